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
from pallas_kernels.attention.how import How, Where
from pallas_kernels.attention.tpu_blocks import Blocks, Sizes
from pallas_kernels.chips import Chip, current_chip

TABLE = resources.files("pallas_kernels.attention") / "tuned.json"
FORWARD, BACKWARD = PASSES = ("forward", "backward")
CAUSAL, FULL, WINDOW, SEGMENTS = "causal", "full", "window", "segments"


class Entry(NamedTuple):
    """What a search found, and for what."""

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
    """As the chip's kernel names them: on a TPU, :class:`Blocks`."""
    cost: float
    """Cycles on a TPU, microseconds on a GPU; of one row of ``heads`` heads."""
    spills: int | None
    """Registers that a TPU's inner loops store away; None: not known."""
    heads: int
    made_with: str
    """Versions of what compiled it."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two entries of a table share, in the table's order."""
        return self.chip, *self.head_sizes, self.dtype, self.kind, self.seq, self.direction

    @property
    def kind(self) -> str:
        return kind(self.mask)


def kind(mask: str) -> str:
    """Of a mask that is spelt out (:attr:`Entry.mask`): see :func:`mask_kind`."""
    name, _, number = mask.partition(":")
    return window_kind(int(number)) if name == WINDOW else name


def window_kind(window: int) -> str:
    """Windows up to the same power of two are alike."""
    return f"{WINDOW}:{1 << (window - 1).bit_length()}"


def mask_kind(how: How, where: Where) -> str:
    """The kind of a mask, as far as it is known before the program runs: what segments leave is
    not, and takes the blocks that were found for 8 of a row."""
    if where.q_segments is not None:
        return SEGMENTS
    if not how.causal:
        return FULL
    return CAUSAL if how.window is None else window_kind(how.window)


def choose(direction: str, sizes: Sizes, kind: str) -> Blocks:
    """A TPU kernel's blocks, for the chip that the program being traced is for: from the table, or
    by rule."""
    chip = current_chip()
    return lookup(chip, direction, sizes, kind) or rule(chip, direction, sizes)


def rule(chip: Chip, direction: str, sizes: Sizes) -> Blocks:
    blocks = tpu_blocks.forward_blocks if direction == FORWARD else tpu_blocks.backward_blocks
    return blocks(sizes, chip)


def lookup(
    chip: Chip, direction: str, sizes: Sizes, kind: str, entries: Iterable[Entry] | None = None
) -> Blocks | None:
    """A TPU kernel's blocks in the table, or None.

    Args:
        direction: of ``PASSES``.
        kind: :func:`mask_kind`.
        entries: of another table.
    """
    found = (Blocks(**blocks) for blocks in nearest(chip.name, direction, sizes, kind, entries))
    return next((blocks for blocks in found if fit(blocks, chip, direction, sizes)), None)


def nearest(
    chip: str, direction: str, sizes: Sizes, kind: str, entries: Iterable[Entry] | None = None
) -> list[dict[str, Any]]:
    """Blocks of all entries that differ in the sequence alone, the nearest first."""
    alike = [
        entry
        for entry in (load() if entries is None else entries)
        if (entry.chip, entry.direction, entry.kind) == (chip, direction, kind)
        and entry.head_sizes == (sizes.H, sizes.Hv)
        and jnp.dtype(entry.dtype).itemsize == sizes.bytes
    ]
    alike.sort(key=lambda entry: abs(math.log(entry.seq / max(sizes.S, sizes.T, 1))))
    return [entry.blocks for entry in alike]


def on_card(kernel: str, direction: str, sizes: Sizes, kind: str) -> dict[str, Any] | None:
    """Block sizes in the table of a GPU's kernel on the card that the program being traced is for,
    as JSON has them; or None."""
    found = nearest(card(kernel), direction, sizes, kind)
    return found[0] if found else None


def card(kernel: str) -> str:
    """What the table calls a kernel on that card."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    return f"{device.device_kind}, {kernel}"


def fit(blocks: Blocks, chip: Chip, direction: str, sizes: Sizes) -> bool:
    """Whether VMEM holds them, and they pad queries and keys by little."""
    needed = tpu_blocks.forward_bytes if direction == FORWARD else tpu_blocks.backward_bytes
    try:
        tpu_blocks.keys_at_once(blocks, sizes, needed, chip)
    except ValueError:
        return False
    return tpu_blocks.pads_little(sizes.S, blocks.q) and tpu_blocks.pads_little(sizes.T, blocks.k)


@cache
def load() -> tuple[Entry, ...]:
    """The table."""
    return parse(TABLE.read_text())


def parse(text: str) -> tuple[Entry, ...]:
    """A table's entries."""
    return tuple(
        Entry(**entry | {"head_sizes": tuple(entry["head_sizes"])}) for entry in json.loads(text)
    )


def text(entries: Iterable[Entry]) -> str:
    """The table of these, sorted, an entry a line; the last of each key."""
    last = {entry.key: entry for entry in entries}
    return "[" + ",".join("\n" + json.dumps(last[key]._asdict()) for key in sorted(last)) + "\n]\n"
