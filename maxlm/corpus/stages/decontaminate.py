"""Decontamination: documents that hold items of evaluation sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.corpus.cuts import CUTS
from maxlm.corpus.dedup.overlap import GramIndex, build_gram_index, find_grams, hash_evaluation_sets
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import LabelStage
from maxlm.corpus.text import UNICODE
from maxlm.data.documents.config import SourceConfig


class DecontaminateStage(LabelStage):
    """Documents that have n-grams of words in common with evaluation sets: by default 13, as in
    "Language Models are Few-Shot Learners" (Brown et al. 2020, arXiv 2005.14165, appendix C).

    Words are compared without case, accents and punctuation; in scripts without spaces each letter
    is a word (`maxlm.corpus.text`). A shorter item is looked for as a whole.
    """

    stage: Literal["decontaminate"] = "decontaminate"
    sets: Mapping[str, SourceConfig] = Field(min_length=1)
    """The evaluation sets by name: files, whose documents are the items. A text file is one item; a
    line of JSONL or a row of Parquet is one, of which `text_field` is looked for. A set whose
    questions and answers are to be found both is named twice, with each field."""
    ngram: int = Field(default=13, ge=1, le=100)
    """Words that must agree in a row. Smaller finds rewritten items, and more by chance."""
    shortest: int = Field(default=8, ge=1)
    """Items of fewer words than this are not looked for, as they stand everywhere; those from here
    up to `ngram` words are looked for as a whole. (The paper: n between 8 and 13.)"""
    min_hits: int = Field(default=1, ge=1)
    """Different n-grams of one item that make a document contaminated; items with fewer: all."""
    max_items: int = Field(default=10, ge=1)
    """An n-gram that more different items of a set have in common is text of a template ("Choose
    the best answer ...") and is not looked for. Not so in a passage that many items quote, as where
    a text has many questions: 2 * `ngram` words in a row or more that the same items share, at
    most half of the set's. (The paper leaves out n-grams of more than 10 documents of the corpus.)
    Items with the same n-grams count as one, the first."""

    version: ClassVar[int] = 3

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("contaminated", pa.bool_()),
                ("overlap", pa.float64()),  # the share of the item's n-grams found; 0: no item
                ("set", pa.string()),  # of the item with the greatest overlap
                ("item", pa.large_string()),  # its id; large: no category to be counted
                ("cuts", CUTS),  # characters that the n-grams found cover
            ]
        )

    def key(self) -> str:
        """The stage's key, which depends on the contents of the evaluation sets as well."""
        return f"{super().key()} {UNICODE} {hash_evaluation_sets(self.sets)}"

    def packages(self) -> tuple[str, ...]:
        return ("regex",)

    def open_row(self) -> Callable[[str | None], dict[str, Any]]:
        """See `LabelStage`.

        Raises:
            MaxlmError: an evaluation set can't be read or has nothing to look for.
        """
        index = build_gram_index(
            self.sets, self.ngram, min(self.shortest, self.ngram), self.max_items
        )

        def label(text: str | None) -> dict[str, Any]:
            found = find_grams(index, text or "")
            if not len(found):
                return {"contaminated": False, "overlap": 0.0, "cuts": []}
            return self._judge(index, found[:, 0]) | {"cuts": _unite_spans(found[:, 1:])}

        return label

    def _judge(self, index: GramIndex, grams: np.ndarray) -> dict[str, Any]:
        """The labels of a document, from the n-grams found in it."""
        grams = np.unique(grams)
        owners = [index.owners[index.starts[g] : index.starts[g + 1]] for g in grams]
        items, hits = np.unique(np.concatenate(owners), return_counts=True)
        overlap = hits / index.sizes[items]
        enough = hits >= np.minimum(self.min_hits, index.sizes[items])
        best = np.lexsort((-hits, -overlap, ~enough))[0]
        item = items[best]
        return {
            "contaminated": bool(enough[best]),
            "overlap": overlap[best],
            "set": index.sets[item],
            "item": index.ids[item],
        }


def _unite_spans(spans: np.ndarray) -> list[dict[str, int]]:
    """Joins spans where they overlap."""
    spans = spans[np.lexsort((spans[:, 1], spans[:, 0]))]
    reach = np.maximum.accumulate(spans[:, 1])
    opens = np.append(True, spans[1:, 0] > reach[:-1])
    begins, ends = spans[opens, 0], reach[np.append(np.flatnonzero(opens)[1:] - 1, len(reach) - 1)]
    return [{"start": a, "end": b} for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]


@dataclass(frozen=True)
class ItemCount:
    """In how many documents an item of an evaluation set was found, and how much of it at most."""

    set: str
    item: str
    documents: int
    overlap: float


def count_items(stage: DecontaminateStage, shards: Sequence[StageShardView]) -> list[ItemCount]:
    """Counts the items of evaluation sets that have contaminated documents, most first.

    A document counts for the item it has most of.

    Raises:
        MaxlmError: the stage's labels are missing.
    """
    title, found = stage.title, {}
    columns = [f"{title}.{name}" for name in ("contaminated", "set", "item", "overlap")]
    for shard in shards:
        for rows in shard.rows(columns):
            for contaminated, name, item, overlap in zip(
                *rows.batch.to_pydict().values(), strict=True
            ):
                if contaminated:
                    documents, most = found.get((name, item), (0, 0.0))
                    found[name, item] = documents + 1, max(most, overlap)
    counts = [ItemCount(*key, *value) for key, value in found.items()]
    return sorted(counts, key=lambda each: (-each.documents, each.set, each.item))
