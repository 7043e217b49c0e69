"""Linear recurrences on a TPU: a head's blocks of tokens in turn, its state in VMEM.

A step of the grid is one block of a value head. Its chunks go in groups, whose products
without a state the compiler overlaps; the state goes from chunk to chunk in registers,
and from block to block in scratch memory. The backward pass goes through the blocks
from the last one: it runs a block again to have the states before its groups, then each
group forward and backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import find_largest_divisor, get_chip, round_up
from pallas_kernels.kernel_types import Index, Ref
from pallas_kernels.linear_recurrence.kernel_chunk import (
    ChunkOperands,
    make_level_sums,
    run_chunks,
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
from pallas_kernels.linear_recurrence.products import ProductPrecision

# Chunks whose products overlap: of more, the compiler spills.
FORWARD_GROUP = 4
BACKWARD_GROUP = 2
# Below, a chunk is no tile of 16-bit operands.
_LEAST_CHUNK = 16
_LANES = 128


def supports(operands: RecurrenceOperands, call: RecurrenceCall) -> bool:
    """Returns whether the kernel runs this: chunks of 16 tokens or more, operands of
    one type, bf16 or fp32, and blocks that VMEM holds."""
    types = {x.dtype for x in (operands.q, operands.k, operands.v) if x is not None}
    is_known = len(types) == 1 and types <= {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),
    }
    if not is_known or get_state_dtype(operands) != jnp.float32:
        return False
    sizes = _get_sizes(operands, call, BACKWARD_GROUP)
    needed = _count_backward_bytes(sizes, operands.k.dtype.itemsize)
    available = get_chip().vmem_bytes
    # What is left is for what the compiler spills: little by head; by channel about
    # eight arrays a level and chunk (8 MB for fp32 keys of 256).
    if sizes.decays_by_channel:
        levels = sizes.plan.chunk.bit_length() + 1
        level_bytes = 4 * sizes.plan.chunk * round_up(sizes.K, _LANES)
        needed += 8 * sizes.group * levels * level_bytes
    else:
        available = available * 3 // 4
    return sizes.plan.chunk >= _LEAST_CHUNK and needed <= available


ArrayT = TypeVar("ArrayT")
"""Arrays, their blocks' specs, or references to blocks."""


class _HeadArrays(NamedTuple, Generic[ArrayT]):
    """Operands with heads first: [B, heads, T, ...], or rows of chunks."""

    q: ArrayT | None
    k: ArrayT
    v: ArrayT
    log_decay: ArrayT
    """[B, N, blocks, chunks, L], or by channel [B, N, T, K]."""
    beta: ArrayT | None
    """[B, N, blocks, chunks, L]."""


class _Sizes(NamedTuple):
    """Static sizes of a kernel."""

    B: int
    H: int
    N: int
    K: int
    V: int
    plan: ChunkPlan
    group: int
    """Chunks of a group."""
    decays_by_channel: bool

    @property
    def num_groups(self) -> int:
        """Groups of a block."""
        return self.plan.chunks_per_block // self.group


def forward(
    operands: RecurrenceOperands, state: jax.Array, call: RecurrenceCall
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """See :class:`~pallas_kernels.linear_recurrence.params.RecurrenceKernel`."""
    num_tokens = operands.k.shape[1]
    sizes = _get_sizes(operands, call, FORWARD_GROUP)
    plan = sizes.plan
    arrays = _move_heads_first(pad_tokens(operands, plan.tokens), plan)
    sums = _get_level_sums(operands, plan)
    precision = _get_precision(operands)
    has_output = operands.q is not None
    run_group = partial(run_chunks, scale=call.scale, precision=precision)

    def kernel(refs, sums_ref, first_ref, output_ref, final_ref, states_ref, state_ref):
        """One block of a head.

        Args:
            refs: a ``_HeadArrays`` of a block.
            sums_ref: :func:`make_level_sums`, or None.
            first_ref: [K, V], the initial state.
            output_ref: [tokens, V], or None.
            final_ref, states_ref: [K, V], the state behind and before the block.
            state_ref: [K, V], the state that goes from block to block.
        """
        block = pl.program_id(2)
        level_sums = None if sums_ref is None else sums_ref[...]

        @pl.when(block == 0)
        def load_first():
            state_ref[...] = first_ref[...]

        states_ref[...] = state_ref[...]

        def run(group: Index, _) -> None:
            chunks = _read_group(refs, group, sizes)
            outputs, state = run_group(chunks, state_ref[...], level_sums)
            state_ref[...] = state
            for number, output in enumerate(outputs):
                rows = _get_chunk_rows(group, number, sizes)
                output_ref[rows, :] = output.astype(output_ref.dtype)

        _loop(sizes.num_groups, run)
        final_ref[...] = state_ref[...]

    B, N, K, V = sizes.B, sizes.N, sizes.K, sizes.V
    by_token, by_state, by_block = _make_index_maps(sizes, reverse=False)
    output_shape = jax.ShapeDtypeStruct((B, N, plan.tokens, V), operands.v.dtype)
    state_shape = jax.ShapeDtypeStruct((B, N, K, V), jnp.float32)
    states_shape = jax.ShapeDtypeStruct((plan.num_blocks, B, N, K, V), jnp.float32)
    results = pl.pallas_call(
        kernel,
        out_shape=(output_shape if has_output else None, state_shape, states_shape),
        grid=(B, N, plan.num_blocks),
        in_specs=(
            _make_operand_specs(arrays, sizes, reverse=False),
            _make_sums_spec(sums),
            pl.BlockSpec((None, None, K, V), by_state),
        ),
        out_specs=(
            pl.BlockSpec((None, None, plan.block, V), by_token) if has_output else None,
            pl.BlockSpec((None, None, K, V), by_state),
            pl.BlockSpec((None, None, None, K, V), by_block),
        ),
        scratch_shapes=(pltpu.VMEM((K, V), jnp.float32),),
        compiler_params=_get_compiler_params(),
        interpret=call.interpret,
        name="linear_recurrence_forward",
    )(arrays, sums, state)
    output, final_state, block_states = results
    if output is not None:
        output = output.swapaxes(1, 2)[:, :num_tokens]
    return output, final_state, block_states


def backward(
    operands: RecurrenceOperands,
    block_states: jax.Array,
    d_output: jax.Array | None,
    d_final_state: jax.Array,
    call: RecurrenceCall,
) -> tuple[RecurrenceOperands, jax.Array]:
    """See :class:`~pallas_kernels.linear_recurrence.params.RecurrenceKernel`."""
    num_tokens = operands.k.shape[1]
    sizes = _get_sizes(operands, call, BACKWARD_GROUP)
    plan = sizes.plan
    arrays = _move_heads_first(pad_tokens(operands, plan.tokens), plan)
    sums = _get_level_sums(operands, plan)
    precision = _get_precision(operands)
    run_group = partial(run_chunks, scale=call.scale, precision=precision)
    if d_output is not None:
        missing = plan.tokens - num_tokens
        d_output = jnp.pad(d_output, [(0, 0), (0, missing), (0, 0), (0, 0)])
        d_output = d_output.swapaxes(1, 2)

    def kernel(
        refs,
        sums_ref,
        first_ref,
        d_output_ref,
        d_final_ref,
        d_refs,
        d_first_ref,
        states_ref,
        d_state_ref,
    ):
        """One block of a head, the last block first.

        Args:
            refs, sums_ref: as of the forward pass.
            first_ref: [K, V], the state before the block.
            d_output_ref: [tokens, V], or None.
            d_final_ref, d_first_ref: [K, V], gradients of the states behind and before
                all blocks.
            d_refs: gradients of ``refs``.
            states_ref: [groups, K, V], the states before the block's groups.
            d_state_ref: [K, V], the gradient that goes from block to block.
        """
        level_sums = None if sums_ref is None else sums_ref[...]

        @pl.when(pl.program_id(2) == 0)
        def load_last():
            d_state_ref[...] = d_final_ref[...]

        states_ref[0] = first_ref[...]

        def advance(group: Index, _) -> None:
            chunks = [
                chunk._replace(q=None) for chunk in _read_group(refs, group, sizes)
            ]
            _, state = run_group(chunks, states_ref[group], level_sums)
            states_ref[group + 1] = state

        _loop(sizes.num_groups - 1, advance)

        def pull_back(number: Index, _) -> None:
            group = sizes.num_groups - 1 - number
            chunks = _read_group(refs, group, sizes)

            def run(chunks, state):
                return run_group(chunks, state, level_sums)

            _, pull = jax.vjp(run, chunks, states_ref[group])
            d_outputs = []
            if d_output_ref is not None:
                for chunk in range(sizes.group):
                    rows = _get_chunk_rows(group, chunk, sizes)
                    d_outputs.append(d_output_ref[rows, :].astype(jnp.float32))
            d_chunks, d_state = pull((d_outputs, d_state_ref[...]))
            d_state_ref[...] = d_state
            _write_group(d_refs, d_chunks, group, sizes)

        _loop(sizes.num_groups, pull_back)
        d_first_ref[...] = d_state_ref[...]

    B, N, K, V = sizes.B, sizes.N, sizes.K, sizes.V
    by_token, by_state, by_block = _make_index_maps(sizes, reverse=True)
    d_arrays = _shape_gradients(arrays, sizes)
    d_output_spec = pl.BlockSpec((None, None, plan.block, V), by_token)
    gradients, d_state = pl.pallas_call(
        kernel,
        out_shape=(d_arrays, jax.ShapeDtypeStruct((B, N, K, V), jnp.float32)),
        grid=(B, N, plan.num_blocks),
        in_specs=(
            _make_operand_specs(arrays, sizes, reverse=True),
            _make_sums_spec(sums),
            pl.BlockSpec((None, None, None, K, V), by_block),
            None if d_output is None else d_output_spec,
            pl.BlockSpec((None, None, K, V), by_state),
        ),
        out_specs=(
            _make_operand_specs(d_arrays, sizes, reverse=True, is_gradient=True),
            pl.BlockSpec((None, None, K, V), by_state),
        ),
        scratch_shapes=(
            pltpu.VMEM((sizes.num_groups, K, V), jnp.float32),
            pltpu.VMEM((K, V), jnp.float32),
        ),
        compiler_params=_get_compiler_params(),
        interpret=call.interpret,
        name="linear_recurrence_backward",
    )(arrays, sums, block_states, d_output, d_final_state)
    return _move_heads_back(gradients, operands, num_tokens), d_state


def _get_sizes(
    operands: RecurrenceOperands, call: RecurrenceCall, most_chunks: int
) -> _Sizes:
    B, T, H, K = operands.k.shape
    N, V = operands.v.shape[2:]
    plan = plan_chunks(T, call.chunk_size)
    if isinstance(call.block_sizes, int):
        most_chunks = call.block_sizes
    group = find_largest_divisor(plan.chunks_per_block, most_chunks)
    return _Sizes(B, H, N, K, V, plan, group, operands.decays_by_channel)


def _count_backward_bytes(sizes: _Sizes, itemsize: int) -> int:
    """Counts bytes of VMEM of the backward pass, which has the forward's operands and
    their gradients: blocks twice, one of them being copied."""
    plan = sizes.plan
    L = plan.chunk
    # VMEM is in tiles of 8 rows and _LANES numbers of 4 bytes.
    K = round_up(sizes.K, _LANES)
    V = round_up(sizes.V, _LANES)
    padded_chunk = round_up(L, _LANES)
    state_bytes = 4 * round_up(sizes.K, 8) * V

    # q, k, v and the gradients of v and of the output; those of q and k may be fp32.
    token_bytes = itemsize * (2 * K + 3 * V) + 4 * 2 * K
    if sizes.decays_by_channel:
        # Log decays and their gradients.
        token_bytes += 4 * 2 * K
    # A number a token, a row for each chunk: decays and beta, and their gradients.
    num_rows = round_up(plan.chunks_per_block, 8)
    rows_bytes = 4 * 4 * num_rows * padded_chunk
    sums_bytes = 2 * (L.bit_length() + 1) * L * padded_chunk

    copied_bytes = plan.block * token_bytes + 3 * state_bytes + rows_bytes + sums_bytes
    # States before the block's groups, and the gradient of one.
    scratch_bytes = (sizes.num_groups + 1) * state_bytes
    return 2 * copied_bytes + scratch_bytes


def _get_precision(operands: RecurrenceOperands) -> ProductPrecision:
    if get_precision(operands) == lax.Precision.HIGH:
        return ProductPrecision.BF16X3
    return ProductPrecision.FP32


def _get_compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=get_chip().vmem_bytes * 7 // 8,
    )


def _get_level_sums(operands: RecurrenceOperands, plan: ChunkPlan) -> jax.Array | None:
    if not operands.decays_by_channel:
        return None
    return jnp.asarray(make_level_sums(plan.chunk), jnp.bfloat16)


def _loop(count: int, body: Callable[[Index, None], None]) -> None:
    """Calls ``body(number, None)``, without a loop where it is called once."""
    if count == 1:
        body(0, None)
    elif count > 1:
        lax.fori_loop(0, count, body, None)


def _move_heads_first(
    operands: RecurrenceOperands, plan: ChunkPlan
) -> _HeadArrays[jax.Array]:
    def move(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2)

    def move_rows(x: jax.Array) -> jax.Array:
        """Returns [B, T, N] as [B, N, blocks, chunks, L], fp32."""
        B, _, N = x.shape
        by_head = x.astype(jnp.float32).swapaxes(1, 2)
        return by_head.reshape(B, N, plan.num_blocks, plan.chunks_per_block, plan.chunk)

    log_decay = operands.log_decay
    return _HeadArrays(
        None if operands.q is None else move(operands.q),
        move(operands.k),
        move(operands.v),
        move(log_decay) if operands.decays_by_channel else move_rows(log_decay),
        None if operands.beta is None else move_rows(operands.beta),
    )


def _move_heads_back(
    gradients: _HeadArrays[jax.Array], operands: RecurrenceOperands, num_tokens: int
) -> RecurrenceOperands:
    """Returns gradients like the operands: sums over the value heads of a key head."""

    def move(gradient: jax.Array, operand: jax.Array) -> jax.Array:
        B, N = gradient.shape[:2]
        H = operand.shape[2]
        by_head = gradient.reshape(B, N, -1, *operand.shape[3:])
        if N != H:
            by_group = by_head.reshape(B, H, N // H, *by_head.shape[2:])
            by_head = by_group.sum(2)
        by_token = by_head.swapaxes(1, 2)[:, :num_tokens]
        return by_token.astype(operand.dtype)

    d_q = None
    if gradients.q is not None and operands.q is not None:
        d_q = move(gradients.q, operands.q)
    d_beta = None
    if gradients.beta is not None and operands.beta is not None:
        d_beta = move(gradients.beta, operands.beta)
    return RecurrenceOperands(
        d_q,
        move(gradients.k, operands.k),
        move(gradients.v, operands.v),
        move(gradients.log_decay, operands.log_decay),
        d_beta,
    )


def _shape_gradients(
    arrays: _HeadArrays[jax.Array], sizes: _Sizes
) -> _HeadArrays[jax.ShapeDtypeStruct]:
    """Returns the gradients' shapes; of q and k a value head's each, to be summed."""
    grouped = jnp.float32 if sizes.H != sizes.N else arrays.k.dtype
    by_value_head = jax.ShapeDtypeStruct(
        (sizes.B, sizes.N, sizes.plan.tokens, sizes.K), grouped
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    q = None if arrays.q is None else by_value_head
    return shapes._replace(q=q, k=by_value_head)


def _make_index_maps(sizes: _Sizes, *, reverse: bool):
    """Returns index maps of what has tokens, of one state a head, and of one state a
    block, at (row, value head, step)."""
    last = sizes.plan.num_blocks - 1

    def number(step: Index) -> Index:
        return last - step if reverse else step

    def by_token(b, n, step):
        return b, n, number(step), 0

    def by_state(b, n, step):
        return b, n, 0, 0

    def by_block(b, n, step):
        return number(step), b, n, 0, 0

    return by_token, by_state, by_block


def _make_operand_specs(
    arrays: _HeadArrays[jax.Array] | _HeadArrays[jax.ShapeDtypeStruct],
    sizes: _Sizes,
    *,
    reverse: bool,
    is_gradient: bool = False,
) -> _HeadArrays[pl.BlockSpec]:
    """Returns the blocks of operands, or of their gradients, of which q's and k's have
    a value head each."""
    by_token, _, _ = _make_index_maps(sizes, reverse=reverse)
    plan = sizes.plan
    group = 1 if is_gradient else sizes.N // sizes.H

    def by_key_head(b, n, step):
        b, n, block, _ = by_token(b, n, step)
        return b, lax.div(n, group), block, 0

    def by_chunk(b, n, step):
        return *by_token(b, n, step), 0

    keys = pl.BlockSpec((None, None, plan.block, sizes.K), by_key_head)
    values = pl.BlockSpec((None, None, plan.block, sizes.V), by_token)
    channels = pl.BlockSpec((None, None, plan.block, sizes.K), by_token)
    rows = pl.BlockSpec((None, None, None, plan.chunks_per_block, plan.chunk), by_chunk)
    return _HeadArrays(
        None if arrays.q is None else keys,
        keys,
        values,
        channels if sizes.decays_by_channel else rows,
        None if arrays.beta is None else rows,
    )


def _make_sums_spec(sums: jax.Array | None) -> pl.BlockSpec | None:
    if sums is None:
        return None
    return pl.BlockSpec(sums.shape, lambda b, n, step: (0, 0))


def _get_chunk_rows(group: Index, number: int, sizes: _Sizes):
    """Returns the tokens of a group's chunk within its block."""
    chunk = sizes.plan.chunk
    start = (group * sizes.group + number) * chunk
    if not isinstance(start, int):
        start = pl.multiple_of(start, chunk)
    return pl.ds(start, chunk)


def _read_group(
    refs: _HeadArrays[Ref], group: Index, sizes: _Sizes
) -> list[ChunkOperands]:
    chunks = []
    for number in range(sizes.group):
        rows = _get_chunk_rows(group, number, sizes)
        row = pl.ds(group * sizes.group + number, 1)
        chunk = ChunkOperands(
            None if refs.q is None else refs.q[rows, :],
            refs.k[rows, :],
            refs.v[rows, :],
            refs.log_decay[rows if sizes.decays_by_channel else row, :],
            None if refs.beta is None else refs.beta[row, :],
        )
        chunks.append(chunk)
    return chunks


def _write_group(
    d_refs: _HeadArrays[Ref], d_chunks: list[ChunkOperands], group: Index, sizes: _Sizes
) -> None:
    for number, d_chunk in enumerate(d_chunks):
        rows = _get_chunk_rows(group, number, sizes)
        row = pl.ds(group * sizes.group + number, 1)
        for d_ref, gradient in zip(d_refs, d_chunk, strict=True):
            if gradient is None or d_ref is None:
                continue
            # A number a token lies in a row a chunk.
            target_rows = row if gradient.shape[0] == 1 else rows
            d_ref[target_rows, :] = gradient.astype(d_ref.dtype)
