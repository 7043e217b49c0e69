"""Repeated runs of words: finding them over files, and which copies to cut.

A *window* is a run of `size` words of one document, from the first character of its first word to
the last of its last, white space between included; two windows are equal if their characters are.
The words of a corpus have a total order: better documents first, those as good in the order of the
corpus, and within a document from left to right. The rule:

    A word is cut if it lies in a window whose characters occur earlier, without overlap.

Every repeat of at least `size` words is a chain of repeated windows, so what is cut is all but the
first copy of each repeat. What follows from the rule, whatever is nested, chained or periodic:

- Nothing else is cut: each word cut is part of a run of `size` words that occurs earlier.
- All of it is cut: of a window that occurs earlier, no word is kept.
- Nothing is lost: the word at the same place of the earlier window comes earlier in the order, so
  going from copy to copy ends, at a word that is kept. A window that overlaps each earlier copy of
  itself is no copy (in "ha ha ha ..." the first windows stay), so a word is never its own source.
  If no part of the first copy is itself in a repeat that began elsewhere, it stays in one piece.

**Why hashes of windows rather than a suffix array.** Of a suffix array and its common-prefix
lengths (Lee et al. 2022, arXiv 2107.06499) the rule needs only which suffixes share their first
`size` words, and in which order they stand. Sorting one 64-bit hash a word gives the same groups as
sorting one suffix a character, in a fraction of the time (`benchmarks/corpus_substring.py` runs
both). And sorted hashes of parts are merged by ranges without their texts,
where merging suffix arrays reads the texts of all parts at random places. Hashes only propose:
every copy is compared with its source byte by byte before anything is cut, so of two windows that
share a hash by chance none is cut for it.

Three passes over files in a folder, none of which holds more than a block of text or a range of
hashes: `write_shard_blocks` sorts the windows of each block; `match_range` finds the first
occurrence of each window that comes several times, for one range of hashes; `find_cuts` follows
each copy to its source, compares, and takes the union. It also lists where each copied run came
first, for which documents are kept is not known yet: what is cut of them is settled later
(`corpus.settling`).
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.config import MaxlmError
from maxlm.corpus.cuts import CUTS
from maxlm.corpus.dedup.columns import concatenate, find_range, hash_range_starts, mark_run_starts
from maxlm.corpus.dedup.members import count_documents, rank_documents
from maxlm.corpus.dedup.windows import (
    compare_windows,
    concatenate_texts,
    find_words,
    get_code_points,
    hash_windows,
)
from maxlm.corpus.shards import StageShardView
from maxlm.runtime.files import convert_write_errors, replace_file

_PLACE = np.uint64(32)  # A position is the number of a block << 32 | a character of its text.
_LOW = np.uint64(2**32 - 1)
_LONGEST = 2**31 - 1  # Spans are int32.

_PLACES = ("begin", "end", "last", "of", "at")
REPEATS = pa.list_(
    pa.struct([(name, pa.int64() if name == "of" else pa.int32()) for name in _PLACES])
)
"""Runs of windows that came first in the document numbered `of`, there from `at` on: where a run
begins and ends and where its last window begins, in characters of its own document, as `at` is."""
_SCHEMA = pa.schema(
    [("row", pa.int64()), ("cuts", CUTS), ("cut_share", pa.float64()), ("repeats", REPEATS)]
)


def write_shard_blocks(
    folder: Path, size: int, block_characters: int, keep_by: str | None, shard: StageShardView
) -> None:
    """Writes a shard's blocks of so many characters, or of a document: FOLDER/blocks/SHARD-N.*

    - text, and for each document its row, its rank, and the character of text where it ends
    - for each window its hash, sorted, and the character of text where it begins
    """
    done = _block_file(folder, shard.name)
    if Path(f"{done}.windows").exists():
        return
    windows = []
    for number, (texts, rows, rank) in enumerate(_blocks(shard, block_characters, keep_by)):
        path = _block_file(folder, f"{shard.name}-{number}")
        order = np.argsort(-rank, kind="stable")  # The best document first.
        text, offsets = concatenate_texts([texts[i] for i in order])
        _write(path, row=rows[order], rank=rank[order], end=offsets[1:], text=text)
        starts, stops, first = find_words(text, offsets)
        hashes, begins = hash_windows(text, starts, stops, first, size)
        order = np.argsort(hashes, kind="stable")
        _write(path, hash=hashes[order], place=starts[begins[order]])
        windows.append(len(hashes))
    _write(done, windows=np.array(windows, np.int64))


def _blocks(
    shard: StageShardView, block_characters: int, keep_by: str | None
) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
    """Yields the texts, rows and ranks of some documents of a shard at a time."""
    texts, rows, ranks, size = [], [], [], 0
    columns = ("text",) if keep_by is None else ("text", keep_by.removeprefix("-"))
    for group in shard.rows(columns):
        column = group.batch.column("text")
        good = rank_documents(group.batch, keep_by)
        for i, row in enumerate((group.index + group.first).tolist()):
            text = get_code_points(column[i].as_py())
            if len(text) > _LONGEST:
                what = f"document of {len(text)} characters, where {_LONGEST} are the most"
                where = f"{shard.path('documents')}, row {row}"
                raise MaxlmError(what, where=where, fix="leave it out, or cut it into several")
            if texts and size + len(text) > block_characters:
                yield texts, np.array(rows, np.int64), np.array(ranks)
                texts, rows, ranks, size = [], [], [], 0
            texts.append(text)
            rows.append(row)
            ranks.append(good[i])
            size += len(text)
    if texts:
        yield texts, np.array(rows, np.int64), np.array(ranks)


def list_blocks(folder: Path, shards: Sequence[StageShardView]) -> int:
    """Write the list of all blocks, in order, for `match_range` and `find_cuts`.

    Returns:
        How many windows the blocks have.
    """
    windows = [_read(_block_file(folder, shard.name), "windows").tolist() for shard in shards]
    blocks = [
        (shard.name, f"{shard.name}-{i}", first)
        for shard, first, counts in zip(shards, count_documents(shards), windows, strict=False)
        for i in range(len(counts))
    ]
    path = folder / "blocks.json"
    with convert_write_errors(path):
        path.write_text(json.dumps(blocks))
    return sum(map(sum, windows))


def _listed(folder: Path) -> list[tuple[str, Path, int]]:
    """Each block's shard, its files without their suffix, and the shard's first document."""
    blocks = json.loads((folder / "blocks.json").read_text())
    return [(shard, _block_file(folder, name), first) for shard, name, first in blocks]


def match_range(folder: Path, num_ranges: int, ranked: bool, range_index: int) -> None:
    """Write the positions of windows that occur earlier, rising, and where the first of all is:
    FOLDER/ranges/NUMBER-WHICH.

    Args:
        num_ranges, range_index: how many ranges of hashes there are, and which this one is.
        ranked: whether documents differ in rank.
    """
    path = _range_file(folder, num_ranges, range_index)
    if Path(f"{path}.source").exists():
        return
    hashes, positions, good, starts = [], [], [], hash_range_starts(num_ranges)
    for block, (_, file, _) in enumerate(_listed(folder)):
        part = find_range(known := _read(file, "hash"), starts, range_index)
        hashes.append(np.array(known[part]))
        place = _read(file, "place")[part].astype(np.int64)
        positions.append(np.uint64(block) << _PLACE | place.astype(np.uint64))
        if ranked:
            document = np.searchsorted(_read(file, "end"), place, "right")
            good.append(_read(file, "rank")[document])
    hashes, positions = concatenate(hashes, np.uint64), concatenate(positions, np.uint64)
    # Both sorts keep the order of blocks among equals.
    if ranked:
        order = np.lexsort((-concatenate(good, np.float64), hashes))
    else:
        order = np.argsort(hashes, kind="stable")
    leads = mark_run_starts(hashes[order])
    positions = positions[order]
    source = positions[leads][np.cumsum(leads) - 1][~leads]
    positions = positions[~leads]
    order = np.argsort(positions)
    _write(path, position=positions[order])
    _write(path, source=source[order])


def find_cuts(folder: Path, shard: str, num_ranges: int, size: int) -> pa.RecordBatch:
    """Finds what to cut from the documents of a shard.

    Args:
        num_ranges: how many ranges of hashes there are.

    Returns:
        For each document its `row` in the shard, rising, and the columns of the stage.
    """
    listed = _listed(folder)
    mine = [block for block, (other, _, _) in enumerate(listed) if other == shard]
    parts = [_cut_block(folder, listed, block, num_ranges, size) for block in mine]
    table = pa.Table.from_batches(parts, _SCHEMA).sort_by("row").combine_chunks()
    columns = [pa.concat_arrays([pa.nulls(0, c.type), *c.chunks]) for c in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _cut_block(
    folder: Path, listed: list[tuple[str, Path, int]], block: int, num_ranges: int, size: int
) -> pa.RecordBatch:
    blocks = [path for _, path, _ in listed]
    rows, ends, text = (_read(blocks[block], name) for name in ("row", "end", "text"))
    offsets = np.concatenate([[0], ends])
    place, source = _find_sources(folder, block, num_ranges)
    starts, stops, first = find_words(text, offsets)
    words = np.searchsorted(starts, place.astype(np.int64))
    reach = stops[words + size - 1].astype(np.uint64) - place
    apart = (source >> _PLACE != block) | ((source & _LOW) + reach <= place)
    words, source = words[apart], source[apart]
    equal = _verify(blocks, text, starts, stops, words, source, size)
    words, source = words[equal], source[equal]
    edges = _unite(words, starts, stops, first, size)
    document = np.searchsorted(ends, edges[:, 0], "right")
    spans = (edges - offsets[document, None]).astype(np.int32)
    counts = np.bincount(document, minlength=len(rows))
    lost = np.bincount(document, spans[:, 1] - spans[:, 0], len(rows))
    share = np.where(counts > 0, lost / np.maximum(ends - offsets[:-1], 1), 0.0)
    pairs = pa.StructArray.from_arrays([spans[:, 0], spans[:, 1]], fields=list(CUTS.value_type))
    cuts = pa.ListArray.from_arrays(np.cumsum([0, *counts], dtype=np.int32), pairs)
    place = starts[words]
    follows = (np.diff(words) == 1) & (np.diff(source) == np.diff(place).astype(np.uint64))
    first = np.flatnonzero(np.append(True, ~follows)[: len(words)])
    last = words[np.append(first[1:], len(words))[: len(first)] - 1]
    ends = (starts[words[first]], stops[last + size - 1], starts[last])
    document = np.searchsorted(offsets[1:], ends[0], "right")
    columns = [(each - offsets[document]).astype(np.int32) for each in ends]
    repeats = pa.StructArray.from_arrays(
        [*columns, *_find_documents(listed, source[first])], fields=list(REPEATS.value_type)
    )
    counts = np.bincount(document, minlength=len(rows))
    repeats = pa.ListArray.from_arrays(np.cumsum([0, *counts], dtype=np.int32), repeats)
    return pa.RecordBatch.from_arrays([rows, cuts, share, repeats], schema=_SCHEMA)


def _find_documents(
    listed: list[tuple[str, Path, int]], source: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the documents in which positions lie, and the characters before each there."""
    of, at = np.empty(len(source), np.int64), np.empty(len(source), np.int32)
    for origin, these in _by_block(source):
        _, path, number = listed[origin]
        there = (source[these] & _LOW).astype(np.int64)
        offsets = np.concatenate([[0], _read(path, "end")])
        document = np.searchsorted(offsets[1:], there, "right")
        of[these] = _read(path, "row")[document] + number
        at[these] = there - offsets[document]
    return of, at


def _by_block(source: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each block with some of these positions, and which those are, from the first on."""
    order = np.argsort(source, kind="stable")
    for these in np.split(order, np.flatnonzero(np.diff(source[order] >> _PLACE)) + 1):
        if len(these):
            yield int(source[these[0]] >> _PLACE), these


def _find_sources(folder: Path, block: int, num_ranges: int) -> tuple[np.ndarray, np.ndarray]:
    """The characters where windows begin that occur earlier, rising, and the positions where
    first."""
    places, sources = [], []
    bounds = np.array([block, block + 1], np.uint64) << _PLACE
    for range_index in range(num_ranges):
        file = _range_file(folder, num_ranges, range_index)
        part = slice(*np.searchsorted(position := _read(file, "position"), bounds))
        places.append(position[part] & _LOW)
        sources.append(_read(file, "source")[part])
    place, source = concatenate(places, np.uint64), concatenate(sources, np.uint64)
    order = np.argsort(place)
    return place[order], source[order]


def _verify(
    blocks: list[Path],
    text: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    words: np.ndarray,
    source: np.ndarray,
    size: int,
) -> np.ndarray:
    """Tells which windows are, character for character, what stands at their sources.

    The texts of other blocks are opened one at a time, and only what is compared is read.
    """
    equal = np.zeros(len(words), np.bool_)
    for origin, these in _by_block(source):
        these.sort()  # In the order of words, of which most follow the one before.
        theirs, there = _read(blocks[origin], "text"), (source[these] & _LOW).astype(np.int64)
        begin, end = starts[words[these]], stops[words[these] + size - 1]
        equal[these] = compare_windows(text, begin, end, theirs, there)
    return equal


def _unite(
    words: np.ndarray, starts: np.ndarray, stops: np.ndarray, first: np.ndarray, size: int
) -> np.ndarray:
    """The first byte, and the byte after the last, of each run of words within a document that
    the windows beginning at `words` cover: int64 [runs, 2]."""
    covers = np.zeros(len(starts) + 1, np.int32)
    covers[words] += 1
    covers[words + size] -= 1
    gone = np.cumsum(covers[:-1], dtype=np.int32) > 0
    opens = np.zeros(len(starts) + 1, np.bool_)  # At the first word of a document, and at the end.
    opens[first] = True
    begins = gone & (opens[:-1] | ~np.roll(gone, 1))
    finishes = gone & (opens[1:] | ~np.roll(gone, -1))
    return np.stack([starts[begins], stops[finishes]], 1).astype(np.int64)


def _block_file(folder: Path, name: str) -> Path:
    """A block's files without their suffix, or a shard's file of how many windows each has."""
    return folder / "blocks" / name


def _range_file(folder: Path, num_ranges: int, range_index: int) -> Path:
    return folder / "ranges" / f"{num_ranges}-{range_index}"


_KINDS = dict.fromkeys(("text", "place"), np.uint32)
_KINDS |= dict.fromkeys(("hash", "position", "source"), np.uint64)
_KINDS |= dict.fromkeys(("row", "end", "windows"), np.int64) | {"rank": np.float64}


def _write(path: Path, **arrays: np.ndarray) -> None:
    """Write each array to a file of its own, which appears when complete."""
    with convert_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        with replace_file(Path(f"{path}.{name}")) as new:
            array.astype(_KINDS[name], copy=False).tofile(new)


def _read(path: Path, name: str) -> np.ndarray:
    """An array of a file, on disk until it is looked at."""
    file, kind = f"{path}.{name}", _KINDS[name]
    return np.memmap(file, kind, "r") if os.path.getsize(file) else np.empty(0, kind)
