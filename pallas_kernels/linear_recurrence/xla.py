"""Linear recurrences in a form that any XLA backend compiles.

Blocks of :data:`~pallas_kernels.linear_recurrence.params.BLOCK_TOKENS` tokens follow
each other. Within a block, products of a chunk with itself run for all its chunks at
once, and a scan hands the state from chunk to chunk. The backward pass goes through
the blocks from the last one, and computes each again from the state at its start: what
exists at once is a block's.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.linear_recurrence.chunks import (
    ChunkSums,
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

Arrays = TypeVar("Arrays", RecurrenceOperands, jax.Array | None)


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


def _slice_block(arrays: Arrays, number: jax.Array, plan: ChunkPlan) -> Arrays:
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
    B, N, K, V = state.shape
    layout = _Layout(B, operands.k.shape[1] // chunk, chunk, operands.k.shape[2], N)
    dtype = get_state_dtype(operands)
    split = partial(layout.split, dtype=dtype)
    precision = get_precision(operands)
    matmul = partial(jnp.matmul, precision=precision)
    k = split(operands.k)
    v = split(operands.v)
    log_decay = operands.log_decay
    if not operands.decays_by_channel:
        log_decay = log_decay[..., None]
    sums = sum_decays(split(log_decay))
    state = state.reshape(-1, N // layout.H, K, V)
    if operands.beta is None:
        last_state, states = _sum_states(k, v, sums, state, layout, precision)
        written = v
    else:
        beta = split(operands.beta[..., None])
        last_state, states, written = _apply_delta_rule(
            k, v, beta, sums, state, layout, precision
        )
    last_state = last_state.reshape(B, N, K, V)
    if operands.q is None:
        return None, last_state

    q = split(operands.q)
    weights = assemble(multiply_decayed(q, k, sums, diagonal=True, precision=precision))
    from_start = jnp.exp(sums.chunk.prefix)
    if operands.decays_by_channel:
        output = matmul(q * from_start, states)
    else:
        output = matmul(q, states) * from_start
    output = scale * (output + matmul(weights, written))
    return layout.join(output).astype(operands.v.dtype), last_state


class _Layout(NamedTuple):
    """A block's tokens by chunk and key head: [Z, G, chunk, d], Z = chunks · B · H.

    The dimensions of Z are one because levels of blocks add two, and XLA for CPUs
    (jaxlib 0.10.2) writes out of bounds in sums over products of seven.
    """

    B: int
    num_chunks: int
    chunk: int
    H: int
    N: int

    def split(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns [B, tokens, heads, d] as [Z, heads / H, chunk, d]."""
        heads, width = x.shape[2:]
        group = heads // self.H
        x = x.reshape(self.B, self.num_chunks, self.chunk, self.H, group, width)
        x = x.transpose(1, 0, 3, 4, 2, 5).astype(dtype)
        return x.reshape(-1, group, self.chunk, width)

    def join(self, x: jax.Array) -> jax.Array:
        """Returns [Z, G, chunk, d] as [B, tokens, N, d]."""
        group = self.N // self.H
        width = x.shape[-1]
        x = x.reshape(self.num_chunks, self.B, self.H, group, self.chunk, width)
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.B, -1, self.N, width)

    def stack_chunks(self, x: jax.Array) -> jax.Array:
        """Returns [Z, ...] as [chunks, B · H, ...], to be scanned over."""
        return x.reshape(self.num_chunks, self.B * self.H, *x.shape[1:])


def _sum_states(
    k: jax.Array,
    v: jax.Array,
    sums: ChunkSums,
    state: jax.Array,
    layout: _Layout,
    precision: lax.Precision,
) -> tuple[jax.Array, jax.Array]:
    """Returns the states behind the block, [B · H, G, K, V], and before each chunk, [Z,
    G, K, V], without a delta rule."""
    to_end = jnp.exp(sums.chunk.suffix)
    if to_end.shape[-1] == 1:
        added = jnp.matmul(k.mT, v * to_end, precision=precision)
    else:
        added = jnp.matmul((k * to_end).mT, v, precision=precision)
    over_chunk = jnp.exp(sums.total).mT  # [Z, G, K or 1, 1]

    def advance(state, inputs):
        over_chunk, added = inputs
        return over_chunk * state + added, state

    inputs = jax.tree.map(layout.stack_chunks, (over_chunk, added))
    last_state, states = lax.scan(advance, state, inputs)
    return last_state, states.reshape(-1, *states.shape[2:])


def _apply_delta_rule(
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    sums: ChunkSums,
    state: jax.Array,
    layout: _Layout,
    precision: lax.Precision,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what :func:`_sum_states` does, and U, [Z, G, chunk, V]."""
    matmul = partial(jnp.matmul, precision=precision)
    products = multiply_decayed(k, k, sums, diagonal=False, precision=precision)
    inverse = invert_unit_lower(scale_rows(products, beta), precision)
    from_start = jnp.exp(sums.chunk.prefix)
    to_end = jnp.exp(sums.chunk.suffix)
    over_chunk = jnp.exp(sums.total).mT  # [Z, G, K or 1, 1]
    new = matmul(inverse, beta * v)
    decays_by_channel = to_end.shape[-1] > 1
    if decays_by_channel:
        read = matmul(inverse, beta * from_start * k)
        keys = k * to_end
    else:
        # Value heads of one key head share its keys.
        read = matmul(inverse * (beta * from_start).mT, k)
        keys = k

    def advance(state, inputs):
        over_chunk, new, read, keys, to_end = inputs
        written = new - matmul(read, state)
        to_add = written if decays_by_channel else written * to_end
        next_state = over_chunk * state + matmul(keys.mT, to_add)
        return next_state, (state, written)

    inputs = (over_chunk, new, read, keys, to_end)
    inputs = jax.tree.map(layout.stack_chunks, inputs)
    last_state, (states, written) = lax.scan(advance, state, inputs)
    return last_state, states.reshape(-1, *states.shape[2:]), written.reshape(v.shape)
