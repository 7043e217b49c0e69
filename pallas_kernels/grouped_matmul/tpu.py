"""Grouped products on a TPU: one pass over tiles of rows, each met by the groups in
it."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.chips import TpuChip, get_chip
from pallas_kernels.grouped_matmul import blocks as sizing
from pallas_kernels.grouped_matmul.blocks import GroupedBlocks, GroupedOperands
from pallas_kernels.grouped_matmul.xla import accumulation_dtype
from pallas_kernels.kernel_types import Interpret, Ref, Span

# The sum of so many products of int8 is exact in fp32.
_EXACT = 1024
# Rows of a block that are widened at once.
_WIDENED = 128


class GroupVisits(NamedTuple):
    """Pairs in the order of rows, int32 [V] each, V = tiles + groups + 1; the first
    ``count`` of them are used.

    Behind the groups' own may come those of the padding, one for each tile that holds
    some: they read what the visit before them read, so that nothing is fetched for
    them.
    """

    tile: jax.Array
    """The tile of rows that is read."""
    out_tile: jax.Array
    """The tile of rows that is written."""
    group: jax.Array
    """The group whose kernel is read, or written."""
    begin: jax.Array
    """First row within the tile that belongs to the group, or to the padding."""
    end: jax.Array
    """The row behind the last one that does."""
    padding: jax.Array
    """1 where the rows belong to no group, else 0."""


def matmul(
    rows: jax.Array,
    kernels: jax.Array,
    group_sizes: jax.Array,
    row_scales: jax.Array | None = None,
    column_scales: jax.Array | None = None,
    *,
    transposed: bool,
    dtype: DTypeLike,
    blocks: GroupedBlocks | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """See ``grouped_matmul``. The grid: columns (over the cores), visits, parts of D.

    A visit goes through its group's rows of the tile in parts, from the first one on,
    so that a group costs its own rows rounded up to a part, and the tile's other rows
    nothing.
    """
    chip = get_chip()
    R, D = rows.shape
    F = kernels.shape[1 if transposed else 2]
    operands = GroupedOperands(R, D, F, rows.dtype, kernels.dtype, dtype)
    blocks = blocks or sizing.choose_matmul_blocks(operands, chip)
    needed = sizing.matmul_vmem_bytes(blocks, operands, chip)
    sizing.check_vmem(blocks, operands, needed, chip)
    tile, inner, columns = blocks
    parts_of_d = D // inner
    sums = accumulation_dtype(rows.dtype, kernels.dtype)
    wide = sizing.widened_dtype(operands, chip)
    aligned = _alignment(rows, jax.ShapeDtypeStruct((), dtype))

    def kernel(
        visit_refs,
        row_ref,
        kernel_ref,
        row_scale_ref,
        column_scale_ref,
        out_ref,
        wide_ref,
        sum_ref,
    ):
        """One visit: a group's rows in a tile, a part of D, a block of columns.

        Args:
            visit_refs: int32 [V] each, in scalar memory: a ``GroupVisits``.
            row_ref: [tile, inner].
            kernel_ref: [inner, columns], or [columns, inner] when transposed.
            row_scale_ref, column_scale_ref: fp32 [tile, 1] and [1, columns], or None.
            out_ref: [tile, columns].
            wide_ref: the kernel in the type that it is multiplied in, or None.
            sum_ref: [tile, columns], the sum over parts of D, or None for one part.
        """
        wide_ref = kernel_ref if wide is None else wide_ref
        visit = pl.program_id(1)
        d = pl.program_id(2)
        visits = GroupVisits(*visit_refs)
        begin = visits.begin[visit]
        end = visits.end[visit]

        def multiply(part: _TilePart) -> None:
            """Multiplies the part's rows by its columns."""
            here = part.rows
            there = part.columns
            right = wide_ref[there, :] if transposed else wide_ref[:, there]
            y = _product(row_ref[here, :], right, 1, 1 if transposed else 0, sums, chip)
            # Rows of this group that no part before has met.
            row = part.first_row + lax.broadcasted_iota(jnp.int32, y.shape, 0)
            first_new = jnp.maximum(begin, part.first_new_row)
            is_new = (row >= first_new) & (row < end)
            if sum_ref is not None:
                old = sum_ref[here, there]
                earlier_parts = jnp.where(d == 0, 0, old)
                y = jnp.where(is_new, earlier_parts + y, old)
                sum_ref[here, there] = y
            if row_scale_ref is not None:
                y = y.astype(jnp.float32) * row_scale_ref[here, :]
            if column_scale_ref is not None:
                y = y.astype(jnp.float32) * column_scale_ref[:, there]
            # Other rows of the tile are other groups' results.
            old = out_ref[here, there].astype(y.dtype)
            out_ref[here, there] = jnp.where(is_new, y, old).astype(dtype)

        if wide is not None:
            # Once for all rows of a group that follow each other.
            group_before = visits.group[jnp.maximum(visit - 1, 0)]
            is_new_group = (visit == 0) | (group_before != visits.group[visit])
            is_new_block = is_new_group | (parts_of_d > 1)

            @pl.when(is_new_block & (visits.padding[visit] == 0))
            def widen_kernel():
                _widen(kernel_ref, wide_ref)

        @pl.when(visits.padding[visit] == 0)
        def multiply_rows():
            _run_parts(
                multiply,
                begin,
                end,
                aligned=aligned,
                tile=tile,
                lengths=sizing.row_part_sizes(chip),
                columns=columns,
                part_columns=sizing.column_part_size(blocks, operands, chip),
            )

        @pl.when(visits.padding[visit] == 1)
        def write_zeros():
            row = lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
            old = out_ref[...].astype(sums)
            out_ref[...] = jnp.where(row >= begin, 0, old).astype(dtype)

    # Index maps of a grid step: column n, visit v, part d, and the visits' integers.

    def at_rows(n, v, d, visit_refs):
        return GroupVisits(*visit_refs).tile[v], d

    def at_kernel(n, v, d, visit_refs):
        group = GroupVisits(*visit_refs).group[v]
        return (group, n, d) if transposed else (group, d, n)

    def at_row_scales(n, v, d, visit_refs):
        return GroupVisits(*visit_refs).tile[v], 0

    def at_column_scales(n, v, d, visit_refs):
        return GroupVisits(*visit_refs).group[v], 0, n

    def at_result(n, v, d, visit_refs):
        return GroupVisits(*visit_refs).out_tile[v], n

    kernel_block = (None, columns, inner) if transposed else (None, inner, columns)
    specs = [
        pl.BlockSpec((tile, inner), at_rows),
        pl.BlockSpec(kernel_block, at_kernel),
        pl.BlockSpec((tile, 1), at_row_scales),
        pl.BlockSpec((None, 1, columns), at_column_scales),
    ]
    if row_scales is not None:
        row_scales = row_scales[:, None]  # [R, 1]
    if column_scales is not None:
        column_scales = column_scales[:, None]  # [G, 1, F]
    arrays = (rows, kernels, row_scales, column_scales)
    in_specs = [
        None if array is None else spec
        for array, spec in zip(arrays, specs, strict=True)
    ]
    visits, count = plan_group_visits(group_sizes, R, tile, padding=True)
    tiles_of_f = pl.cdiv(F, columns)
    # In parts a kernel is read for every tile that its group has rows in.
    kernel_reads = 1 if parts_of_d == 1 else max(1, R // tile // len(group_sizes))
    bytes_read = tiles_of_f * rows.nbytes + kernel_reads * kernels.nbytes
    wide_block = None if wide is None else pltpu.VMEM(kernel_block[1:], wide)
    sum_block = pltpu.VMEM((tile, columns), sums) if parts_of_d > 1 else None
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((R, F), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles_of_f, count, parts_of_d),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tile, columns), at_result),
            scratch_shapes=[wide_block, sum_block],
        ),
        compiler_params=_params(needed, chip),
        cost_estimate=_estimate_cost(operands, (R, F), bytes_read),
        interpret=interpret,
        name="grouped_matmul",
    )(tuple(visits), *arrays)


def outer(
    rows: jax.Array,
    others: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: DTypeLike,
    blocks: GroupedBlocks | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """See ``grouped_outer_product``. The grid: parts of D and of F (over the cores),
    visits."""
    chip = get_chip()
    R, D = rows.shape
    F = others.shape[1]
    operands = GroupedOperands(R, D, F, rows.dtype, others.dtype, dtype)
    blocks = blocks or sizing.choose_outer_blocks(operands, chip)
    needed = sizing.outer_vmem_bytes(blocks, operands)
    sizing.check_vmem(blocks, operands, needed, chip)
    tile, inner, columns = blocks
    sums = accumulation_dtype(rows.dtype, others.dtype)
    aligned = _alignment(rows, others)

    def kernel(visit_refs, row_ref, other_ref, out_ref, sum_ref):
        """One visit: a group's rows in a tile, parts of D and F.

        Args:
            visit_refs: int32 [V] each, in scalar memory: a ``GroupVisits``.
            row_ref, other_ref: [tile, inner] and [tile, columns].
            out_ref, sum_ref: [inner, columns].
        """
        visit = pl.program_id(2)
        visits = GroupVisits(*visit_refs)
        begin = visits.begin[visit]
        end = visits.end[visit]
        group_before = visits.group[jnp.maximum(visit - 1, 0)]
        is_first_visit = (visit == 0) | (group_before != visits.group[visit])

        def add(inside: Span, part: _TilePart) -> None:
            """Adds the outer product of the part's rows, columns ``inside`` of D."""
            here = part.rows
            there = part.columns
            row_index = lax.broadcasted_iota(jnp.int32, (part.num_rows, 1), 0)
            row = part.first_row + row_index
            # Rows of this group that no part before has met.
            first_new = jnp.maximum(begin, part.first_new_row)
            is_new = (row >= first_new) & (row < end)
            left = _mask_rows(is_new, row_ref[here, inside])
            right = _mask_rows(is_new, other_ref[here, there])
            y = _product(left, right, 0, 0, sums, chip)
            # The sum is stored as a result each time: beside a product that costs
            # nothing.
            is_first = is_first_visit & (part.first_new_row <= begin)
            y = jnp.where(is_first, 0, sum_ref[inside, there]) + y
            sum_ref[inside, there] = y
            out_ref[inside, there] = y.astype(dtype)

        part_inner, part_columns = sizing.outer_part_shape(blocks, operands)

        def add_inner_part(number, _):
            _run_parts(
                partial(add, _slice(number, part_inner, inner)),
                begin,
                end,
                aligned=aligned,
                tile=tile,
                # Rows contracted at once: what the matrix unit holds.
                lengths=(chip.mxu_size,),
                columns=columns,
                part_columns=part_columns,
            )

        lax.fori_loop(0, inner // part_inner, add_inner_part, None)

        @pl.when(begin == end)
        def write_zeros():
            out_ref[...] = jnp.zeros_like(out_ref)

    # Index maps of a grid step: parts m of D and n of F, visit v, the visits' integers.

    def at_rows(m, n, v, visit_refs):
        return GroupVisits(*visit_refs).tile[v], m

    def at_others(m, n, v, visit_refs):
        return GroupVisits(*visit_refs).tile[v], n

    def at_result(m, n, v, visit_refs):
        return GroupVisits(*visit_refs).group[v], m, n

    visits, count = plan_group_visits(group_sizes, R, tile, padding=False)
    tiles_of_d = pl.cdiv(D, inner)
    tiles_of_f = pl.cdiv(F, columns)
    bytes_read = tiles_of_f * rows.nbytes + tiles_of_d * others.nbytes
    out_shape = (len(group_sizes), D, F)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(out_shape, dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles_of_d, tiles_of_f, count),
            in_specs=[
                pl.BlockSpec((tile, inner), at_rows),
                pl.BlockSpec((tile, columns), at_others),
            ],
            out_specs=pl.BlockSpec((None, inner, columns), at_result),
            scratch_shapes=[pltpu.VMEM((inner, columns), sums)],
        ),
        compiler_params=_params(needed, chip),
        cost_estimate=_estimate_cost(operands, out_shape, bytes_read),
        interpret=interpret,
        name="grouped_outer",
    )(tuple(visits), rows, others)


class _TilePart(NamedTuple):
    """Rows and columns of a tile that are multiplied at once."""

    rows: Span
    """A slice of the tile."""
    num_rows: int
    first_row: jax.Array
    first_new_row: jax.Array
    """Rows before it another part has met; they are not to be summed twice."""
    columns: Span
    """A slice of the block's columns."""


def _run_parts(
    body: Callable[[_TilePart], None],
    begin: jax.Array,
    end: jax.Array,
    *,
    aligned: int,
    tile: int,
    lengths: tuple[int, ...],
    columns: int,
    part_columns: int,
) -> None:
    """Calls ``body`` for parts of the rows [begin, end) of a tile and of the columns.

    Args:
        aligned: parts start at its multiples.
        tile: rows of the tile. A part that would end behind it begins before its first
            new row.
        lengths: rows of a part, the longest first; only the last is rounded up.
        columns, part_columns: of the block and of a part.
    """
    start = lax.div(begin, aligned) * aligned
    across = columns // part_columns
    last_length = min(lengths[-1], tile)
    for most_length in lengths:
        length = min(most_length, tile)
        is_last = length == last_length
        # Whole parts of this length; the last length's are rounded up.
        rounding = length - 1 if is_last else 0
        count = lax.div(end - start + rounding, length)
        count = jnp.where(end > begin, count, 0)

        def run_part(number, _, start=start, length=length):
            # Parts of the same rows follow each other, a run of columns each.
            first_new_row = start + lax.div(number, across) * length
            first_row = jnp.minimum(first_new_row, tile - length)
            first_row = pl.multiple_of(first_row, aligned)
            part_slice = _slice(lax.rem(number, across), part_columns, columns)
            body(
                _TilePart(
                    pl.ds(first_row, length),
                    length,
                    first_row,
                    first_new_row,
                    part_slice,
                )
            )

        lax.fori_loop(0, count * across, run_part, None)
        if is_last:
            break
        start = start + count * length


def _alignment(*arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Rows in which slices of all of these may start: those that share a register's
    words."""
    smallest = min(array.dtype.itemsize for array in arrays)
    # 32 rows of 8 bits, 16 of wider numbers.
    return 32 // min(2, smallest)


def _slice(number: jax.Array, part: int, whole: int) -> Span:
    """Part ``number`` of a dimension of ``whole`` elements, in parts of ``part``."""
    if part == whole:
        return slice(None)
    first = pl.multiple_of(number * part, part)
    return pl.ds(first, part)


def _product(
    left: jax.Array,
    right: jax.Array,
    left_dim: int,
    right_dim: int,
    sums: DTypeLike,
    chip: TpuChip,
) -> jax.Array:
    """Contracted over one dimension each, in the types that the chip multiplies, or in
    bf16."""
    dims = (((left_dim,), (right_dim,)), ((), ()))
    if chip.multiplies_natively(left.dtype, right.dtype):
        return lax.dot_general(left, right, dims, preferred_element_type=sums)
    is_fp32 = jnp.float32 in (left.dtype, right.dtype)
    wide = jnp.float32 if is_fp32 else jnp.bfloat16
    left = _widened(left, wide)
    right = _widened(right, wide)
    if sums == jnp.float32:
        return lax.dot_general(left, right, dims, preferred_element_type=sums)
    # int8 as bf16: products are exact, and so is a sum of _EXACT of them.
    length = left.shape[left_dim]
    total = None
    for start in range(0, length, _EXACT):
        stop = min(start + _EXACT, length)
        left_part = lax.slice_in_dim(left, start, stop, axis=left_dim)
        right_part = lax.slice_in_dim(right, start, stop, axis=right_dim)
        part = lax.dot_general(
            left_part, right_part, dims, preferred_element_type=jnp.float32
        )
        part = part.astype(sums)
        total = part if total is None else total + part
    assert total is not None
    return total


def _widen(ref: Ref, wide_ref: Ref) -> None:
    """A block at another's type, a part at a time."""
    length = ref.shape[0]
    part = _WIDENED if length % _WIDENED == 0 else length

    def step(number, _):
        here = _slice(number, part, length)
        wide_ref[here, :] = _widened(ref[here, :], wide_ref.dtype)

    lax.fori_loop(0, length // part, step, None)


def _widened(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x in ``dtype``, by way of fp32."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _mask_rows(mask: jax.Array, x: jax.Array) -> jax.Array:
    """x where the mask is true, else zeros."""
    if x.dtype.itemsize > 1:
        return jnp.where(mask, x, 0)
    # 8 bits are chosen from as 32.
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jnp.where(mask, x.astype(wide), 0).astype(x.dtype)


def _params(needed: int, chip: TpuChip) -> pltpu.CompilerParams:
    # An eighth and 2 MiB more than is counted.
    vmem_limit = min(needed + needed // 8 + (2 << 20), chip.vmem_bytes)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=vmem_limit,
    )


def _estimate_cost(
    operands: GroupedOperands, out_shape: tuple[int, ...], bytes_read: int
) -> pl.CostEstimate:
    bytes_written = prod(out_shape) * jnp.dtype(operands.out_dtype).itemsize
    flops = 2 * operands.rows * operands.inner * operands.columns
    return pl.CostEstimate(
        flops=flops, bytes_accessed=bytes_read + bytes_written, transcendentals=0
    )


def plan_group_visits(
    group_sizes: jax.Array, num_rows: int, tile: int, *, padding: bool
) -> tuple[GroupVisits, jax.Array]:
    """Returns the visits to ``num_rows`` rows in tiles of ``tile``, and their count,
    int32 [].

    Args:
        group_sizes: int32 [G], rows of each group; their sum is at most ``num_rows``.
        padding: visit the rows behind the groups', but no empty group; otherwise every
            group, an empty one once with no rows, and no padding.
    """
    num_groups = len(group_sizes)
    num_tiles = -(-num_rows // tile)

    # Rows [starts, ends) of each group. The padding is a group more.
    num_padding = num_rows - group_sizes.sum(dtype=jnp.int32)
    lengths = jnp.append(group_sizes, num_padding)
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    starts = ends - lengths

    # A group visits the tiles from its first row's to its last row's.
    first_tile = starts // tile
    visits_if_empty = 0 if padding else 1
    has_rows = lengths > 0
    tiles_met = (ends - 1) // tile - first_tile + 1
    num_visits = jnp.where(has_rows, tiles_met, visits_if_empty)
    if not padding:
        num_visits = num_visits.at[-1].set(0)
    visits_end = jnp.cumsum(num_visits, dtype=jnp.int32)

    # Of each visit, the group and the tile that is written: the group's first tile, and
    # one more for each of its visits before.
    visit = jnp.arange(num_tiles + num_groups + 1, dtype=jnp.int32)
    group = _find_group(visit, visits_end, num_groups)
    out_tile = _look_up(first_tile - visits_end + num_visits, group) + visit
    # An empty last group begins behind all tiles.
    out_tile = jnp.clip(out_tile, 0, num_tiles - 1)

    # Of each visit, what is read. Visits to the padding read what the last visit to a group read.
    read_visit = jnp.clip(visit, 0, jnp.maximum(visits_end[-2] - 1, 0))
    read_group = _find_group(read_visit, visits_end, num_groups - 1)
    read_tile = _look_up(first_tile - visits_end + num_visits, read_group) + read_visit
    visits = GroupVisits(
        tile=jnp.clip(read_tile, 0, num_tiles - 1),
        out_tile=out_tile,
        group=read_group,
        begin=jnp.clip(_look_up(starts, group) - out_tile * tile, 0, tile),
        end=jnp.clip(_look_up(ends, group) - out_tile * tile, 0, tile),
        padding=(group == num_groups).astype(jnp.int32),
    )
    return visits, visits_end[-1]


def _find_group(visit: jax.Array, visits_end: jax.Array, last_group: int) -> jax.Array:
    """The group of each visit. Compared with all: a TPU searches and gathers more
    slowly."""
    groups_before = (visit[:, None] >= visits_end).sum(1, dtype=jnp.int32)
    return jnp.minimum(groups_before, last_group)


def _look_up(values: jax.Array, group: jax.Array) -> jax.Array:
    """``values[group]``, by comparing too."""
    is_group = group[:, None] == jnp.arange(len(values))
    return jnp.where(is_group, values, 0).sum(1, dtype=jnp.int32)
