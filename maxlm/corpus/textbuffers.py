"""The bytes of strings, for loops that read them where they are."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Texts(NamedTuple):
    """Texts end to end."""

    offsets: np.ndarray
    """Where each begins in `data`, and the end: int64 [texts + 1]."""
    data: np.ndarray
    """UTF-8, as uint8."""


def text_buffers(column: pa.Array) -> Texts:
    """The strings of a column; no copy. Nulls are empty."""
    array = pc.fill_null(column, "").cast(pa.large_string())
    _, offsets, data = array.buffers()
    if len(array) == 0:
        return _fixed(np.zeros(1, np.int64), b"")
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return _fixed(ends, data or b"")


def pack_texts(texts: list[bytes]) -> Texts:
    """The same for texts that need not be UTF-8."""
    return _fixed(np.cumsum([0, *map(len, texts)], dtype=np.int64), b"".join(texts))


def _fixed(offsets: np.ndarray, data: pa.Buffer | bytes) -> Texts:
    texts = Texts(offsets, np.frombuffer(data, np.uint8))
    for each in texts:
        each.setflags(write=False)  # Else loops are compiled again for what is writable.
    return texts
