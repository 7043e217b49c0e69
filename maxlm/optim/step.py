"""One step of training, and one of evaluation: pure functions of state and batch. A
batch's micro-batches are taken one after the other, or through a pipeline."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import reshard

from maxlm.models.architectures import Model
from maxlm.models.architectures.transformer import LayersFunction
from maxlm.models.aux import Aux
from maxlm.models.params import (
    GatheredParam,
    Params,
    bind,
    drop_auxiliary,
    fold_in_name,
    param_specs,
    seed_dropout,
    select_base_params,
)
from maxlm.optim.state import TrainState, merge_params, split_params
from maxlm.parallel.layers import PyTree
from maxlm.parallel.pipeline import run_1f1b_pipeline
from maxlm.tasks.task import (
    Average,
    DeviceBatch,
    Task,
    TaskModels,
    map_micro_batches,
)

Metrics = dict[str, jax.Array]
"""fp32 scalars by name."""
Sums = Mapping[str, jax.Array | Average]
"""fp32 scalars by name, summed over what a task counts."""
COUNT_PREFIX = "count_of_"
"""Of the name of an :class:`Average`'s denominator, among sums of scalars."""
Gradients = tuple[tuple[jax.Array, Sums], Params]
"""((loss, sums), gradients), as ``jax.value_and_grad`` returns them."""
LossFunction = Callable[[nnx.Module, DeviceBatch, jax.Array], tuple[jax.Array, Sums]]
"""(bound model, batch, key) -> (loss summed over tokens, sums)."""
_Updated = tuple[Params, optax.OptState, Params | None, jax.Array]
"""What an update changes: the trained parameters, the optimizer's state, their moving
average, and the norm of the update."""


def train_step(
    state: TrainState,
    batch: DeviceBatch,
    *,
    model: nnx.Module,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    ema_decay: float | None = None,
    gradient_layouts: Params | None = None,
    trainable: Params | None = None,
    frozen_models: Mapping[str, nnx.Module] = MappingProxyType({}),
) -> tuple[TrainState, Metrics]:
    """Computes gradients over micro-batches, and applies one optimizer update.

    Args:
        batch: arrays [A, B / A, ...]: A micro-batches, accumulated one after the other
            or run through a pipeline. Their losses are summed and divided by the tokens
            of the whole batch, so that A changes memory and nothing else (but for the
            balance of experts, which is measured over a micro-batch).
        model, frozen_models: the modules whose parameters the state holds; a frozen
            model that is not in ``state.frozen`` is ``model`` without its adapter, and
            has its base's.
        schedule: the optimizer's, to be reported.
        gradient_layouts: see ``compute_loss_and_gradients``.
        trainable: the declarations of the parameters that are trained; default: all.

    Returns:
        The next state, and fp32 scalars: ``loss`` and the task's other sums per counted
        token, ``batch_tokens`` (how many were counted), ``learning_rate``, the global
        norms of gradients (before clipping), parameters and updates, and ``skipped``: 1
        where the loss or a gradient was not finite, so that parameters and optimizer
        stayed what they were.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    trainable = param_specs(model) if trainable is None else trainable
    trained, untrained = split_params(state.params, trainable)
    frozen = bind_frozen(frozen_models, state.frozen, state.params)
    models = TaskModels(bind(model, state.params), frozen, state.task)
    batch = task.prepare_batch(models, batch, fold_in_name(key, "prepare_batch"))

    def model_loss(
        bound_model: nnx.Module, batch: DeviceBatch, key: jax.Array
    ) -> tuple[jax.Array, Sums]:
        return task.loss(TaskModels(bound_model, frozen, state.task), batch, key)

    # Gradients of the summed loss, then of its mean over the batch's tokens.
    (total, sums), grads = compute_loss_and_gradients(
        model, model_loss, trained, batch, key, gradient_layouts, untrained
    )
    counted = _get_tokens(sums)
    tokens = jnp.maximum(counted, 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    grad_norm = optax.tree.norm(_select_learned(trainable, grads))
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

    def update(_: jax.Array, before: _Updated) -> _Updated:
        trained, opt_state, ema, _ = jax.tree.map(_keep_layout, before)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        if ema is not None:
            ema = optax.incremental_update(trained, ema, 1.0 - (ema_decay or 0.0))
        update_norm = optax.tree.norm(_select_learned(trainable, updates))
        return jax.tree.map(_keep_layout, (trained, opt_state, ema, update_norm))

    # The update. A loop of one turn, or of none where the numbers are bad: its state is
    # updated in place, where choosing between new and old arrays, or branches, would
    # hold both.
    ema = None
    untrained_ema = None
    if state.ema is not None:
        ema, untrained_ema = split_params(state.ema, trainable)
    before = trained, state.opt_state, ema, jnp.zeros_like(grad_norm)
    trained, opt_state, ema, update_norm = lax.fori_loop(
        0, finite.astype(int), update, before
    )

    metrics: Metrics = {
        "loss": total / tokens,
        **convert_sums_to_metrics(sums),
        "batch_tokens": counted,
        # A float where the rate is constant; jit makes it an array.
        "learning_rate": cast(jax.Array, schedule(state.step)),
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(_select_learned(trainable, trained)),
        "update_norm": update_norm,
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    opt_state = jax.tree.map(_advance_count, opt_state, state.opt_state)
    params = merge_params(trained, untrained)
    if ema is not None and untrained_ema is not None:
        ema = merge_params(ema, untrained_ema)
    # Where the update was left out, what the task learnt of the step is none either.
    task_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        task.update_state(state.task, metrics),
        state.task,
    )
    next_state = TrainState(
        state.step + 1, params, opt_state, ema, state.frozen, task_state
    )
    return next_state, metrics


def _get_tokens(sums: Mapping[str, jax.Array | Average]) -> jax.Array:
    """Returns the weight that a loss is divided by."""
    tokens = sums["tokens"]
    assert not isinstance(tokens, Average), "tokens is a sum, and no average"
    return tokens


def _keep_layout(array: jax.Array) -> jax.Array:
    """Keeps an array in the layout of its type: the compiler might choose another for a
    loop's state, and come back from it by gathering what it split."""
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty else reshard(array, jax.typeof(array).sharding)


def _advance_count(new: jax.Array, old: jax.Array) -> jax.Array:
    """Lets counts, and with them the schedule, go on where an update was left out."""
    is_count = new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer)
    return old + 1 if is_count else new


def _select_learned(specs: Params, tree: optax.Updates) -> optax.Updates:
    """Leaves out parameters that follow a rule: their "gradient" is none."""
    return jax.tree.map(lambda spec, x: None if spec.sign_update else x, specs, tree)


def bind_frozen(
    models: Mapping[str, nnx.Module], frozen: Mapping[str, Params], params: Params
) -> dict[str, nnx.Module]:
    """Binds frozen models to their own parameters, or to the base of the adapted
    ``params``, to which no gradient goes."""
    params = drop_auxiliary(params)
    base = jax.tree.map(lax.stop_gradient, select_base_params(params))
    # Without an adapter, the base would be the trained model itself.
    is_adapted = jax.tree.structure(base) != jax.tree.structure(params)
    assert is_adapted or frozen.keys() >= models.keys(), (
        "a frozen model has no parameters"
    )
    return {name: bind(model, frozen.get(name, base)) for name, model in models.items()}


def evaluate_step(
    params: Params,
    frozen: Mapping[str, Params],
    batch: DeviceBatch,
    *,
    model: nnx.Module,
    task: Task,
    frozen_models: Mapping[str, nnx.Module] = MappingProxyType({}),
    task_state: Mapping[str, jax.Array] = MappingProxyType({}),
) -> Metrics:
    """Evaluates the task's sums and ``loss`` over arrays [M, B, ...], without
    gradients. An :class:`Average` becomes two sums: its total, and its count under its
    name behind ``COUNT_PREFIX``."""
    bound_frozen = bind_frozen(frozen_models, frozen, params)
    models = TaskModels(bind(model, params), bound_frozen, task_state)
    # Nothing random happens without gradients: the key has no effect.
    key = jax.random.key(0)
    batch = task.prepare_batch(models, batch, key)

    def compute_sums(_: nnx.Module, micro_batch: DeviceBatch) -> Metrics:
        total, sums = task.loss(models, micro_batch, key)
        scalars = {"loss": total}
        for name, value in sums.items():
            if isinstance(value, Average):
                scalars[name] = value.total
                scalars[f"{COUNT_PREFIX}{name}"] = value.count
            else:
                scalars[name] = value
        return scalars

    sums_by_micro_batch = map_micro_batches(compute_sums, model, batch)
    return jax.tree.map(jnp.sum, sums_by_micro_batch)


def compute_loss_and_gradients(
    model: nnx.Module,
    loss: LossFunction,
    params: Params,
    batch: DeviceBatch,
    key: jax.Array,
    layouts: Params | None = None,
    untrained: Params | None = None,
) -> Gradients:
    """Returns ((loss, sums), gradients of ``params``), all summed over the batch.

    Args:
        model: the module whose parameters ``params`` and ``untrained`` hold together.
        batch: arrays [M, B, ...], M micro-batches.
        layouts: each gradient's partition, where it is finer than its parameter's
            (ZeRO-2); gradients are reduced straight to it.
        untrained: the parameters that get no gradients.
    """
    # `params` are differentiated: under ZeRO-2 each device's share. `whole` are the
    # same in the layout they are stored in, and `rest` those without a gradient.
    trained = params
    whole = params
    rest: Params
    if untrained is None:
        rest = jax.tree.map(lambda _: None, params)
    else:
        rest = untrained
    if layouts is not None:
        params = jax.tree.map(reshard, params, layouts)
    schedule = getattr(model, "pipeline_schedule", None)
    # The 1F1B program differentiates all parameters of a stage.
    if schedule == "1f1b" and jax.tree.leaves(rest):
        params = merge_params(params, rest)
        whole = merge_params(whole, rest)
        rest = jax.tree.map(lambda _: None, params)

    def add_dropout_seeds(params: Params, key: jax.Array) -> Params:
        return seed_dropout(params, param_specs(model), fold_in_name(key, "dropout"))

    def bind_params(params: Params, key: jax.Array | None = None) -> nnx.Module:
        if layouts is not None:
            # Whole parameters are read, and this device's share is differentiated.
            params = jax.tree.map(GatheredParam, params, whole)
        params = merge_params(params, rest)
        if key is not None:
            params = add_dropout_seeds(params, key)
        return bind(model, params)

    if schedule == "1f1b":
        # Once for the whole batch: stages then seed each micro-batch by its number
        # (`seed_micro_batch`).
        params = add_dropout_seeds(params, key)
        whole = add_dropout_seeds(whole, key)
        pipelined_model = cast(Model, model)
        result, gradients = _run_1f1b(
            pipelined_model, bind_params, loss, params, batch, key
        )
        trained_gradients, _ = split_params(gradients, trained)
        return result, trained_gradients

    def compute_loss(
        params: Params, batch: DeviceBatch, index: jax.typing.ArrayLike
    ) -> tuple[jax.Array, Sums]:
        micro_key = jax.random.fold_in(key, index)
        return loss(bind_params(params, micro_key), batch, micro_key)

    value_and_grad = jax.value_and_grad(compute_loss, has_aux=True)
    if schedule is not None:
        return value_and_grad(params, batch, 0)
    return _accumulate(value_and_grad, params, batch)


def _accumulate(
    value_and_grad: Callable[..., Gradients], params: Params, batch: DeviceBatch
) -> Gradients:
    """Adds up losses, sums and gradients over micro-batches, one after the other."""
    num_micro_batches = jax.tree.leaves(batch)[0].shape[0]
    first_micro_batch = jax.tree.map(lambda a: a[0], batch)
    first_index = jnp.int32(0)
    if num_micro_batches == 1:
        return value_and_grad(params, first_micro_batch, first_index)

    def add_micro_batch(
        totals: Gradients, batch_and_index: tuple[DeviceBatch, jax.Array]
    ) -> tuple[Gradients, None]:
        terms = value_and_grad(params, *batch_and_index)
        return jax.tree.map(jnp.add, totals, terms), None

    # Which sums there are, the task's loss alone knows.
    scalars, _ = jax.eval_shape(value_and_grad, params, first_micro_batch, first_index)
    zero_scalars = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), scalars)
    zero_gradients = jax.tree.map(jnp.zeros_like, params)
    totals, _ = lax.scan(
        add_micro_batch,
        (zero_scalars, zero_gradients),
        (batch, jnp.arange(num_micro_batches)),
    )
    return totals


def _run_1f1b(
    model: Model,
    bind_params: Callable[[Params], nnx.Module],
    loss: LossFunction,
    params: Params,
    batch: DeviceBatch,
    key: jax.Array,
) -> Gradients:
    """The loss is run twice for each micro-batch, with the layers taken out of the
    model: up to them on the first stage, from them on the last."""
    numbers = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    batch = batch | {
        "key": jax.random.key_data(keys),
        "number": numbers.astype(jnp.uint32),
    }
    ends = {name: value for name, value in params.items() if name != "layers"}

    def run_loss(
        ends: Params, micro_batch: DeviceBatch, layers_fn: LayersFunction
    ) -> tuple[jax.Array, Sums]:
        bound_model = cast(Model, bind_params(ends | {"layers": params["layers"]}))
        bound_model.layers_fn = layers_fn
        arrays = {
            name: array
            for name, array in micro_batch.items()
            if name not in ("key", "number")
        }
        key = jax.random.wrap_key_data(micro_batch["key"])
        return loss(bound_model, arrays, key)

    def run_first_stage(
        ends: Params, micro_batch: DeviceBatch
    ) -> tuple[jax.Array, PyTree]:
        layer_inputs = []

        # Runs in place of the layers; what the loss computes after it is not used.
        def catch_inputs(x: jax.Array, inputs: PyTree) -> tuple[jax.Array, Aux]:
            layer_inputs.append((x, (inputs, micro_batch["number"])))
            return x, Aux()

        run_loss(ends, micro_batch, catch_inputs)
        return layer_inputs[0]

    def run_last_stage(
        ends: Params, y: jax.Array, micro_batch: DeviceBatch
    ) -> tuple[jax.Array, Sums]:
        return run_loss(ends, micro_batch, lambda x, inputs: (y, Aux()))

    def make_sums_cotangent(aux: Aux) -> Aux:
        # The loss of layers is differentiated, what they log is not.
        loss_cotangent = jax.tree.map(jnp.ones_like, aux.loss)
        return Aux(loss_cotangent, jax.tree.map(jnp.zeros_like, aux.sums))

    (total, sums, aux), (d_ends, d_layers) = run_1f1b_pipeline(
        run_first_stage,
        model.run_stage,
        run_last_stage,
        ends,
        params["layers"],
        batch,
        sums_cotangent=make_sums_cotangent,
    )
    all_sums: Sums = {**sums, **aux.sums}
    return (total + aux.loss, all_sums), d_ends | {"layers": d_layers}


def convert_sums_to_metrics(sums: Mapping[str, jax.Array | Average]) -> Metrics:
    """Divides a task's sums by ``tokens``, as they are logged; averages by their own
    counts, and experts' by their load: the busiest's and the idlest's over the mean,
    and the share of assignments dropped."""
    tokens = jnp.maximum(_get_tokens(sums), 1.0)
    load = sums.get("expert_load", tokens)
    assert not isinstance(load, Average)
    load = jnp.maximum(load, 1.0)
    metrics: Metrics = {}
    for name, value in sums.items():
        if name in ("tokens", "expert_load"):
            continue
        if isinstance(value, Average):
            metrics[name] = value.total / jnp.maximum(value.count, 1.0)
        elif name.startswith("expert_"):
            metrics[name] = value / load
        else:
            metrics[name] = value / tokens
    return metrics
