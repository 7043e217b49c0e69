"""The selective scan in XLA alone: chunk after chunk, and within one token after token.

On a CPU the loop over tokens is faster than an associative scan over a chunk (2.2 times
forward, 1.8 times backward, 4,096 tokens of 768 channels with 16 numbers of state),
which reads and writes [chunk, F, N] several times. States are [R, N, F] here: channels
are many, and lie along a TPU's lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.selective_scan.params import ScanParams


class ChunkTokens(NamedTuple):
    """What the loop reads of tokens: of one, or along further leading axes of many."""

    x: jax.Array
    """[..., R, F]."""
    dt: jax.Array
    """[..., R, F]."""
    B: jax.Array
    """[..., R, N]."""
    C: jax.Array
    """[..., R, N]."""
    starts: jax.Array | None
    """bool [..., R]."""


def scan_forward(
    params: ScanParams, chunk_tokens: int, *, keeps_states: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Scans all tokens.

    Returns:
        y [R, T, F] in x's dtype; the state after the last token, [R, F, N]; and the
        states before each chunk, [chunks, R, N, F], if ``keeps_states``.
    """
    dtype = params.state.dtype
    rates = params.A.T.astype(dtype)
    skip = params.D.astype(dtype)

    def run_token(state: jax.Array, token: ChunkTokens) -> tuple[jax.Array, jax.Array]:
        wide = widen_token(token, params.dt_bias, dtype)
        state = advance_state(state, wide, rates)
        y = read_state(state, wide, skip)
        return state, y.astype(params.x.dtype)

    def run_chunk(
        state: jax.Array, chunk: ChunkTokens
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
        after, y = lax.scan(run_token, state, chunk)
        return after, (y, state if keeps_states else None)

    chunks = _split_tokens(params, chunk_tokens)
    before = params.state.swapaxes(1, 2)
    state, (y, states) = lax.scan(run_chunk, before, chunks)
    num_tokens = params.x.shape[1]
    return _join_chunks(y, num_tokens), state.swapaxes(1, 2), states


def scan_backward(
    params: ScanParams,
    states: jax.Array,
    d_y: jax.Array,
    d_state: jax.Array,
    chunk_tokens: int,
) -> ScanParams:
    """Returns gradients from those of y [R, T, F] and of the state after the last
    token, [R, F, N]; ``states`` are those before each chunk."""
    dtype = params.state.dtype
    rates = params.A.T.astype(dtype)
    skip = params.D.astype(dtype)

    def recompute_token(
        state: jax.Array, token: ChunkTokens
    ) -> tuple[jax.Array, jax.Array]:
        wide = widen_token(token, params.dt_bias, dtype)
        return advance_state(state, wide, rates), state

    def reverse_token(
        carry: tuple[jax.Array, jax.Array, jax.Array],
        inputs: tuple[ChunkTokens, jax.Array, jax.Array],
    ):
        """Goes back through one token, with d_state that of the state after it."""
        d_state, d_rates, after = carry
        token, before, d_y = inputs
        x, dt, B, C, starts = widen_token(token, params.dt_bias, dtype)
        d_y = d_y.astype(dtype)
        # y = Σ_n C · h + D · x.
        d_C = jnp.sum(after * d_y[:, None, :], axis=2)
        d_state = d_state + d_y[:, None, :] * C[:, :, None]
        # h = decay · before + B · (dt · x).
        d_drive = jnp.sum(d_state * B[:, :, None], axis=1)
        d_B = jnp.sum(d_state * (dt * x)[:, None, :], axis=2)
        d_before = d_state * compute_decay(dt, rates, starts)
        # decay = exp(dt · A), and so d decay · decay = d_before · before.
        d_exponent = d_before * before
        d_rates = d_rates + d_exponent * dt[:, None, :]
        d_dt = jnp.sum(d_exponent * rates, axis=1) + d_drive * x
        if params.dt_bias is not None:
            # Of dt = softplus(raw): σ(raw) = 1 − exp(−dt).
            d_dt = d_dt * -jnp.expm1(-dt)
        d_x = d_drive * dt + d_y * skip
        gradients = ChunkTokens(d_x, d_dt, d_B, d_C, None)
        narrowed = jax.tree.map(
            lambda gradient, array: gradient.astype(array.dtype),
            gradients,
            token._replace(starts=None),
        )
        return (d_before, d_rates, before), narrowed

    def reverse_chunk(
        carry: tuple[jax.Array, jax.Array],
        inputs: tuple[ChunkTokens, jax.Array, jax.Array],
    ):
        chunk, state, chunk_d_y = inputs
        after, befores = lax.scan(recompute_token, state, chunk)
        (d_state, d_rates, _), gradients = lax.scan(
            reverse_token, (*carry, after), (chunk, befores, chunk_d_y), reverse=True
        )
        return (d_state, d_rates), gradients

    chunks = _split_tokens(params, chunk_tokens)
    d_y_chunks = _split_into_chunks(d_y, chunk_tokens, 0)
    d_after = d_state.swapaxes(1, 2)
    # Rows are summed at the end: they may lie on several devices.
    carry = (d_after, jnp.zeros_like(d_after))
    inputs = (chunks, states, d_y_chunks)
    (d_before, d_rates), gradients = lax.scan(
        reverse_chunk, carry, inputs, reverse=True
    )
    num_tokens = params.x.shape[1]
    d_skip = jnp.sum(d_y.astype(dtype) * params.x.astype(dtype), axis=(0, 1))
    d_dt = _join_chunks(gradients.dt, num_tokens)
    d_bias = None
    if params.dt_bias is not None:
        d_bias = jnp.sum(d_dt.astype(dtype), axis=(0, 1)).astype(params.dt_bias.dtype)
    return ScanParams(
        x=_join_chunks(gradients.x, num_tokens),
        dt=d_dt,
        A=jnp.sum(d_rates, axis=0).T.astype(params.A.dtype),
        B=_join_chunks(gradients.B, num_tokens),
        C=_join_chunks(gradients.C, num_tokens),
        D=d_skip.astype(params.D.dtype),
        dt_bias=d_bias,
        starts=None,
        state=d_before.swapaxes(1, 2),
    )


def advance_state(state: jax.Array, token: ChunkTokens, rates: jax.Array) -> jax.Array:
    """Returns the state [R, N, F] after one token; ``rates`` is A turned around, [N,
    F]."""
    decay = compute_decay(token.dt, rates, token.starts)
    drive = token.dt * token.x
    return decay * state + drive[:, None, :] * token.B[:, :, None]


def read_state(state: jax.Array, token: ChunkTokens, skip: jax.Array) -> jax.Array:
    """Returns y [R, F] of a token from the state [R, N, F] after it; ``skip`` is D."""
    return jnp.sum(state * token.C[:, :, None], axis=1) + skip * token.x


def compute_decay(
    dt: jax.Array, rates: jax.Array, starts: jax.Array | None
) -> jax.Array:
    """Returns what a token multiplies the state by, [R, N, F]; 0 where a document
    begins."""
    decay = jnp.exp(dt[:, None, :] * rates)
    if starts is not None:
        decay = jnp.where(starts[:, None, None], 0, decay)
    return decay


def compute_step_sizes(
    dt: jax.Array, dt_bias: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
    """Returns step sizes [..., F] in ``dtype``: dt, or softplus(dt + dt_bias)."""
    wide = dt.astype(dtype)
    if dt_bias is None:
        return wide
    return jax.nn.softplus(wide + dt_bias.astype(dtype))


def find_still_step(dt_bias: jax.Array | None) -> float:
    """Returns the dt of a step of size 0, which leaves the state as it is."""
    return 0.0 if dt_bias is None else -jnp.inf


def widen_token(
    token: ChunkTokens, dt_bias: jax.Array | None, dtype: DTypeLike
) -> ChunkTokens:
    """Returns a token in the dtype of the arithmetic, with its step size for dt."""
    return ChunkTokens(
        token.x.astype(dtype),
        compute_step_sizes(token.dt, dt_bias, dtype),
        token.B.astype(dtype),
        token.C.astype(dtype),
        token.starts,
    )


def _split_tokens(params: ScanParams, chunk_tokens: int) -> ChunkTokens:
    """Returns all tokens in chunks, arrays [chunks, c, R, ...]. Steps of size 0 fill
    the last."""
    still = find_still_step(params.dt_bias)
    starts = params.starts
    if starts is not None:
        starts = _split_into_chunks(starts, chunk_tokens, 0)
    return ChunkTokens(
        _split_into_chunks(params.x, chunk_tokens, 0),
        _split_into_chunks(params.dt, chunk_tokens, still),
        _split_into_chunks(params.B, chunk_tokens, 0),
        _split_into_chunks(params.C, chunk_tokens, 0),
        starts,
    )


def _split_into_chunks(
    array: jax.Array, chunk_tokens: int, fill_value: float
) -> jax.Array:
    """Splits [R, T, ...] → [chunks, c, R, ...] with equal c ≤ ``chunk_tokens``."""
    num_rows, num_tokens, *features = array.shape
    num_chunks = -(-num_tokens // chunk_tokens)
    chunk = -(-num_tokens // num_chunks)
    num_added = num_chunks * chunk - num_tokens
    padding = ((0, 0), (0, num_added), *((0, 0),) * len(features))
    padded = jnp.pad(array, padding, constant_values=fill_value)
    by_chunk = padded.reshape(num_rows, num_chunks, chunk, *features)
    return jnp.moveaxis(by_chunk, 0, 2)


def _join_chunks(array: jax.Array, num_tokens: int) -> jax.Array:
    """Joins [chunks, c, R, ...] → [R, T, ...]; inverts :func:`_split_into_chunks`."""
    num_chunks, chunk, num_rows, *features = array.shape
    by_row = jnp.moveaxis(array, 2, 0)
    joined = by_row.reshape(num_rows, num_chunks * chunk, *features)
    return joined[:, :num_tokens]
