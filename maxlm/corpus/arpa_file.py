"""N-gram models as ARPA files, the text form that all toolkits read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxlm.corpus.compiled import compiled
from maxlm.runtime.files import writing

_BUFFER_BYTES = 1 << 20


class ArpaFile:
    """A model in the making. N-grams must come by rising order; `close` completes the file."""

    def __init__(self, path: Path, words: Sequence[bytes], bits: int, counts: Sequence[int]):
        """Write the header; the arguments are those of `KenlmFile`."""
        lengths = np.array([len(word) for word in words])
        self._letters = np.frombuffer(b"".join(words), np.uint8)
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._buffer = np.empty(_BUFFER_BYTES + len(counts) * int(lengths.max()), np.uint8)
        self._bits, self._highest, self._order = bits, len(counts), 0
        self._path = path
        lines = [b"\\data\\", *(b"ngram %d=%d" % each for each in enumerate(counts, 1))]
        with writing(path):
            path.write_bytes(b"\n".join(lines) + b"\n")

    def add(self, order: int, keys: np.ndarray, logarithms: np.ndarray) -> None:
        """N-grams of one order; the arguments are those of `KenlmFile.add`."""
        fast = compiled("ngrams")
        with writing(self._path), self._path.open("ab") as file:
            while self._order < order:
                self._order += 1
                file.write(b"\n\\%d-grams:\n" % self._order)
            first = 0
            while first < len(keys):
                lines, size = fast.print_lines(
                    keys[first:], logarithms[first:], order, self._bits,
                    self._letters, self._ends, order < self._highest, self._buffer,
                )  # fmt: skip
                file.write(self._buffer[:size].data)
                first += lines

    def close(self) -> None:
        """Write the end."""
        self.add(self._highest, np.empty((0, 3), np.uint64), np.empty((0, 2)))
        with writing(self._path), self._path.open("ab") as file:
            file.write(b"\n\\end\\\n")
