"""Cross-entropy of a linear head in a form that any XLA backend compiles.

Tokens are taken a chunk at a time, and the gradient in the same pass: three matrix products in all,
and [chunk, V] logits, which are read and written several times, in memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_cross_entropy.parts import (
    Loss,
    cap_slope,
    capped,
    losses,
)


def loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    axes: tuple[str, ...],
    gradient: bool,
    z_loss: float,
    softcap: float | None,
    chunk: int,
) -> Loss:
    """See :func:`pallas_kernels.linear_cross_entropy.loss_and_gradients`; targets are counted from
    the share's first entry. The head's gradient is summed over chunks in fp32."""
    step = partial(_chunk, head=head, axes=axes, z_loss=z_loss, softcap=softcap, gradient=gradient)
    chunks = tuple(_split(a, chunk) for a in (hidden, targets, weights))

    def body(carry, inputs):
        sums, d_head = carry
        own, d_rows, d_own = step(*inputs)
        d_head = None if d_head is None else d_head + d_own
        return (jax.tree.map(jnp.add, sums, own), d_head), d_rows

    zero = jnp.zeros((), jnp.float32)
    d_head = jnp.zeros(head.shape, jnp.float32) if gradient else None
    (sums, d_head), d_rows = lax.scan(body, ((zero, zero), d_head), chunks)
    if d_head is None or d_rows is None:
        return sums, None
    d_hidden = d_rows.reshape(-1, hidden.shape[1])[: len(hidden)]
    return sums, (d_hidden, d_head.astype(head.dtype))


def _chunk(rows, targets, weights, *, head, axes, z_loss, softcap, gradient):
    """One chunk of tokens, rows [c, D], against this device's share of the head [D, v]."""
    logits = jnp.dot(rows, head, preferred_element_type=jnp.float32)
    logits = capped(logits, softcap)
    top = jnp.max(logits, axis=-1)
    top = lax.pmax(top, axes) if axes else top
    exp = jnp.exp(logits - top[:, None])
    size = logits.shape[1]
    found = jnp.take_along_axis(logits, jnp.clip(targets, 0, size - 1)[:, None], axis=-1)[:, 0]
    total = jnp.sum(exp, axis=-1), jnp.where((targets >= 0) & (targets < size), found, 0.0)
    total, target = lax.psum(total, axes) if axes else total
    sums, d_logsumexp = losses(top + jnp.log(total), target, weights, z_loss)
    if not gradient:
        return sums, None, None
    onehot = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    d_logits = exp * (d_logsumexp / total)[:, None] - jnp.where(onehot, weights[:, None], 0.0)
    d_logits = (d_logits * cap_slope(logits, softcap)).astype(rows.dtype)
    d_rows = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32)
    d_head = jnp.dot(rows.T, d_logits, preferred_element_type=jnp.float32)
    return sums, d_rows.astype(rows.dtype), d_head


def _split(a: jax.Array, chunk: int) -> jax.Array:
    """[T, ...] → [chunks, c, ...] with equal c ≤ chunk; the few rows added are zeros (weight 0)."""
    count = -(-len(a) // chunk)
    size = -(-len(a) // count)
    padding = ((0, count * size - len(a)), *((0, 0),) * (a.ndim - 1))
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])
