"""Sizes of the blocks that the TPU kernels hold in VMEM, and of the parts they compute
at once."""

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.chips import TpuChip, find_largest_divisor, round_up

LANES = 128
# Elements of a kernel that one unrolled product reads, for each column of the matrix
# unit: more hide its beginning and end better, and compile for longer.
_UNROLLED = 1 << 14
# A tile of rows: groups of fewer share one, and each that begins inside one costs a
# step.
_ROWS = 1024
# Rows of a block of 8-bit numbers come in 32s.
_ROW_UNIT = 32
_COLUMNS = 2048


class GroupedBlocks(NamedTuple):
    """The block that one step of a kernel's grid works on.

    Of a matmul: rows and columns of the result, and ``inner`` of the contracted
    dimension. Of an outer product: ``rows`` are contracted, ``inner`` × ``columns`` is
    the part of [D, F] made.
    """

    rows: int
    inner: int
    columns: int


class GroupedOperands(NamedTuple):
    """Sizes and types that a kernel is built for."""

    rows: int
    inner: int
    """D."""
    columns: int
    """F."""
    left_dtype: DTypeLike
    """Data types of both operands and the result."""
    right_dtype: DTypeLike
    out_dtype: DTypeLike


def choose_matmul_blocks(operands: GroupedOperands, chip: TpuChip) -> GroupedBlocks:
    """Chooses whole D in a kernel's block where it fits, to read each once; rows in
    large tiles.

    Every tile of columns reads all rows again, every change of group a block of a
    kernel.
    """
    D = operands.inner
    F = operands.columns
    budget = _budget(chip)
    # Half of the budget for blocks of kernels, in elements.
    kernel_elements = budget // 2 // _kernel_bytes(operands, chip)
    inner = D
    fewest_columns = _lanes(min(F, 4 * chip.mxu_size))
    if D * fewest_columns > kernel_elements and D % LANES == 0:
        most_inner = kernel_elements // fewest_columns
        inner = LANES * find_largest_divisor(D // LANES, most_inner // LANES)
    most_columns = min(_COLUMNS, kernel_elements // inner)
    most_whole_columns = max(most_columns // LANES * LANES, LANES)
    columns = _even(F, most_whole_columns, chip)
    blocks = GroupedBlocks(_tile(operands), inner, columns)
    while blocks.rows > _ROW_UNIT:
        if matmul_vmem_bytes(blocks, operands, chip) <= budget:
            break
        blocks = blocks._replace(rows=round_up(blocks.rows // 2, _ROW_UNIT))
    return blocks


def choose_outer_blocks(operands: GroupedOperands, chip: TpuChip) -> GroupedBlocks:
    """Chooses as much of [D, F] as fits: every part of it reads rows or others
    again."""
    for most in (_COLUMNS, _COLUMNS // 2, _COLUMNS // 4, _COLUMNS // 8):
        inner = _even(operands.inner, most, chip)
        columns = _even(operands.columns, most, chip._replace(num_cores=1))
        for rows in (_tile(operands), min(_tile(operands), _ROWS // 2)):
            blocks = GroupedBlocks(rows, inner, columns)
            if outer_vmem_bytes(blocks, operands) <= _budget(chip):
                return blocks
    return blocks


def check_vmem(
    blocks: GroupedBlocks, operands: GroupedOperands, needed_bytes: int, chip: TpuChip
) -> None:
    """Raises ValueError: blocks that do not fit the chip's VMEM."""
    if needed_bytes > chip.vmem_bytes:
        raise ValueError(
            f"rows [{operands.rows}, {operands.inner}] and {operands.columns} columns in "
            f"{jnp.dtype(operands.left_dtype).name}, blocks "
            f"{' × '.join(map(str, blocks))}: "
            f"{needed_bytes} bytes of VMEM, of which a core has {chip.vmem_bytes}"
        )


def matmul_vmem_bytes(
    blocks: GroupedBlocks, operands: GroupedOperands, chip: TpuChip
) -> int:
    """Returns bytes of VMEM: two of each block, sums of parts of D, and what a product
    is made in."""
    rows = blocks.rows
    inner = _lanes(blocks.inner)
    columns = _lanes(blocks.columns)
    left_bytes = jnp.dtype(operands.left_dtype).itemsize
    out_bytes = jnp.dtype(operands.out_dtype).itemsize
    # Two blocks each of rows and of results, so that copies overlap.
    total = 2 * rows * (inner * left_bytes + columns * out_bytes)
    total += inner * columns * _kernel_bytes(operands, chip)
    if blocks.inner < operands.inner:
        # Sums of parts of D.
        total += 4 * rows * columns
    # Scales: of rows padded to a row of lanes each, of columns to eight sublanes.
    total += 2 * 4 * (rows * LANES + 8 * columns)
    part_rows, _ = row_part_sizes(chip)
    part_columns = _lanes(column_part_size(blocks, operands, chip))
    # Two products of a part, fp32.
    return total + 2 * 4 * part_rows * part_columns


def widened_dtype(operands: GroupedOperands, chip: TpuChip) -> jnp.dtype | None:
    """Returns the type in which a kernel's blocks are kept beside themselves, or
    None."""
    left, right = operands.left_dtype, operands.right_dtype
    if jnp.dtype(right).itemsize > 1 or chip.multiplies_natively(left, right):
        return None
    is_fp32 = operands.left_dtype == jnp.float32
    return jnp.dtype(jnp.float32 if is_fp32 else jnp.bfloat16)


def _kernel_bytes(operands: GroupedOperands, chip: TpuChip) -> int:
    """Bytes of an element of a kernel's block: two copies, and a wide one."""
    wide = widened_dtype(operands, chip)
    size = 2 * jnp.dtype(operands.right_dtype).itemsize
    return size if wide is None else size + jnp.dtype(wide).itemsize


def outer_vmem_bytes(blocks: GroupedBlocks, operands: GroupedOperands) -> int:
    """Returns bytes of VMEM: two of each block, the sum, and what a product is made
    in."""
    rows = blocks.rows
    inner = _lanes(blocks.inner)
    columns = _lanes(blocks.columns)
    left_bytes = jnp.dtype(operands.left_dtype).itemsize
    right_bytes = jnp.dtype(operands.right_dtype).itemsize
    out_bytes = jnp.dtype(operands.out_dtype).itemsize
    total = 2 * rows * (inner * left_bytes + columns * right_bytes)
    # The sum, fp32, and two blocks of results.
    total += inner * columns * (4 + 2 * out_bytes)
    return total + 2 * prod(outer_part_shape(blocks, operands))


def row_part_sizes(chip: TpuChip) -> tuple[int, int]:
    """Returns rows multiplied at once where a group has many left, and at its end.
    Fewer than fill the matrix unit's weights take as long as these."""
    last_rows = 64 if chip.mxu_size == LANES else LANES
    return 2 * LANES, last_rows


def column_part_size(
    blocks: GroupedBlocks, operands: GroupedOperands, chip: TpuChip
) -> int:
    """Returns the columns multiplied at once: a divisor of the block's."""
    unrolled = chip.mxu_size * _UNROLLED
    if jnp.dtype(operands.left_dtype).itemsize == 4:
        unrolled //= 4
    most = unrolled // blocks.inner
    unit = chip.mxu_size if blocks.columns % chip.mxu_size == 0 else LANES
    if blocks.columns % unit:
        return blocks.columns
    # The nearest divisor: a block of 7 units of which 4 would do is not made one by
    # one.
    num_units = blocks.columns // unit
    divisors = [d for d in range(1, num_units + 1) if num_units % d == 0]

    def ratio_to_most(divisor: int) -> float:
        size = divisor * unit
        return max(size, most) / min(size, max(most, 1))

    return unit * min(divisors, key=ratio_to_most)


def outer_part_shape(
    blocks: GroupedBlocks, operands: GroupedOperands
) -> tuple[int, int]:
    """Returns parts of ``inner`` and of ``columns`` made at once: divisors of the
    block's."""
    fewer = 4 if jnp.dtype(operands.left_dtype).itemsize == 4 else 1

    def choose_part(size: int, most: int) -> int:
        if size % LANES:
            return size
        return LANES * find_largest_divisor(size // LANES, most // fewer // LANES)

    return choose_part(blocks.inner, 1024), choose_part(blocks.columns, 2048)


def _budget(chip: TpuChip) -> int:
    return chip.vmem_bytes * 7 // 8


def _tile(operands: GroupedOperands) -> int:
    return min(_ROWS, round_up(operands.rows, _ROW_UNIT))


def _even(whole: int, most: int, chip: TpuChip) -> int:
    """Equal blocks of at most ``most``, in multiples of lanes, as many for every
    core."""
    if whole <= most and (chip.num_cores == 1 or whole <= 2 * LANES):
        return whole
    # As few blocks as ``most`` allows, but as many for every core.
    count = round_up(-(-whole // most), chip.num_cores)
    # Blocks of two matrix units or more are whole matrix units.
    unit = chip.mxu_size if whole >= 2 * chip.mxu_size * count else LANES
    even_size = -(-whole // (count * unit)) * unit
    largest = max(most // unit * unit, LANES)
    return min(even_size, largest)


def _lanes(n: int) -> int:
    return round_up(n, LANES)
