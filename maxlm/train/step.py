"""One step of training, and one of evaluation: pure functions of state and batch."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import reshard

from maxlm.models.params import Params, bind, param_specs
from maxlm.tasks.task import Models
from maxlm.train.gradients import compute_loss_and_gradients
from maxlm.train.state import TrainState
from maxlm.train.trainable import merge_params, split_params

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
Loss = Callable[[Models, Batch, jax.Array], tuple[jax.Array, Sums]]
"""(models, batch, key) -> (loss summed over tokens, sums to log, ``tokens`` among them)."""


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    ema_decay: float | None = None,
    gradient_layouts: Params | None = None,
    trainable: Params | None = None,
    frozen_models: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[TrainState, Sums]:
    """Gradients over micro-batches, one optimizer update.

    Args:
        batch: arrays [A, B / A, ...]: A micro-batches, accumulated one after the other or run
            through a pipeline. Their losses are summed and divided by the tokens of the whole
            batch, so that A changes memory and nothing else (but for the balance of experts,
            which is measured over a micro-batch).
        model, frozen_models: the modules whose parameters the state holds.
        schedule: the optimizer's, to be reported.
        gradient_layouts: see ``compute_loss_and_gradients``.
        trainable: the declarations of the parameters that are trained; default: all.

    Returns:
        The next state, and fp32 scalars: ``loss`` and the task's other sums per counted
        token, ``batch_tokens`` (how many were counted), ``learning_rate``, the global norms of
        gradients (before clipping), parameters and updates, and ``skipped``: 1 where the loss or
        a gradient was not finite, so that parameters and optimizer stayed what they were.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    trainable = param_specs(model) if trainable is None else trainable
    trained, untrained = split_params(state.params, trainable)
    frozen = {name: bind(own, state.frozen[name]) for name, own in frozen_models.items()}

    def model_loss(bound: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        return loss(Models(bound, frozen), batch, key)

    (total, sums), grads = compute_loss_and_gradients(
        model, model_loss, trained, batch, key, gradient_layouts, untrained
    )
    tokens = jnp.maximum(sums["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    grad_norm = global_norm(_learned(trainable, grads))
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

    def update(_: Any, before: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
        trained, opt_state, ema, _ = jax.tree.map(_held, before)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        if ema is not None:
            ema = optax.incremental_update(trained, ema, 1.0 - (ema_decay or 0.0))
        norm = global_norm(_learned(trainable, updates))
        return jax.tree.map(_held, (trained, opt_state, ema, norm))

    # A loop of one turn, or of none where the numbers are bad: its state is updated in place, where
    # choosing between new and old arrays, or branches, would hold both.
    ema, ema_rest = (None, None) if state.ema is None else split_params(state.ema, trainable)
    before = trained, state.opt_state, ema, jnp.zeros_like(grad_norm)
    trained, opt_state, ema, update_norm = lax.fori_loop(0, finite.astype(int), update, before)
    rate: Any = schedule(state.step)
    metrics: Sums = {
        "loss": total / tokens,
        **divide_by_tokens(sums),
        "batch_tokens": sums["tokens"],
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "param_norm": global_norm(_learned(trainable, trained)),
        "update_norm": update_norm,
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    opt_state = jax.tree.map(_count_on, opt_state, state.opt_state)
    params = merge_params(trained, untrained)
    ema = None if ema is None or ema_rest is None else merge_params(ema, ema_rest)
    return TrainState(state.step + 1, params, opt_state, ema, state.frozen), metrics


def _held(array: jax.Array) -> jax.Array:
    """In the layout of its type: of a loop's state the compiler might choose another, and come back
    from it by gathering what it split."""
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty else reshard(array, jax.typeof(array).sharding)


def _count_on(new: jax.Array, old: jax.Array) -> jax.Array:
    """Counts, and with them the schedule, go on where an update was left out."""
    return old + 1 if new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer) else new


def _learned(specs: Params, tree: Any) -> Any:
    """Without parameters that follow a rule: their "gradient" is none."""
    return jax.tree.map(lambda spec, x: None if spec.sign_update else x, specs, tree)


def evaluate_step(
    params: Params,
    frozen: Mapping[str, Params],
    batch: Batch,
    *,
    model: Any,
    loss: Loss,
    frozen_models: Mapping[str, Any] = MappingProxyType({}),
) -> Sums:
    """The task's sums over a batch of arrays [M, B, ...], and its ``loss``, without gradients."""
    bound = {name: bind(own, frozen[name]) for name, own in frozen_models.items()}
    models, key = Models(bind(model, params), bound), jax.random.key(0)

    def sums_of(batch: Batch) -> Sums:
        total, sums = loss(models, batch, key)
        return {"loss": total, **sums}

    if getattr(model, "schedule", None) is not None:
        return sums_of(batch)

    return jax.tree.map(lambda x: x.sum(0), lax.map(sums_of, batch))


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, summed in fp32; a scalar. 0 of an empty tree."""
    leaves = jax.tree.leaves(tree)
    squares = [jnp.sum(jnp.square(jnp.abs(x.astype(jnp.float32)))) for x in leaves]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def divide_by_tokens(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A task's sums as they are logged: divided by ``tokens``; of experts, the busiest's and
    the idlest's load over the mean, and the share of assignments dropped."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    own = {k: v for k, v in sums.items() if k not in ("tokens", "expert_load")}
    loads = jnp.maximum(sums.get("expert_load", tokens), 1.0)
    return {k: v / (loads if k.startswith("expert_") else tokens) for k, v in own.items()}
