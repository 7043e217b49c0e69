"""Offsets of very many documents, of which only blocks in use are in memory.

10^9 documents have 8 GB of offsets. `Offsets` answers what the loader asks of them from blocks of
4,096, read when they are needed; the last 1,024 (32 MiB) are kept.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64s = NDArray[np.int64]

BLOCK = 4 << 10
_KEPT_BLOCKS = 1024


class Offsets:
    """Rising int64 numbers [size], read in blocks; a stand-in for an array of them.

    It is indexed by a slice or an array of indices and knows `size` and `searchsorted`. Threads
    may use it together.

    Args:
        read: the offsets of each range [start, stop) asked for.
    """

    def __init__(self, read: Callable[[Sequence[tuple[int, int]]], Sequence[Int64s]], size: int):
        self.size, self._read = size, read
        self._kept: dict[int, Int64s] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: slice | Int64s) -> Int64s:
        if isinstance(key, slice):
            start, stop, step = key.indices(self.size)
            return self._read([(start, max(start, stop))])[0][::step]
        numbers, within = np.divmod(key, BLOCK)
        result = np.empty_like(key)
        for number, block in self._blocks(np.unique(numbers).tolist()).items():
            here = numbers == number
            result[here] = block[within[here]]
        return result

    def searchsorted(self, values: ArrayLike, side: str = "left") -> Int64s:
        """Bisects as numpy's does: some log2(size / 2^12) reads a value [n], most of them kept."""
        values = np.asarray(values, np.int64)
        if side == "left":  # As many are below v as are at most v - 1.
            values = values - 1
        low, high = np.zeros_like(values), np.full_like(values, self.size)
        while (left := np.flatnonzero(low < high)).size:
            middle = (low[left] + high[left]) // 2
            is_low = self[middle] <= values[left]
            low[left[is_low]] = middle[is_low] + 1
            high[left[~is_low]] = middle[~is_low]
        return low

    def _blocks(self, numbers: Sequence[int]) -> dict[int, Int64s]:
        with self._lock:
            found = {number: self._kept.pop(number) for number in numbers if number in self._kept}
        missing = [number for number in numbers if number not in found]
        ranges = [(n * BLOCK, min((n + 1) * BLOCK, self.size)) for n in missing]
        found |= zip(missing, self._read(ranges) if ranges else (), strict=True)
        with self._lock:
            self._kept |= found  # Those used last are the last.
            for number in list(self._kept)[: max(0, len(self._kept) - _KEPT_BLOCKS)]:
                del self._kept[number]
        return found
