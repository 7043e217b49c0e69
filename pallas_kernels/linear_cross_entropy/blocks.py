"""Sizes of the TPU kernels' blocks: the largest that a chip's VMEM holds."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SMALLEST_VMEM = 16 << 20
"""Bytes, of the chips supported (v4)."""
_TOKENS = (1024, 512, 256, 128)
_VOCAB = tuple(range(1024, 0, -LANES))
# Of a matrix-sized loop over padding or past the vocabulary's end, the part that is tolerated.
_WASTE = 1 / 16
# Of VMEM, what the compiler may need for itself.
_RESERVED = 1 / 5


class Blocks(NamedTuple):
    tokens: int
    vocab: int

    @property
    def intensity(self) -> float:
        """Grows with operations per byte moved."""
        return self.tokens * self.vocab / (self.tokens + self.vocab)


class Tiling(NamedTuple):
    """Blocks of both kernels."""

    forward: Blocks
    head_gradient: Blocks


def vmem_bytes() -> int:
    """Of a core of the TPU that the program being traced is for: the mesh's in use, or the default
    device; of the smallest supported where that is none."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALLEST_VMEM


def fits(hidden: tuple[int, int], vocab: int, dtype: Any, vmem: int) -> bool:
    """Whether any blocks do."""
    try:
        tiling(hidden, vocab, dtype, vmem)
    except ValueError:
        return False
    return True


def tiling(hidden: tuple[int, int], vocab: int, dtype: Any, vmem: int) -> Tiling:
    """Blocks for hidden [T, D] and a vocabulary, in bytes of VMEM.

    Raises:
        ValueError: not even the smallest fit.
    """
    tokens, width = hidden
    itemsize = jnp.dtype(dtype).itemsize
    width = -(-width // LANES) * LANES
    most = int(vmem * (1 - _RESERVED))

    def best(bytes_of: Any, what: str) -> Blocks:
        blocks = [Blocks(t, v) for t in _tokens(tokens) for v in _vocab(vocab)]
        sizes = {b: bytes_of(b, width, itemsize) for b in blocks}
        fitting = [b for b in blocks if sizes[b] <= most]
        if not fitting:
            raise ValueError(
                f"{what} with D = {width} in {dtype} needs {min(sizes.values())} bytes of VMEM "
                f"for its smallest blocks, of {most} that may be used"
            )
        return max(fitting, key=lambda b: b.intensity)

    return Tiling(
        best(forward_bytes, "linear cross-entropy's forward kernel"),
        best(head_gradient_bytes, "linear cross-entropy's head-gradient kernel"),
    )


def forward_bytes(blocks: Blocks, width: int, itemsize: int) -> int:
    """VMEM of :func:`kernels.forward`: hidden and the fp32 sum once; this block of the head and the
    one before, twice each; logits, weights and statistics."""
    rows = blocks.tokens * (width * (itemsize + 4) + 16 * LANES)
    return rows + 4 * blocks.vocab * width * itemsize + 2 * 4 * blocks.tokens * blocks.vocab


def head_gradient_bytes(blocks: Blocks, width: int, itemsize: int) -> int:
    """VMEM of :func:`kernels.head_gradient`: the head and its gradient twice, the gradient's sum,
    hidden twice, logits."""
    entries = blocks.vocab * width * (4 * itemsize + 4)
    return entries + 2 * blocks.tokens * width * itemsize + 2 * 4 * blocks.tokens * blocks.vocab


def _tokens(count: int) -> list[int]:
    """Sizes that add little padding."""
    padded = {size: -(-count // size) * size for size in _TOKENS}
    return [s for s in _TOKENS if padded[s] <= (1 + _WASTE) * count or s == _TOKENS[-1]]


def _vocab(count: int) -> list[int]:
    """Divisors where there is one that is not small; else sizes that waste little."""
    divisors = [size for size in _VOCAB if count % size == 0]
    if divisors and divisors[0] >= 2 * LANES:
        return divisors
    padded = {size: -(-count // size) * size for size in _VOCAB}
    return [s for s in _VOCAB if padded[s] <= (1 + _WASTE) * count or s == _VOCAB[-1]]
