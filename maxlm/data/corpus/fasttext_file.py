"""Reads a fastText classifier from its file, so that whole Arrow batches can be labelled at once.

The layout is that of fastText's `FastText::loadModel` (format version 12): settings, dictionary,
input matrix (product-quantised in a `.ftz`: Joulin et al., 2016, arXiv:1612.03651), output matrix.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import MaxlmError

_MAGIC, _VERSION = 793712314, 12
_HIERARCHICAL_SOFTMAX, _SUPERVISED = 1, 3
_LABEL = b"__label__"


@dataclass(frozen=True)
class Classifier:
    """A supervised fastText model with a hierarchical softmax, as arrays."""

    labels: tuple[str, ...]
    min_n: int
    max_n: int
    """Lengths of character n-grams, in characters."""
    words: dict[bytes, int]
    """The row of each word the dictionary holds."""
    ngram_rows: np.ndarray
    """The row of each n-gram hash, -1: pruned away. int32 [buckets]."""
    rows: np.ndarray
    """Embeddings of words and n-grams: float32 [rows, dim]."""
    nodes: np.ndarray
    """Inner nodes of the Huffman tree over labels: float32 [labels - 1, dim]."""
    left: np.ndarray
    right: np.ndarray
    """Children of each inner node: i < labels is label i, else inner node i - labels. The root is
    the last one. int32 [labels - 1]."""


def read_classifier(path: Path) -> Classifier:
    """Read a `.ftz` or `.bin` file.

    Raises:
        MaxlmError: the file is missing, damaged, or another kind of model.
    """
    fix = "name a file like fastText's lid.176.ftz"
    try:
        return _read(_Reader(path.read_bytes()))
    except OSError as error:
        what = f"cannot read the model: {error.strerror}"
        raise MaxlmError(what, where=str(path), fix=fix) from error
    except (ValueError, IndexError) as error:
        what = f"no fastText classifier of the kind wanted: {error}"
        raise MaxlmError(what, where=str(path), fix=fix) from error


class _Reader:
    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def array(self, dtype: str, *shape: int) -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        values = np.frombuffer(self._data, f"<{dtype}", count, self._at)
        self._at += values.nbytes
        return values.reshape(shape)

    def number(self, dtype: str) -> Any:
        return self.array(dtype, 1)[0].item()

    def string(self) -> bytes:
        end = self._data.index(b"\0", self._at)
        value = self._data[self._at : end]
        self._at = end + 1
        return value


def _read(file: _Reader) -> Classifier:
    if file.number("i4") != _MAGIC or file.number("i4") != _VERSION:
        raise ValueError("not a fastText file of version 12")
    settings = file.array("i4", 12).tolist()
    dim, word_ngrams, loss, model, bucket, min_n, max_n = (
        settings[i] for i in (0, 5, 6, 7, 8, 9, 10)
    )
    if (word_ngrams, loss, model) != (1, _HIERARCHICAL_SOFTMAX, _SUPERVISED) or not bucket:
        raise ValueError("not supervised, with a hierarchical softmax and no word n-grams")
    file.number("f8")
    entries, num_words, _ = file.array("i4", 3).tolist()
    _, pruned = file.array("i8", 2).tolist()
    words, labels, counts = {}, [], []
    for i in range(entries):
        text, count, is_label = file.string(), file.number("i8"), file.number("i1")
        if is_label:
            labels.append(text.removeprefix(_LABEL).decode())
            counts.append(count)
        else:
            words[text] = i
    ngram_rows = np.full(bucket, -1, np.int32)
    if pruned < 0:
        ngram_rows[:] = num_words + np.arange(bucket)
    else:
        pairs = file.array("i4", pruned, 2)
        ngram_rows[pairs[:, 0]] = num_words + pairs[:, 1]
    rows = _read_quantised(file, dim) if file.number("?") else _read_dense(file)
    if file.number("?"):
        raise ValueError("its output is quantised")
    nodes = _read_dense(file)[: len(labels) - 1]
    left, right = _huffman(counts)
    return Classifier(tuple(labels), min_n, max_n, words, ngram_rows, rows, nodes, left, right)


def _read_dense(file: _Reader) -> np.ndarray:
    return file.array("f4", *file.array("i8", 2).tolist())


def _read_quantised(file: _Reader, dim: int) -> np.ndarray:
    with_norms = file.number("?")
    rows = file.array("i8", 2).tolist()[0]
    codes = file.array("u1", file.number("i4")).reshape(rows, -1)
    decoded = _decode(file, codes)
    if with_norms:
        decoded = decoded * _decode(file, file.array("u1", rows, 1))
    return decoded[:, :dim]


def _decode(file: _Reader, codes: np.ndarray) -> np.ndarray:
    """What a product quantiser stands for: each code names one of 256 centroids of its slice."""
    dim, slices, width, last = file.array("i4", 4).tolist()
    centroids = file.array("f4", dim * 256)
    parts = []
    for i in range(slices):
        size = last if i == slices - 1 else width
        table = centroids[i * 256 * width :][: 256 * size].reshape(256, size)
        parts.append(table[codes[:, i]])
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def _huffman(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The children of each inner node; `counts` fall, as in fastText's dictionary."""
    size = len(counts)
    weights = [*counts, *[10**15] * (size - 1)]
    leaf, node = size - 1, size
    children = np.empty((size - 1, 2), np.int32)
    for i in range(size - 1):
        for side in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                children[i, side], leaf = leaf, leaf - 1
            else:
                children[i, side], node = node, node + 1
        weights[size + i] = weights[children[i, 0]] + weights[children[i, 1]]
    return children[:, 0].copy(), children[:, 1].copy()
