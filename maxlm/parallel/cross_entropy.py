"""Cross-entropy over a vocabulary that is never held as [batch, seq, vocab].

The output head, the softmax and the loss are one operation. Tokens are taken a chunk at a time;
where a gradient is wanted it is formed in the same pass, since with one scalar loss the
cotangent of the logits, ``softmax − onehot``, is known as soon as the logits are. Logits are thus
computed once (not twice, as rematerialising them would) and only [chunk, V / tensor] of them
exists at a time. The vocabulary may be split over mesh axes: each device holds its share of the
head, and three numbers a token (max, sum, target logit) cross the wire; then, once, the gradient of
the hidden states.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from maxlm.parallel.local import (
    Dims,
    axis_numbers,
    gather,
    layout,
    on_shards,
    reduce,
    spec_of,
)


def fused_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    used: Dims,
    whole: jax.Array | None = None,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Σ weight · (logsumexp(logits) − logits[target]), with logits = hidden · head in fp32.

    Args:
        hidden: [..., D], compute dtype; tokens split over any mesh axes, D over none.
        head: [D, V], compute dtype, in its storage layout.
        targets: int [...], split as the tokens of ``hidden`` are, save for ``vocab`` axes.
        weights: fp32 [...], likewise; 0 leaves a token out.
        used: the mesh axes of the head's dimensions in use.
        whole: the head in use, where it need not be gathered; gradients go to ``head``.
        z_loss: coefficient of Σ weight · logsumexp², which keeps logits from drifting
            (Chowdhery et al. 2022, §5).
        chunk: tokens whose logits exist at once on a device; larger is a little faster.

    Returns:
        (loss with the z term, cross-entropy without it), fp32 scalars, sums over counted tokens.
        Only the first is differentiable, in ``hidden`` and ``head``.
    """
    return _fused(hidden, head, whole, targets, weights, used, z_loss, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _fused(hidden, head, whole, targets, weights, used, z_loss, chunk):
    sums, _ = _sharded(hidden, head, whole, targets, weights, used, z_loss, chunk, gradient=False)
    return sums


def _forward(hidden, head, whole, targets, weights, used, z_loss, chunk):
    return _sharded(hidden, head, whole, targets, weights, used, z_loss, chunk, gradient=True)


def _backward(used, z_loss, chunk, gradients, cotangents):
    d_hidden, d_head = (g * cotangents[0].astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None, None


_fused.defvjp(_forward, _backward)


def _sharded(hidden, head, whole, targets, weights, used, z_loss, chunk, *, gradient):
    have, stored, vocab = layout(hidden), layout(head), used[1]
    # Devices that share a token's vocabulary all need the token.
    tokens = tuple(tuple(a for a in axes if a not in vocab) for axes in have)
    token_axes = tuple(axis for axes in tokens for axis in axes)
    targets, weights = (reshard(a, spec_of(tokens[:-1])) for a in (targets, weights))

    def local(hidden, head, whole, targets, weights, number):
        hidden = gather(hidden, have, tokens)
        head = gather(head, stored, used) if whole is None else whole
        rows = hidden.reshape(-1, hidden.shape[-1])
        first = number[0] * head.shape[1]
        step = partial(_chunk, head=head, first=first, axes=vocab, z_loss=z_loss)
        chunks = tuple(_split(a, chunk) for a in (rows, targets.ravel(), weights.ravel()))

        def body(carry, inputs):
            sums, d_head = carry
            own, d_rows, d_own = step(*inputs, gradient=gradient)
            d_head = None if d_head is None else d_head + d_own
            return (jax.tree.map(jnp.add, sums, own), d_head), d_rows

        zero = jnp.zeros((), jnp.float32)
        d_head = jnp.zeros(head.shape, jnp.float32) if gradient else None
        (sums, d_head), d_rows = lax.scan(body, ((zero, zero), d_head), chunks)
        sums = tuple(lax.psum(s, token_axes) if token_axes else s for s in sums)
        if d_head is None or d_rows is None:
            return sums, None
        d_head = reduce(d_head.astype(head.dtype), token_axes, used, stored)
        d_hidden = d_rows.reshape(-1, rows.shape[1])[: len(rows)].reshape(hidden.shape)
        # Or the whole head's gradient waits, in fp32, for the layers' backward pass to end.
        d_head, d_hidden = lax.optimization_barrier((d_head, d_hidden))
        return sums, (reduce(d_hidden, vocab, tokens, have), d_head)

    hidden_spec, head_spec, scalar = spec_of(have), spec_of(stored), spec_of(())
    token_spec = spec_of(tokens[:-1])
    return on_shards(
        local,
        (
            hidden_spec,
            head_spec,
            None if whole is None else spec_of(used),
            token_spec,
            token_spec,
            spec_of((vocab,)),
        ),
        ((scalar, scalar), (hidden_spec, head_spec) if gradient else None),
    )(hidden, head, whole, targets, weights, axis_numbers(vocab))


def _chunk(rows, targets, weights, *, head, first, axes, z_loss, gradient):
    """One chunk of tokens, rows [c, D], against this device's share of the head [D, v]."""
    logits = jnp.dot(rows, head, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1)
    top = lax.pmax(top, axes) if axes else top
    exp = jnp.exp(logits - top[:, None])
    own = targets - first  # where this device's share of the vocabulary has the target, if it does
    size = logits.shape[1]
    found = jnp.take_along_axis(logits, jnp.clip(own, 0, size - 1)[:, None], axis=-1)[:, 0]
    sums = jnp.sum(exp, axis=-1), jnp.where((own >= 0) & (own < size), found, 0.0)
    total, target = lax.psum(sums, axes) if axes else sums
    logsumexp = top + jnp.log(total)
    entropy = jnp.sum(weights * (logsumexp - target))
    loss = entropy + z_loss * jnp.sum(weights * jnp.square(logsumexp))
    if not gradient:
        return (loss, entropy), None, None
    scale = weights * (1.0 + 2.0 * z_loss * logsumexp) / total
    onehot = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == own[:, None]
    d_logits = exp * scale[:, None] - jnp.where(onehot, weights[:, None], 0.0)
    d_logits = d_logits.astype(rows.dtype)
    d_rows = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32)
    d_head = jnp.dot(rows.T, d_logits, preferred_element_type=jnp.float32)
    return (loss, entropy), d_rows.astype(rows.dtype), d_head


def _split(a: jax.Array, chunk: int) -> jax.Array:
    """[T, ...] → [chunks, c, ...] with equal c ≤ chunk; the few rows added are zeros (weight 0)."""
    count = -(-len(a) // chunk)
    size = -(-len(a) // count)
    padding = ((0, count * size - len(a)), *((0, 0),) * (a.ndim - 1))
    return jnp.pad(a, padding).reshape(count, size, *a.shape[1:])
