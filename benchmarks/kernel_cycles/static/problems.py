"""Attention problems that kernels are compared on."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Mask:
    """Causal, and of those keys the last ``window``, or those of a query's own
    segment."""

    window: int | None = None
    segments: int | None = None
    """That a sequence is packed from, of equal lengths."""

    @classmethod
    def parse(cls, text: str) -> "Mask":
        """``causal``, ``window:1024`` or ``segments:8``.

        Raises:
            ValueError: what else.
        """
        kind, _, number = text.partition(":")
        if kind == "causal" and not number:
            return cls()
        if kind in ("window", "segments") and number.isdecimal() and int(number) > 0:
            return cls(**{kind: int(number)})
        raise ValueError(f"mask {text!r}: not causal, window:N or segments:N")

    def __str__(self) -> str:
        if self.window:
            return f"window:{self.window}"
        return f"segments:{self.segments}" if self.segments else "causal"

    def pairs(self, seq: int) -> int:
        """(query, key) pairs that it leaves of seq × seq."""
        length = seq // (self.segments or 1)
        window = min(self.window or length, length)
        # Rows before the window is full see 1, 2, .. keys.
        return (seq // length) * (
            window * (window + 1) // 2 + (length - window) * window
        )

    def segment_ids(self, seq: int) -> np.ndarray | None:
        """int32 [seq], from 1; None without segments."""
        if self.segments is None:
            return None
        if seq % self.segments:
            raise ValueError(f"{self.segments} segments do not divide {seq} tokens")
        return np.repeat(
            np.arange(1, self.segments + 1, dtype=np.int32), seq // self.segments
        )


def attention_flops(
    mask: Mask, batch: int, heads: int, seq: int, head_dim: int
) -> tuple[int, int]:
    """(forward, backward) FLOPs of the pairs that the mask leaves: 2 matrix products
    forward, 5 backward (Dao 2023, FlashAttention-2, section 3.1: q·kᵀ again, dV, dP,
    dQ, dK)."""
    product = 2 * batch * heads * head_dim * mask.pairs(seq)
    return 2 * product, 5 * product


class Shape(NamedTuple):
    """A problem of the tables of tuned blocks and of benchmarks, which are bf16."""

    head_dim: int
    seq: int
    mask: str

    def __str__(self) -> str:
        return f"{self.head_dim}, {self.seq:,}, {self.mask}"


SHAPES = [
    Shape(head_dim, seq, mask)
    for head_dim in (128, 64)
    for seq in (4096, 32768)
    for mask in ("causal", "window:1024", "segments:8")
]


def shapes(head_dim: int | None, seq: int | None, mask: str | None) -> list[Shape]:
    """Of ``SHAPES``, those that have what is asked.

    Raises:
        ValueError: none has.
    """
    requested = (head_dim, seq, mask)
    matching_shapes = [
        shape
        for shape in SHAPES
        if all(
            request in (None, value)
            for request, value in zip(requested, shape, strict=True)
        )
    ]
    if not matching_shapes:
        raise ValueError(
            f"no shape of --all has head size, sequence and mask "
            f"{', '.join(map(str, requested))}"
        )
    return matching_shapes
