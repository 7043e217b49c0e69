"""Substring deduplication: passages that a corpus has more than once, and which copies
to cut.

A *window* is a run of so many words of one document, from the first character of its
first word to the last of its last, white space between included; two windows are equal
if their characters are. The words of a corpus have a total order: better documents
first, those as good in the order of the corpus, and within a document from left to
right. The rule:

    A word is cut if it lies in a window whose characters occur earlier, without
    overlap.

Every repeat of at least as many words is a chain of repeated windows, so what is cut is
all but the first copy of each repeat. What follows from the rule, whatever is nested,
chained or periodic:

- Nothing else is cut: each word cut is part of a run of as many words that occurs
  earlier.
- All of it is cut: of a window that occurs earlier, no word is kept.
- Nothing is lost: the word at the same place of the earlier window comes earlier in the
  order, so going from copy to copy ends, at a word that is kept. A window that overlaps
  each earlier copy of itself is no copy (in "ha ha ha ..." the first windows stay), so
  a word is never its own source. If no part of the first copy is itself in a repeat
  that began elsewhere, it stays in one piece.

Which document keeps a passage depends on rules, too. So beside `cuts`, as if every rule
kept every document, the stage lists in `repeats` where each repeated window came first;
what is cut of the documents that rules keep is settled from that
(`maxlm.corpus.settling`).

Hashes of windows take the place of a suffix array (Lee et al. 2022, arXiv 2107.06499):
sorting one of 128 bits a word gives the same groups as sorting a suffix a character, in
a fraction of the time, and hashes of parts are merged by ranges without their texts.

Three passes over files in a folder, none of which holds more than a block of text or a
range of hashes: `write_window_blocks` sorts the windows of each block; `write_copies`
finds the first occurrence of each window that comes several times, for one range of
hashes; `write_duplicate_spans` takes the union of a document's copies. A window's place
is the index in its block of the word that it begins with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.corpus.cuts import CUTS, merge_spans
from maxlm.corpus.dedup.columns import read_batch, read_columns, write_columns
from maxlm.corpus.dedup.copies import read_copies, write_copies
from maxlm.corpus.dedup.members import (
    compute_document_offsets,
    compute_keep_scores,
    write_labels,
)
from maxlm.corpus.dedup.minhash import mix_bits
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CrossDocumentStage, JobRunner, LabelTypes, Verdicts
from maxlm.corpus.text import ALONE, EXTEND, SPACE, get_code_point_classes
from maxlm.data.batching import batch_by_size

_BYTES_OF_CHARACTER = 64  # Of its block, in an index job.
_BYTES_OF_WINDOW = 80  # In a range job.
# Bases of the two hashes of a window: odd, and so invertible modulo 2^64.
_BASE, _CHECK_BASE = 0x9FB21C651E98DF25, 0xD6E8FEB86659FD93
_LARGEST_BLOCK = (
    2**31
)  # Places in a block are uint32, and no document is longer than this.

REPEATS = pa.list_(
    pa.struct(
        [
            ("word", pa.int32()),
            ("windows", pa.int32()),
            ("document", pa.int64()),
            ("source_word", pa.int32()),
        ]
    )
)
"""Runs of repeated windows of a document, one after the other: the word with which the
first one begins, how many there are, and where the corpus has them first (that may be
here): the document's number in the corpus, and the word there."""
LAYOUT = pa.list_(pa.int32())
"""The lengths, in characters, of a text's white space and words by turns, white space
first and last. Only of texts with repeats."""


def write_window_blocks(
    folder: Path,
    window_words: int,
    block_characters: int,
    keep_by: str | None,
    shard: StageShardView,
) -> None:
    """Writes a shard's blocks of so many characters, or of a document:
    FOLDER/blocks/SHARD-N.*

    - text, and for each document its row, the character of text where it ends, and its
      first word
    - for each window its hashes, sorted, the word with which it begins, and its
      document's rank, if ranks differ
    """
    done = _block_file(folder, shard.name, "windows")
    if done.exists():
        return
    windows = []
    documents = _read_code_points(shard, keep_by)
    blocks = batch_by_size(
        documents, lambda document: len(document[0]), block_characters
    )
    for number, block in enumerate(blocks):
        name = f"{shard.name}-{number}"
        texts, rows, ranks = zip(*block, strict=True)
        text = np.concatenate(texts)
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        starts, stops, first = find_words(text, offsets)
        columns = {"row": np.array(rows), "end": offsets[1:], "first_word": first[:-1]}
        write_columns(_block_file(folder, name, "documents"), columns)
        write_columns(_block_file(folder, name, "text"), {"text": text})
        hashes, begins = hash_windows(text, starts, stops, first, window_words)
        order = np.argsort(hashes, kind="stable")
        columns = {"hash": hashes[order], "place": begins[order].astype(np.uint32)}
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
        encoded = (
            text.as_py().encode("utf-32-le") for text in group.batch.column("text")
        )
        texts = (np.frombuffer(text, np.uint32) for text in encoded)
        rows = (group.row_indices + group.first_row).tolist()
        yield from zip(
            texts, rows, compute_keep_scores(group.batch, keep_by).tolist(), strict=True
        )


def list_blocks(folder: Path, shards: Sequence[StageShardView]) -> list[str]:
    """Lists the names of the blocks of all shards, in order."""
    return [
        f"{shard.name}-{number}"
        for shard in shards
        for number in range(
            read_batch(_block_file(folder, shard.name, "windows")).num_rows
        )
    ]


@dataclass(frozen=True)
class _BlockLabels:
    """The labels of a block's documents."""

    rows: np.ndarray
    """Rows within the shard: int64 [documents]."""
    cuts: pa.ListArray
    cut_share: np.ndarray
    repeats: pa.ListArray
    layout: pa.ListArray


def write_duplicate_spans(
    folder: Path,
    blocks: Sequence[str],
    num_ranges: int,
    window_words: int,
    part: tuple[StageShardView, dict[str, int]],
) -> None:
    """Writes the labels of a shard's documents. `part`: the shard, and for every shard
    the number of its first document in the corpus, by the shard's name."""
    shard, document_offsets = part
    labels = [
        _label_block(folder, blocks, number, num_ranges, window_words, document_offsets)
        for number, block in enumerate(blocks)
        if _get_shard_name(block) == shard.name
    ]
    rows = np.concatenate([np.empty(0, np.int64), *(block.rows for block in labels)])
    shares = np.concatenate([np.empty(0), *(block.cut_share for block in labels)])
    columns = {
        "cuts": pa.concat_arrays(
            [pa.array([], CUTS), *(block.cuts for block in labels)]
        ),
        "cut_share": shares,
        "repeats": pa.concat_arrays(
            [pa.array([], REPEATS), *(block.repeats for block in labels)]
        ),
        "layout": pa.concat_arrays(
            [pa.array([], LAYOUT), *(block.layout for block in labels)]
        ),
    }
    write_labels(shard, SubstringStage, rows, columns)


def _get_shard_name(block: str) -> str:
    return block.rpartition("-")[0]


def _label_block(
    folder: Path,
    blocks: Sequence[str],
    block: int,
    num_ranges: int,
    size: int,
    document_offsets: Mapping[str, int],
) -> _BlockLabels:
    """Labels the documents of a block, whose number `block` is, from the copies of its
    windows of `size` words."""
    documents = read_columns(_block_file(folder, blocks[block], "documents"))
    ends = documents["end"]
    text = read_columns(_block_file(folder, blocks[block], "text"))["text"]
    offsets = np.concatenate([[0], ends])
    starts, stops, first = find_words(text, offsets)
    copies = read_copies(folder, num_ranges, block)
    word, source_block, source = (
        copies[name] for name in ("place", "source_file", "source_place")
    )

    # A source that comes later in the block is in a better document.
    is_cut = (source_block != block) | (source > word) | (source + size <= word)
    # A number is left out between documents, so that no two windows of different ones
    # touch.
    spaced = word[is_cut] + np.searchsorted(first, word[is_cut], "right") - 1
    begins, finishes = merge_spans(spaced, spaced + size)
    document = np.searchsorted(first + np.arange(len(first)), begins, "right") - 1
    edges = np.stack([starts[begins - document], stops[finishes - 1 - document]], 1)
    spans = (edges - offsets[document, None]).astype(np.int32)
    cut_characters = np.bincount(document, spans[:, 1] - spans[:, 0], len(ends))
    cuts = _make_list_array(
        np.bincount(document, minlength=len(ends)), CUTS, [spans[:, 0], spans[:, 1]]
    )

    follows = (
        (np.diff(word) == 1) & (np.diff(source) == 1) & (np.diff(source_block) == 0)
    )
    document = np.searchsorted(first, word, "right") - 1
    follows &= np.diff(document) == 0
    run = np.flatnonzero(np.append(True, ~follows)[: len(word)])
    lengths = np.diff(run, append=len(word))
    source_document, source_word = _find_documents(
        folder, blocks, source_block[run], source[run], document_offsets
    )
    repeats = _make_list_array(
        np.bincount(document[run], minlength=len(ends)),
        REPEATS,
        [word[run] - first[document[run]], lengths, source_document, source_word],
    )

    has_repeats = np.bincount(document, minlength=len(ends)) > 0
    layouts = [
        _make_layout(starts[a:b] - begin, stops[a:b] - begin, end - begin)
        if repeated
        else []
        for a, b, begin, end, repeated in zip(
            first[:-1], first[1:], offsets[:-1], ends, has_repeats, strict=True
        )
    ]
    shares = cut_characters / np.maximum(ends - offsets[:-1], 1)
    return _BlockLabels(
        rows=documents["row"],
        cuts=cuts,
        cut_share=shares,
        repeats=repeats,
        layout=pa.array(layouts, LAYOUT),
    )


def _make_list_array(
    counts: np.ndarray, type_: pa.ListType, fields: Sequence[np.ndarray]
) -> pa.ListArray:
    """Makes a column of lists of structures, of which row i has counts[i]."""
    types = list(type_.value_type)
    arrays = [
        pa.array(values, field.type)
        for values, field in zip(fields, types, strict=True)
    ]
    structures = pa.StructArray.from_arrays(arrays, fields=types)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), structures, type=type_)


def _make_layout(starts: np.ndarray, stops: np.ndarray, length: int) -> np.ndarray:
    """Makes the layout of a text from its words' first characters and those after their
    last."""
    edges = np.stack([starts, stops], 1).ravel()
    return np.diff(edges, prepend=0, append=length).astype(np.int32)


def _find_documents(
    folder: Path,
    blocks: Sequence[str],
    block: np.ndarray,
    word: np.ndarray,
    document_offsets: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the documents, numbered over the corpus, in which words of blocks lie, and
    the words' numbers in them: int64 [words] both."""
    documents = np.empty(len(block), np.int64)
    words = np.empty(len(block), np.int64)
    for number, name in enumerate(blocks):
        here = np.flatnonzero(block == number)
        if len(here) == 0:
            continue
        columns = read_columns(_block_file(folder, name, "documents"))
        first_word = columns["first_word"]
        # The last document that begins with this word or before: those before it may be
        # empty.
        index = np.searchsorted(first_word, word[here], "right") - 1
        offset = document_offsets[_get_shard_name(name)]
        documents[here] = columns["row"][index] + offset
        words[here] = word[here] - first_word[index]
    return documents, words


def _block_file(folder: Path, name: str, kind: str) -> Path:
    """A file of a block: its `documents`, `text` or `hashes`; or of a shard: how many
    `windows` each of its blocks has."""
    return folder / "blocks" / f"{name}.{kind}"


def find_words(
    text: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the words of documents that lie end to end as code points: runs of visible
    characters, in which each letter of a script without spaces is a word of its own,
    with its marks. Returns each word's first character and the one after its last,
    int64 [words]; each document's first word, and the number of words, int64 [documents
    + 1]."""
    bits = get_code_point_classes()[text]
    opens = np.bincount(offsets, minlength=len(text) + 1)[:-1] > 0  # A document begins.
    space, alone = bits & SPACE > 0, bits & ALONE > 0
    begins = (bits & EXTEND == 0) | opens
    # The last character of the document before this one that is no mark, if there is
    # one.
    anchor = np.maximum.accumulate(np.where(begins, np.arange(len(text)), 0))
    after = np.roll(alone[anchor], 1)
    starts = ~space & (opens | np.roll(space, 1) | (begins & (after | alone)))
    edges = np.append(np.flatnonzero(starts | space | opens), len(text))
    starts = np.flatnonzero(starts)
    return (
        starts,
        edges[np.searchsorted(edges, starts, "right")],
        np.searchsorted(starts, offsets),
    )


def hash_windows(
    text: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    document_word_offsets: np.ndarray,
    window_words: int,
    base: int = _BASE,
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes each run of `window_words` words within a document, with the white space
    between them, from what `find_words` found: uint64 [windows], and the word with
    which each begins, int64 [windows].

    The hash is a polynomial of the characters: the difference of two sums up to its
    ends, times a power that makes up for where it begins."""
    ends = np.repeat(document_word_offsets[1:], np.diff(document_word_offsets))
    begins = np.flatnonzero(np.arange(len(starts)) + window_words <= ends)
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(
        (text.astype(np.uint64) + np.uint64(1)) * _list_powers(base, len(text)),
        out=sums[1:],
    )
    inverse = _list_powers(pow(base, -1, 2**64), len(text))
    start, stop = starts[begins], stops[begins + window_words - 1]
    return mix_bits((sums[stop] - sums[start]) * inverse[start]), begins


def _list_powers(base: int, number: int) -> np.ndarray:
    powers = np.full(number, base, np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers)


class SubstringStage(CrossDocumentStage):
    """Passages of at least `min_tokens` words that stand elsewhere too, within a
    document or in another, become spans to cut; the first copy stays (Lee et al. 2022,
    arXiv 2107.06499).

    A word is what white space separates, and in scripts without spaces each letter with
    its marks (see `maxlm.corpus.text`), so spans begin and end between words; passages
    are the same if their characters are, white space included. The module states the
    rule and its guarantees. No document is split, so one of more characters than
    `memory` / 64 takes more.
    """

    stage: Literal["substring"] = "substring"
    min_tokens: int = Field(default=50, ge=2)
    """The shortest repeat to be cut, in words; shorter ones (set phrases, addresses)
    stay. 50 words of English are about 65 tokens of byte-pair encoding, of which the
    paper takes 50."""

    label_types: ClassVar[LabelTypes] = {
        "cuts": CUTS,
        "cut_share": pa.float64(),
        "repeats": REPEATS,
        "layout": LAYOUT,
    }
    verdicts: ClassVar[Verdicts] = {"cuts": (), "cut_share": 0.0}
    internal_labels: ClassVar[tuple[str, ...]] = ("repeats", "layout")
    version: ClassVar[int] = 6
    depends_on_unicode: ClassVar[bool] = True

    def label(
        self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner
    ) -> None:
        """See `CrossDocumentStage.label`. The scratch files take ten times the text."""
        folder = scratch / f"blocks-{self.memory}"  # A killed run may have had another.
        largest = min(self.memory // _BYTES_OF_CHARACTER, _LARGEST_BLOCK)
        index = partial(
            write_window_blocks, folder, self.min_tokens, largest, self.keep_by
        )
        run_jobs(index, shards, "index")
        blocks = list_blocks(folder, shards)
        hashes = [_block_file(folder, block, "hashes") for block in blocks]
        windows = sum(read_batch(file).num_rows for file in hashes)
        number = max(1, -(-windows * _BYTES_OF_WINDOW // self.memory))
        match = partial(write_copies, folder, hashes, number, self.keep_by is not None)
        run_jobs(match, range(number) if blocks else (), "match")
        cut = partial(write_duplicate_spans, folder, blocks, number, self.min_tokens)
        offsets = compute_document_offsets(shards)[:-1]
        by_name = {
            shard.name: offset for shard, offset in zip(shards, offsets, strict=True)
        }
        run_jobs(cut, [(shard, by_name) for shard in shards], "cut")
