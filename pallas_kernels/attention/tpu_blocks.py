"""Block sizes of the TPU kernels, and the VMEM that they take."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.attention.params import AttentionOperands
from pallas_kernels.chips import TpuChip, round_up

FORWARD, BACKWARD = PASSES = ("forward", "backward")
LANES, SUBLANES = 128, 8
SUMS = 16
"""Rows of ones on top of the forward pass's turned values, as many as bf16 packs
together."""
# Of VMEM, for what is counted here: the compiler needs some for itself.
_USABLE = 0.85
# Fewer at once are many kernels, one after the other.
_KEYS = 2048


class TpuBlocks(NamedTuple):
    """Blocks of one pass. Sizes are multiples of 128."""

    q: int
    """Queries of a block: a step of the grid."""
    k: int
    """Keys of a block: a round of the loop."""
    tile_q: int
    """Queries of a tile; divides ``q``. The loop's body is made of tiles, one after the
    other."""
    tile_k: int
    """Keys of a tile; divides ``k``, forward only where the mask's edge cuts a
    block."""
    ahead: int = 1
    """Tiles whose scores are issued before the first one's softmax."""
    behind: int = 1
    """Tiles whose softmax is issued before the first one's values, or gradients."""
    pace: int = 0
    """Chunks of weights whose exponentials are under way at once; 0: any number."""

    @property
    def tiles_in_flight(self) -> int:
        """Tiles between their first and their last stage at once."""
        return 1 + self.ahead + self.behind


class TpuBlockSizes(NamedTuple):
    forward: TpuBlocks
    backward: TpuBlocks


class AttentionSizes(NamedTuple):
    """The operands' sizes that decide the blocks."""

    S: int
    T: int
    H: int
    Hv: int
    element_bytes: int
    """Bytes of a number in q, k and v."""
    out_bytes: int
    """Bytes of a number in the results."""

    @classmethod
    def of(cls, operands: AttentionOperands, dtype: DTypeLike) -> "AttentionSizes":
        """Reads the sizes of operands, whose results are in ``dtype``."""
        _, S, _, H = operands.q.shape
        _, T, _, Hv = operands.v.shape
        element_bytes = operands.q.dtype.itemsize
        return cls(S, T, H, Hv, element_bytes, jnp.dtype(dtype).itemsize)


def choose_blocks_by_rule(
    chip: TpuChip, direction: str, sizes: AttentionSizes
) -> TpuBlocks:
    """Chooses, forward, large blocks, whose loop's body hides its own beginning and
    end, and tiles as wide as the matrix unit, of which little spills; backward, tiles
    so small that nothing spills. From 1024 down, the first whose queries leave VMEM for
    ``_KEYS`` keys, or for all.
    """

    def make_blocks(most: int) -> TpuBlocks:
        q = _fit_block(sizes.S, most)
        k = min(q, _fit_block(sizes.T, most))
        tile_k = min(chip.mxu_size, k)
        if direction == BACKWARD:
            return TpuBlocks(q, k, LANES, tile_k)
        tile_q = min(chip.mxu_size, q)
        if chip.mxu_size == 256:
            return TpuBlocks(q, k, tile_q, tile_k, ahead=3, pace=3)
        return TpuBlocks(q, k, tile_q, tile_k, ahead=3, behind=2)

    most = 1024
    room = int(chip.vmem_bytes * _USABLE)
    keys = round_up(min(sizes.T, _KEYS), LANES)
    blocks = make_blocks(most)
    while most > LANES and vmem_bytes(direction, blocks, sizes, keys) > room:
        most //= 2
        blocks = make_blocks(most)
    return blocks


def _fit_block(n: int, most: int) -> int:
    """The largest power of two, 128 to ``most``, that pads n by little."""
    size = most
    while size > LANES and not has_little_padding(n, size):
        size //= 2
    return size


def has_little_padding(n: int, size: int) -> bool:
    """Returns whether blocks of this size pad n by at most a ninth more than blocks of
    128 do."""
    return round_up(n, size) * 9 <= round_up(n, LANES) * 10


def count_value_and_sum_rows(Hv: int) -> int:
    """Returns the rows of the transposed values and of the sums of weights, in the
    forward pass."""
    return SUMS + round_up(Hv, SUBLANES)


def vmem_bytes(
    direction: str, blocks: TpuBlocks, sizes: AttentionSizes, num_keys: int
) -> int:
    """Returns bytes of VMEM: operands and results twice, so that copies overlap, and
    scratch; of the backward pass, the sums of dK and dV over all queries too."""
    H = round_up(sizes.H, LANES)
    Hv = round_up(sizes.Hv, LANES)
    element_bytes = sizes.element_bytes
    # One fp32 number a query lies along the lanes, in a register of eight rows.
    row_bytes = blocks.q * SUBLANES * 4
    if direction == FORWARD:
        operands = element_bytes * (blocks.q * H + num_keys * (H + Hv))
        results = blocks.q * Hv * sizes.out_bytes + row_bytes
        turned_rows = count_value_and_sum_rows(sizes.Hv)
        scratch = element_bytes * num_keys * turned_rows
        scratch += row_bytes + 4 * blocks.q * turned_rows
        # Scores and weights; maxima and decays.
        tile = blocks.tile_q * (blocks.k * (4 + element_bytes) + 2 * SUBLANES * 4)
    else:
        operands = element_bytes * (blocks.q + num_keys) * (H + Hv) + 2 * row_bytes
        d_q_bytes = blocks.q * H * (sizes.out_bytes + 4)
        results = d_q_bytes + num_keys * (H + Hv) * sizes.out_bytes
        scratch = 4 * num_keys * (H + Hv) + 4 * blocks.q * H
        # Scores, d_weights and derivatives; weights and d_scores.
        tile = blocks.tile_q * blocks.tile_k * (3 * 4 + 2 * element_bytes)
    return 2 * (operands + results) + scratch + blocks.tiles_in_flight * tile


def count_keys_in_vmem(
    direction: str, blocks: TpuBlocks, sizes: AttentionSizes, chip: TpuChip
) -> int:
    """Returns the number of keys of a head that VMEM holds, in whole blocks. Raises
    ValueError: not one block."""
    keys = round_up(sizes.T, blocks.k)
    room = int(chip.vmem_bytes * _USABLE)
    while keys > blocks.k and vmem_bytes(direction, blocks, sizes, keys) > room:
        keys = round_up(keys // 2, blocks.k)
    needed = vmem_bytes(direction, blocks, sizes, keys)
    if needed > room:
        raise ValueError(
            f"blocks {tuple(blocks)} with head sizes {sizes.H} and {sizes.Hv} take "
            f"{needed} bytes of VMEM, of which a {chip.name} has {chip.vmem_bytes}"
        )
    return keys


def check_blocks(blocks: TpuBlocks) -> None:
    """Raises ValueError: sizes that are no multiples of 128, tiles that do not divide
    their blocks, a negative number of tiles between stages, or of chunks."""
    if any(n <= 0 or n % LANES for n in blocks[:4]):
        raise ValueError(f"blocks {tuple(blocks)}: sizes are multiples of {LANES}")
    if blocks.q % blocks.tile_q or blocks.k % blocks.tile_k:
        raise ValueError(f"blocks {tuple(blocks)}: tiles do not divide their blocks")
    if min(blocks.ahead, blocks.behind, blocks.pace) < 0:
        raise ValueError(
            f"blocks {tuple(blocks)}: ahead, behind and pace are 0 or more"
        )
