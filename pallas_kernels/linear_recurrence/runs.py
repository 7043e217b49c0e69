"""Runs of tokens as maps of states, for a sequence that is split over devices.

A device that has a run of neighbouring tokens needs the state before it. What a run
does to a state is affine, S ↦ transition·S + state, and maps of neighbouring runs
combine associatively: devices exchange summaries, not tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence.api import advance_state
from pallas_kernels.linear_recurrence.params import (
    RecurrenceOperands,
    get_state_dtype,
    mark_tokens,
    validate_operands,
)


class StateTransition(NamedTuple):
    """What a run of tokens does to the state before it: S ↦ transition·S + state.

    Every array of it is zero or more and finite for log decays that are not positive;
    where a document starts in the run, ``transition`` is exactly zero.
    """

    transition: jax.Array
    """fp32: [B, N] a factor a head, [B, N, K] a factor a key channel, or [B, N, K, K] a
    matrix (the delta rule's)."""
    state: jax.Array
    """fp32 [B, N, K, V], the state behind the run if it was zero before."""


def summarize_run(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None = None,
    *,
    starts: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> StateTransition:
    """Computes what a run of tokens does to the state before it; differentiable, with
    the memory of :func:`~pallas_kernels.linear_recurrence.linear_recurrence`.

    Args:
        k, v, log_decay, beta, starts, token_mask: those of the run's tokens, as for
            ``linear_recurrence``. The scale and queries do not matter.
        chunk_size, backend: as there.

    Raises:
        ValueError: shapes that do not belong together.
    """
    operands = RecurrenceOperands(None, k, v, log_decay, beta)
    validate_operands(operands)
    operands = mark_tokens(operands, starts, token_mask)
    B, N, K, V = operands.state_shape
    dtype = get_state_dtype(operands)
    if beta is None:
        total = jnp.sum(operands.log_decay, axis=1)
        state = jnp.zeros((B, N, K, V), dtype)
        state = advance_state(operands, state, chunk_size, backend)
        return StateTransition(jnp.exp(total), state)
    # The map of a state's columns is the same for each of them: the columns of the unit
    # matrix, which write nothing new, become the transition's.
    unit = jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, N, K, K))
    state = jnp.concatenate([jnp.zeros((B, N, K, V), dtype), unit], axis=3)
    v = jnp.pad(v, [(0, 0), (0, 0), (0, 0), (0, K)])
    state = advance_state(operands._replace(v=v), state, chunk_size, backend)
    return StateTransition(state[..., V:], state[..., :V])


def combine_runs(first: StateTransition, second: StateTransition) -> StateTransition:
    """Returns the summary of two runs that follow each other; associative but for
    rounding."""
    state = apply_run(second, first.state)
    if second.transition.ndim == 4:
        transition = _multiply(second.transition, first.transition)
    else:
        transition = second.transition * first.transition
    return StateTransition(transition, state)


def apply_run(run: StateTransition, state: jax.Array) -> jax.Array:
    """Returns the state behind a run, fp32 [B, N, K, V], from the one before it."""
    transition = run.transition
    if transition.ndim == 4:
        return _multiply(transition, state) + run.state
    # [B, N] or [B, N, K] → [B, N, 1 or K, 1].
    factors = transition.reshape(*state.shape[:2], -1, 1)
    return factors * state + run.state


def find_segment_starts(
    segment_ids: jax.Array, previous_ids: jax.Array | None = None
) -> jax.Array:
    """Returns tokens whose document differs from that of the token before, bool [B, T].

    Args:
        segment_ids: int [B, T].
        previous_ids: int [B], of the token before the first, as on the device before;
            None: the first token continues what the initial state is of.
    """
    before = segment_ids[:, :1] if previous_ids is None else previous_ids[:, None]
    shifted = jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    return segment_ids != shifted


def _multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
