"""Which store each global sequence comes from: weights kept exactly, any index answered alone.

The stores are the leaves of a binary tree. At a node with weight share p on the left, of the
first t sequences that reach the node floor(p t + 1/2) go left. Both sides' counts grow by at most
one a step, so "the k-th sequence of this store" is well defined, and every count stays within a
few sequences of its weight for ever (largest-remainder rounding of cumulative counts would let a
small store's count fall back). Within a block the order is shuffled, so that no store sits at
the same rows of every batch.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.loader.permutation import derive_keys, permute

# Global indices shuffled together. Smaller keeps each batch closer to the weights.
BLOCK = 256
_SHARE_BITS = 31

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class _Split:
    """A tree node: `share` / 2^31 of what reaches it goes left. Leaves are store numbers."""

    share: int
    left: "_Split | int"
    right: "_Split | int"


@dataclass(frozen=True)
class Mixture:
    """Maps a global sequence index to (store number, index within that store's own stream)."""

    tree: _Split | int
    key: int | None
    """Shuffles within blocks of `BLOCK` indices; None keeps the even interleaving."""

    @classmethod
    def of(cls, weights: Mapping[str, float], key: int | None) -> "Mixture":
        """Stores are numbered in the mapping's order; the weights need not sum to 1.

        Raises:
            MaxlmError: no stores, or a weight that is not a positive finite number.
        """
        if not weights:
            raise MaxlmError("no stores to mix", where="weights", fix="name at least one store")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise MaxlmError(
                    f"the weight of store {name!r} is {weight}, not a positive number",
                    where="weights",
                    fix="give a weight above 0, or leave the store out",
                )
        # Huffman's order: small stores share a node, so each share keeps its precision. Ties go by
        # name and not by place: the mixture must not depend on the order of a mapping.
        heap: list[tuple[float, str, _Split | int]] = [
            (weight, name, number) for number, (name, weight) in enumerate(weights.items())
        ]
        heapq.heapify(heap)
        while len(heap) > 1:
            (weight_a, name_a, a), (weight_b, name_b, b) = heapq.heappop(heap), heapq.heappop(heap)
            share = max(1, round(weight_a / (weight_a + weight_b) * 2**_SHARE_BITS))
            heapq.heappush(heap, (weight_a + weight_b, min(name_a, name_b), _Split(share, a, b)))
        return cls(heap[0][2], key)

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """Store numbers [n] and indices [n] within those stores' streams, both int64."""
        if self.key is not None and isinstance(self.tree, _Split):
            blocks, within = np.divmod(indices, BLOCK)
            indices = blocks * BLOCK + permute(within, BLOCK, derive_keys(self.key, blocks))
        stores, streams = np.empty_like(indices), np.empty_like(indices)
        _descend(self.tree, indices, np.arange(indices.size), stores, streams)
        return stores, streams


def _descend(
    node: _Split | int, indices: Int64s, at: Int64s, stores: Int64s, streams: Int64s
) -> None:
    if isinstance(node, int):
        stores[at], streams[at] = node, indices
        return
    before = _left_count(indices, node.share)
    goes_left = _left_count(indices + 1, node.share) > before
    right = ~goes_left
    _descend(node.left, before[goes_left], at[goes_left], stores, streams)
    _descend(node.right, (indices - before)[right], at[right], stores, streams)


def _left_count(total: Int64s, share: int) -> Int64s:
    """floor(total * share / 2^31 + 1/2), split so that nothing overflows for total < 2^62."""
    high, low = total >> _SHARE_BITS, total & ((1 << _SHARE_BITS) - 1)
    return high * share + ((low * share + (1 << (_SHARE_BITS - 1))) >> _SHARE_BITS)
