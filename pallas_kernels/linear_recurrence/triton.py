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

The state of a program stays in registers. Products of the backward pass are those that
``jax.vjp`` finds of the forward functions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

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
    compute_head_factors,
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
    without_gradients,
)

# The least size of a product's dimension.
_LEAST = 16
_LARGEST_CHUNK = 64
_LARGEST_WIDTH = 256
# Columns of a program's state: with 128 key channels a quarter of the registers.
_STATE_COLUMNS = 32


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


ArrayT = TypeVar("ArrayT")
"""Arrays, their blocks' specs, or references to blocks."""


class _Products(NamedTuple, Generic[ArrayT]):
    """What chunks compute without a state: fp32 [B, tokens, N, width], of widths that
    are powers of two; None: the operands themselves."""

    weights: ArrayT | None
    """Width L; None without queries."""
    queries: ArrayT | None
    """Width K, by channel."""
    new: ArrayT | None
    """Width V, of the delta rule."""
    read: ArrayT | None
    """Width K, of the delta rule."""
    keys: ArrayT | None
    """Width K, by channel."""
    over_chunk: ArrayT | None
    """[B, chunks, N, K], by channel."""


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
        has_output=operands.q is not None,
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
    _, _, chunk_states = _run_states(
        operands, products, block_states, sizes, save_every=1, has_output=False
    )
    d_state, d_chunk_states = _run_states_back(
        operands, products, d_output, d_final_state, sizes
    )
    gradients = _compute_gradients(
        operands, chunk_states, d_output, d_chunk_states, sizes
    )

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


def _compute_products(
    operands: RecurrenceOperands, sizes: _Sizes
) -> _Products[jax.Array]:
    """Computes what chunks need of themselves, a program a chunk."""
    has_weights = operands.q is not None
    has_delta = operands.beta is not None
    by_channel = sizes.decays_by_channel
    tokens = sizes.plan.tokens
    padded_k = _pad_width(sizes.K)

    def shape(rows: int, width: int, is_needed: bool) -> jax.ShapeDtypeStruct | None:
        if not is_needed:
            return None
        return jax.ShapeDtypeStruct((sizes.B, rows, sizes.N, width), jnp.float32)

    shapes = _Products(
        weights=shape(tokens, sizes.plan.chunk, has_weights),
        queries=shape(tokens, padded_k, has_weights and by_channel),
        new=shape(tokens, _pad_width(sizes.V), has_delta),
        read=shape(tokens, padded_k, has_delta),
        keys=shape(tokens, padded_k, by_channel),
        over_chunk=shape(sizes.num_chunks, padded_k, by_channel),
    )
    if not jax.tree.leaves(shapes):
        return _Products(None, None, None, None, None, None)

    def kernel(refs: RecurrenceOperands, result_refs: _Products[Ref]) -> None:
        number = pl.program_id(0)

        def compute(chunk: ChunkOperands) -> ChunkProducts:
            return multiply_chunk(chunk, None, sizes.precision)

        products = without_gradients(compute, _read_chunk(refs, number, sizes))
        rows = _get_rows(number, sizes)
        for ref, values in (
            (result_refs.weights, products.weights),
            (result_refs.queries, products.queries),
            (result_refs.new, products.new),
            (result_refs.read, products.read),
            (result_refs.keys, products.keys),
        ):
            if ref is not None:
                ref[rows, :] = values
        if result_refs.over_chunk is not None:
            result_refs.over_chunk[number, :] = products.over_chunk.reshape(padded_k)

    (products,) = _call(
        kernel,
        (operands,),
        (shapes,),
        sizes,
        sizes.chunk_grid,
        name="linear_recurrence_products",
        num_warps=4,
        num_stages=1,
    )
    return products


def _run_states(
    operands: RecurrenceOperands,
    products: _Products[jax.Array],
    first_states: jax.Array,
    sizes: _Sizes,
    *,
    save_every: int,
    has_output: bool,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Hands states from chunk to chunk.

    Args:
        first_states: [runs, B, N, K, V], the states before runs of equally many chunks,
            which are computed beside each other.
        save_every: chunks; a divisor of a run's.

    Returns:
        Output [B, tokens, N, V] or None; the states behind the runs, like
        ``first_states``; states before chunks 0, ``save_every``, ... [saved, B, N, K,
        V].
    """
    if not has_output:
        operands = operands._replace(q=None)
        products = products._replace(weights=None, queries=None)
    num_runs = len(first_states)
    num_saves = sizes.num_chunks // num_runs // save_every

    def kernel(refs, product_refs, first_ref, output_ref, final_ref, saved_ref) -> None:
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

                output, state = without_gradients(run_chunk, chunk, state)
                if output_ref is not None:
                    rows = _get_rows(chunk_number, sizes)
                    _store_rows(output_ref, rows, column, output, sizes.V)
                return state

            return lax.fori_loop(0, save_every, advance, state)

        state = _load_state(first_ref, run, column, sizes.columns, sizes)
        state = lax.fori_loop(0, num_saves, save_and_run, state)
        _store_state(final_ref, run, state, column, sizes)

    output = None
    if has_output:
        output = jax.ShapeDtypeStruct(operands.v.shape, operands.v.dtype)
    num_saved = num_runs * num_saves
    saved = jax.ShapeDtypeStruct((num_saved, *operands.state_shape), jnp.float32)
    final_states = jax.ShapeDtypeStruct(first_states.shape, jnp.float32)
    num_columns, num_heads, num_rows = sizes.head_grid
    return _call(
        kernel,
        (operands, products, first_states),
        (output, final_states, saved),
        sizes,
        (num_columns, num_heads, num_rows * num_runs),
        name="linear_recurrence_states",
        num_warps=4,
        num_stages=2,
    )


def _run_states_back(
    operands: RecurrenceOperands,
    products: _Products[jax.Array],
    d_output: jax.Array | None,
    d_final_state: jax.Array,
    sizes: _Sizes,
) -> tuple[jax.Array, jax.Array]:
    """Returns gradients of the initial state, [B, N, K, V], and of the states behind
    all chunks, [chunks, B, N, K, V]."""

    def kernel(
        refs, product_refs, d_output_ref, d_final_ref, d_first_ref, saved_ref
    ) -> None:
        column = pl.program_id(0) * sizes.columns

        def go_back(step: Index, d_state: jax.Array) -> jax.Array:
            chunk_number = sizes.num_chunks - 1 - step
            _store_state(saved_ref, chunk_number, d_state, column, sizes)
            chunk = _read_products(refs, product_refs, chunk_number, column, sizes)

            def run_chunk(state: jax.Array):
                return advance_over_chunk(chunk, state, sizes.scale, sizes.precision)

            # Linear in the state, so that its value does not matter.
            _, pull = jax.vjp(run_chunk, jnp.zeros_like(d_state))
            d_chunk_output = None
            if d_output_ref is not None:
                rows = _get_rows(chunk_number, sizes)
                d_chunk_output = _load_rows(
                    d_output_ref, rows, column, sizes.columns, sizes.V
                ).astype(jnp.float32)
            (d_state,) = pull((d_chunk_output, d_state))
            return d_state

        # An array: JAX's interpreter takes no Python int beside a mask.
        d_state = _load_state(d_final_ref, jnp.int32(0), column, sizes.columns, sizes)
        d_state = lax.fori_loop(0, sizes.num_chunks, go_back, d_state)
        _store_state(d_first_ref, jnp.int32(0), d_state, column, sizes)

    d_states = jax.ShapeDtypeStruct(
        (sizes.num_chunks, *d_final_state.shape), jnp.float32
    )
    d_first = jax.ShapeDtypeStruct((1, *d_final_state.shape), jnp.float32)
    d_first_states, d_states = _call(
        kernel,
        (operands, products, d_output, d_final_state[None]),
        (d_first, d_states),
        sizes,
        sizes.head_grid,
        name="linear_recurrence_d_states",
        num_warps=4,
        num_stages=2,
    )
    return d_first_states[0], d_states


def _compute_gradients(
    operands: RecurrenceOperands,
    chunk_states: jax.Array,
    d_output: jax.Array | None,
    d_chunk_states: jax.Array,
    sizes: _Sizes,
) -> RecurrenceOperands:
    """Returns gradients of the operands, a program a chunk; of q and k a value head's
    each, [B, tokens, N, K].

    Args:
        chunk_states, d_chunk_states: [chunks, B, N, K, V], states before chunks, and
            gradients of those behind.
    """

    def kernel(refs, state_ref, d_output_ref, d_state_ref, d_refs) -> None:
        number = pl.program_id(0)
        rows = _get_rows(number, sizes)
        padded_v = _pad_width(sizes.V)
        chunk = _read_chunk(refs, number, sizes)
        state = _load_state(state_ref, number, 0, padded_v, sizes)
        d_state = _load_state(d_state_ref, number, 0, padded_v, sizes)
        d_chunk_output = None
        if d_output_ref is not None:
            d_chunk_output = _load_rows(d_output_ref, rows, 0, padded_v, sizes.V)
            d_chunk_output = d_chunk_output.astype(jnp.float32)

        def run_chunk(chunk: ChunkOperands):
            products = multiply_chunk(chunk, None, sizes.precision)
            products = _widen_over_chunk(products, sizes)
            return advance_over_chunk(products, state, sizes.scale, sizes.precision)

        _, pull = jax.vjp(run_chunk, chunk)
        (d_chunk,) = pull((d_chunk_output, d_state))
        widths = (sizes.K, sizes.K, sizes.V, sizes.K, 1)
        for d_ref, gradient, width in zip(d_refs, d_chunk, widths, strict=True):
            if d_ref is None:
                continue
            if gradient.shape[0] == 1:
                d_ref[rows] = gradient.reshape(sizes.plan.chunk)
            else:
                _store_rows(d_ref, rows, 0, gradient, width)

    def shape(x: jax.Array | None) -> jax.ShapeDtypeStruct | None:
        if x is None:
            return None
        dtype = x.dtype if sizes.H == sizes.N else jnp.float32
        by_value_head = (*x.shape[:2], sizes.N, *x.shape[3:])
        return jax.ShapeDtypeStruct(by_value_head, dtype)

    (gradients,) = _call(
        kernel,
        (operands, chunk_states, d_output, d_chunk_states),
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
    product_refs: _Products[Ref],
    number: Index,
    column: Index,
    sizes: _Sizes,
) -> ChunkProducts:
    """Reads what hands some columns of a state over a chunk."""
    rows = _get_rows(number, sizes)
    padded_k = _pad_width(sizes.K)

    def read(ref: Ref | None, operand_ref: Ref | None = None) -> jax.Array | None:
        """Reads a product, or where there is none queries or keys."""
        if ref is not None:
            return ref[rows, :]
        if operand_ref is None:
            return None
        return _load_rows(operand_ref, rows, 0, padded_k, sizes.K)

    if product_refs.new is not None:
        new = product_refs.new[rows, pl.ds(column, sizes.columns)]
    else:
        new = _load_rows(refs.v, rows, column, sizes.columns, sizes.V)
        new = new.astype(jnp.float32)
    if product_refs.over_chunk is not None:
        from_start = None
        to_end = None
        over_chunk = product_refs.over_chunk[number, :][:, None]
    else:
        factors = compute_head_factors(refs.log_decay[rows][None])
        from_start, to_end, over_chunk = factors
    keys = read(product_refs.keys, refs.k)
    assert keys is not None
    products = ChunkProducts(
        weights=read(product_refs.weights),
        queries=read(product_refs.queries, refs.q),
        from_start=from_start,
        new=new,
        read=read(product_refs.read),
        keys=keys,
        to_end=to_end,
        over_chunk=over_chunk,
    )
    return _widen_over_chunk(products, sizes)


def _widen_over_chunk(products: ChunkProducts, sizes: _Sizes) -> ChunkProducts:
    """Writes out the decay over a chunk as [K, 1]: Triton sums gradients along one
    dimension at a time."""
    over_chunk = jnp.broadcast_to(products.over_chunk, (_pad_width(sizes.K), 1))
    return products._replace(over_chunk=over_chunk)
