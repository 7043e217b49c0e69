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
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.corpus.cuts import CUTS, merge_spans
from maxlm.corpus.dedup.columns import (
    count_ranges,
    map_columns,
    read_columns,
    write_columns,
)
from maxlm.corpus.dedup.copies import Copies, read_copies, write_copies
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

# Bytes that a job needs: for each character of the block that it indexes, and for each
# window of the range that it groups.
_CHARACTER_BYTES = 64
_WINDOW_BYTES = 80
# Bases of the two hashes of a window: odd, and so invertible modulo 2^64.
_BASE = 0x9FB21C651E98DF25
_CHECK_BASE = 0xD6E8FEB86659FD93
# Places in a block are uint32, and no document is longer than this.
_LARGEST_BLOCK = 2**31

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


class WordEdges(NamedTuple):
    """Where the words of documents lie that stand end to end."""

    starts: np.ndarray
    """Each word's first character: int64 [words]."""
    stops: np.ndarray
    """The character after each word's last: int64 [words]."""
    document_offsets: np.ndarray
    """Each document's first word, and the number of words: int64 [documents + 1]."""

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    def find_documents(self, words: np.ndarray) -> np.ndarray:
        """Finds the document of each word: int64 [words]."""
        return np.searchsorted(self.document_offsets, words, "right") - 1


@dataclass(frozen=True)
class _Document:
    """A document of a shard."""

    text: np.ndarray
    """Its code points: uint32."""
    row: int
    """Its row within the shard."""
    rank: float


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
    done = _get_block_path(folder, shard.name, "windows")
    if done.exists():
        return
    num_windows = []
    blocks = batch_by_size(
        _read_documents(shard, keep_by),
        lambda document: len(document.text),
        block_characters,
    )
    for number, documents in enumerate(blocks):
        name = f"{shard.name}-{number}"
        num_windows.append(
            _write_block(
                folder, name, documents, window_words, has_ranks=keep_by is not None
            )
        )
    write_columns(done, {"windows": np.array(num_windows, np.int64)})


def _write_block(
    folder: Path,
    name: str,
    documents: Sequence[_Document],
    window_words: int,
    has_ranks: bool,
) -> int:
    """Writes the files of a block of documents; returns its number of windows."""
    texts = [document.text for document in documents]
    text = np.concatenate(texts)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    words = find_words(text, offsets)
    document_columns = {
        "row": np.array([document.row for document in documents]),
        "end": offsets[1:],
        "first_word": words.document_offsets[:-1],
    }
    write_columns(_get_block_path(folder, name, "documents"), document_columns)
    write_columns(_get_block_path(folder, name, "text"), {"text": text})

    hashes, first_words = hash_windows(text, words, window_words)
    checks, _ = hash_windows(text, words, window_words, _CHECK_BASE)
    order = np.argsort(hashes, kind="stable")
    window_columns = {
        "hash": hashes[order],
        "place": first_words[order].astype(np.uint32),
        "check": checks[order],
    }
    if has_ranks:
        ranks = np.array([document.rank for document in documents])
        document_of_window = words.find_documents(first_words[order])
        window_columns["rank"] = ranks[document_of_window]
    write_columns(_get_block_path(folder, name, "hashes"), window_columns)
    return len(hashes)


def _read_documents(shard: StageShardView, keep_by: str | None) -> Iterator[_Document]:
    """Yields the documents of a shard."""
    columns = ["text"]
    if keep_by is not None:
        columns.append(keep_by.removeprefix("-"))
    for group in shard.read_selected_rows(columns):
        texts = group.batch.column("text")
        rows = (group.row_indices + group.first_row).tolist()
        ranks = compute_keep_scores(group.batch, keep_by).tolist()
        for text, row, rank in zip(texts, rows, ranks, strict=True):
            yield _Document(convert_to_code_points(text.as_py()), row, rank)


def convert_to_code_points(text: str) -> np.ndarray:
    """Returns the code points of a text: uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def list_blocks(folder: Path, shards: Sequence[StageShardView]) -> list[str]:
    """Lists the names of the blocks of all shards, in order."""
    names = []
    for shard in shards:
        path = _get_block_path(folder, shard.name, "windows")
        for number in range(map_columns(path).num_rows):
            names.append(f"{shard.name}-{number}")
    return names


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
    rows = [np.empty(0, np.int64)]
    cuts = [pa.array([], CUTS)]
    shares = [np.empty(0)]
    repeats = [pa.array([], REPEATS)]
    layouts = [pa.array([], LAYOUT)]
    for number, name in enumerate(blocks):
        if _get_shard_name(name) != shard.name:
            continue
        block = _label_block(
            folder, blocks, number, num_ranges, window_words, document_offsets
        )
        rows.append(block.rows)
        cuts.append(block.cuts)
        shares.append(block.cut_share)
        repeats.append(block.repeats)
        layouts.append(block.layout)
    labels = {
        "cuts": pa.concat_arrays(cuts),
        "cut_share": np.concatenate(shares),
        "repeats": pa.concat_arrays(repeats),
        "layout": pa.concat_arrays(layouts),
    }
    write_labels(shard, SubstringStage, np.concatenate(rows), labels)


def _get_shard_name(block: str) -> str:
    return block.rpartition("-")[0]


def _label_block(
    folder: Path,
    blocks: Sequence[str],
    block: int,
    num_ranges: int,
    window_words: int,
    document_offsets: Mapping[str, int],
) -> _BlockLabels:
    """Labels the documents of a block, whose number `block` is, from the copies of its
    windows."""
    name = blocks[block]
    documents = read_columns(_get_block_path(folder, name, "documents"))
    text = read_columns(_get_block_path(folder, name, "text"))["text"]
    text_offsets = np.concatenate([[0], documents["end"]])
    words = find_words(text, text_offsets)
    copies = read_copies(folder, num_ranges, block)

    # What is cut. A source that comes later in the block is in a better document. One
    # that overlaps its copy is none: see the rule above.
    is_elsewhere = copies.source_file != block
    is_later = copies.source_place > copies.place
    is_apart = copies.source_place + window_words <= copies.place
    is_cut = is_elsewhere | is_later | is_apart
    cut_starts = copies.place[is_cut]
    cuts, num_cut = _list_cuts(words, text_offsets, cut_starts, window_words)
    num_characters = np.diff(text_offsets)

    # Runs of repeated windows, cut or not, from which verdicts are settled.
    run_starts, run_lengths = _find_runs(words, copies)
    run_words = copies.place[run_starts]
    run_documents = words.find_documents(run_words)
    source_documents, source_words = _find_documents(
        folder,
        blocks,
        copies.source_file[run_starts],
        copies.source_place[run_starts],
        document_offsets,
    )
    num_runs = np.bincount(run_documents, minlength=words.num_documents)
    repeats = _make_list_array(
        num_runs,
        REPEATS,
        [
            run_words - words.document_offsets[run_documents],
            run_lengths,
            source_documents,
            source_words,
        ],
    )
    return _BlockLabels(
        rows=documents["row"],
        cuts=cuts,
        cut_share=num_cut / np.maximum(num_characters, 1),
        repeats=repeats,
        layout=_make_layouts(words, text_offsets, has_repeats=num_runs > 0),
    )


def _list_cuts(
    words: WordEdges,
    text_offsets: np.ndarray,
    window_starts: np.ndarray,
    window_words: int,
) -> tuple[pa.ListArray, np.ndarray]:
    """Returns the union of windows as spans of each document's characters, and how many
    characters of each document they hold: float64 [documents].

    Args:
        text_offsets: the first character of each document, and the number of all.
        window_starts: the word with which each window begins, rising.
    """
    # Spaced numbers of words leave one out between documents, so that no two windows of
    # different documents touch, and would be merged.
    spaced_starts = window_starts + words.find_documents(window_starts)
    span_starts, span_stops = merge_spans(spaced_starts, spaced_starts + window_words)

    # Back to words, and to characters of each span's document.
    spaced_offsets = words.document_offsets + np.arange(len(words.document_offsets))
    document = np.searchsorted(spaced_offsets, span_starts, "right") - 1
    first_word = span_starts - document
    last_word = span_stops - 1 - document
    starts = (words.starts[first_word] - text_offsets[document]).astype(np.int32)
    ends = (words.stops[last_word] - text_offsets[document]).astype(np.int32)
    num_spans = np.bincount(document, minlength=words.num_documents)
    num_characters = np.bincount(document, ends - starts, words.num_documents)
    return _make_list_array(num_spans, CUTS, [starts, ends]), num_characters


def _find_runs(words: WordEdges, copies: Copies) -> tuple[np.ndarray, np.ndarray]:
    """Finds the runs of repeated windows of a document, one after the other, whose
    sources are so too. Returns the index of each run's first window among `copies`, and
    its number of windows: int64 [runs]."""
    document = words.find_documents(copies.place)
    follows = (
        (np.diff(copies.place) == 1)
        & (np.diff(copies.source_place) == 1)
        & (np.diff(copies.source_file) == 0)
        & (np.diff(document) == 0)
    )
    is_start = np.append(True, ~follows)[: len(copies.place)]  # Of no windows none.
    run_starts = np.flatnonzero(is_start)
    return run_starts, np.diff(run_starts, append=len(copies.place))


def _make_list_array(
    counts: np.ndarray, type_: pa.ListType, columns: Sequence[np.ndarray]
) -> pa.ListArray:
    """Makes a column of lists of structures, of which row i has counts[i]. `columns`:
    the values of each field of the structures, those of all rows end to end."""
    fields = list(type_.value_type)
    arrays = [
        pa.array(values, field.type)
        for values, field in zip(columns, fields, strict=True)
    ]
    structures = pa.StructArray.from_arrays(arrays, fields=fields)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), structures, type=type_)


def _make_layouts(
    words: WordEdges, text_offsets: np.ndarray, has_repeats: np.ndarray
) -> pa.ListArray:
    """Makes the layouts of documents; empty ones of those without repeats.

    Args:
        text_offsets: the first character of each document, and the number of all.
        has_repeats: which documents have some: bool [documents].
    """
    edges = np.stack([words.starts, words.stops], axis=1)
    layouts = []
    for document in range(words.num_documents):
        if not has_repeats[document]:
            layouts.append([])
            continue
        first_word, stop_word = words.document_offsets[document : document + 2]
        begin, end = text_offsets[document : document + 2]
        # From edge to edge are the lengths of white space and words by turns.
        document_edges = edges[first_word:stop_word].ravel() - begin
        lengths = np.diff(document_edges, prepend=0, append=end - begin)
        layouts.append(lengths.astype(np.int32))
    return pa.array(layouts, LAYOUT)


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
        in_block = np.flatnonzero(block == number)
        if len(in_block) == 0:
            continue
        columns = read_columns(_get_block_path(folder, name, "documents"))
        first_words = columns["first_word"]
        # The last document that begins with this word or before: those before it may be
        # empty.
        index = np.searchsorted(first_words, word[in_block], "right") - 1
        offset = document_offsets[_get_shard_name(name)]
        documents[in_block] = columns["row"][index] + offset
        words[in_block] = word[in_block] - first_words[index]
    return documents, words


def _get_block_path(folder: Path, name: str, kind: str) -> Path:
    """Returns a file of a block: its `documents`, `text` or `hashes`; or of a shard:
    how many `windows` each of its blocks has."""
    return folder / "blocks" / f"{name}.{kind}"


def find_words(text: np.ndarray, offsets: np.ndarray) -> WordEdges:
    """Finds the words of documents that stand end to end as code points: runs of
    visible characters, in which each letter of a script without spaces is a word of its
    own, with its marks. `offsets`: each document's first character, and the number of
    all: int64 [documents + 1]."""
    # All bool [characters], but for `base`.
    classes = get_code_point_classes()[text]
    is_space = classes & SPACE > 0
    is_alone = classes & ALONE > 0
    is_mark = classes & EXTEND > 0
    opens_document = np.bincount(offsets, minlength=len(text) + 1)[:-1] > 0
    # A mark belongs to its base: the last character of the document before it that is
    # none, if there is one.
    is_base = ~is_mark | opens_document
    base = np.maximum.accumulate(np.where(is_base, np.arange(len(text)), 0))

    # A word opens with a document, after white space, and with each letter that is a
    # word of its own and behind it. Each of these two says of the character before;
    # that of the first one is of no account, since it opens a document.
    follows_alone = np.roll(is_alone[base], 1)
    follows_space = np.roll(is_space, 1)
    opens_word = opens_document | follows_space
    opens_word |= is_base & (follows_alone | is_alone)
    is_start = ~is_space & opens_word
    # A word ends where another one, white space or a document begins.
    edges = np.append(np.flatnonzero(is_start | is_space | opens_document), len(text))
    starts = np.flatnonzero(is_start)
    return WordEdges(
        starts=starts,
        stops=edges[np.searchsorted(edges, starts, "right")],
        document_offsets=np.searchsorted(starts, offsets),
    )


def hash_windows(
    text: np.ndarray, words: WordEdges, window_words: int, base: int = _BASE
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes each run of `window_words` words within a document, with the white space
    between them: uint64 [windows], and the word with which each begins, int64
    [windows].

    The hash is a polynomial of the characters: the difference of two sums up to its
    ends, times a power that makes up for where it begins."""
    # Words with which a window begins that ends in the same document.
    words_per_document = np.diff(words.document_offsets)
    stop_word = np.repeat(words.document_offsets[1:], words_per_document)
    window_stop = np.arange(len(words.starts)) + window_words
    first_words = np.flatnonzero(window_stop <= stop_word)

    # All modulo 2^64: sum i is that of (code point + 1) * base^j over the characters j
    # before i.
    coefficients = text.astype(np.uint64) + np.uint64(1)
    terms = coefficients * _list_powers(base, len(text))
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(terms, out=sums[1:])
    inverse_powers = _list_powers(pow(base, -1, 2**64), len(text))

    # A window's own sum is base^start times that which the same text has elsewhere.
    start = words.starts[first_words]
    stop = words.stops[first_words + window_words - 1]
    window_sums = sums[stop] - sums[start]
    return mix_bits(window_sums * inverse_powers[start]), first_words


def _list_powers(base: int, number: int) -> np.ndarray:
    """Lists base^0, base^1, ... modulo 2^64: uint64 [number]."""
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
        block_characters = min(self.memory // _CHARACTER_BYTES, _LARGEST_BLOCK)
        index = partial(
            write_window_blocks,
            folder,
            self.min_tokens,
            block_characters,
            self.keep_by,
        )
        run_jobs(index, shards, "index")

        blocks = list_blocks(folder, shards)
        hashes = [_get_block_path(folder, block, "hashes") for block in blocks]
        num_windows = sum(map_columns(path).num_rows for path in hashes)
        num_ranges = count_ranges(num_windows, _WINDOW_BYTES, self.memory)
        has_ranks = self.keep_by is not None
        match = partial(write_copies, folder, hashes, num_ranges, has_ranks=has_ranks)
        run_jobs(match, range(num_ranges) if blocks else (), "match")

        cut = partial(
            write_duplicate_spans, folder, blocks, num_ranges, self.min_tokens
        )
        document_offsets = {}
        for shard, offset in zip(
            shards, compute_document_offsets(shards)[:-1], strict=True
        ):
            document_offsets[shard.name] = offset
        run_jobs(cut, [(shard, document_offsets) for shard in shards], "cut")
