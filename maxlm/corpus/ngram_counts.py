"""Counts of n-grams in memory of a set size: sorted runs on disk, merged range by range.

The plan is that of Heafield et al. 2013, "Scalable Modified Kneser-Ney Language Model Estimation":
sort all n-grams of the highest order by their suffixes, and read the adjusted counts of all orders
off one pass. `ngram_loops` tells how an n-gram is a key.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np

from maxlm.config import MaxlmError
from maxlm.runtime.files import convert_write_errors

SPECIAL = (b"<unk>", b"<s>", b"</s>")
"""The words with ids 0, 1 and 2."""
BEGIN, END = 1, 2
_NO_WORDS = {*SPECIAL, b"<UNK>"}  # The last is <unk> to KenLM.
_KEY_BITS = 128


def load_ngram_loops() -> ModuleType:
    """Imports the compiled loops.

    Raises:
        MaxlmError: Numba is not installed.
    """
    try:
        return import_module("maxlm.corpus.ngram_loops")
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        what = "training n-gram models needs Numba, which is not installed"
        raise MaxlmError(what, fix="pip install 'maxlm[corpus]'") from error


@dataclass(frozen=True)
class NgramTable:
    """Rows of uint64 in a file, which is only appended to."""

    path: Path
    columns: int

    def append(self, rows: np.ndarray) -> None:
        with convert_write_errors(self.path), self.path.open("ab") as file:
            np.ascontiguousarray(rows).tofile(file)

    def open(self) -> np.ndarray:
        """Maps the rows into memory page by page: uint64 [rows, columns]."""
        if not self.path.exists() or not self.path.stat().st_size:
            return np.empty((0, self.columns), np.uint64)
        return np.memmap(self.path, np.uint64, "r").reshape(-1, self.columns)


@dataclass(frozen=True)
class TokenFile:
    """A text as word ids on disk; sentences end with id 2."""

    path: Path
    words: list[bytes]
    """By id: in the order of first appearance, after the special ones."""

    def ids(self) -> np.ndarray:
        """Word ids: uint32 [tokens], `</s>` included."""
        return np.memmap(self.path, np.uint32, "r")

    @property
    def bits(self) -> int:
        """Bits of an id."""
        return max(2, (len(self.words) - 1).bit_length())


class _Vocabulary(dict[bytes, int]):
    """Numbers words as they are asked for."""

    def __missing__(self, word: bytes) -> int:
        self[word] = number = len(self)
        return number


def read_tokens(sentences: Iterable[str], path: Path, block: int) -> TokenFile:
    """Numbers the words of sentences, `block` ids or one sentence in memory at a time.

    Words are what ASCII white space and NUL separate. The special words are read as white space.
    """
    vocabulary = _Vocabulary({word: number for number, word in enumerate(SPECIAL)})
    number, ids = vocabulary.__getitem__, array("I")
    with convert_write_errors(path), path.open("wb") as file:
        for sentence in sentences:
            words = sentence.encode(errors="replace").replace(b"\0", b" ").split()
            if "<" in sentence:
                words = [word for word in words if word not in _NO_WORDS]
            ids.extend(map(number, words))
            ids.append(END)
            if len(ids) >= block:
                ids.tofile(file)
                ids = array("I")
        ids.tofile(file)
    return TokenFile(path, list(vocabulary))


@dataclass(frozen=True)
class NgramCounts:
    """Adjusted counts of n-grams of all orders."""

    tables: list[NgramTable]
    """By order: (key, adjusted count, perhaps marked as pruned) in suffix order."""
    with_count: np.ndarray
    """int64 [order, 6]: the n-grams with adjusted count 0, 1, ..., 4, more."""
    kept: np.ndarray
    """int64 [order]: the n-grams that are not pruned."""


def count_ngrams(
    tokens: TokenFile, thresholds: Sequence[int], folder: Path, block: int
) -> NgramCounts:
    """Counts the n-grams of orders 1 to len(thresholds), with files in `folder`.

    Args:
        thresholds: by order, prune n-grams that occur at most so often.
        block: rows to be in memory at a time.

    Raises:
        MaxlmError: too many different words for the order.
    """
    order, bits = len(thresholds), tokens.bits
    if order * bits > _KEY_BITS:
        what = f"{len(tokens.words):,} different words are too many for a model of order {order}"
        most = 2 ** (_KEY_BITS // order)
        raise MaxlmError(what, fix=f"use at most {most:,}, by a tokenizer, or lower the order")
    tables = [NgramTable(folder / f"counts-{k}", 3) for k in range(1, order + 1)]
    # <unk> and <s> occur nowhere but must be in the model.
    tables[0].append(np.array([[0, 0, 0], [0, BEGIN, 0]], np.uint64))
    seen = np.zeros((order, 7), np.int64)
    seen[0, [0, 6]] = 2
    state, depth = np.zeros((order, 4), np.uint64), 0
    limits, count_adjusted = np.array(thresholds, np.uint64), load_ngram_loops().count_adjusted
    ids = tokens.ids()
    runs = (_full_ngrams(ids, i, block, order, bits) for i in range(0, len(ids), block))
    parts = sort_runs(runs, folder / "ngrams", block, _add_equal)
    # The empty part at last closes what is still open.
    for part in chain(parts, [np.empty((0, 3), np.uint64)]):
        out = np.empty((order, len(part) + order, 3), np.uint64)
        sizes = np.zeros(order, np.int64)
        depth = count_adjusted(part, bits, limits, state, depth, out, sizes, seen)
        for table, written, size in zip(tables, out, sizes, strict=True):
            table.append(written[:size])
    return NgramCounts(tables, seen[:, :6], seen[:, 6])


def _full_ngrams(ids: np.ndarray, first: int, block: int, order: int, bits: int) -> np.ndarray:
    """Makes rows (key, 1) of the n-grams that end at each of `block` tokens from `first`.

    Where the sentence has begun less than `order` words before, <s> is repeated to the left.
    """
    place = np.arange(first, min(first + block, len(ids)))
    rows = np.zeros((len(place), 3), np.uint64)
    rows[:, 2] = 1
    inside = np.ones(len(place), np.bool_)
    for back in range(order):
        word = np.where(place >= back, ids[np.maximum(place - back, 0)], END)
        inside &= (word != END) | (back == 0)
        rows[:, 0] = rows[:, 0] << np.uint64(bits) | rows[:, 1] >> np.uint64(64 - bits)
        rows[:, 1] = rows[:, 1] << np.uint64(bits) | np.where(inside, word, BEGIN)
    return rows


def mark_key_starts(rows: np.ndarray) -> np.ndarray:
    """Marks the first of each run of sorted rows with equal keys: bool [rows]."""
    first = np.ones(len(rows), np.bool_)
    first[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
    return first


def _add_equal(rows: np.ndarray) -> np.ndarray:
    firsts = np.flatnonzero(mark_key_starts(rows))
    sums = rows[firsts]
    sums[:, 2] = np.add.reduceat(rows[:, 2], firsts) if len(rows) else 0
    return sums


def _sort_rows(rows: np.ndarray) -> np.ndarray:
    """Sorts rows by their keys, stable."""
    if not rows[:, 0].any():
        return rows[np.argsort(rows[:, 1], kind="stable")]
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def sort_runs(
    runs: Iterable[np.ndarray],
    path: Path,
    block: int,
    shrink: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Iterator[np.ndarray]:
    """Yields the rows of many runs in the order of their keys, in parts of about `block` rows.

    Rows with equal keys come in one part, and in the order they came in. A single run stays in
    memory; more are sorted to files that begin with `path` and merged range by range.

    Args:
        runs: uint64 [at most block, columns] each, the key in the first two columns.
        shrink: what to do to sorted rows as soon as possible, such as to add up equal ones.
    """
    files: list[NgramTable] = []
    rows = None
    for run in runs:
        if rows is not None:
            files.append(NgramTable(path.with_name(f"{path.name}-{len(files)}"), rows.shape[1]))
            files[-1].append(shrink(_sort_rows(rows)))
        rows = run
    if rows is None:
        return
    rows = shrink(_sort_rows(rows))
    if not files:
        yield rows
        return
    for part in _merge_runs([*(file.open() for file in files), rows], block):
        yield shrink(part)
    for file in files:
        file.path.unlink()


def _merge_runs(runs: Sequence[np.ndarray], block: int) -> Iterator[np.ndarray]:
    """Merges sorted runs, whose keys are sampled to find ranges that fit into memory."""
    # Between samples 2R apart lie at most (2R + R) steps of rows, which is 3/4 of a block.
    step = max(1, block // (4 * len(runs)))
    samples = _sort_rows(np.concatenate([run[::step, :2] for run in runs]))
    splits = np.unique(samples[2 * len(runs) :: 2 * len(runs)], axis=0).tolist()
    firsts = [0] * len(runs)
    for split in (*splits, None):
        lasts = [
            len(run) if split is None else bisect_left(run, split, key=lambda r: r[:2].tolist())
            for run in runs
        ]
        parts = [run[i:j] for run, i, j in zip(runs, firsts, lasts, strict=True)]
        if any(map(len, parts)):
            yield _sort_rows(np.concatenate(parts))
        firsts = lasts
