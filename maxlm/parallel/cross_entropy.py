"""Cross-entropy over a vocabulary that is never held as [batch, seq, vocab], on a mesh.

The output head, the softmax and the loss are one operation
(pallas_kernels.linear_cross_entropy), and the gradient is formed in the same pass. The
vocabulary may be split over mesh axes: each device holds its share of the head, and
three numbers a token (max, sum, target logit) cross the wire; then, once, the gradient
of the hidden states.

Letters: D model, V vocabulary, ways the devices that share it, T tokens of a device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from maxlm.parallel.batch_invariance import compute_log_probs_in_tiles
from maxlm.parallel.decode_kernels import LocalProduct
from maxlm.parallel.local import (
    Axes,
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
    split_into_chunks,
)


class HeadArrays(NamedTuple):
    """Arrays of a program on an output head."""

    hidden: jax.Array
    """[..., D]."""
    head: jax.Array
    """[D, V]."""
    bias: jax.Array | None
    """[V]."""
    gathered_head: jax.Array | None


class HeadOptions(NamedTuple):
    """Settings of a program on an output head."""

    head_layout: Dims
    """The mesh axes of the head's dimensions in use."""
    soft_cap: float | None
    z_loss: float
    chunk_tokens: int
    product: LocalProduct | None = None
    """What log-probabilities multiply with, and in tiles; None: XLA's dot."""

    @property
    def vocab_axes(self) -> Axes:
        """The mesh axes that the vocabulary is split over in use."""
        return self.head_layout[1]


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
    product: LocalProduct | None = None
    """What :func:`compute_fused_log_probs` multiplies with where the vocabulary is
    whole; None: XLA's dot."""

    def split(self, z_loss: float, chunk_tokens: int) -> tuple[HeadArrays, HeadOptions]:
        """Returns the arrays, a bias split over the vocabulary's axes or more of them,
        and the settings of a program on them."""
        options = HeadOptions(
            self.head_layout, self.soft_cap, z_loss, chunk_tokens, self.product
        )
        vocab_axes = options.vocab_axes
        bias = self.bias
        if bias is not None:
            bias_axes = get_layout(bias)[0]
            if bias_axes[: len(vocab_axes)] != vocab_axes:
                bias = reshard(bias, make_spec((vocab_axes,)))
        arrays = HeadArrays(self.hidden, self.head, bias, self.gathered_head)
        return arrays, options


def fused_cross_entropy_loss(
    model: LogitsInputs,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
) -> tuple[jax.Array, ...]:
    """Runs :func:`pallas_kernels.linear_cross_entropy.linear_cross_entropy` on a mesh.

    Args:
        targets: int [...], split as the tokens of ``hidden`` are, save for ``vocab``
            axes.
        weights: fp32 [...], likewise; 0 leaves a token out.
        z_loss: as there.
        chunk_tokens: tokens whose logits exist at once on a device; larger is a little
            faster.
    """
    arrays, options = model.split(z_loss, chunk_tokens)
    loss = _make_cross_entropy(options)
    return run_head_loss(arrays, None, (targets, weights), loss)


def compute_fused_log_probs(
    model: LogitsInputs, targets: jax.Array, *, chunk_tokens: int = 1024
) -> jax.Array:
    """Computes log softmax(logits)[target], fp32 [...]; see
    :func:`fused_cross_entropy_loss`.

    Differentiable in ``hidden``, ``head`` and ``bias``; its gradient is the
    cross-entropy's, weighted by the cotangents.
    """
    arrays, options = model.split(0.0, chunk_tokens)
    return _log_probs(arrays, targets, options)


class HeadLayout:
    """Layouts of a head's arrays in storage and in use."""

    def __init__(self, arrays: HeadArrays, head_layout: Dims):
        hidden, head, bias, gathered_head = arrays
        self.head_used = head_layout
        self.vocab_axes = head_layout[1]
        self.hidden_stored = get_layout(hidden)
        self.head_stored = get_layout(head)
        self.bias_stored = None if bias is None else get_layout(bias)
        self.hidden_used: Dims = tuple(
            tuple(axis for axis in axes if axis not in self.vocab_axes)
            for axes in self.hidden_stored
        )
        """Devices that share a token's vocabulary all need the token."""
        specs: Any = (
            make_spec(self.hidden_stored),
            make_spec(self.head_stored),
            None if self.bias_stored is None else make_spec(self.bias_stored),
            None if gathered_head is None else make_spec(self.head_used),
        )
        self.specs = HeadArrays(*specs)
        """Of the arrays, in their places."""

    @property
    def token_axes(self) -> Axes:
        """The mesh axes that tokens are split over in use."""
        return tuple(axis for axes in self.hidden_used for axis in axes)

    @property
    def token_spec(self) -> PartitionSpec:
        """Of arrays [...], a number for each token."""
        return make_spec(self.hidden_used[:-1])

    def gather(
        self, arrays: HeadArrays
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Brings hidden, head and bias into use, on shards."""
        hidden, head, bias, gathered_head = arrays
        hidden = gather(hidden, self.hidden_stored, self.hidden_used)
        if gathered_head is not None:
            head = gathered_head
        else:
            head = gather(head, self.head_stored, self.head_used)
        if bias is not None and self.bias_stored is not None:
            bias = gather(bias, self.bias_stored, (self.vocab_axes,))
        return hidden, head, bias


class LocalHead(NamedTuple):
    """A head's arrays in use on one device, its tokens in one dimension."""

    hidden: jax.Array
    """[T, D]."""
    head: jax.Array
    """[D, V / ways]."""
    bias: jax.Array | None


class HeadLoss(NamedTuple):
    """A loss of an output head's logits."""

    options: HeadOptions
    local: Callable[
        [LocalHead, jax.Array, tuple[jax.Array, ...], LocalHead | None, bool],
        tuple[tuple[jax.Array, ...], LinearGradients | None],
    ]
    """(head, first index of this share of the vocabulary, rows [T, *], the other head,
    whether gradients are wanted) -> (sums over T, gradients of hidden, head and
    bias)."""
    other_layout: Dims = ((), ())
    """The mesh axes of the other head's dimensions in use."""


def _make_cross_entropy(options: HeadOptions) -> HeadLoss:
    def local(
        model: LocalHead,
        vocab_start: jax.Array,
        rows: tuple[jax.Array, ...],
        other: LocalHead | None,
        gradient: bool,
    ):
        targets, weights = rows
        return loss_and_gradients(
            model.hidden,
            model.head,
            targets,
            weights,
            bias=model.bias,
            vocab_start=vocab_start,
            vocab_axes=options.vocab_axes,
            gradient=gradient,
            z_loss=options.z_loss,
            soft_cap=options.soft_cap,
            chunk_tokens=options.chunk_tokens,
        )

    return HeadLoss(options, local)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def run_head_loss(
    arrays: HeadArrays,
    other_arrays: HeadArrays | None,
    rows: tuple[jax.Array, ...],
    loss: HeadLoss,
) -> tuple[jax.Array, ...]:
    """Runs a loss on shards, and returns its sums over all tokens; the first is
    differentiable in ``arrays``. ``other_arrays``: of a model that gets no gradient, if
    any. ``rows``: arrays [..., *], each token's in its place."""
    return run_loss_and_gradients(arrays, other_arrays, rows, loss, gradient=False)[0]


def _backward(_, gradients, cotangents):
    # The gradients are ready since the forward pass; they are linear in the loss's.
    d_loss = cotangents[0]
    scaled = jax.tree.map(lambda g: g * d_loss.astype(g.dtype), gradients)
    return HeadArrays(*scaled, gathered_head=None), None, None


def run_loss_and_gradients(
    arrays: HeadArrays,
    other_arrays: HeadArrays | None,
    rows: tuple[jax.Array, ...],
    loss: HeadLoss,
    *,
    gradient: bool,
):
    """Returns the sums, and the gradients of hidden, head and bias, or None."""
    layout = HeadLayout(arrays, loss.options.head_layout)
    vocab_axes = layout.vocab_axes
    token_axes = layout.token_axes
    num_token_dims = len(layout.hidden_used) - 1
    row_specs = tuple(
        make_spec((*layout.hidden_used[:-1], *((),) * (row.ndim - num_token_dims)))
        for row in rows
    )
    rows = tuple(map(reshard, rows, row_specs))
    other_layout = None
    if other_arrays is not None:
        # Tokens of both models lie on the same devices.
        other_hidden = reshard(other_arrays.hidden, make_spec(layout.hidden_stored))
        other_arrays = other_arrays._replace(hidden=other_hidden)
        other_layout = HeadLayout(other_arrays, loss.other_layout)

    def local(arrays, other_arrays, rows, vocab_index):
        hidden, head, bias = layout.gather(arrays)
        other = None
        if other_layout is not None:
            other_hidden, other_head, other_bias = other_layout.gather(other_arrays)
            other_hidden = other_hidden.reshape(-1, other_hidden.shape[-1])
            other = LocalHead(other_hidden, other_head, other_bias)
        vocab_start = vocab_index[0] * head.shape[1]
        flat_hidden, *flat_rows = (
            array.reshape(-1, *array.shape[num_token_dims:])
            for array in (hidden, *rows)
        )
        model = LocalHead(flat_hidden, head, bias)
        sums, gradients = loss.local(
            model, vocab_start, tuple(flat_rows), other, gradient
        )
        sums = tuple(lax.psum(s, token_axes) if token_axes else s for s in sums)
        if gradients is None:
            return sums, None
        d_head = reduce(
            gradients.head, token_axes, layout.head_used, layout.head_stored
        )
        d_bias = gradients.bias
        if d_bias is not None and layout.bias_stored is not None:
            d_bias = reduce(d_bias, token_axes, (vocab_axes,), layout.bias_stored)
        d_hidden = gradients.hidden.reshape(hidden.shape)
        # Or the whole head's gradient waits, in fp32, for the layers' backward pass to
        # end.
        d_head, d_hidden = lax.optimization_barrier((d_head, d_hidden))
        d_hidden = reduce(
            d_hidden, vocab_axes, layout.hidden_used, layout.hidden_stored
        )
        return sums, (d_hidden, d_head, d_bias)

    run = map_shards(
        local,
        in_specs=(
            layout.specs,
            None if other_layout is None else other_layout.specs,
            row_specs,
            make_spec((vocab_axes,)),
        ),
        out_specs=(make_spec(()), layout.specs[:3] if gradient else None),
    )
    return run(arrays, other_arrays, rows, axis_indices(vocab_axes))


run_head_loss.defvjp(partial(run_loss_and_gradients, gradient=True), _backward)


def compute_head_log_probs_in_tiles(
    model: LocalHead,
    targets: jax.Array,
    options: HeadOptions,
    temperature: float = 1.0,
) -> jax.Array:
    """Computes log softmax(logits / temperature) of targets int [T], fp32 [T], as an
    engine does that is batch-invariant."""
    product = options.product
    assert product is not None

    def compute_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = chunk
        logits = product(hidden, model.head, 1, jnp.float32)
        if model.bias is not None:
            logits += model.bias
        if options.soft_cap is not None:
            logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
        return compute_log_probs_in_tiles(logits / temperature, targets)

    num_tokens = len(targets)
    size = min(options.chunk_tokens, num_tokens)
    hidden = split_into_chunks(model.hidden, size)
    log_probs = lax.map(compute_chunk, (hidden, split_into_chunks(targets, size)))
    return log_probs.reshape(-1)[:num_tokens]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_probs(
    arrays: HeadArrays, targets: jax.Array, options: HeadOptions
) -> jax.Array:
    layout = HeadLayout(arrays, options.head_layout)
    vocab_axes = layout.vocab_axes
    targets = reshard(targets, layout.token_spec)

    def local(arrays, targets, vocab_index):
        hidden, head, bias = layout.gather(arrays)
        vocab_start = vocab_index[0] * head.shape[1]

        def compute_token(token):
            row, target = token
            logits = compute_logits(row, head, bias, options.soft_cap)
            # Only one of the devices that share the vocabulary has the target.
            index = target - vocab_start
            target_logit = logits[jnp.clip(index, 0, len(logits) - 1)]
            is_here = (index >= 0) & (index < len(logits))
            target_logit = jnp.where(is_here, target_logit, 0.0)
            return jax.nn.logsumexp(logits), target_logit

        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        flat_targets = targets.ravel()
        if options.product is not None and not vocab_axes:
            model = LocalHead(flat_hidden, head, bias)
            log_probs = compute_head_log_probs_in_tiles(model, flat_targets, options)
            return log_probs.reshape(targets.shape)
        normalizer, target_logit = lax.map(
            compute_token,
            (flat_hidden, flat_targets),
            batch_size=min(options.chunk_tokens, len(flat_targets)),
        )
        if vocab_axes:
            target_logit = lax.psum(target_logit, vocab_axes)
            top = lax.pmax(normalizer, vocab_axes)
            total = lax.psum(jnp.exp(normalizer - top), vocab_axes)
            normalizer = top + jnp.log(total)
        return (target_logit - normalizer).reshape(targets.shape)

    run = map_shards(
        local,
        in_specs=(
            layout.specs,
            layout.token_spec,
            make_spec((vocab_axes,)),
        ),
        out_specs=layout.token_spec,
    )
    return run(arrays, targets, axis_indices(vocab_axes))


def _log_probs_forward(arrays, targets, options):
    return _log_probs(arrays, targets, options), (arrays, targets)


def _log_probs_backward(options, saved, cotangents):
    # A log-probability is a cross-entropy's negative.
    arrays, targets = saved
    loss = _make_cross_entropy(options)
    _, gradients = run_loss_and_gradients(
        arrays, None, (targets, -cotangents), loss, gradient=True
    )
    assert gradients is not None
    return HeadArrays(*gradients, gathered_head=None), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)
