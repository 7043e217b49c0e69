"""Divergence of a model's tokens from a teacher's, on a mesh; [batch, seq, vocab] is
never held.

Both heads, both softmaxes, the divergence and the cross-entropy of the targets are one
operation, a chunk of tokens at a time, as in :mod:`maxlm.parallel.cross_entropy`. A
teacher may stand in memory, or as the log-probabilities of its likeliest tokens, with
all others as one class more.

Letters: D model, V vocabulary, ways the devices that share it, c tokens of a chunk, k
tokens that a stored teacher names.
"""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.cross_entropy import (
    HeadLayout,
    HeadLoss,
    LocalHead,
    LogitsInputs,
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
    arrays, options = student.split(z_loss, chunk_tokens)
    rows = (targets, weights)
    teacher_arrays = None
    teacher_options = options
    if isinstance(teacher, StoredTeacher):
        rows = (*rows, *teacher)
    else:
        teacher_arrays, teacher_options = teacher.split(0.0, chunk_tokens)
    divergence_weight = 1.0 - ce_weight
    vocab_axes = options.vocab_axes

    def local(
        model: LocalHead,
        vocab_start: jax.Array,
        rows: tuple[jax.Array, ...],
        other: LocalHead | None,
        gradient: bool,
    ):
        targets, weights, *stored = rows
        # What a chunk of tokens has of the teacher: ids and log-probabilities, or
        # hidden states.
        if other is None:
            ids, log_probs = stored
            teacher_rows = (ids - vocab_start, log_probs)
        else:
            teacher_rows = (other.hidden,)

        def measure(
            logits: jax.Array, teacher_rows: tuple[jax.Array, ...]
        ) -> tuple[jax.Array, jax.Array]:
            logits = logits / temperature
            if other is None:
                ids, log_probs = teacher_rows
                return _measure_from_classes(logits, ids, log_probs, beta, vocab_axes)
            (hidden,) = teacher_rows
            teacher_logits = compute_logits(
                hidden, other.head, other.bias, teacher_options.soft_cap
            )
            return _measure_from_logits(
                logits, teacher_logits / temperature, beta, vocab_axes
            )

        def logits_loss(logits, targets, weights, *teacher_rows):
            divergence, d_logits = measure(logits, teacher_rows)
            (cross_entropy_loss, cross_entropy), d_cross_entropy = (
                compute_logits_cross_entropy(
                    logits,
                    targets,
                    weights,
                    axes=vocab_axes,
                    z_loss=options.z_loss,
                    gradient=gradient and ce_weight > 0,
                )
            )
            # Whatever stands where nothing is counted may be infinite.
            divergence = jnp.where(weights != 0, divergence * weights, 0.0).sum()
            divergence = divergence * temperature**2
            loss = divergence_weight * divergence + ce_weight * cross_entropy_loss
            sums = (loss, divergence, cross_entropy)
            if not gradient:
                return sums, None
            # One factor T of T² is left: the logits were divided by the other.
            token_weights = weights[:, None] * (divergence_weight * temperature)
            d_logits = jnp.where(token_weights != 0, d_logits * token_weights, 0.0)
            if d_cross_entropy is not None:
                d_logits = d_logits + ce_weight * d_cross_entropy
            return sums, d_logits

        return sum_over_chunks(
            model.hidden,
            model.head,
            (targets - vocab_start, weights, *teacher_rows),
            logits_loss,
            bias=model.bias,
            soft_cap=options.soft_cap,
            num_sums=3,
            gradient=gradient,
            chunk_tokens=options.chunk_tokens,
        )

    loss = HeadLoss(options, local, teacher_options.head_layout)
    sums = run_head_loss(arrays, teacher_arrays, rows, loss)
    return cast(tuple[jax.Array, jax.Array, jax.Array], sums)


def compute_top_log_probs(
    model: LogitsInputs, k: int, *, temperature: float = 1.0, chunk_tokens: int = 1024
) -> StoredTeacher:
    """Returns the ``k`` likeliest tokens after each of a model's hidden states [...,
    D]."""
    arrays, options = model.split(0.0, chunk_tokens)
    layout = HeadLayout(arrays, options.head_layout)
    vocab_axes = layout.vocab_axes

    def local(arrays, vocab_index):
        hidden, head, bias = layout.gather(arrays)
        vocab_start = vocab_index[0] * head.shape[1]

        def find_top(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = compute_logits(rows, head, bias, options.soft_cap) / temperature
            values, ids = lax.top_k(logits, min(k, logits.shape[1]))
            if vocab_axes:
                # The best of each device's best; ids count from this share's first.
                values = lax.all_gather(values, vocab_axes, axis=1, tiled=True)
                ids = lax.all_gather(ids + vocab_start, vocab_axes, axis=1, tiled=True)
                values, places = lax.top_k(values, k)
                ids = jnp.take_along_axis(ids, places, axis=1) - vocab_start
            log_probs, _ = _compute_class_log_probs(logits, ids, vocab_axes)
            return ids + vocab_start, log_probs

        rows = hidden.reshape(-1, hidden.shape[-1])
        chunks = split_into_chunks(rows, options.chunk_tokens)

        def join_chunks(x: jax.Array) -> jax.Array:
            # The last chunk is padded.
            x = x.reshape(-1, x.shape[-1])[: len(rows)]
            return x.reshape(*hidden.shape[:-1], -1)

        return jax.tree.map(join_chunks, lax.map(find_top, chunks))

    row_spec = make_spec((*layout.hidden_used[:-1], ()))
    run = map_shards(
        local,
        in_specs=(layout.specs, make_spec((vocab_axes,))),
        out_specs=(row_spec, row_spec),
    )
    ids, log_probs = run(arrays, axis_indices(vocab_axes))
    return StoredTeacher(ids, log_probs)


def _measure_from_logits(
    logits: jax.Array, teacher: jax.Array, beta: float, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Returns the divergence [c] of logits [c, V / ways] from a teacher's, and its
    gradient."""
    student = logits - _logsumexp(logits, axes)[:, None]
    teacher = teacher - _logsumexp(teacher, axes)[:, None]
    # The gradient is s − p·Σs; both sums are over the whole vocabulary.
    terms, slopes = _divergence_terms(student, teacher, beta)
    sums = (terms.sum(-1), slopes.sum(-1))
    divergence, slope_sum = lax.psum(sums, axes) if axes else sums
    d_logits = slopes - jnp.exp(student) * slope_sum[:, None]
    return divergence, d_logits


def _measure_from_classes(
    logits: jax.Array, ids: jax.Array, log_probs: jax.Array, beta: float, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Returns what :func:`_measure_from_logits` does, of the classes that a stored
    teacher has; ``ids`` are counted from this share's first."""
    student, shares = _compute_class_log_probs(logits, ids, axes)
    terms, slopes = _divergence_terms(student, log_probs, beta)
    d_classes = slopes - jnp.exp(student) * slopes.sum(-1, keepdims=True)
    divergence = terms.sum(-1)
    # The last class's is split over its tokens.
    d_others = shares * d_classes[:, -1:]
    return divergence, _set_classes(d_others, ids, d_classes[:, :-1])


def _divergence_terms(
    student: jax.Array, teacher: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Returns terms that add up to the divergence of log-probabilities, and s with the
    gradient s − p·Σs in the student's logits, p being its probabilities; ``beta`` as of
    :func:`fused_divergence_loss`."""
    p = jnp.exp(student)
    q = jnp.exp(teacher)

    def weigh(p: jax.Array, log_ratio: jax.Array) -> jax.Array:
        # 0 · log 0 is 0.
        return jnp.where(p > 0, p * log_ratio, 0.0)

    if beta == 0:
        # KL(teacher ‖ student) = Σ q·(log q − log p).
        return weigh(q, teacher - student), -q
    if beta == 1:
        # KL(student ‖ teacher) = Σ p·(log p − log q).
        terms = weigh(p, student - teacher)
        return terms, terms
    # log(β·q + (1 − β)·p).
    student_share = student + math.log1p(-beta)
    teacher_share = teacher + math.log(beta)
    mixture = jnp.logaddexp(student_share, teacher_share)
    student_terms = (1.0 - beta) * weigh(p, student - mixture)
    teacher_terms = beta * weigh(q, teacher - mixture)
    return teacher_terms + student_terms, student_terms


def _compute_class_log_probs(
    logits: jax.Array, ids: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities [c, k + 1] of ids and of all other tokens together; and
    of these the share that each of this device's tokens has [c, V / ways], 0 for
    ids."""
    size = logits.shape[1]
    is_here = (ids >= 0) & (ids < size)
    index = jnp.clip(ids, 0, size - 1)
    local_logits = jnp.take_along_axis(logits, index, axis=1)
    # A token is on one device; the others add 0.
    class_logits = jnp.where(is_here, local_logits, 0.0)
    if axes:
        class_logits = lax.psum(class_logits, axes)
    others = _set_classes(logits, ids, jnp.full(ids.shape, -jnp.inf))
    others_logit = _logsumexp(others, axes)[:, None]
    # Where the ids are all tokens there are no others: −inf − −inf is NaN.
    finite_logit = jnp.where(jnp.isfinite(others_logit), others_logit, 0.0)
    shares = jnp.exp(others - finite_logit)
    all_logits = jnp.concatenate([class_logits, others_logit], axis=1)
    return jax.nn.log_softmax(all_logits, axis=1), shares


def _set_classes(values: jax.Array, ids: jax.Array, new: jax.Array) -> jax.Array:
    """Sets values [c, V / ways] at ids [c, k], as far as they are this device's."""
    size = values.shape[1]
    places = jnp.where((ids >= 0) & (ids < size), ids, size)  # size: dropped
    rows = jnp.arange(len(ids))[:, None]
    return values.at[rows, places].set(new, mode="drop")


def _logsumexp(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns log Σ exp over the last axis, which ``axes`` split: [c]."""
    local = jax.nn.logsumexp(x, axis=-1)
    if not axes:
        return local
    return jax.nn.logsumexp(lax.all_gather(local, axes), axis=0)
