"""Linear recurrences on an NVIDIA GPU: kernels that Triton compiles.

What needs no state is computed for all chunks at once, and a few programs a head hand
the state on (as flash-linear-attention splits the delta rule: Yang & Zhang 2024):

    forward    products      a program a chunk: weights, the inverse, what it reads
               states        a program for some columns of a head's state: chunk after
                             chunk, outputs, and the state before each block
    backward   products      again
               states        again, of all blocks at once: the state before each chunk
               d_states      from the last chunk to the first: gradients of the states
                             behind each chunk
               gradients     a program a chunk: its own, from those two states

The state of a program stays in registers. Gradients of a chunk's products by its
operands are those of ``jax.vjp``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kernel_types import Index, Ref
from pallas_kernels.linear_recurrence.kernel_chunk import (
    ChunkOperands,
    ChunkProducts,
    advance_over_chunk,
    multiply_chunk,
)
from pallas_kernels.linear_recurrence.params import (
    RecurrenceCall,
    RecurrenceOperands,
    get_precision,
    get_state_dtype,
    pad_tokens,
    plan_chunks,
)
from pallas_kernels.linear_recurrence.products import (
    Matrix,
    ProductPrecision,
    multiply_plain,
    multiply_rows_plain,
    multiply_transposed_plain,
    split_terms,
    without_gradients,
)
from pallas_kernels.linear_recurrence.triton_memory import (
    LEAST_SIZE,
    MemoryT,
    OperandMemory,
    ProductMemory,
    Sizes,
    get_rows,
    load_rows,
    load_state,
    make_spec,
    pad_width,
    read_chunk,
    read_products,
    store_rows,
    store_state,
)

_LARGEST_CHUNK = 64
_LARGEST_WIDTH = 256
# Columns of a state at a time that a chunk's gradients are summed over.
_GRADIENT_COLUMNS = 32


def supports(operands: RecurrenceOperands, call: RecurrenceCall) -> bool:
    """Returns whether the kernels run this: chunks of 16 to 64 tokens, operands of one
    type, bf16 or fp32, keys and values of at most 256."""
    types = {x.dtype for x in (operands.q, operands.k, operands.v) if x is not None}
    is_known = len(types) == 1 and types <= {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),
    }
    plan = plan_chunks(operands.k.shape[1], call.chunk_size)
    _, _, K, V = operands.state_shape
    return (
        is_known
        and get_state_dtype(operands) == jnp.float32
        and LEAST_SIZE <= plan.chunk <= _LARGEST_CHUNK
        and max(K, V) <= _LARGEST_WIDTH
    )


def forward(
    operands: RecurrenceOperands, state: jax.Array, call: RecurrenceCall
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """See :class:`~pallas_kernels.linear_recurrence.params.RecurrenceKernel`."""
    num_tokens = operands.k.shape[1]
    sizes = _get_sizes(operands, call)
    operands = pad_tokens(operands, sizes.plan.tokens)
    products = _compute_products(operands, sizes)
    output, final_states, block_states = _run_states(
        operands,
        products,
        state[None],
        sizes,
        save_every=sizes.plan.chunks_per_block,
        is_again=False,
    )
    if output is not None:
        output = output[:, :num_tokens]
    return output, final_states[0], block_states


def backward(
    operands: RecurrenceOperands,
    block_states: jax.Array,
    d_output: jax.Array | None,
    d_final_state: jax.Array,
    call: RecurrenceCall,
) -> tuple[RecurrenceOperands, jax.Array]:
    """See :class:`~pallas_kernels.linear_recurrence.params.RecurrenceKernel`."""
    num_tokens = operands.k.shape[1]
    sizes = _get_sizes(operands, call)
    operands = pad_tokens(operands, sizes.plan.tokens)
    if d_output is not None:
        missing = sizes.plan.tokens - num_tokens
        d_output = jnp.pad(d_output, [(0, 0), (0, missing), (0, 0), (0, 0)])
    products = _compute_products(operands, sizes)
    written, _, states = _run_states(
        operands, products, block_states, sizes, save_every=1, is_again=True
    )
    d_state, d_states, d_written = _run_states_back(
        operands, products, d_output, d_final_state, sizes
    )
    if written is None:
        written = operands.v
    arrays = _ChunkGradients(states, written, d_output, d_states, d_written)
    gradients = _compute_gradients(operands, products, arrays, sizes)

    def sum_by_key_head(gradient: jax.Array, operand: jax.Array) -> jax.Array:
        """Sums over the value heads of a key head."""
        B, T, H = operand.shape[:3]
        by_group = gradient.reshape(B, T, H, -1, *operand.shape[3:])
        return by_group.sum(3)[:, :num_tokens].astype(operand.dtype)

    return jax.tree.map(sum_by_key_head, gradients, operands), d_state


def _get_sizes(operands: RecurrenceOperands, call: RecurrenceCall) -> Sizes:
    B, T, H, K = operands.k.shape
    N, V = operands.v.shape[2:]
    is_narrow = get_precision(operands) == lax.Precision.HIGH
    precision = ProductPrecision.BF16X3 if is_narrow else ProductPrecision.BF16X6
    plan = plan_chunks(T, call.chunk_size)
    by_channel = operands.decays_by_channel
    return Sizes(B, H, N, K, V, plan, by_channel, precision, call.scale, call.interpret)


# Kernels, in the order of their use.


def _compute_products(
    operands: RecurrenceOperands, sizes: Sizes
) -> ProductMemory[jax.Array]:
    """Computes what chunks need of themselves, a program a chunk."""
    has_weights = operands.q is not None
    has_delta = operands.beta is not None
    by_channel = sizes.decays_by_channel
    padded_k = pad_width(sizes.K)
    num_terms = sizes.precision.value

    def shape(*width: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (sizes.B, sizes.plan.tokens, sizes.N, *width), dtype
        )

    def shape_terms(
        width: int, is_needed: bool
    ) -> tuple[jax.ShapeDtypeStruct, ...] | None:
        if not is_needed:
            return None
        return (shape(width, dtype=jnp.bfloat16),) * num_terms

    over_chunk = shape(*([padded_k] if by_channel else []))
    over_chunk_shape = (sizes.B, sizes.num_chunks, *over_chunk.shape[2:])
    shapes = ProductMemory(
        weights=shape_terms(sizes.plan.chunk, has_weights),
        queries=shape_terms(padded_k, has_weights and by_channel),
        from_start=None if by_channel else shape(),
        new=shape(pad_width(sizes.V)) if has_delta else None,
        read=shape_terms(padded_k, has_delta),
        keys=shape_terms(padded_k, by_channel),
        to_end=None if by_channel else shape(),
        over_chunk=jax.ShapeDtypeStruct(over_chunk_shape, jnp.float32),
    )

    def kernel(refs: OperandMemory[Ref], result_refs: ProductMemory[Ref]) -> None:
        number = pl.program_id(0)
        rows = get_rows(number, sizes)

        def compute(chunk: ChunkOperands) -> ChunkProducts[jax.Array]:
            return multiply_chunk(chunk, None, sizes.precision)

        def store_terms(
            term_refs: tuple[Ref, ...] | None, values: jax.Array | None
        ) -> None:
            if term_refs is None:
                return
            assert values is not None
            terms = split_terms(sizes.precision, values)
            for ref, term in zip(term_refs, terms, strict=True):
                ref[rows, :] = term

        def store_column(ref: Ref | None, values: jax.Array | None) -> None:
            if ref is None:
                return
            assert values is not None
            ref[rows] = values.reshape(sizes.plan.chunk)

        products = without_gradients(compute, read_chunk(refs, number, sizes))
        store_terms(result_refs.weights, products.weights)
        store_terms(result_refs.queries, products.queries)
        store_column(result_refs.from_start, products.from_start)
        if result_refs.new is not None:
            result_refs.new[rows, :] = products.new
        store_terms(result_refs.read, products.read)
        store_terms(result_refs.keys, products.keys)
        store_column(result_refs.to_end, products.to_end)
        if by_channel:
            result_refs.over_chunk[number, :] = products.over_chunk.reshape(padded_k)
        else:
            result_refs.over_chunk[number] = jnp.sum(products.over_chunk)

    (products,) = _call(
        kernel,
        (OperandMemory(*operands),),
        (shapes,),
        sizes,
        sizes.chunk_grid,
        name="linear_recurrence_products",
        num_warps=8,
        num_stages=1,
    )
    return products


def _run_states(
    operands: RecurrenceOperands,
    products: ProductMemory[jax.Array],
    first_states: jax.Array,
    sizes: Sizes,
    *,
    save_every: int,
    is_again: bool,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Hands states from chunk to chunk.

    Args:
        first_states: [runs, B, N, K, V], the states before runs of equally many chunks,
            which are computed beside each other.
        save_every: chunks; a divisor of a run's.
        is_again: whether this is for the backward pass.

    Returns:
        Output [B, tokens, N, V], or None without queries; for the backward pass what
        tokens write, fp32 [B, tokens, N, V], or None without the delta rule. The states
        behind the runs, like ``first_states``. States before chunks 0, ``save_every``,
        ... [saved, B, N, K, V].
    """
    if is_again:
        operands = operands._replace(q=None)
        products = products._replace(weights=None, queries=None)
    num_runs = len(first_states)
    num_saves = sizes.num_chunks // num_runs // save_every

    def kernel(
        refs: OperandMemory[Ref],
        product_refs: ProductMemory[Ref],
        first_ref: Ref,
        result_ref: Ref | None,
        final_ref: Ref,
        saved_ref: Ref,
    ) -> None:
        column = pl.program_id(0) * sizes.columns
        run = lax.div(pl.program_id(2), sizes.B)

        def save_and_run(save: Index, state: jax.Array) -> jax.Array:
            number = run * num_saves + save
            store_state(saved_ref, number, state, column, sizes)

            def advance(step: Index, state: jax.Array) -> jax.Array:
                chunk_number = number * save_every + step
                chunk = read_products(refs, product_refs, chunk_number, column, sizes)

                def run_chunk(chunk: ChunkProducts[Matrix], state: jax.Array):
                    return advance_over_chunk(
                        chunk, state, sizes.scale, sizes.precision
                    )

                output, written, state = without_gradients(run_chunk, chunk, state)
                if result_ref is not None:
                    result = written if is_again else output
                    assert result is not None
                    store_rows(result_ref, chunk_number, column, result, sizes.V, sizes)
                return state

            return lax.fori_loop(0, save_every, advance, state)

        state = load_state(first_ref, run, column, sizes.columns, sizes)
        state = lax.fori_loop(0, num_saves, save_and_run, state)
        store_state(final_ref, run, state, column, sizes)

    result = None
    if is_again and operands.beta is not None:
        result = jax.ShapeDtypeStruct(operands.v.shape, jnp.float32)
    if not is_again and operands.q is not None:
        result = jax.ShapeDtypeStruct(operands.v.shape, operands.v.dtype)
    num_saved = num_runs * num_saves
    saved = jax.ShapeDtypeStruct((num_saved, *operands.state_shape), jnp.float32)
    final_states = jax.ShapeDtypeStruct(first_states.shape, jnp.float32)
    num_columns, num_heads, num_rows = sizes.head_grid
    return _call(
        kernel,
        (OperandMemory(*operands), products, first_states),
        (result, final_states, saved),
        sizes,
        (num_columns, num_heads, num_rows * num_runs),
        name="linear_recurrence_states",
        num_warps=4,
        num_stages=2,
    )


def _run_states_back(
    operands: RecurrenceOperands,
    products: ProductMemory[jax.Array],
    d_output: jax.Array | None,
    d_final_state: jax.Array,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hands gradients of states from chunk to chunk, the last one first.

    Returns:
        Gradients of the initial state, [B, N, K, V]; of the states behind all chunks,
        [chunks, B, N, K, V]; and of what tokens write, fp32 [B, tokens, N, V].
    """
    precision = sizes.precision

    def kernel(
        refs: OperandMemory[Ref],
        product_refs: ProductMemory[Ref],
        d_output_ref: Ref | None,
        d_final_ref: Ref,
        d_first_ref: Ref,
        saved_ref: Ref,
        d_ref: Ref,
    ) -> None:
        column = pl.program_id(0) * sizes.columns

        def cross_chunk(step: Index, d_state: jax.Array) -> jax.Array:
            number = sizes.num_chunks - 1 - step
            store_state(saved_ref, number, d_state, column, sizes)
            chunk = read_products(refs, product_refs, number, column, sizes)
            # Gradients of advance_over_chunk.
            d_written = multiply_plain(precision, chunk.keys, d_state)
            if chunk.to_end is not None:
                d_written = d_written * chunk.to_end
            d_before = chunk.over_chunk * d_state
            if d_output_ref is not None:
                assert chunk.weights is not None
                assert chunk.queries is not None
                d_chunk = load_rows(
                    d_output_ref, number, column, sizes.columns, sizes.V, sizes
                )
                d_chunk = sizes.scale * d_chunk.astype(jnp.float32)
                d_written += multiply_transposed_plain(
                    precision, chunk.weights, d_chunk
                )
                if chunk.from_start is not None:
                    d_chunk = d_chunk * chunk.from_start
                d_before += multiply_transposed_plain(precision, chunk.queries, d_chunk)
            if chunk.read is not None:
                d_before -= multiply_transposed_plain(precision, chunk.read, d_written)
            store_rows(d_ref, number, column, d_written, sizes.V, sizes)
            return d_before

        # An array: JAX's interpreter takes no Python int beside a mask.
        d_state = load_state(d_final_ref, jnp.int32(0), column, sizes.columns, sizes)
        d_state = lax.fori_loop(0, sizes.num_chunks, cross_chunk, d_state)
        store_state(d_first_ref, jnp.int32(0), d_state, column, sizes)

    state_shape = d_final_state.shape
    d_states = jax.ShapeDtypeStruct((sizes.num_chunks, *state_shape), jnp.float32)
    d_first = jax.ShapeDtypeStruct((1, *state_shape), jnp.float32)
    d_written = jax.ShapeDtypeStruct(operands.v.shape, jnp.float32)
    d_first_states, d_states, d_written = _call(
        kernel,
        (OperandMemory(*operands), products, d_output, d_final_state[None]),
        (d_first, d_states, d_written),
        sizes,
        sizes.head_grid,
        name="linear_recurrence_d_states",
        num_warps=4,
        num_stages=2,
    )
    return d_first_states[0], d_states, d_written


class _ChunkGradients(NamedTuple, Generic[MemoryT]):
    """Arrays of the backward pass that chunks' gradients come from."""

    states: MemoryT
    """[chunks, B, N, K, V], before chunks."""
    written: MemoryT
    """[B, tokens, N, V]."""
    d_output: MemoryT | None
    """[B, tokens, N, V]."""
    d_states: MemoryT
    """[chunks, B, N, K, V], of the states behind chunks."""
    d_written: MemoryT
    """fp32 [B, tokens, N, V]."""


class _ColumnSums(NamedTuple):
    """Products of gradients, summed over columns of a state."""

    weights: jax.Array | None
    """[L, L], of d_output and what is written."""
    queries: jax.Array | None
    """[L, K], of d_output and the state."""
    read: jax.Array | None
    """[L, K], of d_written and the state."""
    keys: jax.Array
    """[L, K], of what is written and d_state."""
    over_chunk: jax.Array
    """[K, 1], of the state and d_state."""


def _compute_gradients(
    operands: RecurrenceOperands,
    products: ProductMemory[jax.Array],
    arrays: _ChunkGradients[jax.Array],
    sizes: Sizes,
) -> RecurrenceOperands:
    """Returns gradients of the operands, a program a chunk; of q and k a value head's
    each, [B, tokens, N, K]."""
    L = sizes.plan.chunk
    padded_k = pad_width(sizes.K)
    padded_v = pad_width(sizes.V)
    num_columns = min(_GRADIENT_COLUMNS, padded_v)
    precision = sizes.precision
    has_output = arrays.d_output is not None
    has_delta = operands.beta is not None

    def sum_columns(refs: _ChunkGradients[Ref], number: Index) -> _ColumnSums:
        def add(step: Index, sums: _ColumnSums) -> _ColumnSums:
            column = step * num_columns

            def load(ref: Ref) -> jax.Array:
                values = load_rows(ref, number, column, num_columns, sizes.V, sizes)
                return values.astype(jnp.float32)

            state = load_state(refs.states, number, column, num_columns, sizes)
            d_state = load_state(refs.d_states, number, column, num_columns, sizes)
            written = load(refs.written)
            weights = None
            queries = None
            read = None
            if refs.d_output is not None:
                assert sums.weights is not None
                assert sums.queries is not None
                d_output = sizes.scale * load(refs.d_output)
                weights = sums.weights + multiply_rows_plain(
                    precision, d_output, written
                )
                queries = sums.queries + multiply_rows_plain(precision, d_output, state)
            if sums.read is not None:
                d_written = load(refs.d_written)
                read = sums.read - multiply_rows_plain(precision, d_written, state)
            keys = sums.keys + multiply_rows_plain(precision, written, d_state)
            over_chunk = jnp.sum(state * d_state, axis=1, keepdims=True)
            return _ColumnSums(
                weights, queries, read, keys, sums.over_chunk + over_chunk
            )

        by_key = jnp.zeros((L, padded_k), jnp.float32)
        zeros = _ColumnSums(
            weights=jnp.zeros((L, L), jnp.float32) if has_output else None,
            queries=by_key if has_output else None,
            read=by_key if has_delta else None,
            keys=by_key,
            over_chunk=jnp.zeros((padded_k, 1), jnp.float32),
        )
        return lax.fori_loop(0, padded_v // num_columns, add, zeros)

    def kernel(
        refs: OperandMemory[Ref],
        factor_refs: ProductMemory[Ref],
        array_refs: _ChunkGradients[Ref],
        d_refs: OperandMemory[Ref],
    ) -> None:
        number = pl.program_id(0)
        rows = get_rows(number, sizes)
        sums = sum_columns(array_refs, number)
        chunk = read_chunk(refs, number, sizes)
        d_new = load_rows(array_refs.d_written, number, 0, padded_v, sizes.V, sizes)
        d_products = ChunkProducts(
            weights=sums.weights,
            queries=sums.queries,
            from_start=None,
            new=d_new,
            read=sums.read,
            keys=sums.keys,
            to_end=None,
            over_chunk=sums.over_chunk,
        )
        if not sizes.decays_by_channel:
            assert factor_refs.to_end is not None
            assert factor_refs.from_start is not None
            to_end = factor_refs.to_end[rows][:, None]
            d_to_end = jnp.sum(chunk.k.astype(jnp.float32) * sums.keys, 1)
            d_products = d_products._replace(
                from_start=jnp.zeros((L, 1), jnp.float32),
                keys=to_end * sums.keys,
                to_end=d_to_end[:, None],
                over_chunk=jnp.sum(sums.over_chunk, axis=0, keepdims=True),
            )
            if sums.queries is not None:
                assert chunk.q is not None
                from_start = factor_refs.from_start[rows][:, None]
                d_from_start = jnp.sum(chunk.q.astype(jnp.float32) * sums.queries, 1)
                d_products = d_products._replace(
                    queries=from_start * sums.queries,
                    from_start=d_from_start[:, None],
                )

        def compute(chunk: ChunkOperands) -> ChunkProducts[jax.Array]:
            return multiply_chunk(chunk, None, precision)

        _, pull = jax.vjp(compute, chunk)
        (d_chunk,) = pull(d_products)
        widths = (sizes.K, sizes.K, sizes.V, sizes.K, 1)
        for d_ref, gradient, width in zip(d_refs, d_chunk, widths, strict=True):
            if d_ref is None:
                continue
            if gradient.shape[0] == 1:
                d_ref[rows] = gradient.reshape(L)
            else:
                store_rows(d_ref, number, 0, gradient, width, sizes)

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if sizes.H == sizes.N else jnp.float32
        by_value_head = (*x.shape[:2], sizes.N, *x.shape[3:])
        return jax.ShapeDtypeStruct(by_value_head, dtype)

    factors = products._replace(
        weights=None, queries=None, new=None, read=None, keys=None
    )
    (gradients,) = _call(
        kernel,
        (OperandMemory(*operands), factors, arrays),
        (jax.tree.map(shape, OperandMemory(*operands)),),
        sizes,
        sizes.chunk_grid,
        name="linear_recurrence_gradients",
        num_warps=8,
        num_stages=1,
    )
    return RecurrenceOperands(*gradients)


Arrays = tuple[Any, ...]
"""Arrays, or trees of them."""


def _call(
    kernel: Callable[..., None],
    arrays: Arrays,
    results: Any,
    sizes: Sizes,
    grid: tuple[int, int, int],
    *,
    name: str,
    num_warps: int,
    num_stages: int,
) -> Any:
    """Runs a kernel over a grid (columns or chunks, value heads, rows of the batch for
    each run), whose programs' windows are all tokens of their head and row."""
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=grid,
        in_specs=jax.tree.map(partial(make_spec, sizes), arrays),
        out_specs=jax.tree.map(partial(make_spec, sizes), results),
        compiler_params=plgpu.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        ),
        interpret=sizes.interpret,
        name=name,
    )(*arrays)
