"""The bytes of a column of strings, for loops that read them where they are."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def text_buffers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each string lies: offsets int64 [rows + 1], bytes uint8; no copy. Nulls are empty."""
    array = pc.fill_null(column, "").cast(pa.large_string())
    _, offsets, data = array.buffers()
    if len(array) == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return ends, np.frombuffer(data or b"", np.uint8)


def pack_texts(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The same for texts that need not be UTF-8."""
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return ends, np.frombuffer(b"".join(texts), np.uint8)
