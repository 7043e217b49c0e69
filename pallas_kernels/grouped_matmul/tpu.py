"""Grouped products on a TPU: one pass over tiles of rows, each met by the groups in
it."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TpuChip, get_chip
from pallas_kernels.grouped_matmul import blocks as sizing
from pallas_kernels.grouped_matmul.blocks import GroupedBlocks, GroupedOperands
from pallas_kernels.grouped_matmul.xla import accumulation_dtype

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
    dtype: Any,
    blocks: GroupedBlocks | None = None,
    interpret: Any = False,
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
        where,
        row_ref,
        kernel_ref,
        row_scale_ref,
        column_scale_ref,
        out_ref,
        wide_ref,
        sum_ref,
    ):
        wide_ref = kernel_ref if wide is None else wide_ref
        visit, d = pl.program_id(1), pl.program_id(2)
        where = GroupVisits(*where)
        begin, end = where.begin[visit], where.end[visit]

        def multiply(here, at, start, there):
            """The rows ``here``, from ``at`` on, times the columns ``there``. Those
            before ``start`` another part has met; they are not to be summed twice."""
            right = wide_ref[there, :] if transposed else wide_ref[:, there]
            y = _product(row_ref[here, :], right, 1, 1 if transposed else 0, sums, chip)
            row = at + lax.broadcasted_iota(jnp.int32, y.shape, 0)
            own = (row >= jnp.maximum(begin, start)) & (row < end)
            if sum_ref is not None:
                old = sum_ref[here, there]
                y = jnp.where(own, jnp.where(d == 0, 0, old) + y, old)
                sum_ref[here, there] = y
            if row_scale_ref is not None:
                y = y.astype(jnp.float32) * row_scale_ref[here, :]
            if column_scale_ref is not None:
                y = y.astype(jnp.float32) * column_scale_ref[:, there]
            old = out_ref[here, there].astype(y.dtype)
            out_ref[here, there] = jnp.where(own, y, old).astype(dtype)

        if wide is not None:
            # Once for all rows of a group that follow each other.
            before = where.group[jnp.maximum(visit - 1, 0)]
            is_new = (visit == 0) | (before != where.group[visit]) | (parts_of_d > 1)

            @pl.when(is_new & (where.padding[visit] == 0))
            def _():
                _widen(kernel_ref, wide_ref)

        @pl.when(where.padding[visit] == 0)
        def _():
            part = sizing.column_part_size(blocks, operands, chip)
            lengths = sizing.row_part_sizes(chip)
            _over_parts(multiply, begin, end, aligned, tile, lengths, columns, part)

        @pl.when(where.padding[visit] == 1)
        def _():
            row = lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
            old = out_ref[...].astype(sums)
            out_ref[...] = jnp.where(row >= begin, 0, old).astype(dtype)

    kernel_block = (None, columns, inner) if transposed else (None, inner, columns)
    specs = [
        pl.BlockSpec((tile, inner), lambda n, v, d, where: (where[0][v], d)),
        pl.BlockSpec(
            kernel_block,
            lambda n, v, d, where: (where[2][v], *((n, d) if transposed else (d, n))),
        ),
        pl.BlockSpec((tile, 1), lambda n, v, d, where: (where[0][v], 0)),
        pl.BlockSpec((None, 1, columns), lambda n, v, d, where: (where[2][v], 0, n)),
    ]
    scales = (None if x is None else x[:, None] for x in (row_scales, column_scales))
    arrays = rows, kernels, *scales
    where, count = plan_group_visits(group_sizes, R, tile, padding=True)
    tiles_of_f = pl.cdiv(F, columns)
    read = 1 if parts_of_d == 1 else max(1, R // tile // len(group_sizes))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((R, F), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles_of_f, count, parts_of_d),
            in_specs=[
                None if x is None else spec
                for x, spec in zip(arrays, specs, strict=True)
            ],
            out_specs=pl.BlockSpec(
                (tile, columns), lambda n, v, d, where: (where[1][v], n)
            ),
            scratch_shapes=[
                None if wide is None else pltpu.VMEM(kernel_block[1:], wide),
                pltpu.VMEM((tile, columns), sums) if parts_of_d > 1 else None,
            ],
        ),
        compiler_params=_params(needed, chip),
        cost_estimate=_estimate_cost(
            operands, (R, F), tiles_of_f * rows.nbytes + read * kernels.nbytes
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(tuple(where), *arrays)


def outer(
    rows: jax.Array,
    others: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: Any,
    blocks: GroupedBlocks | None = None,
    interpret: Any = False,
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

    def kernel(where, row_ref, other_ref, out_ref, sum_ref):
        visit = pl.program_id(2)
        where = GroupVisits(*where)
        begin, end = where.begin[visit], where.end[visit]
        before = where.group[jnp.maximum(visit - 1, 0)]
        is_first = (visit == 0) | (before != where.group[visit])

        def add_part(inside):
            def add(here, at, start, there):
                row = at + lax.broadcasted_iota(jnp.int32, (here.size, 1), 0)
                own = (row >= jnp.maximum(begin, start)) & (row < end)
                left, right = (
                    _where(own, ref[here, part])
                    for ref, part in ((row_ref, inside), (other_ref, there))
                )
                y = _product(left, right, 0, 0, sums, chip)
                # The sum is stored as a result each time: beside a product that costs
                # nothing.
                new = is_first & (start <= begin)
                y = jnp.where(new, 0, sum_ref[inside, there]) + y
                sum_ref[inside, there] = y
                out_ref[inside, there] = y.astype(dtype)

            return add

        at_once = sizing.outer_part_shape(blocks, operands)
        depth = chip.mxu_size  # rows contracted at once: what the matrix unit holds

        def over_inner(number, _):
            inside = _slice(number, at_once[0], inner)
            _over_parts(
                add_part(inside),
                begin,
                end,
                aligned,
                tile,
                (depth,),
                columns,
                at_once[1],
            )

        lax.fori_loop(0, inner // at_once[0], over_inner, None)

        @pl.when(begin == end)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

    where, count = plan_group_visits(group_sizes, R, tile, padding=False)
    tiles = pl.cdiv(D, inner), pl.cdiv(F, columns)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(group_sizes), D, F), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*tiles, count),
            in_specs=[
                pl.BlockSpec((tile, inner), lambda m, n, v, where: (where[0][v], m)),
                pl.BlockSpec((tile, columns), lambda m, n, v, where: (where[0][v], n)),
            ],
            out_specs=pl.BlockSpec(
                (None, inner, columns), lambda m, n, v, where: (where[2][v], m, n)
            ),
            scratch_shapes=[pltpu.VMEM((inner, columns), sums)],
        ),
        compiler_params=_params(needed, chip),
        cost_estimate=_estimate_cost(
            operands,
            (len(group_sizes), D, F),
            tiles[1] * rows.nbytes + tiles[0] * others.nbytes,
        ),
        interpret=interpret,
        name="grouped_outer",
    )(tuple(where), rows, others)


def _over_parts(
    body: Callable[..., None],
    begin: jax.Array,
    end: jax.Array,
    aligned: int,
    tile: int,
    lengths: tuple[int, ...],
    columns: int,
    part: int,
) -> None:
    """``body(here, at, start, there)`` for parts of the rows [begin, end) of a tile,
    the longest first, and of the columns. Parts start at multiples of ``aligned``; one
    that would end behind the tile begins, at ``at``, before its ``start``."""
    start = lax.div(begin, aligned) * aligned
    across = columns // part
    for length in (min(length, tile) for length in lengths):
        is_last = length == min(lengths[-1], tile)
        count = lax.div(end - start + (length - 1 if is_last else 0), length)
        count = jnp.where(end > begin, count, 0)

        def step(number, _, start=start, length=length):
            own = start + lax.div(number, across) * length
            at = pl.multiple_of(jnp.minimum(own, tile - length), aligned)
            body(
                pl.ds(at, length),
                at,
                own,
                _slice(lax.rem(number, across), part, columns),
            )

        lax.fori_loop(0, count * across, step, None)
        if is_last:
            break
        start = start + count * length


def _alignment(*arrays: Any) -> int:
    """Rows in which slices of all of these may start: those that share a register's
    words."""
    return 32 // min(2, *(x.dtype.itemsize for x in arrays))


def _slice(number: jax.Array, part: int, whole: int) -> Any:
    return (
        slice(None)
        if part == whole
        else pl.ds(pl.multiple_of(number * part, part), part)
    )


def _product(
    left, right, left_dim: int, right_dim: int, sums: Any, chip: TpuChip
) -> jax.Array:
    """Contracted over one dimension each, in the types that the chip multiplies, or in
    bf16."""
    contract = (((left_dim,), (right_dim,)), ((), ()))
    if chip.multiplies_natively(left.dtype, right.dtype):
        return lax.dot_general(left, right, contract, preferred_element_type=sums)
    wide = jnp.float32 if jnp.float32 in (left.dtype, right.dtype) else jnp.bfloat16
    left, right = _widened(left, wide), _widened(right, wide)
    if sums == jnp.float32:
        return lax.dot_general(left, right, contract, preferred_element_type=sums)
    length = left.shape[left_dim]
    total = None
    for at in range(0, length, _EXACT):
        stop = min(at + _EXACT, length)
        a = lax.slice_in_dim(left, at, stop, axis=left_dim)
        b = lax.slice_in_dim(right, at, stop, axis=right_dim)
        y = lax.dot_general(a, b, contract, preferred_element_type=jnp.float32).astype(
            sums
        )
        total = y if total is None else total + y
    assert total is not None
    return total


def _widen(ref: Any, wide_ref: Any) -> None:
    """A block at another's type, a part at a time."""
    length = ref.shape[0]
    part = _WIDENED if length % _WIDENED == 0 else length

    def step(number, _):
        here = _slice(number, part, length)
        wide_ref[here, :] = _widened(ref[here, :], wide_ref.dtype)

    lax.fori_loop(0, length // part, step, None)


def _widened(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _where(own: jax.Array, x: jax.Array) -> jax.Array:
    """x, and zeros in other rows."""
    if x.dtype.itemsize > 1:
        return jnp.where(own, x, 0)
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jnp.where(own, x.astype(wide), 0).astype(x.dtype)


def _params(needed: int, chip: TpuChip) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=min(needed + needed // 8 + (2 << 20), chip.vmem_bytes),
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
    lengths = jnp.append(group_sizes, num_rows - group_sizes.sum(dtype=jnp.int32))
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    starts = ends - lengths
    first = starts // tile
    counts = jnp.where(lengths > 0, (ends - 1) // tile - first + 1, 0 if padding else 1)
    counts = counts if padding else counts.at[-1].set(0)
    done = jnp.cumsum(counts, dtype=jnp.int32)

    number = jnp.arange(num_tiles + num_groups + 1, dtype=jnp.int32)
    group = _find_group(number, done, num_groups)
    out_tile = _look_up(first - done + counts, group) + number
    out_tile = jnp.clip(
        out_tile, 0, num_tiles - 1
    )  # an empty last group begins behind them
    own = jnp.clip(number, 0, jnp.maximum(done[-2] - 1, 0))
    own_group = _find_group(own, done, num_groups - 1)
    own_tile = jnp.clip(
        _look_up(first - done + counts, own_group) + own, 0, num_tiles - 1
    )
    found = GroupVisits(
        tile=own_tile,
        out_tile=out_tile,
        group=own_group,
        begin=jnp.clip(_look_up(starts, group) - out_tile * tile, 0, tile),
        end=jnp.clip(_look_up(ends, group) - out_tile * tile, 0, tile),
        padding=(group == num_groups).astype(jnp.int32),
    )
    return found, done[-1]


def _find_group(number: jax.Array, done: jax.Array, most: int) -> jax.Array:
    """The group of each visit. Compared with all: a TPU searches and gathers more
    slowly."""
    return jnp.minimum((number[:, None] >= done).sum(1, dtype=jnp.int32), most)


def _look_up(values: jax.Array, group: jax.Array) -> jax.Array:
    """``values[group]``, by comparing too."""
    mine = group[:, None] == jnp.arange(len(values))
    return jnp.where(mine, values, 0).sum(1, dtype=jnp.int32)
