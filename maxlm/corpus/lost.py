"""Counting the text that is lost to deduplication: what rules drop as a copy, or cut as
a repeat, and no kept document has.

It is looked for in the texts, however copies were settled: a document that is dropped
as a copy by the digest of its text among those of kept documents, as a near-copy by its
word n-grams among those of the kept document that it is said to be like; a passage that
is cut by the digests of its runs of words among those of what stays of kept documents.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from maxlm.corpus.cuts import remove_spans
from maxlm.corpus.dedup.judges import KEPT_DOCUMENT
from maxlm.corpus.dedup.members import compute_document_offsets
from maxlm.corpus.dedup.minhash import make_shingle_set
from maxlm.corpus.dedup.passages import Span
from maxlm.corpus.opened import OpenCorpus, mark_kept, remove_cut_spans
from maxlm.corpus.recipe import FilterRules, get_text_stages
from maxlm.corpus.settling import add_neutral_verdicts
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.stages.near import NearStage
from maxlm.corpus.stages.substring import SubstringStage, find_words, hash_windows
from maxlm.corpus.verdicts import VerdictPlan, plan_verdicts
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress, ignore_progress

_FILE = "lost.json"
_SKETCH = (
    64  # N-grams of a document that are compared: its smallest hashes, a fair sample.
)
_DOUBT = 0.25  # Five standard deviations of a share of so many.
_BATCH = 256  # Texts hashed at a time.


@dataclass(frozen=True)
class LostText:
    """Counts of what deduplication drops and cuts, and of what of it no kept document
    has."""

    documents: int = 0
    """Documents dropped as copies that are like no kept document."""
    passages: int = 0
    """Passages cut that do not stand in what stays of kept documents."""
    characters: int = 0
    """Characters of both."""
    dropped_documents: int = 0
    """Documents dropped as copies."""
    cut_passages: int = 0
    """Passages cut, of documents that are kept or would be."""
    repetitive_documents: int = 0
    """Documents dropped for how much of them is repeated: by a rule that says so, and
    with what only they have."""

    def __str__(self) -> str:
        text = (
            f"text lost: {self.documents + self.passages:,} (of "
            f"{self.dropped_documents:,} "
            f"documents dropped as copies and {self.cut_passages:,} passages cut)"
        )
        if self.documents or self.passages:
            text += (
                f": {self.documents:,} documents and {self.passages:,} passages, "
                f"{self.characters:,} characters, are in no kept document"
            )
        if self.repetitive_documents:
            text += (
                f"; {self.repetitive_documents:,} documents are dropped for their "
                f"share of "
                "repeats, with what only they have"
            )
        return text


@dataclass
class _Removed:
    """Documents and passages that rules drop and cut of a shard because of copies."""

    kept: list[int] = field(default_factory=list)
    """Numbers of kept documents."""
    kept_digests: list[tuple[int, bytes]] = field(default_factory=list)
    """Digests of kept documents, each with the number of the stage that compares
    them."""
    documents: list["_DroppedDocument"] = field(default_factory=list)
    passages: list["_CutPassage"] = field(default_factory=list)
    num_repetitive: int = 0
    """Documents dropped for their share of repeats."""


@dataclass(frozen=True)
class _DroppedDocument:
    number: int
    characters: int
    digests: tuple[tuple[int, bytes], ...]
    """The digests by which stages call it a copy, each with the stage's number."""
    witnesses: tuple[tuple[int, int], ...]
    """The kept documents that it is said to be like, each after the stage's number."""


@dataclass(frozen=True)
class _CutPassage:
    stage: int
    """The number of the stage."""
    characters: int
    windows: np.ndarray
    """Hashes of windows that cover it: uint64."""


def count_lost_text(
    corpus: OpenCorpus,
    rules: FilterRules,
    executor: TaskExecutor,
    progress: Progress = ignore_progress,
) -> LostText:
    """Looks in what `rules` keep of a corpus for what they drop as copies and cut as
    repeats.

    The count lies beside the settled labels, and is made once for the same rules.
    Raises MaxlmError as `OpenCorpus.settle_rules`.
    """
    plan = plan_verdicts(corpus.recipe, rules, str(corpus.folder))
    settled = corpus.settle_rules(rules, progress)
    if not plan.stages or not settled:
        return LostText()
    path = corpus.folder / settled[0].settled_folder / _FILE
    if path.exists():
        return LostText(**json.loads(path.read_text()))
    run = JobRunner("text lost", executor, progress)
    offsets = compute_document_offsets(settled)
    parts = list(zip(offsets[:-1], corpus.shards, settled, strict=True))
    removed = run(partial(_list_removed, corpus, rules, plan), parts, "dropped and cut")
    documents, document_characters = _count_lost_documents(
        corpus, plan, removed, parts, run
    )
    passages, passage_characters = _count_lost_passages(
        corpus, rules, plan, removed, parts, run
    )
    total = LostText(
        documents=documents,
        passages=passages,
        characters=document_characters + passage_characters,
        dropped_documents=sum(len(part.documents) for part in removed),
        cut_passages=sum(len(part.passages) for part in removed),
        repetitive_documents=sum(part.num_repetitive for part in removed),
    )
    with replace_file(path) as new:
        new.write_text(json.dumps(asdict(total)))
    return total


_Part = tuple[int, StageShardView, StageShardView]
"""A shard: the number of its first document; its labels as the stages wrote them; as
settled."""


def _list_removed(
    corpus: OpenCorpus, rules: FilterRules, plan: VerdictPlan, part: _Part
) -> _Removed:
    """Lists what the rules drop and cut of a shard because of copies."""
    first, raw_shard, shard = part
    removed = _Removed()
    raw_names = list(dict.fromkeys(["text", *rules.label_names, *plan.label_names]))
    names = list(dict.fromkeys([*raw_names, *shard.settled_labels]))
    tables = zip(
        shard.read_row_groups(names),
        raw_shard.read_row_groups(raw_names),
        _read_texts_of_stages(corpus, plan, shard),
        strict=True,
    )
    for table, raw, texts in tables:
        alone = mark_kept(add_neutral_verdicts(raw, plan.stages), rules)
        is_kept = mark_kept(table, rules)
        for row in np.flatnonzero(alone | is_kept).tolist():
            labels = _read_labels(table, row)
            texts_of_row = [column[row] for column in texts]
            _add_document(
                removed, plan, first + row, bool(is_kept[row]), labels, texts_of_row
            )
        first += table.num_rows
    return removed


def _read_labels(table: pa.RecordBatch, row: int) -> dict[str, Any]:
    return {
        name: column[row].as_py()
        for name, column in zip(table.schema.names, table.columns, strict=True)
        if name != "text"
    }


def _add_document(
    removed: _Removed,
    plan: VerdictPlan,
    number: int,
    is_kept: bool,
    labels: Mapping[str, Any],
    texts: Sequence[str | None],
) -> None:
    """Adds a document that the rules keep, or would keep if it were like no other.

    Args:
        number: the document's, in the corpus.
        texts: the text as each stage of the plan read it.
    """
    digests = []
    witnesses = []
    cuts: list[tuple[int, str, list[Span]]] = []
    if is_kept:
        removed.kept.append(number)
    for index, (bound, text) in enumerate(zip(plan.stages, texts, strict=True)):
        stage = bound.stage
        name = stage.unique_name
        if text is None:
            continue
        if isinstance(stage, ExactStage):
            if is_kept:
                removed.kept_digests.append((index, stage.compute_digest(text)))
            elif labels[f"{name}.duplicate"]:
                digests.append((index, stage.compute_digest(text)))
        elif isinstance(stage, NearStage):
            witness = labels[f"{name}.{KEPT_DOCUMENT}"]
            if witness is not None and not is_kept:
                witnesses.append((index, witness))
        elif is_kept and not bound.is_cut:
            continue  # It keeps what it has in common with others.
        elif isinstance(stage, SubstringStage) and labels[f"{name}.cuts"]:
            spans = [(span["start"], span["end"]) for span in labels[f"{name}.cuts"]]
            cuts.append((index, text, spans))
    if not is_kept and (digests or witnesses or not cuts):
        characters = max(len(text or "") for text in texts)
        removed.documents.append(
            _DroppedDocument(number, characters, tuple(digests), tuple(witnesses))
        )
        return
    if not is_kept:
        removed.num_repetitive += 1
    for index, text, spans in cuts:
        pieces = [text[start:stop] for start, stop in spans]
        # What a document repeats of itself goes with it, where a rule says that it
        # goes.
        rest = [] if is_kept else [remove_spans(text, spans)]
        removed.passages += _list_passages(plan, index, pieces, rest)


def _read_texts_of_stages(
    corpus: OpenCorpus, plan: VerdictPlan, shard: StageShardView
) -> Iterator[list[pa.Array]]:
    """Yields for each row group the texts as each stage of the plan read them."""
    views = []
    for bound in plan.stages:
        position = corpus.recipe.stages.index(bound.stage)
        views.append(
            replace(shard, text_stages=get_text_stages(corpus.recipe.stages[:position]))
        )
    readers = [view.read_row_groups(["text"]) for view in views]
    for tables in zip(*readers, strict=True):
        yield [table.column("text").to_pylist() for table in tables]


def _get_window_words(plan: VerdictPlan, index: int) -> int:
    stage = plan.stages[index].stage
    assert isinstance(stage, SubstringStage)
    return stage.min_tokens


def _list_passages(
    plan: VerdictPlan, index: int, pieces: Sequence[str], rest: Sequence[str]
) -> list[_CutPassage]:
    """Lists passages with windows that cover them, but for those that `rest` has."""
    size = _get_window_words(plan, index)
    has_already, _, _ = _hash_texts(rest, size)
    hashes, piece_of_window, word = _hash_texts(pieces, size)
    passages = []
    for number, piece in enumerate(pieces):
        here = piece_of_window == number
        words = word[here]
        # Side by side, and the last one.
        covering = (words % size == 0) | (words == words.max(initial=0))
        wanted = hashes[here][covering]
        passages.append(
            _CutPassage(index, len(piece), wanted[~np.isin(wanted, has_already)])
        )
    return passages


def _hash_texts(
    texts: Sequence[str], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes the windows of texts: uint64 [windows], the text of each and the word of
    it with which it begins, int64 [windows]."""
    points = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]
    text = np.concatenate([np.empty(0, np.uint32), *points])
    offsets = np.cumsum([0, *map(len, points)], dtype=np.int64)
    starts, stops, first = find_words(text, offsets)
    hashes, begins = hash_windows(text, starts, stops, first, size)
    text_of_window = np.searchsorted(first, begins, "right") - 1
    return hashes, text_of_window, begins - first[text_of_window]


def _count_lost_documents(
    corpus: OpenCorpus,
    plan: VerdictPlan,
    removed: Sequence[_Removed],
    parts: Sequence[_Part],
    run: JobRunner,
) -> tuple[int, int]:
    """Counts dropped documents that are like no kept one, and their characters."""
    kept_digests = {digest for part in removed for digest in part.kept_digests}
    survivors = {number for part in removed for number in part.kept}
    left = [
        document
        for part in removed
        for document in part.documents
        if kept_digests.isdisjoint(document.digests)
    ]
    wanted: dict[int, set[int]] = {}
    for document in left:
        for stage, witness in document.witnesses:
            wanted.setdefault(stage, set()).update((document.number, witness))
    sketches: dict[tuple[int, int], np.ndarray] = {}
    for stage, numbers in wanted.items():
        job = partial(_sketch_documents, corpus, plan, stage, frozenset(numbers))
        for shard_sketches in run(job, parts, "near-copies"):
            sketches |= shard_sketches
    lost = [
        document
        for document in left
        if not any(
            witness in survivors
            and _are_alike(
                sketches[stage, document.number],
                sketches[stage, witness],
                plan.stages[stage].stage,
            )
            for stage, witness in document.witnesses
        )
    ]
    return len(lost), sum(document.characters for document in lost)


def _sketch_documents(
    corpus: OpenCorpus,
    plan: VerdictPlan,
    stage: int,
    numbers: frozenset[int],
    part: _Part,
) -> dict[tuple[int, int], np.ndarray]:
    """Returns the smallest hashes of n-grams of documents, by the stage's and their
    numbers."""
    first, _, shard = part
    near = plan.stages[stage].stage
    assert isinstance(near, NearStage)
    position = corpus.recipe.stages.index(near)
    view = replace(shard, text_stages=get_text_stages(corpus.recipe.stages[:position]))
    sketches = {}
    for table in view.read_row_groups(["text"]):
        for row, text in enumerate(table.column("text")):
            if first + row in numbers:
                hashes = make_shingle_set(text.as_py(), near.ngram)
                sketches[stage, first + row] = hashes[: _SKETCH + 1]
        first += table.num_rows
    return sketches


def _are_alike(one: np.ndarray, other: np.ndarray, stage: object) -> bool:
    """Tells whether two documents with these sketches may have the similarity that a
    stage asks."""
    assert isinstance(stage, NearStage)
    union = np.union1d(one, other)
    is_whole = len(one) <= _SKETCH and len(other) <= _SKETCH
    sample = union if is_whole else union[:_SKETCH]
    shared = np.count_nonzero(np.isin(sample, one) & np.isin(sample, other))
    least = stage.jaccard if is_whole else stage.jaccard - _DOUBT
    return bool(shared >= least * len(sample))


def _count_lost_passages(
    corpus: OpenCorpus,
    rules: FilterRules,
    plan: VerdictPlan,
    removed: Sequence[_Removed],
    parts: Sequence[_Part],
    run: JobRunner,
) -> tuple[int, int]:
    """Counts passages cut that are not in what stays of kept documents, and their
    characters."""
    passages = [passage for part in removed for passage in part.passages]
    lost = 0
    characters = 0
    for index in sorted({passage.stage for passage in passages}):
        of_stage = [passage for passage in passages if passage.stage == index]
        wanted = np.unique(np.concatenate([passage.windows for passage in of_stage]))
        job = partial(_find_windows, corpus, rules, plan, index, wanted)
        is_there = np.zeros(len(wanted), np.bool_)
        for is_in_shard in run(job, parts, "passages"):
            is_there |= is_in_shard
        for passage in of_stage:
            if not is_there[np.searchsorted(wanted, passage.windows)].all():
                lost += 1
                characters += passage.characters
    return lost, characters


def _find_windows(
    corpus: OpenCorpus,
    rules: FilterRules,
    plan: VerdictPlan,
    index: int,
    wanted: np.ndarray,
    part: _Part,
) -> np.ndarray:
    """Marks the hashes (sorted) of windows that are in what stays of a shard's kept
    documents: bool [wanted]."""
    _, _, shard = part
    bound = plan.stages[index]
    size = _get_window_words(plan, index)
    cuts = rules.cut if bound.is_cut else ()
    position = corpus.recipe.stages.index(bound.stage)
    view = replace(shard, text_stages=get_text_stages(corpus.recipe.stages[:position]))
    is_there = np.zeros(len(wanted), np.bool_)
    # Rules are on labels and the newest text's being there; windows are of the text
    # that was read.
    tables = shard.read_row_groups(
        list(dict.fromkeys(["text", *rules.label_names, *cuts]))
    )
    for table, texts in zip(tables, view.read_row_groups(["text"]), strict=True):
        columns = dict(zip(table.schema.names, table.columns, strict=True))
        is_kept = mark_kept(table, rules)
        columns["text"] = texts.column("text")
        rest = pa.RecordBatch.from_pydict(columns).filter(pa.array(is_kept))
        remaining = list(remove_cut_spans(rest, FilterRules(rules.keep, tuple(cuts))))
        for begin in range(0, len(remaining), _BATCH):
            hashes, _, _ = _hash_texts(remaining[begin : begin + _BATCH], size)
            is_there |= np.isin(wanted, hashes)
    return is_there
