"""Decontamination: documents that hold n-grams of items of evaluation sets."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.cuts import CUTS, merge_spans
from maxlm.corpus.dedup.columns import mark_run_starts
from maxlm.corpus.dedup.minhash import hash_shingles, hash_words, mix_bits
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import LabelTypes, PerDocumentStage
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


def build_ngram_index(
    sets: Mapping[str, SourceConfig], n: int, min_words: int, max_items_per_ngram: int
) -> NgramIndex:
    """Builds the index of evaluation sets' n-grams.

    Args:
        n: words in an n-gram. An item of fewer words is looked for as a whole,
        min_words: if it has this many; else it is left out.
        max_items_per_ngram: n-grams of more different items of a set are left out, as
            text of a template, if they are not of a long passage; see `_wanted`.
    """
    grams = []
    owners = []
    items = []
    lengths = set[int]()
    for name, source in sets.items():
        ids, words, gram, owner = _read_items(source, n, min_words)
        wanted = _wanted(words, gram, owner, n, max_items_per_ngram)
        if not wanted.any():
            what = f'evaluation set "{name}" has no text of {min_words} words or more to look for'
            if words.any():
                what = f'all text of evaluation set "{name}" is common to more than '
                what += f"{max_items_per_ngram} items"
            fix = "check its files and text_field, lower shortest, or raise max_items"
            raise MaxlmError(what, fix=fix)
        lengths.update(np.minimum(words[words > 0], n).tolist())
        grams.append(gram[wanted])
        owners.append(owner[wanted] + len(items))
        items += [(name, each) for each in ids]
    gram, owner = _pairs(np.concatenate(grams), np.concatenate(owners))
    ngrams_per_item = np.bincount(owner, minlength=len(items))
    return NgramIndex(gram, owner, ngrams_per_item, tuple(items), frozenset(lengths))


def _read_items(
    source: SourceConfig, n: int, shortest: int
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Reads the items of a set.

    Returns:
        Their ids. The words of each, 0 if it is too short or equal to one before: int64
        [items]. The n-grams of all in the order of the text, uint64 [places], and the
        item of each, int64.
    """
    ids = []
    words = []
    grams = []
    owners = []
    seen = set()
    for document in read_documents(source):
        text = hash_words(document.text.decode("utf-8", "replace"))
        found = hash_shingles(text, n)
        count = len(text)
        content = hashlib.sha256(np.unique(found).tobytes()).digest()
        if wanted := count >= shortest and content not in seen:
            seen.add(content)
            grams.append(found)
            owners.append(len(ids))
        ids.append(document.id)
        words.append(count if wanted else 0)
    places = np.repeat(np.array(owners, np.int64), [len(each) for each in grams])
    return (
        ids,
        np.array(words, np.int64),
        np.concatenate([np.empty(0, np.uint64), *grams]),
        places,
    )


def _wanted(
    words: np.ndarray, grams: np.ndarray, owners: np.ndarray, n: int, max_items: int
) -> np.ndarray:
    """Marks places that have n-grams to look for: not those of a template. bool
    [places].

    An n-gram of more than `max_items` items is of a template, unless it is of a passage
    that several items quote, such as a text with many questions: 2 n words or more in a
    row that the same items share, at most half of all. What most items share is how
    they are asked.
    """
    gram, owner = _pairs(grams, owners)
    firsts = np.flatnonzero(mark_run_starts(gram))
    count = np.diff(np.append(firsts, len(gram)))
    # One number for a set of items. Two sets have the same by chance only.
    hashes = mix_bits(owner.astype(np.uint64) + np.uint64(1))
    whose = np.add.reduceat(hashes, firsts) if len(gram) else hashes
    quoted = 2 * count <= np.count_nonzero(words)

    place = np.searchsorted(gram[firsts], grams)
    run = np.cumsum(mark_run_starts(whose[place]) | mark_run_starts(owners)) - 1
    long = np.bincount(run)[run] + n - 1 >= 2 * n
    is_passage = np.zeros(len(firsts), np.bool_)
    is_passage[place[long]] = True
    return ((count <= max_items) | (is_passage & quoted))[place]


def _pairs(grams: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each n-gram of each item once, sorted by n-gram, then item."""
    order = np.lexsort((owners, grams))
    grams, owners = grams[order], owners[order]
    keep = mark_run_starts(grams) | mark_run_starts(owners)
    return grams[keep], owners[keep]


def find_ngrams(index: NgramIndex, text: str) -> np.ndarray:
    """Finds every n-gram of the index in a text. Returns int64 [found, 3]: the first of
    it in `index.hashes`, its first character and the one after its last."""
    words = hash_words(text)
    spans = np.array([word.span() for word in WORD.finditer(text)], np.int64).reshape(
        -1, 2
    )
    found = [np.empty((0, 3), np.int64)]
    for size in sorted(n for n in index.lengths if n <= len(words)):
        grams = hash_shingles(words, size)
        place = np.searchsorted(index.hashes, grams) % len(index.hashes)
        at = np.flatnonzero(index.hashes[place] == grams)
        found.append(np.stack([place[at], spans[at, 0], spans[at + size - 1, 1]], 1))
    return np.concatenate(found)


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
        return [
            file.path
            for source in self.sets.values()
            for file in find_files(source).files
        ]

    def make_row_label_fn(self) -> Callable[[str | None], dict[str, Any]]:
        shortest = min(self.shortest, self.ngram)
        index = build_ngram_index(self.sets, self.ngram, shortest, self.max_items)

        def label(text: str | None) -> dict[str, Any]:
            found = find_ngrams(index, text or "")
            if not len(found):
                return {"contaminated": False, "overlap": 0.0, "cuts": []}
            grams = np.unique(found[:, 0])
            stops = np.searchsorted(index.hashes, index.hashes[grams], "right")
            owners = [
                index.item_indices[i:j] for i, j in zip(grams, stops, strict=True)
            ]
            items, hits = np.unique(np.concatenate(owners), return_counts=True)
            overlap = hits / index.ngrams_per_item[items]
            enough = hits >= np.minimum(self.min_hits, index.ngrams_per_item[items])
            best = np.lexsort((-hits, -overlap, ~enough))[0]
            spans = zip(*merge_spans(found[:, 1], found[:, 2]), strict=True)
            name, item = index.items[items[best]]
            return {
                "contaminated": bool(enough[best]),
                "overlap": overlap[best],
                "set": name,
                "item": item,
                "cuts": [{"start": start, "end": end} for start, end in spans],
            }

        return label


def count_contaminated_documents(
    stage: DecontaminateStage, shards: Sequence[StageShardView]
) -> list[dict[str, Any]]:
    """Counts the items of evaluation sets that have contaminated documents, most first:
    by set and item the number of documents that have most of it, and the greatest
    overlap."""
    title = stage.unique_name
    names = ("set", "item", "overlap", "contaminated")
    found: dict[tuple[str, str], list[float]] = {}
    for shard in shards:
        for table in shard.read_row_groups([f"{title}.{name}" for name in names]):
            for name, item, overlap, contaminated in zip(
                *table.to_pydict().values(), strict=True
            ):
                if contaminated:
                    found.setdefault((name, item), []).append(overlap)
    counts = [
        {
            "set": name,
            "item": item,
            "documents": len(overlaps),
            "overlap": max(overlaps),
        }
        for (name, item), overlaps in found.items()
    ]
    return sorted(
        counts, key=lambda each: (-each["documents"], each["set"], each["item"])
    )
