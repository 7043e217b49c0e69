"""Cross-entropy of a linear head in a form that any XLA backend compiles.

Tokens are taken a chunk at a time, and the gradient in the same pass: three matrix products in all,
and [chunk, V] logits, which are read and written several times, in memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_cross_entropy.parts import (
    CrossEntropyGradients,
    Loss,
    apply_soft_cap,
    soft_cap_gradient,
    sum_losses,
)


def loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None,
    axes: tuple[str, ...],
    gradient: bool,
    z_loss: float,
    soft_cap: float | None,
    chunk: int,
) -> Loss:
    """See :func:`pallas_kernels.linear_cross_entropy.loss_and_gradients`; targets are counted from
    the share's first entry. Gradients of head and bias are summed over chunks in fp32."""
    options = {"axes": axes, "z_loss": z_loss, "soft_cap": soft_cap, "gradient": gradient}
    step = partial(_chunk, head=head, bias=bias, **options)
    chunks = tuple(_split(a, chunk) for a in (hidden, targets, weights))

    def body(carry, inputs):
        d_rows, own = step(*inputs)
        return jax.tree.map(jnp.add, carry, own), d_rows

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    # None stays None in a tree.
    d_head = zeros(*head.shape) if gradient else None
    d_bias = zeros(*bias.shape) if gradient and bias is not None else None
    (sums, d_head, d_bias), d_rows = lax.scan(body, ((zeros(), zeros()), d_head, d_bias), chunks)
    if d_head is None or d_rows is None:
        return sums, None
    d_hidden = d_rows.reshape(-1, hidden.shape[1])[: len(hidden)]
    return sums, CrossEntropyGradients(d_hidden, d_head.astype(head.dtype), d_bias)


def _chunk(rows, targets, weights, *, head, bias, axes, z_loss, soft_cap, gradient):
    """One chunk of tokens, rows [c, D], against this device's share of the head [D, v].

    Returns:
        The gradient of the rows, and what is summed over chunks: the sums, and the gradients of
        head and bias.
    """
    logits = jnp.dot(rows, head, preferred_element_type=jnp.float32)
    logits = apply_soft_cap(logits if bias is None else logits + bias, soft_cap)
    top = jnp.max(logits, axis=-1)
    top = lax.pmax(top, axes) if axes else top
    exp = jnp.exp(logits - top[:, None])
    size = logits.shape[1]
    found = jnp.take_along_axis(logits, jnp.clip(targets, 0, size - 1)[:, None], axis=-1)[:, 0]
    total = jnp.sum(exp, axis=-1), jnp.where((targets >= 0) & (targets < size), found, 0.0)
    total, target = lax.psum(total, axes) if axes else total
    sums, d_logsumexp = sum_losses(top + jnp.log(total), target, weights, z_loss)
    if not gradient:
        return None, (sums, None, None)
    onehot = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    d_logits = exp * (d_logsumexp / total)[:, None] - jnp.where(onehot, weights[:, None], 0.0)
    d_logits *= soft_cap_gradient(logits, soft_cap)
    d_bias = None if bias is None else jnp.sum(d_logits, axis=0)
    d_logits = d_logits.astype(rows.dtype)
    d_rows = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32)
    d_head = jnp.dot(rows.T, d_logits, preferred_element_type=jnp.float32)
    return d_rows.astype(rows.dtype), (sums, d_head, d_bias)


def _split(a: jax.Array, chunk: int) -> jax.Array:
    """[T, ...] → [chunks, c, ...] with equal c ≤ chunk; the few rows added are zeros (weight 0)."""
    count = -(-len(a) // chunk)
    size = -(-len(a) // count)
    padding = ((0, count * size - len(a)), *((0, 0),) * (a.ndim - 1))
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])
