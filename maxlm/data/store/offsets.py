"""Offsets of very many documents, of which only blocks in use are in memory.

10^9 documents have 8 GB of offsets. `Offsets` answers what the loader asks of them from blocks of
4,096 read when they are needed: it keeps 512 of them (16 MiB) and the first offset of each that
it has ever read (8 bytes a block: 2 MB for 10^9 documents).
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]

BLOCK = 4 << 10
_KEPT_BLOCKS = 512


class Offsets:
    """Rising int64 numbers [size], read in blocks; a stand-in for an array of them.

    It is indexed by a slice or an array of indices and knows `size` and `searchsorted`. Threads
    may use it together.
    """

    def __init__(
        self,
        read: Callable[[Sequence[tuple[int, int]]], Sequence[Int64s]],
        size: int,
        last: int,
    ):
        """
        Args:
            read: the offsets of each range [start, stop) asked for.
            size: how many there are.
            last: the last of them.
        """
        self.size, self._read, self._last = size, read, last
        self._firsts = np.full(-(-size // BLOCK), -1, np.int64)
        self._kept: dict[int, Int64s] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: slice | Int64s) -> Int64s:
        if isinstance(key, slice):
            start, stop, step = key.indices(self.size)
            return self._read([(start, max(start, stop))])[0][::step]
        blocks, within = np.divmod(key, BLOCK)
        result = np.empty_like(key)
        for number, block in self._blocks(blocks).items():
            here = blocks == number
            result[here] = block[within[here]]
        return result

    def searchsorted(self, values: ArrayLike, side: str = "left") -> Int64s:
        """As numpy's, by interpolation between the blocks already seen: about three reads of a
        block for each value [n], and at most twice log2 of the number of blocks."""
        values = np.asarray(values, np.int64)
        if side == "left":  # As many are below v as are at most v - 1.
            values = values - 1
        # The block in [low, high) holds the last offset that is at most the value, if any does.
        low, high = np.zeros_like(values), np.full_like(values, self._firsts.size)
        below, above = np.zeros_like(values), np.full_like(values, self._last + 1)
        halve = False
        while (open_ := np.flatnonzero(high - low > 1)).size:
            a, b = low[open_], high[open_]
            part = (values[open_] - below[open_]) / (above[open_] - below[open_])
            guess = (a + b) // 2 if halve else a + (part * (b - a)).astype(np.int64)
            guess, halve = np.clip(guess, a + 1, b - 1), not halve
            unseen = guess[self._firsts[guess] < 0]
            self._blocks(unseen)
            first = self._firsts[guess]
            right = first <= values[open_]
            low[open_[right]], below[open_[right]] = guess[right], first[right]
            high[open_[~right]], above[open_[~right]] = guess[~right], first[~right]
        result = low * BLOCK
        for number, block in self._blocks(low).items():
            here = low == number
            result[here] += block.searchsorted(values[here], side="right")
        return result

    def _blocks(self, numbers: Int64s) -> dict[int, Int64s]:
        """These blocks, by number."""
        wanted = np.unique(numbers).tolist()
        with self._lock:
            found = {number: self._kept[number] for number in wanted if number in self._kept}
        missing = [number for number in wanted if number not in found]
        if missing:
            ranges = [(n * BLOCK, min((n + 1) * BLOCK, self.size)) for n in missing]
            new = dict(zip(missing, self._read(ranges), strict=True))
            found |= new
            with self._lock:
                for number, block in new.items():
                    self._firsts[number] = block[0]
                    self._kept[number] = block
                while len(self._kept) > _KEPT_BLOCKS:
                    del self._kept[next(iter(self._kept))]
        return found
