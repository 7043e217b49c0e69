"""Decontamination: documents that hold n-grams of items of evaluation sets."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypedDict

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.cuts import CUTS, merge_spans
from maxlm.corpus.dedup.columns import mark_run_starts
from maxlm.corpus.dedup.minhash import hash_shingles, hash_words, mix_bits
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import LabelTypes, PerDocumentStage, RowLabelFn, RowLabels
from maxlm.corpus.text import WORD
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.files import find_files
from maxlm.data.documents.reader import read_documents


@dataclass(frozen=True)
class NgramIndex:
    """The n-grams of evaluation sets, and the items that each belongs to."""

    hashes: np.ndarray
    """Hashes of the n-grams of each item, sorted: uint64 [pairs]."""
    item_indices: np.ndarray
    """The item of each: int64 [pairs]."""
    ngrams_per_item: np.ndarray
    """Different n-grams of each item: int64 [items]. 0: it is too short, equal to one
    before it in its set, or all of it is of a template."""
    items: tuple[tuple[str, str], ...]
    """The set and the id of each item."""
    lengths: frozenset[int]
    """Words of the n-grams."""


@dataclass(frozen=True)
class _EvaluationItems:
    """The items of an evaluation set."""

    ids: list[str]
    num_words: np.ndarray
    """The words of each, 0 if it is not looked for: it is too short, or equal to one
    before; int64 [items]."""
    ngrams: np.ndarray
    """The n-grams of all that are looked for, in the order of the texts: uint64
    [places]."""
    item_of_ngram: np.ndarray
    """The item of each: int64 [places]."""


def build_ngram_index(
    sets: Mapping[str, SourceConfig], n: int, min_words: int, max_items_per_ngram: int
) -> NgramIndex:
    """Builds the index of evaluation sets' n-grams.

    Args:
        n: words in an n-gram. An item of fewer words is looked for as a whole,
        min_words: if it has this many; else it is left out.
        max_items_per_ngram: n-grams of more different items of a set are left out, as
            text of a template, if they are not of a long passage; see
            `_mark_specific_ngrams`.
    """
    ngrams = []
    item_of_ngram = []
    set_and_ids = []
    lengths = set[int]()
    for name, source in sets.items():
        items = _read_items(source, n, min_words)
        is_specific = _mark_specific_ngrams(items, n, max_items_per_ngram)
        if not is_specific.any():
            if items.num_words.any():
                message = (
                    f'all text of evaluation set "{name}" is common to more than '
                    f"{max_items_per_ngram} items"
                )
            else:
                message = (
                    f'evaluation set "{name}" has no text of {min_words} words or more '
                    "to look for"
                )
            fix = "check its files and text_field, lower shortest, or raise max_items"
            raise MaxlmError(message, fix=fix)
        num_words = items.num_words[items.num_words > 0]
        lengths.update(np.minimum(num_words, n).tolist())
        ngrams.append(items.ngrams[is_specific])
        item_of_ngram.append(items.item_of_ngram[is_specific] + len(set_and_ids))
        set_and_ids += [(name, item_id) for item_id in items.ids]
    hashes, item_indices = _sort_pairs(
        np.concatenate(ngrams), np.concatenate(item_of_ngram)
    )
    return NgramIndex(
        hashes=hashes,
        item_indices=item_indices,
        ngrams_per_item=np.bincount(item_indices, minlength=len(set_and_ids)),
        items=tuple(set_and_ids),
        lengths=frozenset(lengths),
    )


def _read_items(source: SourceConfig, n: int, min_words: int) -> _EvaluationItems:
    """Reads the items of a set."""
    ids = []
    num_words = []
    ngrams = [np.empty(0, np.uint64)]
    item_of_ngram = [np.empty(0, np.int64)]
    seen = set()
    for document in read_documents(source):
        words = hash_words(document.text.decode("utf-8", "replace"))
        item_ngrams = hash_shingles(words, n)
        content = hashlib.sha256(np.unique(item_ngrams).tobytes()).digest()
        if len(words) >= min_words and content not in seen:
            seen.add(content)
            ngrams.append(item_ngrams)
            item_of_ngram.append(np.full(len(item_ngrams), len(ids), np.int64))
            num_words.append(len(words))
        else:
            num_words.append(0)
        ids.append(document.id)
    return _EvaluationItems(
        ids=ids,
        num_words=np.array(num_words, np.int64),
        ngrams=np.concatenate(ngrams),
        item_of_ngram=np.concatenate(item_of_ngram),
    )


def _mark_specific_ngrams(
    items: _EvaluationItems, n: int, max_items: int
) -> np.ndarray:
    """Marks the n-grams of items that are not of a template: bool [places].

    An n-gram of more than `max_items` items is of a template, unless it is of a passage
    that several items quote, such as a text with many questions: 2 n words or more in a
    row that the same items share, at most half of all. What most items share is how
    they are asked.
    """
    # Different n-grams, and how many items have each: [ngrams]. Those of n-gram i are
    # item_of_ngram[starts[i] : starts[i + 1]].
    ngrams, item_of_ngram = _sort_pairs(items.ngrams, items.item_of_ngram)
    starts = np.flatnonzero(mark_run_starts(ngrams))
    num_items = np.diff(starts, append=len(ngrams))
    # One number for a set of items. Two sets have the same by chance only.
    item_hashes = mix_bits(item_of_ngram.astype(np.uint64) + np.uint64(1))
    item_sets = item_hashes
    if len(ngrams):
        item_sets = np.add.reduceat(item_hashes, starts)

    # Of each place the number of its n-gram: [places]. A run is places of an item, one
    # after the other, whose n-grams the same items share.
    number = np.searchsorted(ngrams[starts], items.ngrams)
    opens_run = mark_run_starts(item_sets[number])
    opens_run |= mark_run_starts(items.item_of_ngram)
    run = np.cumsum(opens_run) - 1
    run_ngrams = np.bincount(run)[run]
    run_words = run_ngrams + n - 1
    is_long = run_words >= 2 * n

    is_of_passage = np.zeros(len(starts), np.bool_)
    is_of_passage[number[is_long]] = True
    num_searched_items = np.count_nonzero(items.num_words)
    is_quoted = 2 * num_items <= num_searched_items
    is_specific = (num_items <= max_items) | (is_of_passage & is_quoted)
    return is_specific[number]


def _sort_pairs(ngrams: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each n-gram of each item once, sorted by n-gram, then item."""
    order = np.lexsort((items, ngrams))
    ngrams = ngrams[order]
    items = items[order]
    is_first = mark_run_starts(ngrams) | mark_run_starts(items)
    return ngrams[is_first], items[is_first]


def find_ngrams(index: NgramIndex, text: str) -> np.ndarray:
    """Finds every n-gram of the index in a text. Returns int64 [matches, 3]: the first
    of it in `index.hashes`, its first character and the one after its last."""
    words = hash_words(text)
    word_spans = [word.span() for word in WORD.finditer(text)]
    spans = np.array(word_spans, np.int64).reshape(-1, 2)
    matches = [np.empty((0, 3), np.int64)]
    for n in sorted(index.lengths):
        if n > len(words):
            continue
        ngrams = hash_shingles(words, n)
        # An n-gram past the last of the index wraps around to its first, which is not
        # equal to it.
        position = np.searchsorted(index.hashes, ngrams) % len(index.hashes)
        first_word = np.flatnonzero(index.hashes[position] == ngrams)
        start = spans[first_word, 0]
        stop = spans[first_word + n - 1, 1]
        matches.append(np.stack([position[first_word], start, stop], 1))
    return np.concatenate(matches)


class DecontaminateStage(PerDocumentStage):
    """Labels documents that have n-grams of words in common with evaluation sets: by
    default 13, as in "Language Models are Few-Shot Learners" (Brown et al. 2020, arXiv
    2005.14165, appendix C).

    Words are compared without case, accents and punctuation; in scripts without spaces
    each letter is a word (`maxlm.corpus.text`). A shorter item is looked for as a
    whole.
    """

    stage: Literal["decontaminate"] = "decontaminate"
    sets: Mapping[str, SourceConfig] = Field(min_length=1)
    """The evaluation sets by name: files, whose documents are the items. A text file is
    one item; a line of JSONL or a row of Parquet is one, of which `text_field` is
    looked for. A set whose questions and answers are to be found both is named twice,
    with each field."""
    ngram: int = Field(default=13, ge=1, le=100)
    """Words that must agree in a row. Smaller finds rewritten items, and more by
    chance."""
    shortest: int = Field(default=8, ge=1)
    """Items of fewer words than this are not looked for, as they stand everywhere;
    those from here up to `ngram` words are looked for as a whole. (The paper: n between
    8 and 13.)"""
    min_hits: int = Field(default=1, ge=1)
    """Different n-grams of one item that make a document contaminated; items with
    fewer: all."""
    max_items: int = Field(default=10, ge=1)
    """An n-gram that more different items of a set have in common is text of a template
    ("Choose the best answer ...") and is not looked for. Not so in a passage that many
    items quote, as where a text has many questions: 2 * `ngram` words in a row or more
    that the same items share, at most half of the set's. (The paper leaves out n-grams
    of more than 10 documents of the corpus.) Items with the same n-grams count as one,
    the first."""

    label_types: ClassVar[LabelTypes] = {
        "contaminated": pa.bool_(),
        "overlap": pa.float64(),  # the share of the item's n-grams found; 0: no item
        "set": pa.string(),  # of the item with the greatest overlap
        "item": pa.large_string(),  # its id
        "cuts": CUTS,  # characters that the n-grams found cover
    }
    version: ClassVar[int] = 3
    packages: ClassVar[tuple[str, ...]] = ("regex",)
    depends_on_unicode: ClassVar[bool] = True

    def list_input_files(self) -> Iterable[Path]:
        for source in self.sets.values():
            for file in find_files(source).files:
                yield file.path

    def make_row_label_fn(self) -> RowLabelFn:
        min_words = min(self.shortest, self.ngram)
        index = build_ngram_index(self.sets, self.ngram, min_words, self.max_items)

        def label(text: str | None) -> RowLabels:
            matches = find_ngrams(index, text or "")
            if not len(matches):
                return {"contaminated": False, "overlap": 0.0, "cuts": []}
            positions, starts, stops = matches.T
            items, num_hits = _count_hits(index, positions)
            num_ngrams = index.ngrams_per_item[items]
            overlap = num_hits / num_ngrams
            is_enough = num_hits >= np.minimum(self.min_hits, num_ngrams)
            # Of those with enough hits the one with the greatest overlap.
            best = np.lexsort((-num_hits, -overlap, ~is_enough))[0]
            set_name, item_id = index.items[items[best]]
            cut_starts, cut_stops = merge_spans(starts, stops)
            return {
                "contaminated": bool(is_enough[best]),
                "overlap": overlap[best],
                "set": set_name,
                "item": item_id,
                "cuts": [
                    {"start": start, "end": end}
                    for start, end in zip(cut_starts, cut_stops, strict=True)
                ],
            }

        return label


def _count_hits(
    index: NgramIndex, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the items that n-grams belong to, and how many different ones of each
    there are: int64 [items] both. `positions`: as `find_ngrams` returns them."""
    firsts = np.unique(positions)
    stops = np.searchsorted(index.hashes, index.hashes[firsts], "right")
    items = [
        index.item_indices[first:stop]
        for first, stop in zip(firsts, stops, strict=True)
    ]
    return np.unique(np.concatenate(items), return_counts=True)


class ContaminatedItem(TypedDict):
    """An item of an evaluation set that documents have."""

    set: str
    item: str
    """Its id."""
    documents: int
    """Contaminated documents that have more of it than of any other item."""
    overlap: float
    """The greatest overlap."""


def count_contaminated_documents(
    stage: DecontaminateStage, shards: Sequence[StageShardView]
) -> list[ContaminatedItem]:
    """Counts the items of evaluation sets that have contaminated documents, most
    first."""
    columns = [
        f"{stage.unique_name}.{name}"
        for name in ("set", "item", "overlap", "contaminated")
    ]
    overlaps: dict[tuple[str, str], list[float]] = {}
    for shard in shards:
        for table in shard.read_row_groups(columns):
            values = [column.to_pylist() for column in table.columns]
            for set_name, item, overlap, is_contaminated in zip(*values, strict=True):
                if is_contaminated:
                    overlaps.setdefault((set_name, item), []).append(overlap)
    items: list[ContaminatedItem] = []
    for (set_name, item), item_overlaps in overlaps.items():
        items.append(
            {
                "set": set_name,
                "item": item,
                "documents": len(item_overlaps),
                "overlap": max(item_overlaps),
            }
        )
    return sorted(
        items, key=lambda item: (-item["documents"], item["set"], item["item"])
    )
