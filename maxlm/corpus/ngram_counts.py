"""Counts of n-grams in memory of a set size: sorted runs on disk, merged range by range.

The plan is that of Heafield et al. 2013, "Scalable Modified Kneser-Ney Language Model Estimation":
sort all n-grams of the highest order by their suffixes, and read the adjusted counts of all orders
off one pass. `kernels.ngrams` tells how an n-gram is a key.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.corpus.compiled import compiled
from maxlm.runtime.files import writing

SPECIAL = (b"<unk>", b"<s>", b"</s>")
"""The words with ids 0, 1 and 2."""
_NO_WORDS = {*SPECIAL, b"<UNK>"}  # The last is <unk> to KenLM.
_KEY_BITS = 128


@dataclass(frozen=True)
class Table:
    """Rows of uint64 in a file, which is only appended to."""

    path: Path
    columns: int

    def append(self, rows: np.ndarray) -> None:
        with writing(self.path), self.path.open("ab") as file:
            np.ascontiguousarray(rows).tofile(file)

    def rows(self) -> np.ndarray:
        """uint64 [rows, columns], mapped into memory page by page."""
        if not self.path.exists() or not self.path.stat().st_size:
            return np.empty((0, self.columns), np.uint64)
        return np.memmap(self.path, np.uint64, "r").reshape(-1, self.columns)


@dataclass(frozen=True)
class Tokens:
    """A text as word ids on disk; sentences end with id 2."""

    path: Path
    words: list[bytes]
    """By id: in the order of first appearance, after the special ones."""

    def ids(self) -> np.ndarray:
        """uint32 [tokens], `</s>` included."""
        return np.memmap(self.path, np.uint32, "r")

    @property
    def bits(self) -> int:
        """Of an id."""
        return max(2, (len(self.words) - 1).bit_length())


class _Vocabulary(dict[bytes, int]):
    """Numbers words as they are asked for."""

    def __missing__(self, word: bytes) -> int:
        self[word] = number = len(self)
        return number


def read_tokens(sentences: Iterable[str], path: Path, block: int) -> Tokens:
    """Number the words of sentences, `block` ids or one sentence in memory at a time.

    Words are what ASCII white space and NUL separate. The special words are read as white space.
    """
    vocabulary = _Vocabulary({word: number for number, word in enumerate(SPECIAL)})
    number, ids = vocabulary.__getitem__, array("I")
    with writing(path), path.open("wb") as file:
        for sentence in sentences:
            words = sentence.encode(errors="replace").replace(b"\0", b" ").split()
            if "<" in sentence:
                words = [word for word in words if word not in _NO_WORDS]
            ids.extend(map(number, words))
            ids.append(2)
            if len(ids) >= block:
                ids.tofile(file)
                ids = array("I")
        ids.tofile(file)
    return Tokens(path, list(vocabulary))


@dataclass(frozen=True)
class Counts:
    """Adjusted counts of n-grams of all orders."""

    tables: list[Table]
    """By order: (key, adjusted count, perhaps marked as pruned) in suffix order."""
    with_count: np.ndarray
    """int64 [order, 6]: the n-grams with adjusted count 0, 1, ..., 4, more."""
    kept: np.ndarray
    """int64 [order]: the n-grams that are not pruned."""


def count_ngrams(tokens: Tokens, thresholds: Sequence[int], folder: Path, block: int) -> Counts:
    """Count the n-grams of orders 1 to len(thresholds), with files in `folder`.

    Args:
        thresholds: by order, prune n-grams that occur at most so often.
        block: rows to be in memory at a time.

    Raises:
        MaxlmError: too many different words for the order.
    """
    fast = compiled("ngrams")

    order, bits = len(thresholds), tokens.bits
    if order * bits > _KEY_BITS:
        what = f"{len(tokens.words):,} different words are too many for a model of order {order}"
        most = 2 ** (_KEY_BITS // order)
        raise MaxlmError(what, fix=f"use at most {most:,}, by a tokenizer, or lower the order")
    tables = [Table(folder / f"counts-{k}", 3) for k in range(1, order + 1)]
    # <unk> and <s> occur nowhere but must be in the model.
    tables[0].append(np.array([[0, 0, 0], [0, fast.BEGIN, 0]], np.uint64))
    seen = np.zeros((order, 7), np.int64)
    seen[0, [0, 6]] = 2
    state, depth = np.zeros((order, 4), np.uint64), 0
    limits = np.array(thresholds, np.uint64)
    runs = _runs(tokens, order, block)
    parts = sort_runs(runs, order * bits, folder / "ngrams", block, _add_equal)
    # The empty part at last closes what is still open.
    for part in chain(parts, [np.empty((0, 3), np.uint64)]):
        out = np.empty((order, len(part) + order, 3), np.uint64)
        sizes = np.zeros(order, np.int64)
        depth = fast.adjusted_counts(part, bits, limits, state, depth, out, sizes, seen)
        for table, written, size in zip(tables, out, sizes, strict=True):
            table.append(written[:size])
    return Counts(tables, seen[:, :6], seen[:, 6])


def _runs(tokens: Tokens, order: int, block: int) -> Iterator[np.ndarray]:
    """(key, count) of the n-grams that end at each run of `block` tokens."""
    fast = compiled("ngrams")

    ids = tokens.ids()
    for first in range(0, len(ids), block):
        last = min(first + block, len(ids))
        rows = np.empty((last - first, 3), np.uint64)
        fast.full_ngrams(ids, first, last, order, tokens.bits, rows)
        yield rows


def _add_equal(rows: np.ndarray) -> np.ndarray:
    fast = compiled("ngrams")

    return rows[: fast.combine(rows)]


def sort_rows(rows: np.ndarray, bits: int) -> np.ndarray:
    """Rows by their keys of so many bits, stable. Overwrites `rows`."""
    fast = compiled("ngrams")

    return fast.radix_sort(rows, np.empty_like(rows), bits)


def sort_runs(
    runs: Iterable[np.ndarray],
    bits: int,
    path: Path,
    block: int,
    shrink: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Iterator[np.ndarray]:
    """Rows of many runs in the order of their keys, in parts of about `block` rows.

    Rows with equal keys come in one part, and in the order they came in. A single run stays in
    memory; more are sorted to files that begin with `path` and merged range by range.

    Args:
        runs: uint64 [at most block, columns] each, the key in the first two columns.
        bits: of the key.
        shrink: what to do to sorted rows as soon as possible, such as to add up equal ones.
    """
    files: list[Table] = []
    rows = None
    for run in runs:
        if rows is not None:
            files.append(Table(path.with_name(f"{path.name}-{len(files)}"), rows.shape[1]))
            files[-1].append(shrink(sort_rows(rows, bits)))
        rows = run
    if rows is None:
        return
    rows = shrink(sort_rows(rows, bits))
    if not files:
        yield rows
        return
    sorted_runs = [*(file.rows() for file in files), rows]
    for part in _merge(sorted_runs, bits, block):
        yield shrink(part)
    for file in files:
        file.path.unlink()


def _merge(runs: Sequence[np.ndarray], bits: int, block: int) -> Iterator[np.ndarray]:
    """Sorted runs as one. Their keys are sampled to find ranges that fit into memory."""
    fast = compiled("ngrams")

    # Between samples 2R apart lie at most (2R + R) steps of rows, which is 3/4 of a block.
    step = max(1, block // (4 * len(runs)))
    samples = sort_rows(np.concatenate([run[::step, :2] for run in runs]), bits)
    splits = np.unique(samples[2 * len(runs) :: 2 * len(runs)], axis=0)
    firsts = [0] * len(runs)
    for split in (*splits, None):
        lasts = [len(r) if split is None else fast.lower_bound(r, *split) for r in runs]
        parts = [run[i:j] for run, i, j in zip(runs, firsts, lasts, strict=True)]
        if any(map(len, parts)):
            yield sort_rows(np.concatenate(parts), bits)
        firsts = lasts
