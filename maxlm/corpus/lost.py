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
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from maxlm.corpus.cuts import get_span_edges, remove_spans
from maxlm.corpus.dedup.judges import KEPT_DOCUMENT
from maxlm.corpus.dedup.members import compute_document_offsets
from maxlm.corpus.dedup.minhash import make_shingle_set
from maxlm.corpus.dedup.passages import Span
from maxlm.corpus.opened import OpenCorpus, mark_kept, remove_cut_spans
from maxlm.corpus.recipe import FilterRules, get_text_stages
from maxlm.corpus.settling import add_neutral_verdicts
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import JobRunner, LabelValue, Stage
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.stages.near import NearStage
from maxlm.corpus.stages.substring import (
    SubstringStage,
    convert_to_code_points,
    find_words,
    hash_windows,
)
from maxlm.corpus.verdicts import VerdictPlan, plan_verdicts
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress, ignore_progress

_FILE = "lost.json"
# N-grams of a document that are compared: its smallest hashes, a fair sample.
_SKETCH = 64
_DOUBT = 0.25  # Five standard deviations of a share of so many.
_BATCH = 256  # Texts hashed at a time.


@dataclass(frozen=True)
class LostTextCounts:
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
        num_lost = self.documents + self.passages
        text = (
            f"text lost: {num_lost:,} (of {self.dropped_documents:,} documents dropped "
            f"as copies and {self.cut_passages:,} passages cut)"
        )
        if num_lost:
            text += (
                f": {self.documents:,} documents and {self.passages:,} passages, "
                f"{self.characters:,} characters, are in no kept document"
            )
        if self.repetitive_documents:
            text += (
                f"; {self.repetitive_documents:,} documents are dropped for their "
                "share of repeats, with what only they have"
            )
        return text


@dataclass
class _Removed:
    """Documents and passages that rules drop and cut of a shard because of copies.

    Stages are named by their places in `VerdictPlan.stages`.
    """

    kept_numbers: list[int] = field(default_factory=list)
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
    look_alikes: tuple[tuple[int, int], ...]
    """The kept documents that it is said to be like, each after the stage's number."""


@dataclass(frozen=True)
class _CutPassage:
    stage: int
    """The number of the stage."""
    characters: int
    windows: np.ndarray
    """Hashes of windows that cover it: uint64."""


@dataclass(frozen=True)
class _Part:
    """A shard to look through."""

    first_document: int
    """The number of its first document in the corpus."""
    raw_shard: StageShardView
    """Its labels as the stages wrote them."""
    shard: StageShardView
    """Its labels as settled."""


def count_lost_text(
    corpus: OpenCorpus,
    rules: FilterRules,
    executor: TaskExecutor,
    progress: Progress = ignore_progress,
) -> LostTextCounts:
    """Looks in what `rules` keep of a corpus for what they drop as copies and cut as
    repeats.

    The count lies beside the settled labels, and is made once for the same rules.
    Raises MaxlmError as `OpenCorpus.settle_rules`.
    """
    plan = plan_verdicts(corpus.recipe, rules, str(corpus.folder))
    settled_shards = corpus.settle_rules(rules, progress)
    if not plan.stages or not settled_shards:
        return LostTextCounts()
    path = corpus.folder / settled_shards[0].settled_folder / _FILE
    if path.exists():
        return LostTextCounts(**json.loads(path.read_text()))

    run = JobRunner("text lost", executor, progress)
    first_documents = compute_document_offsets(settled_shards)[:-1]
    parts = [
        _Part(first_document, raw_shard, shard)
        for first_document, raw_shard, shard in zip(
            first_documents, corpus.shards, settled_shards, strict=True
        )
    ]
    removed = run(partial(_list_removed, corpus, rules, plan), parts, "dropped and cut")
    lost_documents = _find_lost_documents(corpus, plan, removed, parts, run)
    lost_passages = _find_lost_passages(corpus, rules, plan, removed, parts, run)
    lost_characters = sum(document.characters for document in lost_documents)
    lost_characters += sum(passage.characters for passage in lost_passages)
    counts = LostTextCounts(
        documents=len(lost_documents),
        passages=len(lost_passages),
        characters=lost_characters,
        dropped_documents=sum(len(part.documents) for part in removed),
        cut_passages=sum(len(part.passages) for part in removed),
        repetitive_documents=sum(part.num_repetitive for part in removed),
    )
    with replace_file(path) as new:
        new.write_text(json.dumps(asdict(counts)))
    return counts


def _list_removed(
    corpus: OpenCorpus, rules: FilterRules, plan: VerdictPlan, part: _Part
) -> _Removed:
    """Lists what the rules drop and cut of a shard because of copies."""
    removed = _Removed()
    raw_names = list(dict.fromkeys(["text", *rules.label_names, *plan.label_names]))
    names = list(dict.fromkeys([*raw_names, *part.shard.settled_labels]))
    row_groups = zip(
        part.shard.read_row_groups(names),
        part.raw_shard.read_row_groups(raw_names),
        _read_texts_of_stages(corpus, plan, part.shard),
        strict=True,
    )
    first_document = part.first_document
    for table, raw_table, texts_by_stage in row_groups:
        is_kept = mark_kept(table, rules)
        is_kept_alone = mark_kept(add_neutral_verdicts(raw_table, plan.stages), rules)
        for row in np.flatnonzero(is_kept_alone | is_kept).tolist():
            _add_document(
                removed,
                plan,
                first_document + row,
                bool(is_kept[row]),
                _read_labels(table, row),
                [texts[row] for texts in texts_by_stage],
            )
        first_document += table.num_rows
    return removed


def _read_labels(table: pa.RecordBatch, row: int) -> dict[str, LabelValue]:
    labels = {}
    for name, column in zip(table.schema.names, table.columns, strict=True):
        if name != "text":
            labels[name] = column[row].as_py()
    return labels


def _add_document(
    removed: _Removed,
    plan: VerdictPlan,
    number: int,
    is_kept: bool,
    labels: Mapping[str, LabelValue],
    texts: Sequence[str | None],
) -> None:
    """Adds a document that the rules keep, or would keep if it were like no other.

    Args:
        number: the document's, in the corpus.
        texts: the text as each stage of the plan read it.
    """
    if is_kept:
        removed.kept_numbers.append(number)
    digests = []
    look_alikes = []
    cuts: list[tuple[int, str, list[Span]]] = []
    for index, (verdict_stage, text) in enumerate(zip(plan.stages, texts, strict=True)):
        stage = verdict_stage.stage
        name = stage.unique_name
        if text is None:
            continue
        if isinstance(stage, ExactStage):
            if is_kept:
                removed.kept_digests.append((index, stage.compute_digest(text)))
            elif labels[f"{name}.duplicate"]:
                digests.append((index, stage.compute_digest(text)))
        elif isinstance(stage, NearStage):
            look_alike = labels[f"{name}.{KEPT_DOCUMENT}"]
            if isinstance(look_alike, int) and not is_kept:
                look_alikes.append((index, look_alike))
        elif isinstance(stage, SubstringStage):
            spans = labels[f"{name}.cuts"]
            # A kept document keeps what is found and not cut.
            goes = verdict_stage.is_cut or not is_kept
            if goes and isinstance(spans, list) and spans:
                cuts.append((index, text, get_span_edges(spans)))

    # Dropped as a copy, or with nothing cut of it: all of it is looked for.
    if not is_kept and (digests or look_alikes or not cuts):
        characters = max(len(text or "") for text in texts)
        removed.documents.append(
            _DroppedDocument(number, characters, tuple(digests), tuple(look_alikes))
        )
        return
    # Kept without its cuts, or dropped for how much of it is cut: passages are looked
    # for.
    if not is_kept:
        removed.num_repetitive += 1
    for index, text, spans in cuts:
        passages = [text[start:stop] for start, stop in spans]
        # What a document repeats of itself goes with it, where a rule says that it
        # goes.
        repeated_in = [] if is_kept else [remove_spans(text, spans)]
        removed.passages += _make_cut_passages(plan, index, passages, repeated_in)


def _read_texts_of_stages(
    corpus: OpenCorpus, plan: VerdictPlan, shard: StageShardView
) -> Iterator[list[list[str | None]]]:
    """Yields for each row group the texts as each stage of the plan read them."""
    readers = []
    for verdict_stage in plan.stages:
        view = _view_as_stage(corpus, verdict_stage.stage, shard)
        readers.append(view.read_row_groups(["text"]))
    for tables in zip(*readers, strict=True):
        yield [table.column("text").to_pylist() for table in tables]


def _view_as_stage(
    corpus: OpenCorpus, stage: Stage, shard: StageShardView
) -> StageShardView:
    """Returns a shard with the texts that a stage of its corpus read."""
    position = corpus.recipe.stages.index(stage)
    text_stages = get_text_stages(corpus.recipe.stages[:position])
    return replace(shard, text_stages=text_stages)


def _get_window_words(plan: VerdictPlan, index: int) -> int:
    stage = plan.stages[index].stage
    assert isinstance(stage, SubstringStage)
    return stage.min_tokens


def _make_cut_passages(
    plan: VerdictPlan, index: int, passages: Sequence[str], repeated_in: Sequence[str]
) -> list[_CutPassage]:
    """Hashes windows that cover passages, but for those that other texts have.

    Args:
        index: the stage's, in the plan.
        passages: what is cut of a document.
        repeated_in: texts whose windows are not lost.
    """
    window_words = _get_window_words(plan, index)
    known_hashes = _hash_texts(repeated_in, window_words).hashes
    windows = _hash_texts(passages, window_words)
    cut_passages = []
    for number, passage in enumerate(passages):
        is_of_passage = windows.text == number
        words = windows.word[is_of_passage]
        # Windows side by side, and the last one.
        is_last = words == words.max(initial=0)
        is_covering = (words % window_words == 0) | is_last
        hashes = windows.hashes[is_of_passage][is_covering]
        is_known = np.isin(hashes, known_hashes)
        cut_passages.append(_CutPassage(index, len(passage), hashes[~is_known]))
    return cut_passages


class _Windows(NamedTuple):
    """The windows of texts; arrays have an entry for each."""

    hashes: np.ndarray
    """uint64."""
    text: np.ndarray
    """The index of the text: int64."""
    word: np.ndarray
    """The word of that text with which the window begins: int64."""


def _hash_texts(texts: Sequence[str], window_words: int) -> _Windows:
    """Hashes the windows of texts."""
    code_points = [convert_to_code_points(text) for text in texts]
    all_text = np.concatenate([np.empty(0, np.uint32), *code_points])
    offsets = np.cumsum([0, *map(len, code_points)], dtype=np.int64)
    words = find_words(all_text, offsets)
    hashes, first_words = hash_windows(all_text, words, window_words)
    text = words.find_documents(first_words)
    return _Windows(hashes, text, first_words - words.document_offsets[text])


def _find_lost_documents(
    corpus: OpenCorpus,
    plan: VerdictPlan,
    removed: Sequence[_Removed],
    parts: Sequence[_Part],
    run: JobRunner,
) -> list[_DroppedDocument]:
    """Finds dropped documents that are like no kept one."""
    kept_digests: set[tuple[int, bytes]] = set()
    kept_numbers: set[int] = set()
    for part in removed:
        kept_digests.update(part.kept_digests)
        kept_numbers.update(part.kept_numbers)
    without_copy = [
        document
        for part in removed
        for document in part.documents
        if kept_digests.isdisjoint(document.digests)
    ]

    # Of what is left, near-copies are compared with what they are said to be like.
    compared: dict[int, set[int]] = {}
    for document in without_copy:
        for stage, look_alike in document.look_alikes:
            numbers = compared.setdefault(stage, set())
            numbers.update((document.number, look_alike))
    sketches: dict[tuple[int, int], np.ndarray] = {}
    for stage, numbers in compared.items():
        job = partial(_sketch_documents, corpus, plan, stage, frozenset(numbers))
        for shard_sketches in run(job, parts, "near-copies"):
            sketches |= shard_sketches

    def is_like_kept(document: _DroppedDocument) -> bool:
        for stage, look_alike in document.look_alikes:
            if look_alike not in kept_numbers:
                continue
            sketch = sketches[stage, document.number]
            other_sketch = sketches[stage, look_alike]
            min_jaccard = _get_near_stage(plan, stage).jaccard
            if _are_alike(sketch, other_sketch, min_jaccard):
                return True
        return False

    return [document for document in without_copy if not is_like_kept(document)]


def _get_near_stage(plan: VerdictPlan, index: int) -> NearStage:
    stage = plan.stages[index].stage
    assert isinstance(stage, NearStage)
    return stage


def _sketch_documents(
    corpus: OpenCorpus,
    plan: VerdictPlan,
    index: int,
    numbers: frozenset[int],
    part: _Part,
) -> dict[tuple[int, int], np.ndarray]:
    """Returns the smallest hashes of n-grams of documents, by the stage's and their
    numbers: one more than are compared, which tells whether they are all."""
    stage = _get_near_stage(plan, index)
    view = _view_as_stage(corpus, stage, part.shard)
    sketches = {}
    first_document = part.first_document
    for table in view.read_row_groups(["text"]):
        for row, text in enumerate(table.column("text")):
            number = first_document + row
            if number in numbers:
                hashes = make_shingle_set(text.as_py(), stage.ngram)
                sketches[index, number] = hashes[: _SKETCH + 1]
        first_document += table.num_rows
    return sketches


def _are_alike(one: np.ndarray, other: np.ndarray, min_jaccard: float) -> bool:
    """Tells whether two documents with these sketches may have a Jaccard similarity of
    `min_jaccard` or more."""
    union = np.union1d(one, other)
    are_whole = len(one) <= _SKETCH and len(other) <= _SKETCH
    if not are_whole:
        # The smallest hashes of the union are a fair sample of it, of which the share
        # that both have estimates the similarity.
        union = union[:_SKETCH]
        min_jaccard -= _DOUBT
    num_shared = np.count_nonzero(np.isin(union, one) & np.isin(union, other))
    return bool(num_shared >= min_jaccard * len(union))


def _find_lost_passages(
    corpus: OpenCorpus,
    rules: FilterRules,
    plan: VerdictPlan,
    removed: Sequence[_Removed],
    parts: Sequence[_Part],
    run: JobRunner,
) -> list[_CutPassage]:
    """Finds passages cut that are not in what stays of kept documents."""
    passages = [passage for part in removed for passage in part.passages]
    lost = []
    for index in sorted({passage.stage for passage in passages}):
        of_stage = [passage for passage in passages if passage.stage == index]
        windows = np.unique(np.concatenate([passage.windows for passage in of_stage]))
        job = partial(_mark_kept_windows, corpus, rules, plan, index, windows)
        is_kept = np.zeros(len(windows), np.bool_)
        for is_kept_in_shard in run(job, parts, "passages"):
            is_kept |= is_kept_in_shard
        for passage in of_stage:
            if not is_kept[np.searchsorted(windows, passage.windows)].all():
                lost.append(passage)
    return lost


def _mark_kept_windows(
    corpus: OpenCorpus,
    rules: FilterRules,
    plan: VerdictPlan,
    index: int,
    windows: np.ndarray,
    part: _Part,
) -> np.ndarray:
    """Marks the hashes (sorted) of windows that are in what stays of a shard's kept
    documents: bool [windows]."""
    verdict_stage = plan.stages[index]
    window_words = _get_window_words(plan, index)
    cuts = rules.cut if verdict_stage.is_cut else ()
    view = _view_as_stage(corpus, verdict_stage.stage, part.shard)
    is_kept_window = np.zeros(len(windows), np.bool_)
    # Rules are on labels and the newest text's being there; windows are of the text
    # that was read.
    names = list(dict.fromkeys(["text", *rules.label_names, *cuts]))
    row_groups = zip(
        part.shard.read_row_groups(names), view.read_row_groups(["text"]), strict=True
    )
    for table, texts in row_groups:
        columns = dict(zip(table.schema.names, table.columns, strict=True))
        columns["text"] = texts.column("text")
        is_kept = pa.array(mark_kept(table, rules))
        kept_table = pa.RecordBatch.from_pydict(columns).filter(is_kept)
        cut_rules = FilterRules(rules.keep, tuple(cuts))
        kept_texts = list(remove_cut_spans(kept_table, cut_rules))
        for first in range(0, len(kept_texts), _BATCH):
            batch = kept_texts[first : first + _BATCH]
            kept_windows = _hash_texts(batch, window_words)
            is_kept_window |= np.isin(windows, kept_windows.hashes)
    return is_kept_window
