"""Cross-entropy over a vocabulary that is never held as [batch, seq, vocab], on a mesh.

The output head, the softmax and the loss are one operation
(pallas_kernels.linear_cross_entropy), and the gradient is formed in the same pass. The
vocabulary may be split over mesh axes: each device holds its share of the head, and
three numbers a token (max, sum, target logit) cross the wire; then, once, the gradient
of the hidden states.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from maxlm.parallel.local import (
    Dims,
    axis_indices,
    gather,
    get_layout,
    make_spec,
    map_shards,
    reduce,
)
from pallas_kernels.linear_cross_entropy import (
    LinearGradients,
    compute_logits,
    loss_and_gradients,
)

HeadArrays = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""Hidden states [..., D], head [D, V], bias [V] and the head gathered."""


class LogitsInputs(NamedTuple):
    """Logits are cap·tanh((hidden · head + bias) / cap)."""

    hidden: jax.Array
    """[..., D], compute dtype; tokens split over any mesh axes, D over none."""
    head: jax.Array
    """[D, V], compute dtype, in its storage layout."""
    head_layout: Dims
    """The mesh axes of the head's dimensions in use."""
    gathered_head: jax.Array | None = None
    """The head in use, where it need not be gathered; gradients go to ``head``."""
    bias: jax.Array | None = None
    """fp32 [V] in any layout."""
    soft_cap: float | None = None

    def split(
        self, z_loss: float, chunk_tokens: int
    ) -> tuple[HeadArrays, "HeadOptions"]:
        """Returns the arrays, a bias split over the vocabulary's axes or more of them,
        and the settings of a program on them."""
        bias = self.bias
        vocab = self.head_layout[1]
        if bias is not None and get_layout(bias)[0][: len(vocab)] != vocab:
            bias = reshard(bias, make_spec((vocab,)))
        how = HeadOptions(self.head_layout, self.soft_cap, z_loss, chunk_tokens)
        return (self.hidden, self.head, bias, self.gathered_head), how


def fused_cross_entropy_loss(
    model: LogitsInputs,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
) -> tuple[jax.Array, ...]:
    """Runs :func:`pallas_kernels.linear_cross_entropy.linear_cross_entropy` on a mesh.

    Args: as there; and
        targets: int [...], split as the tokens of ``hidden`` are, save for ``vocab``
        axes. weights: fp32 [...], likewise; 0 leaves a token out. chunk_tokens: tokens
        whose logits exist at once on a device; larger is a little faster.
    """
    own, how = model.split(z_loss, chunk_tokens)
    return run_head_loss(own, None, (targets, weights), _make_cross_entropy(how))


def compute_fused_log_probs(
    model: LogitsInputs, targets: jax.Array, *, chunk_tokens: int = 1024
) -> jax.Array:
    """Computes log softmax(logits)[target], fp32 [...]; see
    :func:`fused_cross_entropy_loss`.

    Differentiable in ``hidden``, ``head`` and ``bias``; its gradient is the
    cross-entropy's, weighted by the cotangents.
    """
    own, how = model.split(0.0, chunk_tokens)
    return _log_probs(own, targets, how)


class HeadOptions(NamedTuple):
    """Settings of a program on an output head."""

    used: Dims
    soft_cap: float | None
    z_loss: float
    chunk: int


def lay_out_head(own: HeadArrays, used: Dims):
    """Returns the layout of tokens in use, the specs of these arrays, and a function
    that brings hidden, head and bias into use on shards."""
    hidden, head, bias, whole = own
    have = get_layout(hidden)
    stored = get_layout(head)
    vocab = used[1]
    bias_stored = None if bias is None else get_layout(bias)
    # Devices that share a token's vocabulary all need the token.
    tokens = tuple(tuple(a for a in axes if a not in vocab) for axes in have)

    def bring(hidden, head, bias, whole):
        hidden = gather(hidden, have, tokens)
        head = gather(head, stored, used) if whole is None else whole
        if bias_stored is not None:
            bias = gather(bias, bias_stored, (vocab,))
        return hidden, head, bias

    specs = (
        make_spec(have),
        make_spec(stored),
        None if bias_stored is None else make_spec(bias_stored),
        None if whole is None else make_spec(used),
    )
    return tokens, specs, bring


class HeadLoss(NamedTuple):
    """A loss of an output head's logits."""

    how: HeadOptions
    local: Callable[..., tuple[tuple[jax.Array, ...], LinearGradients | None]]
    """(hidden [T, D], head [D, V / ways], bias, first index of this share of the
    vocabulary, rows [T, *], the other's hidden, head and bias, whether gradients are
    wanted) -> (sums over T, gradients of hidden, head and bias)."""
    other_layout: Dims = ((), ())
    """The mesh axes of the other head's dimensions in use."""


def _make_cross_entropy(how: HeadOptions) -> HeadLoss:
    def local(hidden, head, bias, first, rows, _, gradient):
        return loss_and_gradients(
            *(hidden, head, *rows),
            bias=bias,
            vocab_start=first,
            vocab_axes=how.used[1],
            gradient=gradient,
            z_loss=how.z_loss,
            soft_cap=how.soft_cap,
            chunk_tokens=how.chunk,
        )

    return HeadLoss(how, local)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def run_head_loss(
    own: HeadArrays,
    other: HeadArrays | None,
    rows: tuple[jax.Array, ...],
    loss: HeadLoss,
) -> tuple[jax.Array, ...]:
    """Runs a loss on shards, and returns its sums over all tokens; the first is
    differentiable in ``own``. ``other``: of a model that gets no gradient, if any.
    ``rows``: arrays [..., *], each token's in its place."""
    return _run_loss(own, other, rows, loss, gradient=False)[0]


def _backward(_, gradients, cotangents):
    return (
        (*jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients), None),
        None,
        None,
    )


def _run_loss(own, other: Any, rows, loss: HeadLoss, *, gradient: bool):
    """Returns the sums, and the gradients of hidden, head and bias, or None."""
    how = loss.how
    tokens, specs, bring = lay_out_head(own, how.used)
    have = get_layout(own[0])
    stored = get_layout(own[1])
    vocab = how.used[1]
    bias_stored = None if own[2] is None else get_layout(own[2])
    token_axes = tuple(axis for axes in tokens for axis in axes)
    lead = len(tokens) - 1
    row_specs = tuple(make_spec((*tokens[:-1], *((),) * (a.ndim - lead))) for a in rows)
    rows = tuple(map(reshard, rows, row_specs))
    other_specs, bring_other = None, None
    if other is not None:
        other = reshard(other[0], make_spec(have)), *other[1:]
        _, other_specs, bring_other = lay_out_head(other, loss.other_layout)

    def local(own, other, rows, number):
        hidden, head, bias = bring(*own)
        beside = None
        if bring_other is not None:
            beside = bring_other(*other)
            beside = beside[0].reshape(-1, beside[0].shape[-1]), *beside[1:]
        first = number[0] * head.shape[1]
        flat = tuple(a.reshape(-1, *a.shape[lead:]) for a in (hidden, *rows))
        sums, gradients = loss.local(
            flat[0], head, bias, first, flat[1:], beside, gradient
        )
        sums = tuple(lax.psum(s, token_axes) if token_axes else s for s in sums)
        if gradients is None:
            return sums, None
        d_head = reduce(gradients.head, token_axes, how.used, stored)
        d_bias = gradients.bias
        if d_bias is not None and bias_stored is not None:
            d_bias = reduce(d_bias, token_axes, (vocab,), bias_stored)
        d_hidden = gradients.hidden.reshape(hidden.shape)
        # Or the whole head's gradient waits, in fp32, for the layers' backward pass to
        # end.
        d_head, d_hidden = lax.optimization_barrier((d_head, d_hidden))
        return sums, (reduce(d_hidden, vocab, tokens, have), d_head, d_bias)

    return map_shards(
        local,
        (specs, other_specs, row_specs, make_spec((vocab,))),
        (make_spec(()), specs[:3] if gradient else None),
    )(own, other, rows, axis_indices(vocab))


run_head_loss.defvjp(partial(_run_loss, gradient=True), _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_probs(own, targets, how):
    tokens, specs, bring = lay_out_head(own, how.used)
    rows = make_spec(tokens[:-1])
    vocab = how.used[1]
    targets = reshard(targets, rows)

    def local(own, targets, number):
        hidden, head, bias = bring(*own)
        first = number[0] * head.shape[1]

        def one(token):
            row, target = token
            logits = compute_logits(row, head, bias, how.soft_cap)
            at = target - first
            own = logits[jnp.clip(at, 0, len(logits) - 1)]
            own = jnp.where((at >= 0) & (at < len(logits)), own, 0.0)
            return jax.nn.logsumexp(logits), own

        rows = hidden.reshape(-1, hidden.shape[-1]), targets.ravel()
        normalizer, own = lax.map(one, rows, batch_size=min(how.chunk, len(rows[1])))
        if vocab:
            own = lax.psum(own, vocab)
            top = lax.pmax(normalizer, vocab)
            normalizer = top + jnp.log(lax.psum(jnp.exp(normalizer - top), vocab))
        return (own - normalizer).reshape(targets.shape)

    run = map_shards(local, (specs, rows, make_spec((vocab,))), rows)
    return run(own, targets, axis_indices(vocab))


def _log_probs_backward(how, saved, cotangents):
    own, targets = saved
    rows = (targets, -cotangents)
    loss = _make_cross_entropy(how)
    _, gradients = _run_loss(own, None, rows, loss, gradient=True)
    return (*gradients, None), None


_log_probs.defvjp(lambda *args: (_log_probs(*args), args[:2]), _log_probs_backward)
