"""Judges: what stages that compare documents found, and the verdicts that follow of it
on one document after the other, given those that are kept already
(`corpus.settling`)."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

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

KEPT_DOCUMENT = "kept_document"
"""Name of a verdict: the number, in the corpus, of the kept document that `of`
names."""
JudgedVerdicts = dict[str, Any]
"""Verdicts on a document, by the names of a stage's labels."""


class VerdictJudge(Protocol):
    """Findings of one stage, and what of them kept documents keep so far."""

    def judge(self, document: int, cuts: "DocumentCuts") -> JudgedVerdicts:
        """Returns the stage's verdicts on a document, by the names of its labels."""
        ...

    def keep(self, document: int, cuts: "DocumentCuts") -> None:
        """Takes note that a document is kept."""
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
        self._groups = dict(zip(documents.tolist(), groups.tolist(), strict=True))
        self._survivors: dict[int, int] = {}  # By group.

    def judge(self, document: int, cuts: DocumentCuts) -> JudgedVerdicts:
        survivor = self._survivors.get(self._groups.get(document, -1))
        return {"duplicate": survivor is not None, KEPT_DOCUMENT: survivor}

    def keep(self, document: int, cuts: DocumentCuts) -> None:
        if document in self._groups:
            self._survivors.setdefault(self._groups[document], document)


class SimilarityJudge:
    """Verdicts of `near`: a document is a near-copy if it is like a kept one."""

    def __init__(self, graph: SimilarityGraph):
        self._graph = graph

    def judge(self, document: int, cuts: DocumentCuts) -> JudgedVerdicts:
        match = self._graph.find_kept(document)
        if match is None:
            return {"duplicate": False, "jaccard": None, KEPT_DOCUMENT: None}
        survivor, jaccard = match
        return {"duplicate": True, "jaccard": jaccard, KEPT_DOCUMENT: survivor}

    def keep(self, document: int, cuts: DocumentCuts) -> None:
        self._graph.mark_kept(document)


class PassageJudge:
    """Verdicts of `substring`: passages are cut that stand in what stays of a kept
    document."""

    def __init__(self, size: int, passages: "DocumentPassages"):
        self._size = size
        self._passages = passages
        self._kept = WindowIndex()

    def judge(self, document: int, cuts: DocumentCuts) -> JudgedVerdicts:
        runs = self._passages.get_runs(document)
        if not runs:
            return {"cuts": [], "cut_share": 0.0}
        shared = [
            span
            for span in find_shared_spans(runs, self._kept, self._size)
            if not cuts.needed.overlaps(*span)
        ]
        for span in shared:
            cuts.cut.add(*span)
        inner = find_inner_spans(runs, self._size, cuts.cut, cuts.needed)
        starts, stops, length = self._passages.get_word_edges(document)
        spans = choose_cover([*shared, *inner])
        pieces = [{"start": starts[a], "end": stops[b - 1]} for a, b in spans]
        # With the white space between pieces that touch.
        characters = sum(
            stops[b - 1] - starts[a] for a, b in SpanSet(spans).list_spans()
        )
        return {"cuts": pieces, "cut_share": characters / length}

    def keep(self, document: int, cuts: DocumentCuts) -> None:
        runs = self._passages.get_runs(document)
        add_intact_windows(runs, self._kept, self._size, cuts.cut)

    def find_words(self, document: int, spans: Sequence[Span]) -> list[Span]:
        """Finds the words that spans of characters touch; none of a document without
        repeats."""
        if not self._passages.get_runs(document):
            return []
        starts, stops, _ = self._passages.get_word_edges(document)
        return [
            (bisect_right(stops, start), bisect_left(starts, stop))
            for start, stop in spans
        ]


class DocumentPassages:
    """The repeats of documents, and where their words lie, which is in a file."""

    def __init__(self, path: Path):
        self._path = path
        self._runs: dict[int, np.ndarray] = {}
        self._layouts: dict[
            int, tuple[int, int]
        ] = {}  # Where in the file, and how many numbers.
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
                columns = [
                    field.to_numpy().astype(np.int64) for field in runs.flatten()
                ]
                self._runs[document] = np.stack(columns, 1)
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
        return [] if runs is None else [RepeatedRun(*run) for run in runs.tolist()]

    def get_word_edges(self, document: int) -> tuple[list[int], list[int], int]:
        """Returns the first character of each word, the one after its last, and how
        many characters the text has."""
        offset, count = self._layouts[document]
        if self._file is None:
            self._file = np.memmap(self._path, np.int32, "r")
        edges = np.cumsum(self._file[offset : offset + count], dtype=np.int64)
        return edges[:-1:2].tolist(), edges[1::2].tolist(), int(edges[-1])
