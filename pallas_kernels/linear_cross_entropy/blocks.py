"""Sizes of the TPU kernels' blocks: the largest that a chip's VMEM holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.chips import TpuChip

LANES = 128
_TOKENS = (1024, 512, 256, 128)
_MOST_VOCAB = 1024
# Of a matrix-sized loop over padding or past the vocabulary's end, the part that is tolerated.
_WASTE = 1 / 16


class CrossEntropyBlocks(NamedTuple):
    tokens: int
    vocab: int

    @property
    def intensity(self) -> float:
        """Grows with operations per byte moved."""
        return self.tokens * self.vocab / (self.tokens + self.vocab)


class CrossEntropyTiling(NamedTuple):
    """Blocks of both kernels."""

    forward: CrossEntropyBlocks
    head_gradient: CrossEntropyBlocks


BytesOf = Callable[[CrossEntropyBlocks, int, Any], int]


def usable_vmem_bytes(chip: TpuChip) -> int:
    """Returns bytes of VMEM for blocks: the compiler needs some for itself."""
    return chip.vmem * 4 // 5


def part_rows_size(size: int, chip: TpuChip) -> int:
    """Into which part of a block its products are cut, each one piece of code: enough rows to hide
    what a piece begins and ends with."""
    parts = (size // n for n in range(1, size) if size % n == 0)
    return next(part for part in parts if part <= 2 * chip.mxu)


def can_tile(hidden: tuple[int, ...], vocab: int, dtype: Any, chip: TpuChip) -> bool:
    """Returns whether any blocks do."""
    try:
        choose_tiling(hidden, vocab, dtype, chip)
    except ValueError:
        return False
    return True


def choose_tiling(
    hidden: tuple[int, ...], vocab: int, dtype: Any, chip: TpuChip
) -> CrossEntropyTiling:
    """Returns blocks for hidden [T, D] and a vocabulary: those that fit with the most operations a
    byte.

    Raises:
        ValueError: not even the smallest fit.
    """
    tokens, width = hidden
    blocks = [CrossEntropyBlocks(t, v) for t in _tokens(tokens) for v in _vocab(vocab, chip.mxu)]
    blocks.sort(key=lambda b: b.intensity, reverse=True)

    def best(bytes_of: BytesOf) -> CrossEntropyBlocks:
        fitting = (b for b in blocks if bytes_of(b, width, dtype) <= usable_vmem_bytes(chip))
        return next(fitting, blocks[-1])

    return check_tiling(
        CrossEntropyTiling(best(forward_bytes), best(head_gradient_bytes)), width, dtype, chip
    )


def check_tiling(
    tiling: CrossEntropyTiling, width: int, dtype: Any, chip: TpuChip
) -> CrossEntropyTiling:
    """Checks a tiling and returns it.

    Raises:
        ValueError: blocks that are no multiples of 128, or do not fit.
    """
    for name, blocks, bytes_of in zip(
        CrossEntropyTiling._fields, tiling, (forward_bytes, head_gradient_bytes), strict=True
    ):
        if min(blocks) < LANES or any(size % LANES for size in blocks):
            raise ValueError(f"{name}: blocks are multiples of {LANES}; got {tuple(blocks)}")
        size = bytes_of(blocks, width, dtype)
        if size > usable_vmem_bytes(chip):
            raise ValueError(
                f"{name}: blocks {tuple(blocks)} with D = {width} in {jnp.dtype(dtype)} need {size}"
                f" bytes of VMEM; {usable_vmem_bytes(chip)} of {chip.vmem} may be used"
            )
    return tiling


def forward_bytes(blocks: CrossEntropyBlocks, width: int, dtype: Any) -> int:
    """VMEM of :func:`kernels.forward`: hidden and the fp32 sum once; this block of the head and the
    one before, twice each; logits, weights and statistics."""
    width, itemsize = _padded(width), jnp.dtype(dtype).itemsize
    rows = blocks.tokens * (width * (itemsize + 4) + 16 * LANES)
    return rows + 4 * blocks.vocab * width * itemsize + 2 * 4 * blocks.tokens * blocks.vocab


def head_gradient_bytes(blocks: CrossEntropyBlocks, width: int, dtype: Any) -> int:
    """VMEM of :func:`kernels.head_gradient`: the head and its gradient twice, the gradient's sum,
    hidden twice, logits."""
    width, itemsize = _padded(width), jnp.dtype(dtype).itemsize
    entries = blocks.vocab * width * (4 * itemsize + 4)
    return entries + 2 * blocks.tokens * width * itemsize + 2 * 4 * blocks.tokens * blocks.vocab


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _tokens(count: int) -> list[int]:
    """Sizes that add little padding."""
    padded = {size: -(-count // size) * size for size in _TOKENS}
    return [s for s in _TOKENS if padded[s] <= (1 + _WASTE) * count or s == _TOKENS[-1]]


def _vocab(count: int, matrix_width: int) -> list[int]:
    """Sizes that fill the matrix unit, and the smallest: divisors where there is one that is not
    small; else those that waste little."""
    sizes = sorted({*range(matrix_width, _MOST_VOCAB + 1, matrix_width), LANES}, reverse=True)
    divisors = [size for size in sizes if count % size == 0]
    if divisors and divisors[0] >= _MOST_VOCAB // 2:
        return divisors
    padded = {size: -(-count // size) * size for size in sizes}
    return [s for s in sizes if padded[s] <= (1 + _WASTE) * count or s == sizes[-1]]
