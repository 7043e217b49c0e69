"""One step of training, and one of evaluation: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import reshard

from maxlm.models.params import Params, bind, param_specs
from maxlm.train.gradients import loss_and_gradients
from maxlm.train.metrics import global_norm, per_token
from maxlm.train.state import TrainState

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Sums]]
"""(bound model, batch, key) -> (loss summed over tokens, sums to log, ``tokens`` among them)."""


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
) -> tuple[TrainState, Sums]:
    """Gradients over micro-batches, one optimizer update.

    Args:
        batch: arrays [A, B / A, ...]: A micro-batches, accumulated one after the other or run
            through a pipeline. Their losses are summed and divided by the tokens of the whole
            batch, so that A changes memory and nothing else (but for the balance of experts,
            which is measured over a micro-batch).
        model: the module whose parameters ``state.params`` holds.
        schedule: the optimizer's, to be reported.
        gradient_layouts: see ``loss_and_gradients``.

    Returns:
        The next state, and fp32 scalars: ``loss`` and the objective's other sums per counted
        token, ``batch_tokens`` (how many were counted), ``learning_rate``, the global norms of
        gradients (before clipping), parameters and updates, and ``skipped``: 1 where the loss or
        a gradient was not finite, so that parameters and optimizer stayed what they were.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    (total, sums), grads = loss_and_gradients(
        model, loss, state.params, batch, key, gradient_layouts
    )
    tokens = jnp.maximum(sums["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    grad_norm = global_norm(_learned(model, grads))
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

    def update(_: Any, before: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
        params, opt_state, ema, _ = jax.tree.map(_held, before)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - (ema_decay or 0.0))
        norm = global_norm(_learned(model, updates))
        return jax.tree.map(_held, (params, opt_state, ema, norm))

    # A loop of one turn, or of none where the numbers are bad: its state is updated in place, where
    # choosing between new and old arrays, or branches, would hold both.
    before = state.params, state.opt_state, state.ema, jnp.zeros_like(grad_norm)
    params, opt_state, ema, update_norm = lax.fori_loop(0, finite.astype(int), update, before)
    rate: Any = schedule(state.step)
    metrics: Sums = {
        "loss": total / tokens,
        **per_token(sums),
        "batch_tokens": sums["tokens"],
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "param_norm": global_norm(_learned(model, params)),
        "update_norm": update_norm,
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    opt_state = _counted(opt_state, state.opt_state)
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def _held(array: jax.Array) -> jax.Array:
    """In the layout of its type: of a loop's state the compiler might choose another, and come back
    from it by gathering what it split."""
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty else reshard(array, jax.typeof(array).sharding)


def _counted(opt_state: Any, before: Any) -> Any:
    """With counts that go on, and with them the schedule, where an update was left out."""

    def count(new: jax.Array, old: jax.Array) -> jax.Array:
        return old + 1 if new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer) else new

    return jax.tree.map(count, opt_state, before)


def _learned(model: Any, tree: Any) -> Any:
    """Without parameters that follow a rule: their "gradient" is none."""
    return jax.tree.map(lambda spec, x: None if spec.sign_update else x, param_specs(model), tree)


def eval_step(params: Params, batch: Batch, *, model: Any, loss: Loss) -> Sums:
    """The objective's sums over a batch of arrays [M, B, ...], without gradients."""
    bound, key = bind(model, params), jax.random.key(0)
    if getattr(model, "schedule", None) is not None:
        return loss(bound, batch, key)[1]

    def body(_, micro):
        return None, loss(bound, micro, key)[1]

    return jax.tree.map(lambda x: x.sum(0), lax.scan(body, None, batch)[1])
