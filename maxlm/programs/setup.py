"""Sets up the objects of a run, from its RunConfig, and its batches on its mesh."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.data.batch_source import BatchSource
from maxlm.data.loader import load_batches
from maxlm.models.architectures import Model
from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.models.params import Params
from maxlm.models.placement import PlacedModel
from maxlm.parallel.context import sequence_order_indices
from maxlm.plan.layout import place_frozen_models, place_run
from maxlm.run import RunConfig, list_base_models, resolve_micro_batches
from maxlm.sharding import AxisRules, bind_mesh, jit_sharded, make_mesh
from maxlm.tasks import FrozenModelSource
from maxlm.train.batch import batch_sharding, get_local_row_indices, make_global_batch
from maxlm.train.optimizer import (
    make_optimizer,
    make_schedule,
    opt_state_shardings,
    shard_optimizer,
)
from maxlm.train.skips import Skips, contiguous_ranges
from maxlm.train.state import TrainState, init_state, param_shardings, remove_frozen
from maxlm.train.step import Batch, Loss, Sums, evaluate_step, train_step
from maxlm.train.trainable import select_trainable


def use_compilation_cache(config: RunConfig) -> None:
    """Let this process find on disk what an earlier one compiled: a setting of JAX's own."""
    if config.compilation_cache is not None:
        path = Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(path))


@dataclass(frozen=True)
class RunSetup:
    """A run's mesh, model and optimizer; nothing is allocated yet."""

    config: RunConfig
    mesh: Mesh
    storage: AxisRules
    gradients: AxisRules
    optimizer_rules: AxisRules
    compute: AxisRules
    model: Model
    specs: Params
    schedule: optax.Schedule
    trainable: Params
    """The declarations of the parameters that are trained."""
    optimizer: optax.GradientTransformation
    loss: Loss
    frozen_sources: Mapping[str, FrozenModelSource]
    """Sources of the models that have parameters of their own."""
    frozen_models: Mapping[str, PlacedModel]
    base_models: Mapping[str, Model]
    """Models of the task that are the trained one's base, without its adapter."""

    @cached_property
    def shardings(self) -> TrainState:
        """The sharding of every array of a state, as a TrainState of shardings."""
        mesh, storage, frozen = self.mesh, self.storage, self.frozen_models.items()
        params = param_shardings(self.specs, storage, mesh)
        moments = opt_state_shardings(self.optimizer, self.specs, self.optimizer_rules, mesh)
        return TrainState(
            step=NamedSharding(mesh, PartitionSpec()),
            params=params,
            opt_state=moments,
            ema=params if self._ema else None,
            frozen={name: param_shardings(own.specs, storage, mesh) for name, own in frozen},
        )

    @property
    def token_order(self) -> np.ndarray | None:
        """The token that stands at each place of a row, where context parallelism wants another
        order than the sequence's own."""
        ways = prod(self.mesh.shape[axis] for axis in self.compute.seq)
        if ways == 1 or not self.config.parallel.balance_sequence:
            return None
        return sequence_order_indices(self.config.data.seq_len, ways, balanced=True)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every array of the state."""
        shapes = bind_mesh(self.mesh, jax.eval_shape)(self._init, jax.random.key(0))
        frozen = {name: own.specs for name, own in self.frozen_models.items()}
        shapes = replace(shapes, frozen=frozen)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
        )

    def init_train_state(self) -> TrainState:
        """A fresh state without frozen models, every array created in its own sharding."""
        key = jax.random.key(self.config.seed)
        return bind_mesh(self.mesh, jit_sharded(self._init, remove_frozen(self.shardings)))(key)

    def jit_train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
        """The training step, compiled at its first call; it donates the state it is given."""
        layouts = None
        if self.gradients != self.storage:
            layouts = jax.tree.map(lambda spec: self.gradients.spec(*spec.axes), self.trainable)
        step = partial(
            train_step,
            model=self.model,
            loss=self.loss,
            optimizer=self.optimizer,
            schedule=self.schedule,
            seed=self.config.seed,
            ema_decay=self.config.train.ema_decay,
            gradient_layouts=layouts,
            trainable=self.trainable,
            frozen_models=self._frozen_modules,
            base_models=self.base_models,
            prepare_batch=self.config.task.prepare_batch,
        )
        return bind_mesh(self.mesh, jax.jit(step, donate_argnums=0))

    def jit_eval_step(self) -> Callable[[Params, Mapping[str, Params], Batch], Sums]:
        """The evaluation step ``(params, frozen models' params, batch) -> sums``, compiled at its
        first call."""
        models = {"frozen_models": self._frozen_modules, "base_models": self.base_models}
        own = {"loss": self.loss, "prepare_batch": self.config.task.prepare_batch}
        step = partial(evaluate_step, model=self.model, **own, **models)
        return bind_mesh(self.mesh, jax.jit(step))

    def _init(self, key: jax.Array) -> TrainState:
        return init_state(self.specs, self.optimizer, key, ema=self._ema)

    @property
    def _frozen_modules(self) -> dict[str, Model]:
        return {name: own.model for name, own in self.frozen_models.items()}

    @property
    def _ema(self) -> bool:
        return self.config.train.ema_decay is not None


def set_up_run(
    config: RunConfig,
    devices: Sequence[Any] | None = None,
    *,
    for_training: bool = True,
    frozen_sources: Mapping[str, FrozenModelSource] | None = None,
) -> RunSetup:
    """Builds the mesh, rules, model and optimizer for the devices at hand (default: all); what does
    not fit raises a MaxlmError. ``for_training``: the batch must divide over the mesh;
    ``frozen_sources``: default, those of the task."""
    mesh = make_mesh(config.mesh, devices)
    if for_training:
        config = resolve_micro_batches(config, dict(mesh.shape))
    dtype = resolve_compute_dtype(config.compute_dtype, mesh.devices.flat[0].platform)
    placed = place_run(config, dict(mesh.shape), dtype, for_training=for_training)
    schedule = make_schedule(config.schedule, config.train.steps)
    trainable = select_trainable(placed.specs, config.train.trainable)
    optimizer = make_optimizer(config.optimizer, schedule, trainable)
    sources = config.task.frozen_models() if frozen_sources is None else frozen_sources
    sources = sources if for_training else {}
    others = place_frozen_models(config, sources, dict(mesh.shape), dtype)
    bases = list_base_models(config, sources)
    return RunSetup(
        config=config,
        mesh=mesh,
        storage=placed.storage,
        gradients=placed.gradients,
        optimizer_rules=placed.optimizer,
        compute=placed.compute,
        model=placed.model,
        specs=placed.specs,
        schedule=schedule,
        trainable=trainable,
        optimizer=shard_optimizer(optimizer, trainable, placed.optimizer, placed.storage),
        loss=config.task.loss,
        frozen_sources={name: own for name, own in sources.items() if name not in bases},
        frozen_models={name: own for name, own in others.items() if name not in bases},
        base_models={name: others[name].model for name in bases},
    )


def open_training_batches(
    setup: RunSetup, source: BatchSource, start: int, skips: Skips = ()
) -> closing[Generator[Batch]]:
    """Arrays [micro-batches, rows, ...] from step ``start`` to the last, but for ``skips``."""
    data = setup.config.data

    def batches() -> Generator[Batch]:
        for first, count in contiguous_ranges(start, setup.config.train.steps, skips):
            steps = {"start_step": first, "num_steps": count}
            pace = {"workers": data.workers, "prefetch": data.prefetch}
            yield from _put_batches(setup, source, **steps, **pace)

    return closing(batches())


def open_evaluation_batches(
    setup: RunSetup, source: BatchSource, max_batches: int | None = None
) -> closing[Generator[Batch]]:
    """Arrays [micro-batches, rows, ...] of a finite source, in order."""
    steps = min(n for n in (source.num_steps, max_batches) if n is not None)
    return closing(_put_batches(setup, source, num_steps=steps))


def _put_batches(setup: RunSetup, source: BatchSource, **how: int) -> Generator[Batch]:
    config, mesh = setup.config, setup.mesh
    lead = (config.train.micro_batches, config.data.batch_size // config.train.micro_batches)
    arrays = config.task.batch_arrays(config.data.seq_len)
    rows = get_local_row_indices(batch_sharding(setup.compute, mesh, ()), lead)
    where = setup.compute, mesh, lead, setup.token_order
    with load_batches(source, rows, **how) as loader:
        for batch in loader:
            yield make_global_batch(batch, arrays, rows, *where)
