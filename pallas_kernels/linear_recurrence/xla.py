"""Linear recurrences in a form that any XLA backend compiles.

Blocks of :data:`~pallas_kernels.linear_recurrence.params.BLOCK_TOKENS` tokens follow
each other. Within a block, products of a chunk with itself run for all its chunks at
once, and a scan hands the state from chunk to chunk. The backward pass goes through
the blocks from the last one, and computes each again from the state at its start: what
exists at once is a block's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_recurrence.chunks import (
    assemble,
    invert_unit_lower,
    multiply_decayed,
    scale_rows,
    sum_decays,
)
from pallas_kernels.linear_recurrence.params import (
    ChunkPlan,
    RecurrenceCall,
    RecurrenceOperands,
    get_precision,
    get_state_dtype,
    pad_tokens,
    plan_chunks,
)


def supports(operands: RecurrenceOperands, call: RecurrenceCall) -> bool:
    """Returns True: XLA runs everything."""
    del operands, call
    return True


def forward(
    operands: RecurrenceOperands, state: jax.Array, call: RecurrenceCall
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """See :class:`~pallas_kernels.linear_recurrence.params.RecurrenceKernel`."""
    num_tokens = operands.k.shape[1]
    plan = plan_chunks(num_tokens, call.chunk_size)
    operands = pad_tokens(operands, plan.tokens)

    def run(carry, number):
        state, output = carry
        block = _slice_block(operands, number, plan)
        block_output, next_state = run_block(block, state, plan.chunk, call.scale)
        if block_output is not None:
            output = _write_block(output, block_output, number, plan)
        return (next_state, output), state

    output = None if operands.q is None else jnp.zeros_like(operands.v)
    (state, output), block_states = lax.scan(
        run, (state, output), jnp.arange(plan.num_blocks)
    )
    if output is not None:
        output = output[:, :num_tokens]
    return output, state, block_states


def backward(
    operands: RecurrenceOperands,
    block_states: jax.Array,
    d_output: jax.Array | None,
    d_final_state: jax.Array,
    call: RecurrenceCall,
) -> tuple[RecurrenceOperands, jax.Array]:
    """See :class:`~pallas_kernels.linear_recurrence.params.RecurrenceKernel`."""
    num_tokens = operands.k.shape[1]
    plan = plan_chunks(num_tokens, call.chunk_size)
    operands = pad_tokens(operands, plan.tokens)
    if d_output is not None:
        missing = plan.tokens - num_tokens
        d_output = jnp.pad(d_output, [(0, 0), (0, missing), (0, 0), (0, 0)])

    def run(carry, inputs):
        d_state, gradients = carry
        number, state = inputs
        block = _slice_block(operands, number, plan)
        d_block_output = _slice_block(d_output, number, plan)
        run_forward = partial(run_block, chunk=plan.chunk, scale=call.scale)
        _, pull = jax.vjp(run_forward, block, state)
        d_block, d_state = pull((d_block_output, d_state))
        gradients = jax.tree.map(
            lambda whole, part: _write_block(whole, part, number, plan),
            gradients,
            d_block,
        )
        return (d_state, gradients), None

    gradients = jax.tree.map(jnp.zeros_like, operands)
    numbers = jnp.arange(plan.num_blocks)
    (d_state, gradients), _ = lax.scan(
        run, (d_final_state, gradients), (numbers, block_states), reverse=True
    )
    gradients = jax.tree.map(lambda x: x[:, :num_tokens], gradients)
    return gradients, d_state


def _slice_block(arrays, number: jax.Array, plan: ChunkPlan):
    """Returns a block of arrays [B, T, ...]."""

    def cut(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, number * plan.block, plan.block, axis=1)

    return jax.tree.map(cut, arrays)


def _write_block(
    whole: jax.Array, block: jax.Array, number: jax.Array, plan: ChunkPlan
) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, block, number * plan.block, axis=1)


def run_block(
    operands: RecurrenceOperands, state: jax.Array, chunk: int, scale: float
) -> tuple[jax.Array | None, jax.Array]:
    """Runs one block: output [B, tokens, N, V] in v's dtype (None without q), and the
    state behind it.

    With b the sum of log decays from a chunk's start, S the state there and U the rows
    that tokens write (v, or what the delta rule leaves of it), a chunk computes

        A = tril(β·k·kᵀ·exp(b_i − b_j), −1)
        U = (I + A)⁻¹·β·(v − exp(b)·k·S)
        o = scale·(exp(b)·q·S + tril(q·kᵀ·exp(b_i − b_j))·U)
        S' = exp(b_L)·S + (exp(b_L − b)·k)ᵀ·U

    (Yang et al. 2024, Gated Delta Networks, §3.3; by channel Kimi Team 2025, Kimi
    Linear, §3; without A and β Dao & Gu 2024, Mamba-2, §6).

    Args:
        operands: [B, tokens, ...], tokens a multiple of ``chunk``.
        state: [B, N, K, V].
    """
    dtype = get_state_dtype(operands)
    precision = get_precision(operands)
    matmul = partial(jnp.matmul, precision=precision)
    B, N, K, V = state.shape
    tokens, H = operands.k.shape[1:3]
    G = N // H
    num_chunks = tokens // chunk

    # Z is chunks × rows × key heads. The dimensions are one because levels of blocks add
    # two, and XLA for CPUs (jaxlib 0.10.2) writes out of bounds in sums over products of
    # seven.
    def by_chunk(x: jax.Array) -> jax.Array:
        """Returns [B, tokens, heads, d] as [Z, heads / H, chunk, d]."""
        heads, width = x.shape[2:]
        x = x.reshape(B, num_chunks, chunk, H, heads // H, width)
        x = x.transpose(1, 0, 3, 4, 2, 5).astype(dtype)
        return x.reshape(-1, heads // H, chunk, width)

    def over_chunks(x: jax.Array) -> jax.Array:
        """Returns [Z, ...] as [chunks, Z / chunks, ...], to be scanned over."""
        return x.reshape(num_chunks, B * H, *x.shape[1:])

    k = by_chunk(operands.k)
    v = by_chunk(operands.v)
    log_decay = operands.log_decay
    if not operands.decays_by_channel:
        log_decay = log_decay[..., None]
    sums = sum_decays(by_chunk(log_decay))
    # Factors to a token from the chunk's start, and from it to the chunk's end.
    from_start = jnp.exp(sums.chunk.prefix)
    to_end = jnp.exp(sums.chunk.suffix)
    over_chunk = jnp.exp(sums.total).mT  # [Z, G, K or 1, 1]
    state = state.reshape(B * H, G, K, V)

    if operands.beta is None:
        written = v
        if operands.decays_by_channel:
            added = matmul((k * to_end).mT, v)
        else:
            added = matmul(k.mT, v * to_end)

        def advance(state, inputs):
            over_chunk, added = inputs
            return over_chunk * state + added, state

        inputs = jax.tree.map(over_chunks, (over_chunk, added))
        last_state, states = lax.scan(advance, state, inputs)
    else:
        beta = by_chunk(operands.beta[..., None])
        products = multiply_decayed(k, k, sums, diagonal=False, precision=precision)
        inverse = invert_unit_lower(scale_rows(products, beta), precision)
        new = matmul(inverse, beta * v)
        if operands.decays_by_channel:
            read = matmul(inverse, beta * from_start * k)
            to_end_k = k * to_end
        else:
            read = matmul(inverse * (beta * from_start).mT, k)
            to_end_k = k

        def advance_delta(state, inputs):
            over_chunk, new, read, to_end_k, to_end = inputs
            written = new - matmul(read, state)
            decayed_rows = written if operands.decays_by_channel else written * to_end
            next_state = over_chunk * state + matmul(to_end_k.mT, decayed_rows)
            return next_state, (state, written)

        inputs = (over_chunk, new, read, to_end_k, to_end)
        inputs = jax.tree.map(over_chunks, inputs)
        last_state, (states, written) = lax.scan(advance_delta, state, inputs)
        written = written.reshape(v.shape)
    last_state = last_state.reshape(B, N, K, V)
    if operands.q is None:
        return None, last_state

    q = by_chunk(operands.q)
    states = states.reshape(-1, G, K, V)
    weights = assemble(multiply_decayed(q, k, sums, diagonal=True, precision=precision))
    if operands.decays_by_channel:
        output = matmul(q * from_start, states)
    else:
        output = matmul(q, states) * from_start
    output = scale * (output + matmul(weights, written))
    # [Z, G, chunk, V] → [B, tokens, N, V].
    output = output.reshape(num_chunks, B, H, G, chunk, V).transpose(1, 0, 4, 2, 3, 5)
    output = output.reshape(B, tokens, N, V)
    return output.astype(operands.v.dtype), last_state
