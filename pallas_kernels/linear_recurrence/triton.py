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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kernel_types import Index, Interpret, Ref
from pallas_kernels.linear_recurrence.kernel_chunk import (
    ChunkOperands,
    ChunkProducts,
    advance_over_chunk,
    multiply_chunk,
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
from pallas_kernels.linear_recurrence.products import (
    ProductPrecision,
    Terms,
    multiply_plain,
    multiply_rows_plain,
    multiply_transposed_plain,
    split_terms,
    without_gradients,
)

# The least size of a product's dimension.
_LEAST = 16
_LARGEST_CHUNK = 64
_LARGEST_WIDTH = 256
# Columns of a program's state: with 128 key channels a quarter of the registers.
_STATE_COLUMNS = 32
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
        and _LEAST <= plan.chunk <= _LARGEST_CHUNK
        and max(K, V) <= _LARGEST_WIDTH
    )


class _Sizes(NamedTuple):
    """Static sizes and settings of a call."""

    B: int
    H: int
    N: int
    K: int
    V: int
    plan: ChunkPlan
    decays_by_channel: bool
    precision: ProductPrecision
    scale: float
    interpret: Interpret

    @property
    def num_chunks(self) -> int:
        return self.plan.num_blocks * self.plan.chunks_per_block

    @property
    def columns(self) -> int:
        """Columns of a state that a program has."""
        return min(_STATE_COLUMNS, _pad_width(self.V))

    @property
    def head_grid(self) -> tuple[int, int, int]:
        """A program for some columns of a head's state."""
        return pl.cdiv(self.V, self.columns), self.N, self.B

    @property
    def chunk_grid(self) -> tuple[int, int, int]:
        """A program a chunk of a head."""
        return self.num_chunks, self.N, self.B


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

    def finish(gradient: jax.Array, operand: jax.Array) -> jax.Array:
        """Sums over the value heads of a key head."""
        B, T, H = operand.shape[:3]
        by_group = gradient.reshape(B, T, H, -1, *operand.shape[3:])
        return by_group.sum(3)[:, :num_tokens].astype(operand.dtype)

    return jax.tree.map(finish, gradients, operands), d_state


def _get_sizes(operands: RecurrenceOperands, call: RecurrenceCall) -> _Sizes:
    B, T, H, K = operands.k.shape
    N, V = operands.v.shape[2:]
    is_narrow = get_precision(operands) == lax.Precision.HIGH
    precision = ProductPrecision.BF16X3 if is_narrow else ProductPrecision.BF16X6
    plan = plan_chunks(T, call.chunk_size)
    by_channel = operands.decays_by_channel
    return _Sizes(
        B, H, N, K, V, plan, by_channel, precision, call.scale, call.interpret
    )


# Kernels, in the order of their use.


def _compute_products(operands: RecurrenceOperands, sizes: _Sizes) -> ChunkProducts:
    """Computes what chunks need of themselves, a program a chunk.

    Returns:
        Arrays [B, tokens, N, width], of widths that are powers of two, and
        ``from_start`` and ``to_end`` [B, tokens, N]; ``over_chunk`` has chunks for
        tokens. Matrices that meet a state are terms of bf16 in all places, so that they
        go from memory to the tensor cores as they are. None: the operands themselves.
    """
    has_weights = operands.q is not None
    has_delta = operands.beta is not None
    by_channel = sizes.decays_by_channel
    padded_k = _pad_width(sizes.K)
    num_terms = sizes.precision.value

    def shape(*width: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (sizes.B, sizes.plan.tokens, sizes.N, *width), dtype
        )

    def shape_terms(width: int, is_needed: bool):
        if not is_needed:
            return None
        return (shape(width, dtype=jnp.bfloat16),) * num_terms

    over_chunk = shape(*([padded_k] if by_channel else []))
    over_chunk_shape = (sizes.B, sizes.num_chunks, *over_chunk.shape[2:])
    shapes = ChunkProducts(
        weights=shape_terms(sizes.plan.chunk, has_weights),
        queries=shape_terms(padded_k, has_weights and by_channel),
        from_start=None if by_channel else shape(),
        new=shape(_pad_width(sizes.V)) if has_delta else None,
        read=shape_terms(padded_k, has_delta),
        keys=shape_terms(padded_k, by_channel),
        to_end=None if by_channel else shape(),
        over_chunk=jax.ShapeDtypeStruct(over_chunk_shape, jnp.float32),
    )

    def kernel(refs: RecurrenceOperands, result_refs: ChunkProducts) -> None:
        number = pl.program_id(0)

        def compute(chunk: ChunkOperands) -> ChunkProducts:
            return multiply_chunk(chunk, None, sizes.precision)

        products = without_gradients(compute, _read_chunk(refs, number, sizes))
        rows = _get_rows(number, sizes)
        for ref, values in zip(result_refs[:-1], products[:-1], strict=True):
            if ref is None:
                continue
            if isinstance(ref, tuple):
                terms = split_terms(sizes.precision, values)
                for term_ref, term in zip(ref, terms, strict=True):
                    term_ref[rows, :] = term
            elif values.shape[1] == 1:
                ref[rows] = values.reshape(sizes.plan.chunk)
            else:
                ref[rows, :] = values
        if by_channel:
            result_refs.over_chunk[number, :] = products.over_chunk.reshape(padded_k)
        else:
            result_refs.over_chunk[number] = jnp.sum(products.over_chunk)

    (products,) = _call(
        kernel,
        (operands,),
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
    products: ChunkProducts,
    first_states: jax.Array,
    sizes: _Sizes,
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

    def kernel(refs, product_refs, first_ref, result_ref, final_ref, saved_ref) -> None:
        column = pl.program_id(0) * sizes.columns
        run = lax.div(pl.program_id(2), sizes.B)

        def save_and_run(save: Index, state: jax.Array) -> jax.Array:
            number = run * num_saves + save
            _store_state(saved_ref, number, state, column, sizes)

            def advance(step: Index, state: jax.Array) -> jax.Array:
                chunk_number = number * save_every + step
                chunk = _read_products(refs, product_refs, chunk_number, column, sizes)

                def run_chunk(chunk: ChunkProducts, state: jax.Array):
                    return advance_over_chunk(
                        chunk, state, sizes.scale, sizes.precision
                    )

                output, written, state = without_gradients(run_chunk, chunk, state)
                if result_ref is not None:
                    rows = _get_rows(chunk_number, sizes)
                    result = written if is_again else output
                    _store_rows(result_ref, rows, column, result, sizes.V)
                return state

            return lax.fori_loop(0, save_every, advance, state)

        state = _load_state(first_ref, run, column, sizes.columns, sizes)
        state = lax.fori_loop(0, num_saves, save_and_run, state)
        _store_state(final_ref, run, state, column, sizes)

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
        (operands, products, first_states),
        (result, final_states, saved),
        sizes,
        (num_columns, num_heads, num_rows * num_runs),
        name="linear_recurrence_states",
        num_warps=4,
        num_stages=2,
    )


def _run_states_back(
    operands: RecurrenceOperands,
    products: ChunkProducts,
    d_output: jax.Array | None,
    d_final_state: jax.Array,
    sizes: _Sizes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hands gradients of states from chunk to chunk, the last one first.

    Returns:
        Gradients of the initial state, [B, N, K, V]; of the states behind all chunks,
        [chunks, B, N, K, V]; and of what tokens write, fp32 [B, tokens, N, V].
    """
    precision = sizes.precision

    def kernel(
        refs, product_refs, d_output_ref, d_final_ref, d_first_ref, saved_ref, d_ref
    ) -> None:
        column = pl.program_id(0) * sizes.columns

        def go_back(step: Index, d_state: jax.Array) -> jax.Array:
            number = sizes.num_chunks - 1 - step
            rows = _get_rows(number, sizes)
            _store_state(saved_ref, number, d_state, column, sizes)
            chunk = _read_products(refs, product_refs, number, column, sizes)
            # Gradients of advance_over_chunk.
            d_written = multiply_plain(precision, chunk.keys, d_state)
            if chunk.to_end is not None:
                d_written = d_written * chunk.to_end
            d_before = chunk.over_chunk * d_state
            if d_output_ref is not None:
                d_chunk = sizes.scale * _load_rows(
                    d_output_ref, rows, column, sizes.columns, sizes.V
                ).astype(jnp.float32)
                d_written += multiply_transposed_plain(
                    precision, chunk.weights, d_chunk
                )
                if chunk.from_start is not None:
                    d_chunk = d_chunk * chunk.from_start
                d_before += multiply_transposed_plain(precision, chunk.queries, d_chunk)
            if chunk.read is not None:
                d_before -= multiply_transposed_plain(precision, chunk.read, d_written)
            _store_rows(d_ref, rows, column, d_written, sizes.V)
            return d_before

        # An array: JAX's interpreter takes no Python int beside a mask.
        d_state = _load_state(d_final_ref, jnp.int32(0), column, sizes.columns, sizes)
        d_state = lax.fori_loop(0, sizes.num_chunks, go_back, d_state)
        _store_state(d_first_ref, jnp.int32(0), d_state, column, sizes)

    state_shape = d_final_state.shape
    d_states = jax.ShapeDtypeStruct((sizes.num_chunks, *state_shape), jnp.float32)
    d_first = jax.ShapeDtypeStruct((1, *state_shape), jnp.float32)
    d_written = jax.ShapeDtypeStruct(operands.v.shape, jnp.float32)
    d_first_states, d_states, d_written = _call(
        kernel,
        (operands, products, d_output, d_final_state[None]),
        (d_first, d_states, d_written),
        sizes,
        sizes.head_grid,
        name="linear_recurrence_d_states",
        num_warps=4,
        num_stages=2,
    )
    return d_first_states[0], d_states, d_written


class _ChunkGradients(NamedTuple):
    """Arrays of the backward pass that chunks' gradients come from."""

    states: jax.Array
    """[chunks, B, N, K, V], before chunks."""
    written: jax.Array
    """[B, tokens, N, V]."""
    d_output: jax.Array | None
    """[B, tokens, N, V]."""
    d_states: jax.Array
    """[chunks, B, N, K, V], of the states behind chunks."""
    d_written: jax.Array
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
    products: ChunkProducts,
    arrays: _ChunkGradients,
    sizes: _Sizes,
) -> RecurrenceOperands:
    """Returns gradients of the operands, a program a chunk; of q and k a value head's
    each, [B, tokens, N, K]."""
    L = sizes.plan.chunk
    padded_k = _pad_width(sizes.K)
    padded_v = _pad_width(sizes.V)
    num_columns = min(_GRADIENT_COLUMNS, padded_v)
    precision = sizes.precision
    has_output = arrays.d_output is not None
    has_delta = operands.beta is not None

    def sum_columns(refs: _ChunkGradients, number: Index) -> _ColumnSums:
        rows = _get_rows(number, sizes)

        def add(step: Index, sums: _ColumnSums) -> _ColumnSums:
            column = step * num_columns

            def load(ref: Ref) -> jax.Array:
                values = _load_rows(ref, rows, column, num_columns, sizes.V)
                return values.astype(jnp.float32)

            state = _load_state(refs.states, number, column, num_columns, sizes)
            d_state = _load_state(refs.d_states, number, column, num_columns, sizes)
            written = load(refs.written)
            weights = None
            queries = None
            read = None
            if has_output:
                d_output = sizes.scale * load(refs.d_output)
                weights = sums.weights + multiply_rows_plain(
                    precision, d_output, written
                )
                queries = sums.queries + multiply_rows_plain(precision, d_output, state)
            if has_delta:
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

    def kernel(refs, factor_refs, array_refs, d_refs) -> None:
        number = pl.program_id(0)
        rows = _get_rows(number, sizes)
        sums = sum_columns(array_refs, number)
        chunk = _read_chunk(refs, number, sizes)
        d_new = _load_rows(array_refs.d_written, rows, 0, padded_v, sizes.V)
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
            to_end = factor_refs.to_end[rows][:, None]
            d_to_end = jnp.sum(chunk.k.astype(jnp.float32) * sums.keys, 1)
            d_products = d_products._replace(
                from_start=jnp.zeros((L, 1), jnp.float32),
                keys=to_end * sums.keys,
                to_end=d_to_end[:, None],
                over_chunk=jnp.sum(sums.over_chunk, axis=0, keepdims=True),
            )
            if has_output:
                from_start = factor_refs.from_start[rows][:, None]
                d_from_start = jnp.sum(chunk.q.astype(jnp.float32) * sums.queries, 1)
                d_products = d_products._replace(
                    queries=from_start * sums.queries,
                    from_start=d_from_start[:, None],
                )

        def compute(chunk: ChunkOperands) -> ChunkProducts:
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
                _store_rows(d_ref, rows, 0, gradient, width)

    def shape(x: jax.Array | None) -> jax.ShapeDtypeStruct | None:
        if x is None:
            return None
        dtype = x.dtype if sizes.H == sizes.N else jnp.float32
        by_value_head = (*x.shape[:2], sizes.N, *x.shape[3:])
        return jax.ShapeDtypeStruct(by_value_head, dtype)

    factors = products._replace(
        weights=None, queries=None, new=None, read=None, keys=None
    )
    (gradients,) = _call(
        kernel,
        (operands, factors, arrays),
        (RecurrenceOperands(*[shape(x) for x in operands]),),
        sizes,
        sizes.chunk_grid,
        name="linear_recurrence_gradients",
        num_warps=8,
        num_stages=1,
    )
    return gradients


Arrays = tuple[Any, ...]
"""Arrays, or trees of them."""


def _call(
    kernel: Callable[..., None],
    arrays: Arrays,
    results: Any,
    sizes: _Sizes,
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
        in_specs=jax.tree.map(partial(_make_spec, sizes), arrays),
        out_specs=jax.tree.map(partial(_make_spec, sizes), results),
        compiler_params=plgpu.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        ),
        interpret=sizes.interpret,
        name=name,
    )(*arrays)


def _make_spec(sizes: _Sizes, x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Returns the window of [B, rows, heads], [B, rows, heads, width] or states [S, B,
    N, K, V]: all of a head, filled up to powers of two."""

    def index(i, n, row_of_run):
        row = lax.rem(row_of_run, sizes.B)
        if x.ndim == 5:
            return 0, row, n, 0, 0
        head = lax.div(n, sizes.N // x.shape[2])
        return (row, 0, head, 0)[: x.ndim]

    widths = [_pad_width(width) for width in x.shape[3:]]
    if x.ndim == 5:
        return pl.BlockSpec((x.shape[0], None, None, *widths), index)
    return pl.BlockSpec((None, x.shape[1], None, *widths), index)


def _pad_width(width: int) -> int:
    """Returns the size of a dimension in registers: a power of two."""
    return max(_LEAST, 1 << (width - 1).bit_length())


def _get_rows(number: Index, sizes: _Sizes) -> pl.Slice:
    """Returns a chunk's tokens."""
    return pl.ds(number * sizes.plan.chunk, sizes.plan.chunk)


def _make_mask(
    shape: tuple[int, int], column: Index, size: tuple[int, int]
) -> jax.Array | None:
    """Returns what of a part lies in a matrix of ``size``; None: all. The part has all
    rows, and columns from ``column``, a multiple of as many."""
    mask = None
    if size[0] < shape[0]:
        is_row = jnp.arange(shape[0]) < size[0]
        mask = jnp.broadcast_to(is_row[:, None], shape)
    if size[1] % shape[1] > 0:
        is_column = column + jnp.arange(shape[1]) < size[1]
        columns = jnp.broadcast_to(is_column[None], shape)
        mask = columns if mask is None else mask & columns
    return mask


def _load(ref: Ref, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return ref[...]
    return plgpu.load(ref, mask=mask, other=0.0)


def _load_rows(
    ref: Ref, rows: pl.Slice, column: Index, num_columns: int, width: int
) -> jax.Array:
    """Reads [tokens, num_columns] of [T, width]; zeros past it."""
    mask = _make_mask((rows.size, num_columns), column, (rows.size, width))
    return _load(ref.at[rows, pl.ds(column, num_columns)], mask)


def _store_rows(
    ref: Ref, rows: pl.Slice, column: Index, values: jax.Array, width: int
) -> None:
    """Writes [tokens, columns] of [T, width]."""
    num_columns = values.shape[1]
    mask = _make_mask(values.shape, column, (rows.size, width))
    part = ref.at[rows, pl.ds(column, num_columns)]
    plgpu.store(part, values.astype(ref.dtype), mask=mask)


def _load_state(
    ref: Ref, number: Index, column: Index, num_columns: int, sizes: _Sizes
) -> jax.Array:
    """Reads columns of a state, [K, num_columns], filled up with zeros."""
    padded_k = _pad_width(sizes.K)
    mask = _make_mask((padded_k, num_columns), column, (sizes.K, sizes.V))
    part = ref.at[number, pl.ds(0, padded_k), pl.ds(column, num_columns)]
    return _load(part, mask)


def _store_state(
    ref: Ref, number: Index, state: jax.Array, column: Index, sizes: _Sizes
) -> None:
    """Writes columns of a state."""
    padded_k, num_columns = state.shape
    mask = _make_mask(state.shape, column, (sizes.K, sizes.V))
    part = ref.at[number, pl.ds(0, padded_k), pl.ds(column, num_columns)]
    plgpu.store(part, state, mask=mask)


def _read_chunk(refs: RecurrenceOperands, number: Index, sizes: _Sizes):
    """Reads all of a chunk's operands."""
    rows = _get_rows(number, sizes)

    def read(ref: Ref, width: int) -> jax.Array:
        return _load_rows(ref, rows, 0, _pad_width(width), width)

    if sizes.decays_by_channel:
        log_decay = read(refs.log_decay, sizes.K)
    else:
        log_decay = refs.log_decay[rows][None]
    return ChunkOperands(
        None if refs.q is None else read(refs.q, sizes.K),
        read(refs.k, sizes.K),
        read(refs.v, sizes.V),
        log_decay,
        None if refs.beta is None else refs.beta[rows].astype(jnp.float32)[None],
    )


def _read_products(
    refs: RecurrenceOperands,
    product_refs: ChunkProducts,
    number: Index,
    column: Index,
    sizes: _Sizes,
) -> ChunkProducts:
    """Reads what hands some columns of a state over a chunk."""
    rows = _get_rows(number, sizes)

    def read_terms(term_refs: tuple[Ref, ...] | None) -> Terms | None:
        if term_refs is None:
            return None
        return tuple(ref[rows, :] for ref in term_refs)

    def read_matrix(term_refs: tuple[Ref, ...] | None, ref: Ref | None):
        """Reads queries or keys, which by head are operands."""
        if term_refs is not None or ref is None:
            return read_terms(term_refs)
        return _load_rows(ref, rows, 0, _pad_width(sizes.K), sizes.K)

    def read_column(ref: Ref | None) -> jax.Array | None:
        return None if ref is None else ref[rows][:, None]

    if product_refs.new is not None:
        new = product_refs.new[rows, pl.ds(column, sizes.columns)]
    else:
        new = _load_rows(refs.v, rows, column, sizes.columns, sizes.V)
        new = new.astype(jnp.float32)
    if sizes.decays_by_channel:
        over_chunk = product_refs.over_chunk[number, :][:, None]
    else:
        over_chunk = product_refs.over_chunk[number]
    return ChunkProducts(
        weights=read_terms(product_refs.weights),
        queries=read_matrix(product_refs.queries, refs.q),
        from_start=read_column(product_refs.from_start),
        new=new,
        read=read_terms(product_refs.read),
        keys=read_matrix(product_refs.keys, refs.k),
        to_end=read_column(product_refs.to_end),
        over_chunk=over_chunk,
    )
