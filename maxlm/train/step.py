"""One step of training, and one of evaluation: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from maxlm.models.params import Params, bind
from maxlm.train.metrics import tree_norms
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
) -> tuple[TrainState, Sums]:
    """Gradients over micro-batches, one optimizer update.

    Args:
        batch: arrays [A, B / A, ...]: A micro-batches, accumulated one after the other. Their
            losses are summed and divided by the tokens of the whole batch, so that A changes
            memory and nothing else.
        model: the module whose parameters ``state.params`` holds.
        schedule: the optimizer's, to be reported.

    Returns:
        The next state, and fp32 scalars: ``loss`` and the objective's other sums per counted
        token, ``batch_tokens`` (how many were counted), ``learning_rate``, and the global norms
        of gradients (before clipping), parameters and updates.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def summed(params: Params, micro: Batch, index: jax.Array):
        return loss(bind(model, params), micro, jax.random.fold_in(key, index))

    (total, sums), grads = _accumulate(summed, state.params, batch)
    tokens = jnp.maximum(sums["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    ema: Any = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - (ema_decay or 0.0))
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    metrics = {"loss": total / tokens, **means, "batch_tokens": sums["tokens"]}
    metrics |= {"learning_rate": schedule(state.step), **tree_norms(grads, params, updates)}
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def _accumulate(summed, params: Params, batch: Batch):
    """((loss, sums), gradients), each summed over the leading axis of ``batch``."""
    value_and_grad = jax.value_and_grad(summed, has_aux=True)
    count = batch["tokens"].shape[0]
    first = jax.tree.map(lambda a: a[0], batch), jnp.int32(0)
    if count == 1:
        return value_and_grad(params, *first)

    def body(carry, inputs):
        return jax.tree.map(jnp.add, carry, value_and_grad(params, *inputs)), None

    scalars, _ = jax.eval_shape(value_and_grad, params, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), scalars)
    carry = zeros, jax.tree.map(jnp.zeros_like, params)
    return lax.scan(body, carry, (batch, jnp.arange(count)))[0]


def eval_step(params: Params, batch: Batch, *, model: Any, loss: Loss) -> Sums:
    """The objective's sums over one batch [B, ...], without gradients."""
    return loss(bind(model, params), batch, jax.random.key(0))[1]
