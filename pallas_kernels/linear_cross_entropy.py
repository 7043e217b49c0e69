"""Cross-entropy of a linear head, whose logits [T, V] never exist at once, in plain
XLA.

Tokens are taken a chunk at a time, and the gradient in the same pass: three matrix
products in all, and [chunk, V] logits, which are read and written several times, in
memory.

:func:`linear_cross_entropy` is differentiable. :func:`loss_and_gradients` is one
device's part of it, for a caller that splits the tokens or the vocabulary over devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Sums: TypeAlias = tuple[jax.Array, jax.Array]
"""The loss with the z term and the cross-entropy without it."""
LogitsLoss: TypeAlias = Callable[..., tuple[tuple[jax.Array, ...], jax.Array | None]]
"""(a chunk's logits fp32 [c, V], its inputs) -> (sums, gradient of the first in the
logits)."""


class LinearGradients(NamedTuple):
    """Gradients of the first sum, in the arguments' shapes and dtypes."""

    hidden: jax.Array
    head: jax.Array
    bias: jax.Array | None


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_tokens: int = 1024,
) -> Sums:
    """Computes Σ weight · (logsumexp(logits) − logits[target] + z_loss ·
    logsumexp(logits)²), with logits = cap(hidden · head + bias) in fp32; the z term is
    that of Chowdhery et al. 2022, §5.

    Where a gradient is wanted it is formed in the forward pass, since with one scalar
    loss the cotangent of the logits is known as soon as their sum is.

    Args:
        hidden: [T, D].
        head: [D, V], in hidden's dtype. For a table [V, D] pass its transpose: no copy
            is made.
        targets: int [T]. One outside 0..V-1 counts as a logit of 0: give it weight 0.
        weights: fp32 [T]; 0 leaves a token out.
        bias: fp32 [V] or None.
        soft_cap: logits become cap · tanh(logits / cap), the bias included (Gemma 2,
            Riviere et al. 2024, §2).
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        (loss with the z term, cross-entropy without it), fp32 scalars, sums over
        tokens. Only the first is differentiable, in ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: shapes that do not belong together, soft_cap ≤ 0 or chunk < 1.
    """
    run = partial(
        loss_and_gradients, z_loss=z_loss, soft_cap=soft_cap, chunk_tokens=chunk_tokens
    )
    return _differentiable(hidden, head, bias, targets, weights, run)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _differentiable(hidden, head, bias, targets, weights, run):
    return run(hidden, head, targets, weights, bias=bias, gradient=False)[0]


def _forward(hidden, head, bias, targets, weights, run):
    return run(hidden, head, targets, weights, bias=bias)


def _backward(_, gradients, cotangents):
    scaled = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return *scaled, None, None


_differentiable.defvjp(_forward, _backward)


def loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    vocab_start: jax.Array | int = 0,
    vocab_axes: tuple[str, ...] = (),
    gradient: bool = True,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Sums, LinearGradients | None]:
    """Returns the sums of :func:`linear_cross_entropy` over this device's tokens, and
    their gradients, summed over chunks in fp32; not to be differentiated by JAX.

    Inside ``shard_map``, mesh axes may split the vocabulary: ``head`` [D, V / ways] is
    then this device's share, as is ``bias`` [V / ways], and a few numbers a token cross
    ``vocab_axes``.

    Args: as there; and
        vocab_start: the index in the vocabulary of the share's first entry.
        vocab_axes: the mesh axes that split the vocabulary.

    Returns:
        The two sums, alike along ``vocab_axes``, not yet summed over devices that hold
        other tokens; and the gradients of the first, or None. Along ``vocab_axes`` that
        of hidden is a term of a sum that the caller takes.
    """
    _check(hidden, head, targets, weights, bias, soft_cap, chunk_tokens)
    logits_loss = partial(
        compute_logits_cross_entropy,
        axes=vocab_axes,
        z_loss=z_loss,
        gradient=gradient,
    )
    return sum_over_chunks(
        hidden,
        head,
        (targets - vocab_start, weights),
        logits_loss,
        bias=bias,
        soft_cap=soft_cap,
        gradient=gradient,
        chunk_tokens=chunk_tokens,
    )


def sum_over_chunks(
    hidden: jax.Array,
    head: jax.Array,
    inputs: tuple[jax.Array, ...],
    logits_loss: LogitsLoss,
    *,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    num_sums: int = 2,
    gradient: bool = True,
    chunk_tokens: int = 1024,
) -> tuple[Any, LinearGradients | None]:
    """Sums a loss of logits over tokens, whose logits exist a chunk at a time, and its
    gradients.

    Args: as of :func:`loss_and_gradients`; and
        inputs: arrays [T, ...] of which ``logits_loss`` reads a chunk's part. Zeros
        fill the last. num_sums: the sums that it returns.
    """

    def body(carry, chunk):
        rows, chunk_inputs = chunk
        logits = compute_logits(rows, head, bias, soft_cap)
        sums, d_logits = logits_loss(logits, *chunk_inputs)
        d_rows = None
        d_head = None
        d_bias = None
        if d_logits is not None:
            # logits = cap(rows · head + bias): back through the cap, then the product.
            if soft_cap is None:
                d_logits *= 1.0
            else:
                # Of cap·tanh(x / cap): 1 − tanh².
                d_logits *= 1.0 - jnp.square(logits * (1.0 / soft_cap))
            d_bias = None if bias is None else jnp.sum(d_logits, axis=0)
            d_logits = d_logits.astype(rows.dtype)
            d_rows = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32)
            d_rows = d_rows.astype(rows.dtype)
            d_head = jnp.dot(rows.T, d_logits, preferred_element_type=jnp.float32)
        return jax.tree.map(jnp.add, carry, (sums, d_head, d_bias)), d_rows

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    # None stays None in a tree.
    d_head = zeros(*head.shape) if gradient else None
    d_bias = zeros(*bias.shape) if gradient and bias is not None else None
    arrays = (hidden, inputs)
    chunks = jax.tree.map(lambda x: split_into_chunks(x, chunk_tokens), arrays)
    zero_sums = tuple(zeros() for _ in range(num_sums))
    start = zero_sums, d_head, d_bias
    (sums, d_head, d_bias), d_rows = lax.scan(body, start, chunks)
    if d_head is None or d_rows is None:
        return sums, None
    d_hidden = d_rows.reshape(-1, hidden.shape[1])[: len(hidden)]
    return sums, LinearGradients(d_hidden, d_head.astype(head.dtype), d_bias)


def compute_logits_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    axes: tuple[str, ...] = (),
    z_loss: float = 0.0,
    gradient: bool = True,
) -> tuple[Sums, jax.Array | None]:
    """Returns the sums of :func:`linear_cross_entropy` of logits [c, V], fp32, and the
    first's gradient in them; ``axes`` split the vocabulary."""
    # log Σ exp(logits) = top + log Σ exp(logits − top), in which no term overflows.
    top = jnp.max(logits, axis=-1)
    top = lax.pmax(top, axes) if axes else top
    exp = jnp.exp(logits - top[:, None])
    size = logits.shape[1]
    # A target may be of another device's share of the vocabulary: 0 here.
    index = jnp.clip(targets, 0, size - 1)[:, None]
    target_logit = jnp.take_along_axis(logits, index, axis=-1)[:, 0]
    total = jnp.sum(exp, axis=-1)
    is_here = (targets >= 0) & (targets < size)
    target_logit = jnp.where(is_here, target_logit, 0.0)
    if axes:
        total, target_logit = lax.psum((total, target_logit), axes)
    logsumexp = top + jnp.log(total)

    # Cross-entropy lse − logit, and z_loss · lse²; by the lse: 1 + 2 · z_loss · lse.
    entropy = jnp.sum(weights * (logsumexp - target_logit))
    loss = entropy + z_loss * jnp.sum(weights * jnp.square(logsumexp))
    d_logsumexp = weights * (1.0 + 2.0 * z_loss * logsumexp)
    sums = loss, entropy
    if not gradient:
        return sums, None
    is_target = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    # The logsumexp's gradient is the softmax.
    d_logits = exp * (d_logsumexp / total)[:, None]
    d_logits = d_logits - jnp.where(is_target, weights[:, None], 0.0)
    return sums, d_logits


def compute_logits(
    rows: jax.Array, head: jax.Array, bias: jax.Array | None, soft_cap: float | None
) -> jax.Array:
    """Computes logits of hidden states [..., D], fp32 [..., V]."""
    logits = jnp.dot(rows, head, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits * (1.0 / soft_cap))
    return logits


def split_into_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """Splits [T, ...] → [chunks, c, ...] with equal c ≤ chunk; the few rows added are
    zeros (weight 0)."""
    num_rows, *features = array.shape
    count = -(-num_rows // chunk)
    size = -(-num_rows // count)
    num_added = count * size - num_rows
    padding = ((0, num_added), *((0, 0),) * len(features))
    return jnp.pad(array, padding).reshape(count, size, *features)


def _check(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    soft_cap: float | None,
    chunk: int,
) -> None:
    shapes = f"hidden {hidden.shape}, head {head.shape}"
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(f"hidden is [T, D] and head [D, V]; got {shapes}")
    if 0 in hidden.shape or head.shape[1] == 0:
        raise ValueError(f"no size may be 0; got {shapes}")
    if hidden.dtype != head.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(
            f"hidden, head: want one floating dtype, not {hidden.dtype}, {head.dtype}"
        )
    if not targets.shape == weights.shape == hidden.shape[:1]:
        raise ValueError(
            f"targets {targets.shape}, weights {weights.shape}: want [T], {shapes}"
        )
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is above 0; got {soft_cap}")
    if chunk < 1:
        raise ValueError(f"chunk is at least 1; got {chunk}")
    if bias is not None and (bias.shape != head.shape[1:] or bias.dtype != jnp.float32):
        raise ValueError(f"bias is fp32 [V]; got {bias.dtype} {bias.shape}, {shapes}")
