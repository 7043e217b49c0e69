"""Substring deduplication: passages that a corpus has more than once, and which copies to cut.

A *window* is a run of so many words of one document, from the first character of its first word to
the last of its last, white space between included; two windows are equal if their characters are.
The words of a corpus have a total order: better documents first, those as good in the order of the
corpus, and within a document from left to right. The rule:

    A word is cut if it lies in a window whose characters occur earlier, without overlap.

Every repeat of at least as many words is a chain of repeated windows, so what is cut is all but the
first copy of each repeat. What follows from the rule, whatever is nested, chained or periodic:

- Nothing else is cut: each word cut is part of a run of as many words that occurs earlier.
- All of it is cut: of a window that occurs earlier, no word is kept.
- Nothing is lost: the word at the same place of the earlier window comes earlier in the order, so
  going from copy to copy ends, at a word that is kept. A window that overlaps each earlier copy of
  itself is no copy (in "ha ha ha ..." the first windows stay), so a word is never its own source.
  If no part of the first copy is itself in a repeat that began elsewhere, it stays in one piece.

Hashes of windows take the place of a suffix array (Lee et al. 2022, arXiv 2107.06499): sorting one
of 128 bits a word gives the same groups as sorting a suffix a character, in a fraction of the time,
and hashes of parts are merged by ranges without their texts.

Three passes over files in a folder, none of which holds more than a block of text or a range of
hashes: `write_window_blocks` sorts the windows of each block; `find_repeated_windows` finds the
first occurrence of each window that comes several times, for one range of hashes;
`write_duplicate_spans` takes the union of a document's copies.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.corpus.cuts import CUTS
from maxlm.corpus.dedup.columns import (
    concatenate,
    find_range,
    hash_range_starts,
    mark_run_starts,
    read_columns,
    write_columns,
)
from maxlm.corpus.dedup.members import compute_keep_scores, write_labels
from maxlm.corpus.dedup.windows import (
    CHECK_BASE,
    concatenate_texts,
    find_words,
    get_code_points,
    hash_windows,
)
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CrossDocumentStage, JobRunner
from maxlm.data.batching import batch_by_size

_BYTES_OF_CHARACTER = 64  # Of its block, in an index job.
_BYTES_OF_WINDOW = 80  # In a range job.
_LARGEST_BLOCK = 2**31  # Places in a block are uint32, and no document is longer than this.
_PLACE = np.uint64(32)  # A position is the number of a block << 32 | a character of its text.
_LOW = np.uint64(2**32 - 1)

_LABELS = pa.schema([("cuts", CUTS), ("cut_share", pa.float64())])
_SCHEMA = _LABELS.insert(0, pa.field("row", pa.int64()))


def write_window_blocks(
    folder: Path,
    window_words: int,
    block_characters: int,
    keep_by: str | None,
    shard: StageShardView,
) -> None:
    """Writes a shard's blocks of so many characters, or of a document: FOLDER/blocks/SHARD-N.*

    - text, and for each document its row, its rank, and the character of text where it ends
    - for each window its hashes, sorted, and the character of text where it begins
    """
    done = _block_file(folder, shard.name, "windows")
    if done.exists():
        return
    windows = []
    documents = _read_code_points(shard, keep_by)
    blocks = batch_by_size(documents, lambda document: len(document[0]), block_characters)
    for number, block in enumerate(blocks):
        name = f"{shard.name}-{number}"
        # The best document first.
        texts, rows, ranks = zip(*sorted(block, key=lambda document: -document[2]), strict=True)
        text, offsets = concatenate_texts(texts)
        columns = {"row": np.array(rows), "rank": np.array(ranks), "end": offsets[1:]}
        write_columns(_block_file(folder, name, "documents"), columns)
        write_columns(_block_file(folder, name, "text"), {"text": text})
        starts, stops, first = find_words(text, offsets)
        hashes, begins = hash_windows(text, starts, stops, first, window_words)
        order = np.argsort(hashes, kind="stable")
        columns = {"hash": hashes[order], "place": starts[begins[order]].astype(np.uint32)}
        checks, _ = hash_windows(text, starts, stops, first, window_words, CHECK_BASE)
        columns |= {"check": checks[order]}
        write_columns(_block_file(folder, name, "hashes"), columns)
        windows.append(len(hashes))
    write_columns(done, {"windows": np.array(windows, np.int64)})


def _read_code_points(
    shard: StageShardView, keep_by: str | None
) -> Iterator[tuple[np.ndarray, int, float]]:
    """Yields the text, row and rank of each document of a shard."""
    columns = ("text",) if keep_by is None else ("text", keep_by.removeprefix("-"))
    for group in shard.read_selected_rows(columns):
        texts = (get_code_points(text.as_py()) for text in group.batch.column("text"))
        rows = (group.row_indices + group.first_row).tolist()
        yield from zip(texts, rows, compute_keep_scores(group.batch, keep_by).tolist(), strict=True)


class WindowBlock(NamedTuple):
    """A block that `write_window_blocks` wrote."""

    shard: str
    name: str
    windows: int


def list_blocks(folder: Path, shards: Sequence[StageShardView]) -> list[WindowBlock]:
    """Lists the blocks of all shards, in order."""
    return [
        WindowBlock(shard.name, f"{shard.name}-{i}", windows)
        for shard in shards
        for i, windows in enumerate(
            read_columns(_block_file(folder, shard.name, "windows"))["windows"].tolist()
        )
    ]


def find_repeated_windows(
    folder: Path, blocks: Sequence[WindowBlock], num_ranges: int, has_ranks: bool, range_index: int
) -> None:
    """Write the positions of windows that occur earlier, rising, and where the first of all is:
    FOLDER/ranges/NUMBER-WHICH.

    Args:
        num_ranges, range_index: how many ranges of hashes there are, and which this one is.
        has_ranks: whether documents differ in rank.
    """
    path = _range_file(folder, num_ranges, range_index)
    if path.exists():
        return
    hashes, checks, positions, good = [], [], [], []
    starts = hash_range_starts(num_ranges)
    for number, block in enumerate(blocks):
        columns = read_columns(_block_file(folder, block.name, "hashes"))
        part = find_range(columns["hash"], starts, range_index)
        hashes.append(columns["hash"][part])
        checks.append(columns["check"][part])
        place = columns["place"][part].astype(np.uint64)
        positions.append(np.uint64(number) << _PLACE | place)
        if has_ranks:
            documents = read_columns(_block_file(folder, block.name, "documents"))
            which = np.searchsorted(documents["end"], place.astype(np.int64), "right")
            good.append(documents["rank"][which])
    keys = [concatenate(checks, np.uint64), concatenate(hashes, np.uint64)]
    # The sort keeps the order of blocks among equals.
    order = np.lexsort([-concatenate(good, np.float64), *keys] if has_ranks else keys)
    leads = mark_run_starts(keys[0][order]) | mark_run_starts(keys[1][order])
    positions = concatenate(positions, np.uint64)
    positions = positions[order]
    source = positions[leads][np.cumsum(leads) - 1][~leads]
    positions = positions[~leads]
    order = np.argsort(positions)
    write_columns(path, {"position": positions[order], "source": source[order]})


def write_duplicate_spans(
    folder: Path,
    blocks: Sequence[WindowBlock],
    num_ranges: int,
    window_words: int,
    shard: StageShardView,
) -> None:
    """Writes the labels of a shard's documents: what to cut."""
    mine = [number for number, block in enumerate(blocks) if block.shard == shard.name]
    parts = [_cut_block(folder, blocks, number, num_ranges, window_words) for number in mine]
    table = pa.Table.from_batches(parts, _SCHEMA).sort_by("row").combine_chunks()
    labels = {
        name: pa.concat_arrays([pa.nulls(0, column.type), *column.chunks])
        for name, column in zip(_SCHEMA.names, table.columns, strict=True)
    }
    write_labels(shard, _LABELS, labels["row"].to_numpy(), labels)


def _cut_block(
    folder: Path, blocks: Sequence[WindowBlock], block: int, num_ranges: int, size: int
) -> pa.RecordBatch:
    documents = read_columns(_block_file(folder, blocks[block].name, "documents"))
    rows, ends = documents["row"], documents["end"]
    text = read_columns(_block_file(folder, blocks[block].name, "text"))["text"]
    offsets = np.concatenate([[0], ends])
    place, source = _find_sources(folder, block, num_ranges)
    starts, stops, first = find_words(text, offsets)
    words = np.searchsorted(starts, place.astype(np.int64))
    reach = stops[words + size - 1].astype(np.uint64) - place
    apart = (source >> _PLACE != block) | ((source & _LOW) + reach <= place)
    edges = _unite(words[apart], starts, stops, first, size)
    document = np.searchsorted(ends, edges[:, 0], "right")
    spans = (edges - offsets[document, None]).astype(np.int32)
    counts = np.bincount(document, minlength=len(rows))
    lost = np.bincount(document, spans[:, 1] - spans[:, 0], len(rows))
    share = np.where(counts > 0, lost / np.maximum(ends - offsets[:-1], 1), 0.0)
    pairs = pa.StructArray.from_arrays([spans[:, 0], spans[:, 1]], fields=list(CUTS.value_type))
    cuts = pa.ListArray.from_arrays(np.cumsum([0, *counts], dtype=np.int32), pairs)
    return pa.RecordBatch.from_arrays([rows, cuts, share], schema=_SCHEMA)


def _find_sources(folder: Path, block: int, num_ranges: int) -> tuple[np.ndarray, np.ndarray]:
    """The characters where windows begin that occur earlier, rising, and the positions where
    first."""
    places, sources = [], []
    bounds = np.array([block, block + 1], np.uint64) << _PLACE
    for range_index in range(num_ranges):
        columns = read_columns(_range_file(folder, num_ranges, range_index))
        part = slice(*np.searchsorted(columns["position"], bounds))
        places.append(columns["position"][part] & _LOW)
        sources.append(columns["source"][part])
    place, source = concatenate(places, np.uint64), concatenate(sources, np.uint64)
    order = np.argsort(place)
    return place[order], source[order]


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


def _block_file(folder: Path, name: str, kind: str) -> Path:
    """A file of a block: its `documents`, `text` or `hashes`; or of a shard: how many `windows`
    each of its blocks has."""
    return folder / "blocks" / f"{name}.{kind}"


def _range_file(folder: Path, num_ranges: int, range_index: int) -> Path:
    return folder / "ranges" / f"{num_ranges}-{range_index}.arrow"


class SubstringStage(CrossDocumentStage):
    """Passages of at least `min_tokens` words that stand elsewhere too, within a document or in
    another, become spans to cut; the first copy stays (Lee et al. 2022, arXiv 2107.06499).

    A word is what white space separates, and in scripts without spaces each letter with its marks
    (see `maxlm.corpus.text`), so spans begin and end between words; passages are the same if
    their characters are, white space included. The module states the rule and its
    guarantees. No document is split, so one of more characters than `memory` / 64 takes more.
    """

    stage: Literal["substring"] = "substring"
    min_tokens: int = Field(default=50, ge=2)
    """The shortest repeat to be cut, in words; shorter ones (set phrases, addresses) stay. 50 words
    of English are about 65 tokens of byte-pair encoding, of which the paper takes 50."""

    version: ClassVar[int] = 5
    depends_on_unicode: ClassVar[bool] = True

    def schema(self) -> pa.Schema:
        return _LABELS

    def label(self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner) -> None:
        """See `CrossDocumentStage.label`. The scratch files take ten times the text."""
        folder = scratch / f"windows-{self.memory}"  # A killed run may have had another.
        largest = min(self.memory // _BYTES_OF_CHARACTER, _LARGEST_BLOCK)
        index = partial(write_window_blocks, folder, self.min_tokens, largest, self.keep_by)
        run_jobs(index, shards, "index")
        blocks = list_blocks(folder, shards)
        windows = sum(block.windows for block in blocks)
        number = max(1, -(-windows * _BYTES_OF_WINDOW // self.memory))
        match = partial(find_repeated_windows, folder, blocks, number, self.keep_by is not None)
        run_jobs(match, range(number), "match")
        cut = partial(write_duplicate_spans, folder, blocks, number, self.min_tokens)
        run_jobs(cut, shards, "cut")
