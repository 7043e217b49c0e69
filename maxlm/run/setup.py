"""Sets up the objects of a run, from its RunConfig, and its batches on its mesh."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.checkpoint.skips import Skips, contiguous_ranges
from maxlm.data.batch_source import Batch, BatchArraySpec, BatchSource
from maxlm.data.loader.batches import load_batches
from maxlm.models.architectures import Model
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.models.params import Params, init_params
from maxlm.optim.optimizer import make_optimizer, opt_state_specs, shard_optimizer
from maxlm.optim.schedule import make_schedule
from maxlm.optim.state import (
    TrainState,
    get_eval_params,
    param_shardings,
    select_trainable,
)
from maxlm.optim.step import Metrics, evaluate_step, train_step
from maxlm.parallel.context import sequence_order_indices
from maxlm.run.config import (
    RunConfig,
    check_quantized_is_adapted,
    list_base_models,
    resolve_micro_batches,
)
from maxlm.run.global_batch import (
    batch_sharding,
    get_local_row_indices,
    make_global_batch,
)
from maxlm.run.model_placement import PlacedModel
from maxlm.run.placement import place_frozen_models, place_run
from maxlm.sharding import AxisRules, bind_mesh, jit_sharded, make_mesh
from maxlm.tasks.task import DeviceBatch


def use_compilation_cache(config: RunConfig) -> None:
    """Let this process find on disk what an earlier one compiled: a setting of JAX's
    own."""
    if config.compilation_cache is not None:
        path = Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(path))


@dataclass(frozen=True)
class RunSetup:
    """A run's mesh, model and optimizer; nothing is allocated yet."""

    config: RunConfig
    mesh: Mesh
    placed: PlacedModel
    model: Model
    specs: Params
    schedule: optax.Schedule
    trainable: Params
    """The declarations of the parameters that are trained."""
    optimizer: optax.GradientTransformation
    frozen_sources: Mapping[str, str | None]
    """Folders of the task's models that have parameters of their own; see
    ``Task.frozen_models``."""
    task_models: Mapping[str, PlacedModel]
    """The task's models beside the trained one; those that are not in
    ``frozen_sources`` are its base, without the adapter."""

    @cached_property
    def shardings(self) -> TrainState:
        """The sharding of every array of a state, as a TrainState of shardings."""
        mesh = self.mesh
        storage = self.placed.storage
        params = param_shardings(self.specs, storage, mesh)
        moments = opt_state_specs(self.optimizer, self.specs)
        whole = NamedSharding(mesh, PartitionSpec())
        return TrainState(
            step=whole,
            params=params,
            opt_state=param_shardings(moments, self.placed.optimizer, mesh),
            ema=None if self.config.train.ema_decay is None else params,
            frozen={
                name: param_shardings(self.task_models[name].specs, storage, mesh)
                for name in self.frozen_sources
            },
            task=jax.tree.map(
                lambda _: whole, jax.eval_shape(self.config.task.init_state)
            ),
        )

    @property
    def token_order(self) -> np.ndarray | None:
        """The token that stands at each place of a row, where context parallelism wants
        another order than the sequence's own."""
        num_shards = prod(self.mesh.shape[axis] for axis in self.placed.compute.seq)
        if num_shards == 1 or not self.config.parallel.balance_sequence:
            return None
        seq_len = self.config.data.seq_len
        return sequence_order_indices(seq_len, num_shards, balanced=True)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every array of the state."""
        shapes = bind_mesh(self.mesh, jax.eval_shape)(self._init, jax.random.key(0))
        frozen = {name: self.task_models[name].specs for name in self.frozen_sources}
        shapes = replace(shapes, frozen=frozen)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.shardings,
        )

    def init_train_state(self) -> TrainState:
        """A fresh state without frozen models, every array created in its own
        sharding."""
        shardings = replace(self.shardings, frozen={})
        init = bind_mesh(self.mesh, jit_sharded(self._init, shardings))
        return init(jax.random.key(self.config.seed))

    def place_to_generate(self) -> tuple[Model, Params]:
        """Lays the model out to generate text; returns it, and its parameters'
        shardings."""
        placed = place_run(
            self.config, dict(self.mesh.shape), self.model.dtype, for_training=False
        )
        return placed.model, param_shardings(placed.specs, placed.storage, self.mesh)

    def jit_train_step(
        self,
    ) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
        """The training step, compiled at its first call; it donates the state it is
        given."""
        # None: gradients lie as their parameters are stored.
        layouts = None
        rules = self.placed.gradients
        if rules != self.placed.storage:
            layouts = jax.tree.map(lambda spec: rules.spec(*spec.axes), self.trainable)
        step = partial(
            train_step,
            model=self.model,
            task=self.config.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            seed=self.config.seed,
            ema_decay=self.config.train.ema_decay,
            gradient_layouts=layouts,
            trainable=self.trainable,
            frozen_models=self.frozen_modules,
        )
        return bind_mesh(self.mesh, jax.jit(step, donate_argnums=0))

    def jit_eval_step(
        self,
    ) -> Callable[[TrainState, DeviceBatch], Metrics]:
        """The evaluation step ``(state, batch) -> sums``, compiled at its first call;
        the state's moving average is evaluated where there is one."""
        step = partial(
            evaluate_step,
            model=self.model,
            task=self.config.task,
            frozen_models=self.frozen_modules,
        )
        evaluate = bind_mesh(self.mesh, jax.jit(step))

        def evaluate_state(state: TrainState, batch: DeviceBatch) -> Metrics:
            params = get_eval_params(state)
            return evaluate(params, state.frozen, batch, task_state=state.task)

        return evaluate_state

    def _init(self, key: jax.Array) -> TrainState:
        params = init_params(self.specs, key)
        ema = None
        if self.config.train.ema_decay is not None:
            ema = jax.tree.map(jnp.copy, params)
        step = jnp.zeros((), jnp.int32)
        opt_state = self.optimizer.init(params)
        task_state = self.config.task.init_state()
        return TrainState(step, params, opt_state, ema, task=task_state)

    @property
    def frozen_modules(self) -> dict[str, Model]:
        """The task's models beside the trained one, not bound to parameters."""
        return {name: placed.model for name, placed in self.task_models.items()}


def set_up_run(
    config: RunConfig,
    devices: Sequence[Any] | None = None,
    *,
    for_training: bool = True,
    frozen_sources: Mapping[str, str | None] | None = None,
) -> RunSetup:
    """Builds the mesh, rules, model and optimizer for the devices at hand (default:
    all); what does not fit raises a MaxlmError. ``for_training``: the batch must divide
    over the mesh; ``frozen_sources``: default, those of the task."""
    mesh = make_mesh(config.mesh, devices)
    if for_training:
        config = resolve_micro_batches(config, dict(mesh.shape))
    dtype = resolve_compute_dtype(config.compute_dtype, mesh.devices.flat[0].platform)
    placed = place_run(config, dict(mesh.shape), dtype, for_training=for_training)
    schedule = make_schedule(config.schedule, config.train.steps)
    if for_training:
        check_quantized_is_adapted(config)
    trainable = select_trainable(placed.specs, config.train.trainable)
    optimizer = make_optimizer(config.optimizer, schedule, trainable)
    if not for_training:
        sources = {}
    elif frozen_sources is None:
        sources = config.task.frozen_models()
    else:
        sources = frozen_sources
    # Models that share the trained one's base have no parameters of their own.
    bases = list_base_models(config, sources)
    return RunSetup(
        config=config,
        mesh=mesh,
        placed=placed,
        model=placed.model,
        specs=placed.specs,
        schedule=schedule,
        trainable=trainable,
        optimizer=shard_optimizer(
            optimizer, trainable, placed.optimizer, placed.storage
        ),
        frozen_sources={
            name: source_folder
            for name, source_folder in sources.items()
            if name not in bases
        },
        task_models=place_frozen_models(config, sources, dict(mesh.shape), dtype),
    )


def open_training_batches(
    setup: RunSetup,
    source: BatchSource,
    start: int,
    skips: Skips = (),
    is_stop_requested: Callable[[], bool] = lambda: False,
) -> closing[Generator[DeviceBatch]]:
    """Arrays [micro-batches, rows, ...] from step ``start`` to the last, but for
    ``skips``. ``is_stop_requested``: see `Prefetcher`."""
    data = setup.config.data

    def put_batches() -> Generator[DeviceBatch]:
        for first, count in contiguous_ranges(start, setup.config.train.steps, skips):
            yield from _put_batches(
                setup,
                source,
                start_step=first,
                num_steps=count,
                workers=data.workers,
                prefetch=data.prefetch,
                is_stop_requested=is_stop_requested,
            )

    return closing(put_batches())


def open_evaluation_batches(
    setup: RunSetup, source: BatchSource, max_batches: int | None = None
) -> closing[Generator[DeviceBatch]]:
    """Arrays [micro-batches, rows, ...] of a finite source, in order."""
    steps = min(n for n in (source.num_steps, max_batches) if n is not None)
    return closing(_put_batches(setup, source, num_steps=steps))


def _put_batches(
    setup: RunSetup,
    source: BatchSource,
    *,
    start_step: int = 0,
    num_steps: int,
    workers: int = 0,
    prefetch: int = 4,
    is_stop_requested: Callable[[], bool] = lambda: False,
) -> Generator[DeviceBatch]:
    """Yields a source's batches on the mesh, of which this process loads the rows of
    its devices."""
    placement = BatchPlacement.of_run(setup)
    with load_batches(
        source,
        placement.local_rows,
        start_step=start_step,
        num_steps=num_steps,
        workers=workers,
        prefetch=prefetch,
        is_stop_requested=is_stop_requested,
    ) as loader:
        for batch in loader:
            yield placement.put(batch)


@dataclass(frozen=True)
class BatchPlacement:
    """How a batch lies on a run's mesh: arrays [micro-batches, rows, ...]."""

    lead_shape: tuple[int, int]
    """Micro-batches, and rows of each."""
    arrays: Mapping[str, BatchArraySpec]
    rules: AxisRules
    mesh: Mesh
    token_order: np.ndarray | None
    """See :attr:`RunSetup.token_order`."""

    @classmethod
    def of_run(cls, setup: RunSetup, num_batches: int = 1) -> "BatchPlacement":
        """Returns the placement of a step's batch, or of ``num_batches`` of them
        together, each of whose micro-batches stand behind those of the one before."""
        config = setup.config
        micro_batches = config.train.micro_batches
        return cls(
            lead_shape=(
                num_batches * micro_batches,
                config.data.batch_size // micro_batches,
            ),
            arrays=config.batch_arrays,
            rules=setup.placed.compute,
            mesh=setup.mesh,
            token_order=setup.token_order,
        )

    @cached_property
    def local_rows(self) -> list[int]:
        """Global rows that this process's devices hold, ascending."""
        row_sharding = batch_sharding(self.rules, self.mesh, axes=())
        return get_local_row_indices(row_sharding, self.lead_shape)

    def put(self, batch: Batch) -> DeviceBatch:
        """Puts this process's rows of a batch on its devices.

        Args:
            batch: arrays [local rows, ...].
        """
        return make_global_batch(
            batch,
            self.arrays,
            self.local_rows,
            self.rules,
            self.mesh,
            self.lead_shape,
            self.token_order,
        )
