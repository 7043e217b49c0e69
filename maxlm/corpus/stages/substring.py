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
hashes: `write_window_blocks` sorts the windows of each block; `write_copies` finds the first
occurrence of each window that comes several times, for one range of hashes;
`write_duplicate_spans` takes the union of a document's copies.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.corpus.cuts import CUTS, merge_spans
from maxlm.corpus.dedup.columns import read_batch, read_columns, write_columns
from maxlm.corpus.dedup.copies import read_copies, write_copies
from maxlm.corpus.dedup.members import compute_keep_scores, write_labels
from maxlm.corpus.dedup.minhash import mix_bits
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CrossDocumentStage, JobRunner, LabelTypes
from maxlm.corpus.text import ALONE, EXTEND, SPACE, get_code_point_classes
from maxlm.data.batching import batch_by_size

_BYTES_OF_CHARACTER = 64  # Of its block, in an index job.
_BYTES_OF_WINDOW = 80  # In a range job.
# Bases of the two hashes of a window: odd, and so invertible modulo 2^64.
_BASE, _CHECK_BASE = 0x9FB21C651E98DF25, 0xD6E8FEB86659FD93
_LARGEST_BLOCK = 2**31  # Places in a block are uint32, and no document is longer than this.

_NOTHING = (np.empty(0, np.int64), np.empty((0, 2), np.int32), np.empty(0, np.int64), np.empty(0))


def write_window_blocks(
    folder: Path,
    window_words: int,
    block_characters: int,
    keep_by: str | None,
    shard: StageShardView,
) -> None:
    """Writes a shard's blocks of so many characters, or of a document: FOLDER/blocks/SHARD-N.*

    - text, and for each document its row, and the character of text where it ends
    - for each window its hashes, sorted, the character of text where it begins, and its document's
      rank, if ranks differ
    """
    if (done := _block_file(folder, shard.name, "windows")).exists():
        return
    windows = []
    documents = _read_code_points(shard, keep_by)
    blocks = batch_by_size(documents, lambda document: len(document[0]), block_characters)
    for number, block in enumerate(blocks):
        name = f"{shard.name}-{number}"
        texts, rows, ranks = zip(*block, strict=True)
        text, offsets = np.concatenate(texts), np.cumsum([0, *map(len, texts)], dtype=np.int64)
        columns = {"row": np.array(rows), "end": offsets[1:]}
        write_columns(_block_file(folder, name, "documents"), columns)
        write_columns(_block_file(folder, name, "text"), {"text": text})
        starts, stops, first = find_words(text, offsets)
        hashes, begins = hash_windows(text, starts, stops, first, window_words)
        order = np.argsort(hashes, kind="stable")
        columns = {"hash": hashes[order], "place": starts[begins[order]].astype(np.uint32)}
        checks, _ = hash_windows(text, starts, stops, first, window_words, _CHECK_BASE)
        columns |= {"check": checks[order]}
        if keep_by is not None:
            documents_of_windows = np.searchsorted(first, begins[order], "right") - 1
            columns |= {"rank": np.array(ranks)[documents_of_windows]}
        write_columns(_block_file(folder, name, "hashes"), columns)
        windows.append(len(hashes))
    write_columns(done, {"windows": np.array(windows, np.int64)})


def _read_code_points(
    shard: StageShardView, keep_by: str | None
) -> Iterator[tuple[np.ndarray, int, float]]:
    """Yields the code points (uint32), row and rank of each document of a shard."""
    columns = ("text",) if keep_by is None else ("text", keep_by.removeprefix("-"))
    for group in shard.read_selected_rows(columns):
        encoded = (text.as_py().encode("utf-32-le") for text in group.batch.column("text"))
        texts = (np.frombuffer(text, np.uint32) for text in encoded)
        rows = (group.row_indices + group.first_row).tolist()
        yield from zip(texts, rows, compute_keep_scores(group.batch, keep_by).tolist(), strict=True)


def list_blocks(folder: Path, shards: Sequence[StageShardView]) -> list[str]:
    """Lists the names of the blocks of all shards, in order."""
    return [
        f"{shard.name}-{number}"
        for shard in shards
        for number in range(read_batch(_block_file(folder, shard.name, "windows")).num_rows)
    ]


def write_duplicate_spans(
    folder: Path, blocks: Sequence[str], num_ranges: int, window_words: int, shard: StageShardView
) -> None:
    """Writes the labels of a shard's documents: what to cut."""
    mine = [i for i, block in enumerate(blocks) if block.rpartition("-")[0] == shard.name]
    parts = [_cut_block(folder, blocks, number, num_ranges, window_words) for number in mine]
    rows, spans, counts, shares = map(np.concatenate, zip(_NOTHING, *parts, strict=True))
    pairs = pa.StructArray.from_arrays([spans[:, 0], spans[:, 1]], fields=list(CUTS.value_type))
    cuts = pa.ListArray.from_arrays(np.cumsum([0, *counts], dtype=np.int32), pairs)
    write_labels(shard, SubstringStage, rows, {"cuts": cuts, "cut_share": shares})


def _cut_block(
    folder: Path, blocks: Sequence[str], block: int, num_ranges: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows of a block's documents, the spans of all, how many each has, and the share
    of each text that they cover."""
    documents = read_columns(_block_file(folder, blocks[block], "documents"))
    rows, ends = documents["row"], documents["end"]
    text = read_columns(_block_file(folder, blocks[block], "text"))["text"]
    offsets = np.concatenate([[0], ends])
    place, _, source_block, source = read_copies(folder, num_ranges, block).values()
    starts, stops, first = find_words(text, offsets)
    words = np.searchsorted(starts, place)
    # A source that comes later in the block is in a better document.
    apart = (source_block != block) | (source > place)
    apart |= source + stops[words + size - 1] - place <= place
    words = words[apart]
    # A number is left out between documents, so that no two windows of different ones touch.
    words += np.searchsorted(first, words, "right") - 1
    begins, finishes = merge_spans(words, words + size)
    document = np.searchsorted(first + np.arange(len(first)), begins, "right") - 1
    edges = np.stack([starts[begins - document], stops[finishes - 1 - document]], 1)
    spans = (edges - offsets[document, None]).astype(np.int32)
    counts = np.bincount(document, minlength=len(rows))
    lost = np.bincount(document, spans[:, 1] - spans[:, 0], len(rows))
    return rows, spans, counts, np.where(counts > 0, lost / np.maximum(ends - offsets[:-1], 1), 0.0)


def _block_file(folder: Path, name: str, kind: str) -> Path:
    """A file of a block: its `documents`, `text` or `hashes`; or of a shard: how many `windows`
    each of its blocks has."""
    return folder / "blocks" / f"{name}.{kind}"


def find_words(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the words of documents that lie end to end as code points: runs of visible characters,
    in which each letter of a script without spaces is a word of its own, with its marks. Returns
    each word's first character and the one after its last, int64 [words]; each document's first
    word, and the number of words, int64 [documents + 1]."""
    bits = get_code_point_classes()[text]
    opens = np.bincount(offsets, minlength=len(text) + 1)[:-1] > 0  # A document begins.
    space, alone = bits & SPACE > 0, bits & ALONE > 0
    begins = (bits & EXTEND == 0) | opens
    # The last character of the document before this one that is no mark, if there is one.
    anchor = np.maximum.accumulate(np.where(begins, np.arange(len(text)), 0))
    after = np.roll(alone[anchor], 1)
    starts = ~space & (opens | np.roll(space, 1) | (begins & (after | alone)))
    edges = np.append(np.flatnonzero(starts | space | opens), len(text))
    starts = np.flatnonzero(starts)
    return starts, edges[np.searchsorted(edges, starts, "right")], np.searchsorted(starts, offsets)


def hash_windows(
    text: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    document_word_offsets: np.ndarray,
    window_words: int,
    base: int = _BASE,
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes each run of `window_words` words within a document, with the white space between them,
    from what `find_words` found: uint64 [windows], and the word with which each begins, int64
    [windows].

    The hash is a polynomial of the characters: the difference of two sums up to its ends, times a
    power that makes up for where it begins."""
    ends = np.repeat(document_word_offsets[1:], np.diff(document_word_offsets))
    begins = np.flatnonzero(np.arange(len(starts)) + window_words <= ends)
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum((text.astype(np.uint64) + np.uint64(1)) * _list_powers(base, len(text)), out=sums[1:])
    inverse = _list_powers(pow(base, -1, 2**64), len(text))
    start, stop = starts[begins], stops[begins + window_words - 1]
    return mix_bits((sums[stop] - sums[start]) * inverse[start]), begins


def _list_powers(base: int, number: int) -> np.ndarray:
    powers = np.full(number, base, np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers)


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

    label_types: ClassVar[LabelTypes] = {"cuts": CUTS, "cut_share": pa.float64()}
    version: ClassVar[int] = 5
    depends_on_unicode: ClassVar[bool] = True

    def label(self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner) -> None:
        """See `CrossDocumentStage.label`. The scratch files take ten times the text."""
        folder = scratch / f"blocks-{self.memory}"  # A killed run may have had another.
        largest = min(self.memory // _BYTES_OF_CHARACTER, _LARGEST_BLOCK)
        index = partial(write_window_blocks, folder, self.min_tokens, largest, self.keep_by)
        run_jobs(index, shards, "index")
        blocks = list_blocks(folder, shards)
        hashes = [_block_file(folder, block, "hashes") for block in blocks]
        windows = sum(read_batch(file).num_rows for file in hashes)
        number = max(1, -(-windows * _BYTES_OF_WINDOW // self.memory))
        match = partial(write_copies, folder, hashes, number, self.keep_by is not None)
        run_jobs(match, range(number) if blocks else (), "match")
        cut = partial(write_duplicate_spans, folder, blocks, number, self.min_tokens)
        run_jobs(cut, shards, "cut")
