"""KenLM's binary model files, which open at once and are shared in memory by all who read them.

The "probing" model of Heafield 2011, "KenLM: Faster and Smaller Language Model Queries", in the
file format 5: a header, a hash table of words, the unigrams, a hash table for each higher order,
and the words. All tables probe linearly; 0 is no key. The key of an n-gram is a hash of its words'
ids, last word first.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.corpus.compiled import compiled
from maxlm.runtime.files import writing

_MAGIC = b"mmap lm http://kheafield.com/code format version 5\n\0"
_LOAD = 1.5  # Buckets by entry.


class KenlmFile:
    """A model in the making, in a mapped file: for speed it should fit into memory.

    N-grams must come by rising order. `close` completes the file.
    """

    def __init__(self, path: Path, words: Sequence[bytes], bits: int, counts: Sequence[int]):
        """Make room.

        Args:
            words: by id, beginning with <unk>.
            bits: of an id in a key of `kernels.ngrams`.
            counts: the n-grams by order, at least two.

        Raises:
            MaxlmError: the disk is full, or the model is of order 1.
        """
        if len(counts) < 2:
            raise MaxlmError("KenLM opens no models of order 1", fix="raise the order")
        self._words, self._bits, self._path = words, bits, path
        self._ids, self._unigrams = np.zeros(len(words), np.uint32), 0
        header = _header(counts)
        buckets = [_buckets(count) for count in counts]
        # Words, unigrams with room for one more, middle orders, the highest.
        shapes = [(buckets[0], 3), (counts[0] + 1, 2), *((b, 4) for b in buckets[1:-1])]
        shapes.append((buckets[-1], 3))
        sizes = [rows * columns for rows, columns in shapes]
        start = len(header) // 4
        with writing(path):
            # Room is taken first: to run out of it in mapped memory would kill the process.
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 4 * (start + sum(sizes)))
                file.write(header)
            self._file = np.memmap(path, np.uint32, "r+")
        ends = np.cumsum([start, *sizes])
        self._vocabulary, *self._tables = [
            self._file[first : first + size].reshape(shape)
            for first, size, shape in zip(ends, sizes, shapes, strict=False)
        ]

    def add(self, order: int, keys: np.ndarray, logarithms: np.ndarray) -> None:
        """N-grams of one order.

        Args:
            keys: uint64 [n, 2 or more], in the order of their ids.
            logarithms: float64 [n, 2], of probability and backoff, to base 10, at most 0.
        """
        # With a minus before 0 too, which says of a backoff that nothing extends the n-gram.
        values = (-np.abs(logarithms.round(7))).astype(np.float32).view(np.uint32)
        if order == 1:
            first, self._unigrams = self._unigrams, self._unigrams + len(keys)
            self._ids[keys[:, 1].astype(np.int64)] = np.arange(first, self._unigrams)
            self._tables[0][first : self._unigrams] = values
            if first == 0:
                self._tables[0][1, 0] = 0  # But not before the probability of <s>.
        else:
            lower, table = self._tables[order - 2 : order]
            compiled("kenlm").put_ngrams(keys, values, order, self._bits, self._ids, table, lower)

    def close(self) -> None:
        """Add the words and write all out."""
        fast = compiled("kenlm")
        # Ours without <unk>, which is not looked up, and those that are pruned.
        words = [self._words[i] for i in np.flatnonzero(self._ids).tolist()]
        ends = np.cumsum([0, *map(len, words)])
        letters = np.frombuffer(b"".join(words), np.uint8)
        fast.put_words(fast.word_hashes(letters, ends), self._vocabulary)
        with writing(self._path):
            self._file.flush()
            with self._path.open("ab") as file:
                file.write(b"".join(word + b"\0" for word in (b"<unk>", *words)))


def _header(counts: Sequence[int]) -> bytes:
    """What the file begins with, the table of words' own header included."""
    order = len(counts)
    # Numbers to be recognised, padding; order, load, model type, words at the end, its version.
    fixed = struct.pack("<56s3f2I4xQ", _MAGIC, 0, 1, -0.5, 1, 2**32 - 1, 1)
    fixed += struct.pack("<B3xfIB3xI", order, _LOAD, 0, 1, 0)
    fixed += struct.pack(f"<{order}Q", *counts)
    fixed += bytes(-len(fixed) % 8)
    return fixed + struct.pack("<II", 0, counts[0])


def _buckets(count: int) -> int:
    # In float32, as KenLM computes it.
    return max(count + 1, int(np.float32(_LOAD) * np.float32(count)))
