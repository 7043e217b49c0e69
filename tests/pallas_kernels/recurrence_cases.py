"""Linear recurrences of every kind, drawn at random, and their definition in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.linear_recurrence.params import RecurrenceOperands

# Key heads and value heads, sizes of keys and values: none a power of two but 2.
H, N, K, V = 2, 6, 20, 12
SCALE = K**-0.5


class RecurrenceKind(NamedTuple):
    """A family of recurrences."""

    by_channel: bool = False
    """Whether each key channel has a decay of its own."""
    delta: bool = False
    """Whether it is a delta rule."""


KINDS = {
    "state space": RecurrenceKind(),
    "gated linear attention": RecurrenceKind(by_channel=True),
    "gated delta": RecurrenceKind(delta=True),
    "kimi delta": RecurrenceKind(by_channel=True, delta=True),
}


class RecurrenceCase(NamedTuple):
    """Arrays of one recurrence, fp32."""

    operands: RecurrenceOperands
    initial_state: np.ndarray
    """[B, N, K, V]."""
    starts: np.ndarray
    """bool [B, T]."""


def draw_case(
    kind: str,
    num_tokens: int,
    *,
    rows: int = 2,
    decay: float = 0.3,
    strongest: float = 0.0,
    seed: int = 0,
) -> RecurrenceCase:
    """Draws a case whose documents have about 20 tokens.

    Args:
        decay: mean of the negative log decays; 0: none.
        strongest: half of the log decays are drawn between −``strongest`` and 0 instead.
    """
    by_channel, delta = KINDS[kind]
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, num_tokens, H, K))
    k = rng.standard_normal((rows, num_tokens, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((rows, num_tokens, N, V))
    shape = (rows, num_tokens, N, K) if by_channel else (rows, num_tokens, N)
    log_decay = -decay * rng.exponential(size=shape)
    if strongest:
        strong = -strongest * rng.random(shape)
        log_decay = np.where(rng.random(shape) < 0.5, strong, log_decay)
    beta = rng.random((rows, num_tokens, N)) if delta else None
    state = rng.standard_normal((rows, N, K, V))
    starts = rng.random((rows, num_tokens)) < 0.05
    arrays = [q, k, v, log_decay, beta]
    narrow = [None if x is None else x.astype(np.float32) for x in arrays]
    operands = RecurrenceOperands(*narrow)
    return RecurrenceCase(operands, state.astype(np.float32), starts)


def define_recurrence(
    case: RecurrenceCase, scale: float = SCALE
) -> tuple[np.ndarray, np.ndarray]:
    """Computes output [B, T, N, V] and final state [B, N, K, V] in float64, a row, a head
    and a token after the other."""
    wide = [None if x is None else np.asarray(x, np.float64) for x in case.operands]
    q, k, v, log_decay, beta = wide
    rows, tokens, heads, width = v.shape
    group = heads // k.shape[2]
    unit = np.eye(k.shape[3])
    output = np.zeros((rows, tokens, heads, width))
    final = np.zeros((rows, heads, k.shape[3], width))
    for row in range(rows):
        for head in range(heads):
            state = case.initial_state[row, head].astype(np.float64)
            for token in range(tokens):
                if case.starts[row, token]:
                    state = np.zeros_like(state)
                key = k[row, token, head // group]
                value = v[row, token, head]
                decay = np.exp(log_decay[row, token, head]) * np.ones(len(key))
                state = decay[:, None] * state
                write = 1.0
                if beta is not None:
                    write = beta[row, token, head]
                    state = (unit - write * np.outer(key, key)) @ state
                state = state + write * np.outer(key, value)
                query = q[row, token, head // group]
                output[row, token, head] = scale * (query @ state)
            final[row, head] = state
    return output, final


def draw_cotangents(case: RecurrenceCase) -> tuple[np.ndarray, np.ndarray]:
    """Draws those of the output and of the final state."""
    rng = np.random.default_rng(9)
    output = rng.standard_normal(case.operands.v.shape)
    state = rng.standard_normal(case.initial_state.shape)
    return output.astype(np.float32), state.astype(np.float32)


def near(result: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    """Compares arrays, relative to the largest expected value where it is above 1."""
    expected = np.asarray(expected, np.float64)
    size = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=0, atol=tolerance * size
    )


def run_with_gradients(
    recurrence: Callable[..., Any], case: RecurrenceCase, cotangents: Any
) -> tuple[Any, Any]:
    """Returns a recurrence's output and final state, and the gradients of operands and
    initial state."""

    def recur(operands: RecurrenceOperands, state: jax.Array) -> Any:
        return recurrence(
            *operands, initial_state=state, scale=SCALE, starts=case.starts
        )

    results, pull = jax.vjp(recur, case.operands, case.initial_state)
    return results, pull(cotangents)
