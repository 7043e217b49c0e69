"""Blocks that a search found fastest (``benchmarks.kernel_cycles.tune``), and who they serve.

``tuned.json`` beside this file holds an entry a line. A shape that is not in it takes the blocks
of the nearest sequence with the same chip, pass, head sizes, kind of mask and width of numbers, if
these fit; else the rule in :mod:`tpu_blocks` decides.
"""

import json
import math
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import tpu_blocks
from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.attention.tpu_blocks import AttentionSizes, TpuBlocks
from pallas_kernels.chips import TpuChip, get_chip

TABLE = resources.files("pallas_kernels.attention") / "tuned.json"
FORWARD, BACKWARD = PASSES = ("forward", "backward")
CAUSAL, FULL, WINDOW, SEGMENTS = "causal", "full", "window", "segments"


class TunedEntry(NamedTuple):
    """The blocks that a search found for one shape."""

    chip: str
    direction: str
    """Of ``PASSES``."""
    head_sizes: tuple[int, int]
    """Of q and k, and of v."""
    seq: int
    """Queries, and keys."""
    mask: str
    """causal, full, window:TOKENS or segments:COUNT (causal, of equal lengths)."""
    dtype: str
    """Of q, k and v."""
    blocks: dict[str, Any]
    """As the chip's kernel names them: on a TPU, :class:`TpuBlocks`."""
    cost: float
    """Cycles on a TPU, microseconds on a GPU; of one row of ``heads`` heads."""
    spills: int | None
    """Registers that a TPU's inner loops store away; None: not known."""
    heads: int
    made_with: str
    """Versions of what compiled it."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The entry's unique key, in the table's order."""
        return self.chip, *self.head_sizes, self.dtype, self.kind, self.seq, self.direction

    @property
    def kind(self) -> str:
        return parse_mask_kind(self.mask)


def parse_mask_kind(mask: str) -> str:
    """Returns the kind of a mask that is spelt out, such as ``window:1000``."""
    name, _, number = mask.partition(":")
    return name_window_kind(int(number)) if name == WINDOW else name


def name_window_kind(window: int) -> str:
    """Returns a window's kind: windows up to the same power of two are alike."""
    return f"{WINDOW}:{1 << (window - 1).bit_length()}"


def name_mask_kind(params: AttentionParams, operands: AttentionOperands) -> str:
    """Returns the kind of a mask, as far as it is known before the program runs: what segments
    leave is not, and takes the blocks that were found for 8 of a row."""
    if operands.q_segments is not None:
        return SEGMENTS
    if not params.causal:
        return FULL
    return CAUSAL if params.window is None else name_window_kind(params.window)


def choose_blocks(direction: str, sizes: AttentionSizes, kind: str) -> TpuBlocks:
    """Returns a TPU kernel's blocks, for the chip that the program being traced is for: from the
    table, or by rule."""
    chip = get_chip()
    return find_tuned_blocks(chip, direction, sizes, kind) or choose_blocks_by_rule(
        chip, direction, sizes
    )


def choose_blocks_by_rule(chip: TpuChip, direction: str, sizes: AttentionSizes) -> TpuBlocks:
    blocks = (
        tpu_blocks.choose_forward_blocks
        if direction == FORWARD
        else tpu_blocks.choose_backward_blocks
    )
    return blocks(sizes, chip)


def find_tuned_blocks(
    chip: TpuChip,
    direction: str,
    sizes: AttentionSizes,
    kind: str,
    entries: Iterable[TunedEntry] | None = None,
) -> TpuBlocks | None:
    """Returns a TPU kernel's blocks in the table, or None.

    Args:
        direction: of ``PASSES``.
        kind: :func:`name_mask_kind`.
        entries: of another table.
    """
    found = (
        TpuBlocks(**blocks)
        for blocks in find_nearest_entries(chip.name, direction, sizes, kind, entries)
    )
    return next(
        (blocks for blocks in found if can_use_blocks(blocks, chip, direction, sizes)), None
    )


def find_nearest_entries(
    chip: str,
    direction: str,
    sizes: AttentionSizes,
    kind: str,
    entries: Iterable[TunedEntry] | None = None,
) -> list[dict[str, Any]]:
    """Returns blocks of all entries that differ in the sequence alone, the nearest first."""
    alike = [
        entry
        for entry in (load_table() if entries is None else entries)
        if (entry.chip, entry.direction, entry.kind) == (chip, direction, kind)
        and entry.head_sizes == (sizes.H, sizes.Hv)
        and jnp.dtype(entry.dtype).itemsize == sizes.bytes
    ]
    alike.sort(key=lambda entry: abs(math.log(entry.seq / max(sizes.S, sizes.T, 1))))
    return [entry.blocks for entry in alike]


def find_gpu_blocks(
    kernel: str, direction: str, sizes: AttentionSizes, kind: str
) -> dict[str, Any] | None:
    """Block sizes in the table of a GPU's kernel on the card that the program being traced is for,
    as JSON has them; or None."""
    found = find_nearest_entries(name_gpu_kernel(kernel), direction, sizes, kind)
    return found[0] if found else None


def name_gpu_kernel(kernel: str) -> str:
    """Returns the table's name of a kernel on that card."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    return f"{device.device_kind}, {kernel}"


def can_use_blocks(blocks: TpuBlocks, chip: TpuChip, direction: str, sizes: AttentionSizes) -> bool:
    """Returns whether VMEM holds them, and they pad queries and keys by little."""
    needed = (
        tpu_blocks.forward_vmem_bytes if direction == FORWARD else tpu_blocks.backward_vmem_bytes
    )
    try:
        tpu_blocks.count_keys_in_vmem(blocks, sizes, needed, chip)
    except ValueError:
        return False
    return tpu_blocks.has_little_padding(sizes.S, blocks.q) and tpu_blocks.has_little_padding(
        sizes.T, blocks.k
    )


@cache
def load_table() -> tuple[TunedEntry, ...]:
    """Returns the table."""
    return parse_table(TABLE.read_text())


def parse_table(text: str) -> tuple[TunedEntry, ...]:
    """Returns a table's entries."""
    return tuple(
        TunedEntry(**entry | {"head_sizes": tuple(entry["head_sizes"])})
        for entry in json.loads(text)
    )


def format_table(entries: Iterable[TunedEntry]) -> str:
    """Returns the table of these, sorted, an entry a line; the last of each key."""
    last = {entry.key: entry for entry in entries}
    return "[" + ",".join("\n" + json.dumps(last[key]._asdict()) for key in sorted(last)) + "\n]\n"
