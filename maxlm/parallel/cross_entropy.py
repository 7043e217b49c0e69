"""Cross-entropy over a vocabulary that is never held as [batch, seq, vocab], on a mesh.

The output head, the softmax and the loss are one operation (pallas_kernels/linear_cross_entropy),
and the gradient is formed in the same pass. The vocabulary may be split over mesh axes: each device
holds its share of the head, and three numbers a token (max, sum, target logit) cross the wire;
then, once, the gradient of the hidden states.
"""

from functools import partial

import jax
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
from pallas_kernels.linear_cross_entropy import loss_and_gradients


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
        sums, gradients = loss_and_gradients(
            rows,
            head,
            targets.ravel(),
            weights.ravel(),
            first=number[0] * head.shape[1],
            axes=vocab,
            gradient=gradient,
            z_loss=z_loss,
            chunk=chunk,
            implementation="xla",
        )
        sums = tuple(lax.psum(s, token_axes) if token_axes else s for s in sums)
        if gradients is None:
            return sums, None
        d_head = reduce(gradients[1], token_axes, used, stored)
        d_hidden = gradients[0].reshape(hidden.shape)
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
