"""Log-probabilities of tokens with the entropy of what they were drawn from, on a mesh;
[batch, seq, vocab] is never held.

Both come from one pass over the output head, a chunk of tokens at a time, as in
:mod:`maxlm.parallel.cross_entropy`; the gradient of both from another.

Letters: D model, V vocabulary, ways the devices that share it, c tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.cross_entropy import (
    HeadArrays,
    HeadLayout,
    HeadLoss,
    HeadOptions,
    LocalHead,
    LogitsInputs,
    compute_head_log_probs_in_tiles,
    run_loss_and_gradients,
)
from maxlm.parallel.local import Axes, axis_indices, make_spec, map_shards
from pallas_kernels.linear_cross_entropy import compute_logits, sum_over_chunks


def compute_log_probs_and_entropies(
    model: LogitsInputs,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Computes log p(target) and the entropy −Σ p·log p of p = softmax(logits /
    temperature), both fp32 [...], in nats; see
    :func:`maxlm.parallel.cross_entropy.fused_cross_entropy_loss`.

    Both are differentiable in ``hidden``, ``head`` and ``bias``. Where products have one
    order (``parallel.batch_invariant``), log-probabilities have the bits of an engine's
    of one order too, and cost a second pass over the head.
    """
    arrays, options = model.split(0.0, chunk_tokens)
    return _run(arrays, targets, options, temperature)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _run(
    arrays: HeadArrays, targets: jax.Array, options: HeadOptions, temperature: float
) -> tuple[jax.Array, jax.Array]:
    layout = HeadLayout(arrays, options.head_layout)
    vocab_axes = layout.vocab_axes
    targets = jax.sharding.reshard(targets, layout.token_spec)

    def local(arrays, targets, vocab_index):
        hidden, head, bias = layout.gather(arrays)
        vocab_start = vocab_index[0] * head.shape[1]

        def compute_token(token):
            row, target = token
            logits = compute_logits(row, head, bias, options.soft_cap) / temperature
            # Only one of the devices that share the vocabulary has the target.
            index = target - vocab_start
            target_logit = logits[jnp.clip(index, 0, len(logits) - 1)]
            is_here = (index >= 0) & (index < len(logits))
            target_logit = jnp.where(is_here, target_logit, 0.0)
            normalizer = jax.nn.logsumexp(logits)
            # Of this share of the vocabulary; products with p = 0 are 0.
            mean_logit = jnp.sum(jnp.exp(logits - normalizer) * logits)
            return normalizer, target_logit, mean_logit

        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        flat_targets = targets.ravel()
        normalizer, target_logit, mean_logit = lax.map(
            compute_token,
            (flat_hidden, flat_targets),
            batch_size=min(options.chunk_tokens, len(flat_targets)),
        )
        if vocab_axes:
            target_logit = lax.psum(target_logit, vocab_axes)
            top = lax.pmax(normalizer, vocab_axes)
            shares = jnp.exp(normalizer - top)
            total, mean_logit = lax.psum((shares, shares * mean_logit), vocab_axes)
            mean_logit = mean_logit / total
            normalizer = top + jnp.log(total)
        # −Σ p·(logit − normalizer).
        log_probs = target_logit - normalizer
        if options.product is not None and not vocab_axes:
            log_probs = compute_head_log_probs_in_tiles(
                LocalHead(flat_hidden, head, bias), flat_targets, options, temperature
            )
        entropies = normalizer - mean_logit
        return log_probs.reshape(targets.shape), entropies.reshape(targets.shape)

    run = map_shards(
        local,
        in_specs=(layout.specs, layout.token_spec, make_spec((vocab_axes,))),
        out_specs=(layout.token_spec, layout.token_spec),
    )
    return run(arrays, targets, axis_indices(vocab_axes))


def _forward(arrays, targets, options, temperature):
    return _run(arrays, targets, options, temperature), (arrays, targets)


def _backward(options, temperature, saved, cotangents):
    arrays, targets = saved
    d_log_probs, d_entropies = cotangents
    rows = (targets, d_log_probs, d_entropies)
    loss = _make_gradient_loss(options, temperature)
    _, gradients = run_loss_and_gradients(arrays, None, rows, loss, gradient=True)
    assert gradients is not None
    return HeadArrays(*gradients, gathered_head=None), None


_run.defvjp(_forward, _backward)


def _make_gradient_loss(options: HeadOptions, temperature: float) -> HeadLoss:
    """Makes what computes gradients alone; its sum is 0."""
    vocab_axes = options.vocab_axes

    def local(
        model: LocalHead,
        vocab_start: jax.Array,
        rows: tuple[jax.Array, ...],
        other: LocalHead | None,
        gradient: bool,
    ):
        targets, d_log_probs, d_entropies = rows

        def logits_loss(logits, targets, d_log_probs, d_entropies):
            d_scaled = _differentiate(
                logits / temperature, targets, d_log_probs, d_entropies, vocab_axes
            )
            return (jnp.zeros((), jnp.float32),), d_scaled / temperature

        return sum_over_chunks(
            model.hidden,
            model.head,
            (targets - vocab_start, d_log_probs, d_entropies),
            logits_loss,
            bias=model.bias,
            soft_cap=options.soft_cap,
            num_sums=1,
            gradient=gradient,
            chunk_tokens=options.chunk_tokens,
        )

    return HeadLoss(options, local)


def _differentiate(
    logits: jax.Array,
    targets: jax.Array,
    d_log_probs: jax.Array,
    d_entropies: jax.Array,
    axes: Axes,
) -> jax.Array:
    """Returns the gradient in logits [c, V / ways] of log-probabilities and entropies
    that have these cotangents [c]: [target] − p, and −p·(log p + entropy)."""
    top = jnp.max(logits, axis=-1)
    top = lax.pmax(top, axes) if axes else top
    shifted = logits - top[:, None]
    exp = jnp.exp(shifted)
    sums = (exp.sum(-1), (exp * shifted).sum(-1))
    total, weighted = lax.psum(sums, axes) if axes else sums
    log_total = jnp.log(total)
    entropies = log_total - weighted / total
    p = exp / total[:, None]
    log_p = shifted - log_total[:, None]
    is_target = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    d_logits = d_log_probs[:, None] * (is_target - p)
    return d_logits - d_entropies[:, None] * p * (log_p + entropies[:, None])
