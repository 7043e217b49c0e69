"""Divergence of a model's tokens from a teacher's, on a mesh; [batch, seq, vocab] is
never held.

Both heads, both softmaxes, the divergence and the cross-entropy of the targets are one
operation, a chunk of tokens at a time, as in :mod:`maxlm.parallel.cross_entropy`. A
teacher may stand in memory, or as the log-probabilities of its likeliest tokens, with
all others as one class more.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.cross_entropy import (
    HeadLoss,
    LogitsInputs,
    lay_out_head,
    run_head_loss,
)
from maxlm.parallel.local import Axes, axis_indices, make_spec, map_shards
from pallas_kernels.linear_cross_entropy import (
    compute_logits,
    compute_logits_cross_entropy,
    split_into_chunks,
    sum_over_chunks,
)


class StoredTeacher(NamedTuple):
    """A teacher's likeliest tokens, in any order."""

    ids: jax.Array
    """int32 [..., k]."""
    log_probs: jax.Array
    """fp32 [..., k + 1], of softmax(logits / temperature); the last is all other
    tokens'."""


def fused_divergence_loss(
    student: LogitsInputs,
    teacher: LogitsInputs | StoredTeacher,
    targets: jax.Array,
    weights: jax.Array,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes Σ weight · ((1 − ce_weight)·T²·divergence + ce_weight·cross-entropy).

    Args:
        student, teacher: of one vocabulary and as many tokens.
        targets, weights, z_loss, chunk_tokens: as of
            :func:`maxlm.parallel.cross_entropy.fused_cross_entropy_loss`.
        beta: 0: KL(teacher ‖ student); 1: KL(student ‖ teacher); between: β·KL(teacher
            ‖ mixture) + (1 − β)·KL(student ‖ mixture), the mixture being β·teacher + (1
            − β)·student (Agarwal et al. 2024, eq. 1).
        temperature: T, which divides both models' logits; with its square the
            gradient's size stays what it was (Hinton et al. 2015, §2).

    Returns:
        The loss, T²·divergence and cross-entropy, fp32 sums over tokens. The first
        alone is differentiable, in the student's arrays.
    """
    own, how = student.split(z_loss, chunk_tokens)
    if isinstance(teacher, StoredTeacher):
        stored = teacher
        other = None
        other_how = how
    else:
        stored = ()
        other, other_how = teacher.split(0.0, chunk_tokens)
    share = ce_weight
    vocab = how.used[1]

    def local(hidden, head, bias, first, rows, other, gradient):
        targets, weights, *stored = rows
        teacher: Any = (stored[0] - first, stored[1]) if other is None else other[:1]

        def measure(logits: jax.Array, teacher: Any):
            logits = logits / temperature
            if other is None:
                return _measure_from_classes(
                    logits, teacher[0], teacher[1], beta, vocab
                )
            theirs = compute_logits(teacher[0], other[1], other[2], other_how.soft_cap)
            return _measure_from_logits(logits, theirs / temperature, beta, vocab)

        def logits_loss(logits, targets, weights, *teacher):
            divergence, d_logits = measure(logits, teacher)
            (loss, entropy), d_entropy = compute_logits_cross_entropy(
                *(logits, targets, weights),
                axes=vocab,
                z_loss=how.z_loss,
                gradient=gradient and share > 0,
            )
            # Whatever stands where nothing is counted may be infinite.
            divergence = (
                jnp.where(weights != 0, divergence * weights, 0.0).sum()
                * temperature**2
            )
            sums = (1.0 - share) * divergence + share * loss, divergence, entropy
            if not gradient:
                return sums, None
            counted = weights[:, None] * ((1.0 - share) * temperature)
            d_logits = jnp.where(counted != 0, d_logits * counted, 0.0)
            return sums, d_logits if d_entropy is None else d_logits + share * d_entropy

        return sum_over_chunks(
            *(hidden, head, (targets - first, weights, *teacher), logits_loss),
            bias=bias,
            soft_cap=how.soft_cap,
            num_sums=3,
            gradient=gradient,
            chunk_tokens=how.chunk,
        )

    loss = HeadLoss(how, local, other_how.used)
    return run_head_loss(own, other, (targets, weights, *stored), loss)


def compute_top_log_probs(
    model: LogitsInputs, k: int, *, temperature: float = 1.0, chunk_tokens: int = 1024
) -> StoredTeacher:
    """Returns the ``k`` likeliest tokens after each of a model's hidden states [...,
    D]."""
    own, how = model.split(0.0, chunk_tokens)
    tokens, specs, bring = lay_out_head(own, how.used)
    vocab = how.used[1]

    def local(own, number):
        hidden, head, bias = bring(*own)
        first = number[0] * head.shape[1]

        def find(rows):
            logits = compute_logits(rows, head, bias, how.soft_cap) / temperature
            values, ids = lax.top_k(logits, min(k, logits.shape[1]))
            if vocab:
                values = lax.all_gather(values, vocab, axis=1, tiled=True)
                ids = lax.all_gather(ids + first, vocab, axis=1, tiled=True)
                values, places = lax.top_k(values, k)
                ids = jnp.take_along_axis(ids, places, axis=1) - first
            classes, _ = _compute_class_log_probs(logits, ids, vocab)
            return ids + first, classes

        rows = hidden.reshape(-1, hidden.shape[-1])
        found = lax.map(find, split_into_chunks(rows, how.chunk))
        return jax.tree.map(
            lambda a: a.reshape(-1, a.shape[-1])[: len(rows)].reshape(
                *hidden.shape[:-1], -1
            ),
            found,
        )

    rows = make_spec((*tokens[:-1], ()))
    run = map_shards(local, (specs, make_spec((vocab,))), (rows, rows))
    return StoredTeacher(*run(own, axis_indices(vocab)))


def _measure_from_logits(
    logits: jax.Array, teacher: jax.Array, beta: float, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Returns the divergence [c] of logits [c, V / ways] from a teacher's, and its
    gradient."""
    student, teacher = (a - _logsumexp(a, axes)[:, None] for a in (logits, teacher))
    terms, slopes = _divergence_terms(student, teacher, beta)
    sums = terms.sum(-1), slopes.sum(-1)
    total, slope = lax.psum(sums, axes) if axes else sums
    return total, slopes - jnp.exp(student) * slope[:, None]


def _measure_from_classes(
    logits: jax.Array, ids: jax.Array, log_probs: jax.Array, beta: float, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Returns what :func:`_measure_from_logits` does, of the classes that a stored
    teacher has; ``ids`` are counted from this share's first."""
    student, shares = _compute_class_log_probs(logits, ids, axes)
    terms, slopes = _divergence_terms(student, log_probs, beta)
    d_classes = slopes - jnp.exp(student) * slopes.sum(-1, keepdims=True)
    # The last class's is split over its tokens.
    return terms.sum(-1), _set_classes(
        shares * d_classes[:, -1:], ids, d_classes[:, :-1]
    )


def _divergence_terms(
    student: jax.Array, teacher: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Returns terms that add up to the divergence of log-probabilities, and s with the
    gradient s − p·Σs in the student's logits, p being its probabilities."""
    p, q = jnp.exp(student), jnp.exp(teacher)

    def expect(p: jax.Array, log_ratio: jax.Array) -> jax.Array:
        return jnp.where(p > 0, p * log_ratio, 0.0)

    if beta == 0:
        return expect(q, teacher - student), -q
    if beta == 1:
        terms = expect(p, student - teacher)
        return terms, terms
    mixture = jnp.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    own = (1.0 - beta) * expect(p, student - mixture)
    return beta * expect(q, teacher - mixture) + own, own


def _compute_class_log_probs(
    logits: jax.Array, ids: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities [c, k + 1] of ids and of all other tokens together; and
    of these the share that each of this device's tokens has [c, V / ways], 0 for
    ids."""
    size = logits.shape[1]
    here = (ids >= 0) & (ids < size)
    own = jnp.where(
        here, jnp.take_along_axis(logits, jnp.clip(ids, 0, size - 1), axis=1), 0.0
    )
    own = lax.psum(own, axes) if axes else own
    others = _set_classes(logits, ids, jnp.full(ids.shape, -jnp.inf))
    rest = _logsumexp(others, axes)[:, None]
    shares = jnp.exp(others - jnp.where(jnp.isfinite(rest), rest, 0.0))
    return jax.nn.log_softmax(jnp.concatenate([own, rest], axis=1), axis=1), shares


def _set_classes(values: jax.Array, ids: jax.Array, new: jax.Array) -> jax.Array:
    """Sets values [c, V / ways] at ids [c, k], as far as they are this device's."""
    size = values.shape[1]
    places = jnp.where((ids >= 0) & (ids < size), ids, size)
    return values.at[jnp.arange(len(ids))[:, None], places].set(new, mode="drop")


def _logsumexp(x: jax.Array, axes: Axes) -> jax.Array:
    own = jax.nn.logsumexp(x, axis=-1)
    return jax.nn.logsumexp(lax.all_gather(own, axes), axis=0) if axes else own
