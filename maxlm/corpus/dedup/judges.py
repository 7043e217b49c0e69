"""Judges: what stages that compare documents found, and the verdicts that follow of it
on one document after the other, given those that are kept already
(`corpus.settling`)."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from maxlm.corpus.cuts import TextSpan
from maxlm.corpus.dedup.pairs import SimilarityGraph
from maxlm.corpus.dedup.passages import (
    RepeatedRun,
    Span,
    SpanSet,
    WindowIndex,
    add_intact_windows,
    choose_cover,
    find_inner_spans,
    find_shared_spans,
)
from maxlm.corpus.stage import LabelValue

KEPT_DOCUMENT = "kept_document"
"""Name of a verdict: the number, in the corpus, of the kept document that `of`
names."""


@dataclass(frozen=True)
class Judgement:
    """A stage's verdicts on a document."""

    labels: Mapping[str, LabelValue]
    """Verdicts by the names of the stage's labels, but for `of`."""
    kept_document: int | None = None
    """The kept document that `of` names, by its number in the corpus."""


class VerdictJudge(Protocol):
    """Findings of one stage, and what of them kept documents keep so far."""

    def judge(self, document: int, cuts: "DocumentCuts") -> Judgement:
        """Judges a document, and adds what the stage cuts of it to `cuts`."""
        ...

    def keep(self, document: int, cuts: "DocumentCuts") -> None:
        """Records that a document is kept."""
        ...


@dataclass
class DocumentCuts:
    """Spans cut of one document, in words of its newest text."""

    cut: SpanSet
    needed: SpanSet
    """Words that stay since they are cut elsewhere in the document."""


class CopyJudge:
    """Verdicts of `exact`: of each group of copies one is kept."""

    def __init__(self, documents: np.ndarray, groups: np.ndarray):
        """`documents`: those that have copies; `groups`: the group of each."""
        self._groups = dict(zip(documents.tolist(), groups.tolist(), strict=True))
        self._kept_by_group: dict[int, int] = {}

    def judge(self, document: int, cuts: DocumentCuts) -> Judgement:
        kept_copy = None
        if document in self._groups:
            kept_copy = self._kept_by_group.get(self._groups[document])
        return Judgement({"duplicate": kept_copy is not None}, kept_copy)

    def keep(self, document: int, cuts: DocumentCuts) -> None:
        if document in self._groups:
            self._kept_by_group.setdefault(self._groups[document], document)


class SimilarityJudge:
    """Verdicts of `near`: a document is a near-copy if it is like a kept one."""

    def __init__(self, graph: SimilarityGraph):
        self._graph = graph

    def judge(self, document: int, cuts: DocumentCuts) -> Judgement:
        match = self._graph.find_kept(document)
        if match is None:
            return Judgement({"duplicate": False, "jaccard": None})
        kept_document, jaccard = match
        return Judgement({"duplicate": True, "jaccard": jaccard}, kept_document)

    def keep(self, document: int, cuts: DocumentCuts) -> None:
        self._graph.mark_kept(document)


class PassageJudge:
    """Verdicts of `substring`: passages are cut that stand in what stays of a kept
    document."""

    def __init__(self, window_words: int, passages: "DocumentPassages"):
        self._window_words = window_words
        self._passages = passages
        self._kept_windows = WindowIndex()

    def judge(self, document: int, cuts: DocumentCuts) -> Judgement:
        runs = self._passages.get_runs(document)
        if not runs:
            return Judgement({"cuts": [], "cut_share": 0.0})
        # First what kept documents have, then what the document repeats of itself.
        shared = []
        for span in find_shared_spans(runs, self._kept_windows, self._window_words):
            if not cuts.needed.overlaps(*span):
                shared.append(span)
        for span in shared:
            cuts.cut.add(*span)
        inner = find_inner_spans(runs, self._window_words, cuts.cut, cuts.needed)
        spans = choose_cover([*shared, *inner])

        layout = self._passages.get_word_layout(document)
        cut_spans = [layout.get_characters(*span) for span in spans]
        # Joined, so that white space between pieces that touch counts too.
        num_cut = 0
        for span in SpanSet(spans).list_spans():
            start, end = layout.get_characters(*span)
            num_cut += end - start
        labels: dict[str, LabelValue] = {
            "cuts": [TextSpan(start=start, end=end) for start, end in cut_spans],
            "cut_share": num_cut / layout.num_characters,
        }
        return Judgement(labels)

    def keep(self, document: int, cuts: DocumentCuts) -> None:
        runs = self._passages.get_runs(document)
        add_intact_windows(runs, self._kept_windows, self._window_words, cuts.cut)

    def find_words(self, document: int, spans: Sequence[Span]) -> list[Span]:
        """Finds the words that spans of characters touch; none of a document without
        repeats."""
        if not self._passages.get_runs(document):
            return []
        layout = self._passages.get_word_layout(document)
        words = []
        for start, end in spans:
            first_word = bisect_right(layout.stops, start)
            stop_word = bisect_left(layout.starts, end)
            words.append((first_word, stop_word))
        return words


@dataclass(frozen=True)
class WordLayout:
    """Where the words of a text lie, in characters."""

    starts: list[int]
    """The first character of each word."""
    stops: list[int]
    """The character after each word's last."""
    num_characters: int
    """Characters of the whole text."""

    def get_characters(self, start: int, stop: int) -> Span:
        """Returns the characters from the first of word `start` to the last of the word
        before `stop`."""
        return self.starts[start], self.stops[stop - 1]


class DocumentPassages:
    """The repeats of documents, and where their words lie, which is in a file."""

    def __init__(self, path: Path):
        self._path = path
        self._runs: dict[int, np.ndarray] = {}
        # By document, where in the file its layout begins, and how many numbers it has.
        self._layouts: dict[int, tuple[int, int]] = {}
        self._size = 0
        self._file: np.ndarray | None = None  # Opened when all is written.

    def add(self, documents: np.ndarray, repeats: pa.Array, layouts: pa.Array) -> None:
        """Adds documents, by their numbers, with their columns `repeats` and
        `layout`."""
        with self._path.open("ab") as file:
            for row, document in enumerate(documents.tolist()):
                runs = repeats[row].values
                if runs is None or len(runs) == 0:
                    continue
                fields = [field.to_numpy().astype(np.int64) for field in runs.flatten()]
                self._runs[document] = np.stack(fields, 1)
                layout = layouts[row].values.to_numpy().astype(np.int32)
                file.write(layout.tobytes())
                self._layouts[document] = (self._size, len(layout))
                self._size += len(layout)

    @property
    def documents(self) -> list[int]:
        """The numbers of the documents with repeats."""
        return list(self._runs)

    def get_runs(self, document: int) -> list[RepeatedRun]:
        """Returns the repeats of a document, from left to right."""
        runs = self._runs.get(document)
        if runs is None:
            return []
        return [RepeatedRun(*run) for run in runs.tolist()]

    def get_word_layout(self, document: int) -> WordLayout:
        """Returns where the words of a document with repeats lie."""
        offset, length = self._layouts[document]
        if self._file is None:
            self._file = np.memmap(self._path, np.int32, "r")
        # A layout has the lengths of white space and words by turns, white space first
        # and last: their sums are the edges.
        edges = np.cumsum(self._file[offset : offset + length], dtype=np.int64)
        return WordLayout(
            starts=edges[:-1:2].tolist(),
            stops=edges[1::2].tolist(),
            num_characters=int(edges[-1]),
        )
