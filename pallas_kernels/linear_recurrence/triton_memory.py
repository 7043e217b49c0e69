"""What the GPU kernels of linear recurrences have in memory, and how a program reads and
writes its part of it."""

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kernel_types import Index, Interpret, Ref, Span
from pallas_kernels.linear_recurrence.kernel_chunk import ChunkOperands, ChunkProducts
from pallas_kernels.linear_recurrence.params import ChunkPlan
from pallas_kernels.linear_recurrence.products import (
    Matrix,
    ProductPrecision,
    Terms,
)

# The least size of a product's dimension.
LEAST_SIZE = 16
# Columns of a program's state: with 128 key channels a quarter of the registers.
_STATE_COLUMNS = 32


class Sizes(NamedTuple):
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
        return min(_STATE_COLUMNS, pad_width(self.V))

    @property
    def head_grid(self) -> tuple[int, int, int]:
        """A program for some columns of a head's state."""
        return pl.cdiv(self.V, self.columns), self.N, self.B

    @property
    def chunk_grid(self) -> tuple[int, int, int]:
        """A program a chunk of a head."""
        return self.num_chunks, self.N, self.B


MemoryT = TypeVar("MemoryT")
"""Arrays, their shapes, or references to them in a kernel."""


class OperandMemory(NamedTuple, Generic[MemoryT]):
    """Operands, as :class:`~pallas_kernels.linear_recurrence.params.RecurrenceOperands`
    has them."""

    q: MemoryT | None
    k: MemoryT
    v: MemoryT
    log_decay: MemoryT
    beta: MemoryT | None


class ProductMemory(NamedTuple, Generic[MemoryT]):
    """Products of all chunks, [B, tokens, N, width] of widths that are powers of two,
    as :class:`~pallas_kernels.linear_recurrence.kernel_chunk.ChunkProducts` has them.

    Matrices that meet a state are terms of bf16 in all places, so that they go from
    memory to the tensor cores as they are.
    """

    weights: tuple[MemoryT, ...] | None
    queries: tuple[MemoryT, ...] | None
    """None: the operand."""
    from_start: MemoryT | None
    """[B, tokens, N]."""
    new: MemoryT | None
    """None: the values, which are an operand."""
    read: tuple[MemoryT, ...] | None
    keys: tuple[MemoryT, ...] | None
    """None: the operand."""
    to_end: MemoryT | None
    """[B, tokens, N]."""
    over_chunk: MemoryT
    """[B, chunks, N], or by channel [B, chunks, N, width]."""


def make_spec(sizes: Sizes, x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Returns the window of [B, rows, heads], [B, rows, heads, width] or states [S, B,
    N, K, V]: all of a head, filled up to powers of two."""

    def index(i, n, row_of_run):
        row = lax.rem(row_of_run, sizes.B)
        if x.ndim == 5:
            return 0, row, n, 0, 0
        head = lax.div(n, sizes.N // x.shape[2])
        return (row, 0, head, 0)[: x.ndim]

    widths = [pad_width(width) for width in x.shape[3:]]
    if x.ndim == 5:
        return pl.BlockSpec((x.shape[0], None, None, *widths), index)
    return pl.BlockSpec((None, x.shape[1], None, *widths), index)


def pad_width(width: int) -> int:
    """Returns the size of a dimension in registers: a power of two."""
    return max(LEAST_SIZE, 1 << (width - 1).bit_length())


def get_rows(number: Index, sizes: Sizes) -> Span:
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


def load_rows(
    ref: Ref, number: Index, column: Index, num_columns: int, width: int, sizes: Sizes
) -> jax.Array:
    """Reads a chunk's [tokens, num_columns] of [T, width]; zeros past it."""
    L = sizes.plan.chunk
    mask = _make_mask((L, num_columns), column, (L, width))
    return _load(ref.at[get_rows(number, sizes), pl.ds(column, num_columns)], mask)


def store_rows(
    ref: Ref,
    number: Index,
    column: Index,
    values: jax.Array,
    width: int,
    sizes: Sizes,
) -> None:
    """Writes a chunk's [tokens, columns] of [T, width]."""
    L, num_columns = values.shape
    mask = _make_mask((L, num_columns), column, (L, width))
    part = ref.at[get_rows(number, sizes), pl.ds(column, num_columns)]
    plgpu.store(part, values.astype(ref.dtype), mask=mask)


def load_state(
    ref: Ref, number: Index, column: Index, num_columns: int, sizes: Sizes
) -> jax.Array:
    """Reads columns of a state, [K, num_columns], filled up with zeros."""
    padded_k = pad_width(sizes.K)
    mask = _make_mask((padded_k, num_columns), column, (sizes.K, sizes.V))
    part = ref.at[number, pl.ds(0, padded_k), pl.ds(column, num_columns)]
    return _load(part, mask)


def store_state(
    ref: Ref, number: Index, state: jax.Array, column: Index, sizes: Sizes
) -> None:
    """Writes columns of a state."""
    padded_k, num_columns = state.shape
    mask = _make_mask((padded_k, num_columns), column, (sizes.K, sizes.V))
    part = ref.at[number, pl.ds(0, padded_k), pl.ds(column, num_columns)]
    plgpu.store(part, state, mask=mask)


def read_chunk(refs: OperandMemory[Ref], number: Index, sizes: Sizes) -> ChunkOperands:
    """Reads all of a chunk's operands."""
    rows = get_rows(number, sizes)

    def read(ref: Ref, width: int) -> jax.Array:
        return load_rows(ref, number, 0, pad_width(width), width, sizes)

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


def read_products(
    refs: OperandMemory[Ref],
    product_refs: ProductMemory[Ref],
    number: Index,
    column: Index,
    sizes: Sizes,
) -> ChunkProducts[Matrix]:
    """Reads what hands some columns of a state over a chunk."""
    rows = get_rows(number, sizes)

    def read_terms(term_refs: tuple[Ref, ...]) -> Terms:
        return tuple(ref[rows, :] for ref in term_refs)

    def read_matrix(term_refs: tuple[Ref, ...] | None, ref: Ref) -> Matrix:
        """Reads queries or keys, which by head are operands."""
        if term_refs is not None:
            return read_terms(term_refs)
        return load_rows(ref, number, 0, pad_width(sizes.K), sizes.K, sizes)

    def read_column(ref: Ref | None) -> jax.Array | None:
        return None if ref is None else ref[rows][:, None]

    if product_refs.new is not None:
        new = product_refs.new[rows, pl.ds(column, sizes.columns)]
    else:
        new = load_rows(refs.v, number, column, sizes.columns, sizes.V, sizes)
        new = new.astype(jnp.float32)
    if sizes.decays_by_channel:
        over_chunk = product_refs.over_chunk[number, :][:, None]
    else:
        over_chunk = product_refs.over_chunk[number]
    weights = product_refs.weights
    read = product_refs.read
    return ChunkProducts(
        weights=None if weights is None else read_terms(weights),
        queries=None if refs.q is None else read_matrix(product_refs.queries, refs.q),
        from_start=read_column(product_refs.from_start),
        new=new,
        read=None if read is None else read_terms(read),
        keys=read_matrix(product_refs.keys, refs.k),
        to_end=read_column(product_refs.to_end),
        over_chunk=over_chunk,
    )
