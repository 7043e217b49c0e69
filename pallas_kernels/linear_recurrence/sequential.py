"""Linear recurrences one token after the other: decoding, and what chunks are compared
with."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_recurrence.params import (
    RecurrenceOperands,
    get_state_dtype,
    mark_tokens,
    validate_operands,
)


def linear_recurrence_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None = None,
    *,
    state: jax.Array,
    scale: float = 1.0,
    starts: jax.Array | None = None,
    token_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs one token of :func:`~pallas_kernels.linear_recurrence.linear_recurrence`, as
    decoding does; differentiable.

    Args:
        q, k: [B, H, K].
        v: [B, N, V].
        log_decay: [B, N], or [B, N, K] by key channel.
        beta: [B, N], or None.
        state: [B, N, K, V].
        scale: factor on outputs.
        starts: bool [B], rows whose state counts as zero before the token.
        token_mask: bool [B], False in rows whose state stays as it is.

    Returns:
        Output [B, N, V] in v's dtype, and the next state [B, N, K, V], fp32.

    Raises:
        ValueError: shapes that do not belong together.
    """
    operands = RecurrenceOperands(q, k, v, log_decay, beta)
    with_time = jax.tree.map(lambda x: x[:, None], operands)
    validate_operands(with_time)
    starts = None if starts is None else starts[:, None]
    token_mask = None if token_mask is None else token_mask[:, None]
    marked = mark_tokens(with_time, starts, token_mask)
    token = jax.tree.map(lambda x: x[:, 0], marked)
    return _advance(token, state, scale)


def linear_recurrence_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    starts: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes :func:`~pallas_kernels.linear_recurrence.linear_recurrence` by a scan
    over tokens: the definition, and slow. Autodiff keeps the state of every token."""
    operands = RecurrenceOperands(q, k, v, log_decay, beta)
    validate_operands(operands)
    operands = mark_tokens(operands, starts, token_mask)
    state = initial_state
    if state is None:
        state = jnp.zeros(operands.state_shape, get_state_dtype(operands))

    def advance(state, token):
        output, state = _advance(token, state, scale)
        return state, output

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), operands)
    state, outputs = lax.scan(advance, state, tokens)
    return jnp.moveaxis(outputs, 0, 1), state


def _advance(
    token: RecurrenceOperands, state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Runs one token, arrays without T: output [B, N, V] and the next state."""
    dtype = get_state_dtype(token)
    k = token.k
    v = token.v
    B, N, V = v.shape
    H, K = k.shape[1:]
    G = N // H
    state = state.astype(dtype).reshape(B, H, G, K, V)
    decay = jnp.exp(token.log_decay).reshape(B, H, G, -1, 1)
    state = decay * state
    k = k.astype(dtype)
    written = v.astype(dtype).reshape(B, H, G, V)
    # Sums over K as products of vectors: a matrix unit would round them to bf16.
    k_column = k[:, :, None, :, None]
    if token.beta is not None:
        read = jnp.sum(k_column * state, axis=3)
        beta = token.beta.astype(dtype).reshape(B, H, G, 1)
        written = beta * (written - read)
    state = state + k_column * written[:, :, :, None]
    assert token.q is not None
    q_column = token.q.astype(dtype)[:, :, None, :, None]
    output = scale * jnp.sum(q_column * state, axis=3)
    output = output.reshape(B, N, V).astype(v.dtype)
    return output, state.reshape(B, N, K, V)
