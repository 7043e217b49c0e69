"""Blocks that a search found fastest (``benchmarks.kernel_cycles.tune``), and who they
serve.

``tuned.json`` beside this file holds an entry a line. A shape that is not in it takes
the blocks of the nearest sequence with the same chip, pass, head sizes, kind of mask
and width of numbers, if these fit; else the rule in :mod:`tpu_blocks` decides.
"""

import json
import math
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.attention.tpu_blocks import (
    AttentionSizes,
    TpuBlocks,
    TpuBlockSizes,
    check_blocks,
    choose_blocks_by_rule,
    count_keys_in_vmem,
    has_little_padding,
)
from pallas_kernels.chips import TpuChip, get_chip

TABLE = resources.files("pallas_kernels.attention") / "tuned.json"
CAUSAL, FULL, WINDOW, SEGMENTS = "causal", "full", "window", "segments"


class TunedEntry(NamedTuple):
    """The blocks that a search found for one shape."""

    chip: str
    direction: str
    """One of ``PASSES``."""
    head_sizes: tuple[int, int]
    """Head size of q and k, and of v."""
    seq: int
    """Number of queries, and of keys."""
    mask: str
    """causal, full, window:TOKENS or segments:COUNT (causal, of equal lengths)."""
    dtype: str
    """Dtype of q, k and v."""
    blocks: dict[str, int]
    """:class:`TpuBlocks`."""
    cost: float
    """Cycles, of one row of ``heads`` heads."""
    spills: int | None
    """Registers that the inner loops store away; None: not known."""
    heads: int
    made_with: str
    """Versions of what compiled it."""

    @property
    def key(self) -> tuple[str | int, ...]:
        """The entry's unique key, in the table's order."""
        return (
            self.chip,
            *self.head_sizes,
            self.dtype,
            self.mask_kind,
            self.seq,
            self.direction,
        )

    @property
    def mask_kind(self) -> str:
        return parse_mask_kind(self.mask)


def parse_mask_kind(mask: str) -> str:
    """Returns the kind of a mask that is spelt out, such as ``window:1000``."""
    name, _, number = mask.partition(":")
    return name_window_kind(int(number)) if name == WINDOW else name


def name_window_kind(window: int) -> str:
    """Returns a window's kind: windows up to the same power of two are alike."""
    return f"{WINDOW}:{1 << (window - 1).bit_length()}"


def name_mask_kind(params: AttentionParams, operands: AttentionOperands) -> str:
    """Returns the kind of a mask, as far as it is known before the program runs: what
    segments leave is not, and takes the blocks that were found for 8 of a row."""
    if operands.q_segments is not None:
        return SEGMENTS
    if not params.causal:
        return FULL
    return CAUSAL if params.window is None else name_window_kind(params.window)


def choose_blocks(
    direction: str,
    sizes: AttentionSizes,
    mask_kind: str,
    override: TpuBlockSizes | None,
) -> TpuBlocks:
    """Returns a TPU kernel's blocks, for the chip that the program being traced is for:
    those given, checked, or from the table, or by rule."""
    if override is not None:
        check_blocks(getattr(override, direction))
        return getattr(override, direction)
    chip = get_chip()
    tuned_blocks = find_tuned_blocks(chip, direction, sizes, mask_kind)
    return tuned_blocks or choose_blocks_by_rule(chip, direction, sizes)


def find_tuned_blocks(
    chip: TpuChip,
    direction: str,
    sizes: AttentionSizes,
    mask_kind: str,
    entries: Iterable[TunedEntry] | None = None,
) -> TpuBlocks | None:
    """Returns a kernel's blocks in the table, or in another one; None: there is no
    entry that differs in the sequence alone, and whose blocks can be used."""
    if entries is None:
        entries = load_table()
    alike = [
        entry
        for entry in entries
        if entry.chip == chip.name
        and entry.direction == direction
        and entry.mask_kind == mask_kind
        and entry.head_sizes == (sizes.H, sizes.Hv)
        and jnp.dtype(entry.dtype).itemsize == sizes.element_bytes
    ]
    # The nearest length first.
    seq = max(sizes.S, sizes.T, 1)
    alike.sort(key=lambda entry: abs(math.log(entry.seq / seq)))
    for entry in alike:
        blocks = TpuBlocks(**entry.blocks)
        if can_use_blocks(blocks, chip, direction, sizes):
            return blocks
    return None


def can_use_blocks(
    blocks: TpuBlocks, chip: TpuChip, direction: str, sizes: AttentionSizes
) -> bool:
    """Returns whether VMEM holds them, and they pad queries and keys by little."""
    try:
        count_keys_in_vmem(direction, blocks, sizes, chip)
    except ValueError:
        return False
    pads_few_queries = has_little_padding(sizes.S, blocks.q)
    return pads_few_queries and has_little_padding(sizes.T, blocks.k)


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
    last_by_key = {entry.key: entry for entry in entries}
    lines = [
        "\n" + json.dumps(last_by_key[key]._asdict()) for key in sorted(last_by_key)
    ]
    return f"[{','.join(lines)}\n]\n"
