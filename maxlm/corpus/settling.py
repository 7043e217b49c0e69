"""Settling which of several documents keeps a text: among those that the rules keep.

Stages that compare documents find what is alike: copies, pairs, repeated passages.
Which document of these loses its text is a verdict, and rules decide over it: were the
copy that is kept one that a rule drops, its text would be in no kept document. So
verdicts are settled for each set of rules.

Documents are decided one after the other, in one order for all stages: by `keep_by`,
among equals the first of the corpus. A document is

1. a copy or near-copy if it is like a document that *is kept already*, and of its
   passages those are cut that stand, in one piece, in what stays of such a document (or
   further left in itself);
2. kept if all rules keep it with these verdicts. Then, and only then, it keeps texts
   for others.

What is decided stays, so this ends with the last document, however rules depend on
verdicts and verdicts on each other (`substring.cut_share < 0.5` may drop a document of
which much is cut: then its own passages are cut nowhere on its account). And each
verdict is backed by a kept document, so no text is lost to one. A document that rules
drop whatever the verdicts are is compared with none.

The settled labels lie beside the others, in settled/KEY, a file for each shard, and are
made once for the same rules. Memory: a few bytes for each document, about 1,000 for
each that is like another one, 200 for each pair that is alike, 300 for each repeated
passage; words' places are on disk.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.config import MaxlmError
from maxlm.corpus.cuts import get_span_edges
from maxlm.corpus.dedup.judges import (
    KEPT_DOCUMENT,
    CopyJudge,
    DocumentCuts,
    DocumentPassages,
    PassageJudge,
    SimilarityJudge,
    VerdictJudge,
)
from maxlm.corpus.dedup.members import compute_document_offsets, compute_keep_scores
from maxlm.corpus.dedup.pairs import SimilarityGraph
from maxlm.corpus.dedup.passages import Span, SpanSet
from maxlm.corpus.expression import Expression
from maxlm.corpus.recipe import FilterRules, RecipeConfig, get_label_types
from maxlm.corpus.shards import StageShardView, mark_valid, open_shard_writer
from maxlm.corpus.stage import CrossDocumentStage, LabelValue, Stage
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.stages.near import NearStage
from maxlm.corpus.stages.substring import SubstringStage
from maxlm.corpus.verdicts import (
    VerdictPlan,
    VerdictStage,
    get_order_labels,
    plan_verdicts,
)
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.progress import Progress, ignore_progress

SETTLED = "settled"
"""Name of the folder with settled labels, below a corpus."""
_VERSION = 1
_LAYOUTS_SUFFIX = ".layouts"  # Of scratch files, which are deleted.
_MAX_RESULTS = 1 << 16  # Of a condition that are remembered.


def settle_verdicts(
    recipe: RecipeConfig,
    shards: Sequence[StageShardView],
    manifests: Sequence[str],
    rules: FilterRules,
    error_location: str,
    progress: Progress = ignore_progress,
) -> list[StageShardView]:
    """Returns a corpus's shards with verdicts as they are among the documents that
    `rules` keep.

    Raises MaxlmError: rules that keep a document because it is a copy; stages that are
    to be settled together and keep by different labels; a disk that is full, a corpus
    that cannot be written.

    Args:
        manifests: of the corpus's stages, which tell its labels from those of other
            runs.
    """
    plan = plan_verdicts(recipe, rules, error_location)
    if not plan.stages or not shards:
        return list(shards)

    # The folder's name says all that decides what is settled.
    description = [_VERSION, list(manifests), rules.describe()]
    key = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]
    corpus = shards[0].folder
    folder = corpus / SETTLED / key
    names = [*plan.label_names]
    for verdict_stage in plan.stages:
        if isinstance(verdict_stage.stage, ExactStage | NearStage):
            names.append(f"{verdict_stage.stage.unique_name}.{KEPT_DOCUMENT}")
    if not folder.exists():
        with convert_write_errors(folder):
            folder.parent.mkdir(exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
        try:
            settling = _Settling(
                recipe, shards, rules, plan, error_location, scratch, progress
            )
            settling.write(scratch, names)
            with suppress(OSError):  # Another process was faster.
                scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return [
        replace(shard, settled_labels=tuple(names), settled_folder=f"{SETTLED}/{key}")
        for shard in shards
    ]


def add_neutral_verdicts(
    table: pa.RecordBatch, stages: Sequence[VerdictStage]
) -> pa.RecordBatch:
    """Replaces verdicts by those on documents that lose no text: null where a stage did
    not look."""
    columns = dict(zip(table.schema.names, table.columns, strict=True))
    for verdict_stage in stages:
        stage = verdict_stage.stage
        if not isinstance(stage, CrossDocumentStage):
            continue
        for name, neutral in stage.neutral_verdicts.items():
            if name not in columns:
                continue
            column = columns[name]
            if pa.types.is_list(column.type):
                continue  # An expression only tells whether spans are null.
            if neutral is None:
                columns[name] = pa.nulls(len(column), column.type)
            else:
                columns[name] = pa.array(
                    np.full(len(column), neutral),
                    column.type,
                    mask=~mark_valid(column),
                )
    return pa.RecordBatch.from_pydict(columns)


class _RowCondition:
    """An expression on one document at a time."""

    def __init__(self, expression: Expression, types: Mapping[str, pa.DataType]):
        self._expression = expression
        self._names = expression.label_names
        self._schema = pa.schema([(name, types[name]) for name in self._names])
        # Most documents have one of few combinations of verdicts.
        self._results: dict[tuple[object, ...], bool] = {}

    def holds(self, labels: Mapping[str, LabelValue]) -> bool:
        """Tells whether a document with these labels fulfils it."""
        values = []
        for name in self._names:
            value = labels[name]
            # An expression only tells whether spans are null.
            values.append(() if isinstance(value, list) else value)
        key = tuple(values)
        if key not in self._results:
            if len(self._results) >= _MAX_RESULTS:
                self._results.clear()
            columns = [
                pa.array([value], field.type)
                for value, field in zip(values, self._schema, strict=True)
            ]
            row = pa.RecordBatch.from_arrays(columns, schema=self._schema)
            self._results[key] = bool(self._expression.evaluate(row)[0])
        return self._results[key]


class _Settling:
    """Decides the documents of a corpus for one set of rules."""

    def __init__(
        self,
        recipe: RecipeConfig,
        shards: Sequence[StageShardView],
        rules: FilterRules,
        plan: VerdictPlan,
        error_location: str,
        scratch: Path,
        progress: Progress,
    ):
        self._recipe = recipe
        self._shards = shards
        self._rules = rules
        self._plan = plan
        self._error_location = error_location
        self._progress = progress
        self._types = get_label_types(recipe.stages)
        self._offsets = compute_document_offsets(shards)
        self._dependent = set(plan.label_names)
        # By label, what is settled of documents, by their numbers; of others it is
        # neutral.
        self._settled: dict[str, dict[int, LabelValue]] = {}
        # By stage, the documents that its `where` leaves out with these verdicts.
        self._deselected: dict[str, set[int]] = {
            verdict_stage.stage.unique_name: set() for verdict_stage in plan.stages
        }

        with convert_write_errors(scratch):
            # As long as a document is not decided: what the rules keep of documents
            # alone.
            self._is_kept = self._mark_kept_alone()
            self._judges: dict[str, VerdictJudge] = {}
            related: set[int] = set()
            for verdict_stage in plan.stages:
                stage = verdict_stage.stage
                if isinstance(stage, CrossDocumentStage):
                    judge, documents = self._make_judge(stage, scratch)
                    self._judges[stage.unique_name] = judge
                    related.update(documents)
        # Documents that are like others, rising, and their labels.
        numbers = np.array(sorted(related), np.int64)
        self._related = numbers[self._is_kept[numbers]]
        self._table = self._read_related()
        for phase in plan.phases:
            self._decide_phase(phase)

    def _read_groups(
        self, columns: Iterable[str], step: str
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yields each row group after the number of its first document."""
        names = list(dict.fromkeys(columns))
        for index, shard in enumerate(self._shards):
            first_document = self._offsets[index]
            for table in shard.read_row_groups(names):
                yield first_document, table
                first_document += table.num_rows
            self._progress(f"settling copies: {step}", index + 1, len(self._shards))

    def _mark_kept_alone(self) -> np.ndarray:
        """Marks documents that the rules keep if none loses a text: bool
        [documents]."""
        is_kept = np.zeros(self._offsets[-1], np.bool_)
        conditions = {}
        for verdict_stage in self._plan.stages:
            if verdict_stage.where is not None:
                number = self._recipe.stages.index(verdict_stage.stage)
                conditions[f"stages.{number}.where"] = verdict_stage.where
        names = ["id", "text", *self._rules.label_names]
        for condition in conditions.values():
            names += condition.label_names
        for first_document, table in self._read_groups(names, "rules"):
            neutral = add_neutral_verdicts(table, self._plan.stages)
            has_text = mark_valid(table.column("text"))
            passes = has_text
            for rule_name, rule in self._rules.keep.items():
                result = rule.evaluate(neutral)
                self._check_falls(rule, f"keep.{rule_name}", table, result & has_text)
                passes = passes & result
            for place, condition in conditions.items():
                result = condition.evaluate(neutral)
                self._check_falls(condition, place, table, result)
            is_kept[first_document : first_document + table.num_rows] = passes
        return is_kept

    def _check_falls(
        self,
        condition: Expression,
        place: str,
        table: pa.RecordBatch,
        neutral_result: np.ndarray,
    ) -> None:
        """Checks that no document fulfils a condition because it loses a text.

        Args:
            table: documents with the verdicts as if every rule kept every document.
            neutral_result: which documents fulfil it if they lose no text: bool
                [documents].
        """
        names = [name for name in condition.label_names if name in self._dependent]
        if not names:
            return
        has_text = mark_valid(table.column("text"))
        is_gained = condition.evaluate(table) & ~neutral_result & has_text
        gained_rows = np.flatnonzero(is_gained)
        if len(gained_rows) == 0:
            return
        document_id = table.column("id")[int(gained_rows[0])].as_py()
        where = f"{self._error_location}: {place}" if self._error_location else place
        message = (
            f"{condition.text!r} selects documents, such as {document_id!r}, because "
            f"others like them are kept ({', '.join(names)}), and which are kept "
            "depends on this"
        )
        fix = (
            "write it so that it selects fewer by these labels, like: not "
            "near.duplicate"
        )
        raise MaxlmError(message, where=where, fix=fix)

    def _make_judge(
        self, stage: CrossDocumentStage, scratch: Path
    ) -> tuple[VerdictJudge, list[int]]:
        """Reads the findings of a stage; returns also the documents that are like
        others."""
        if isinstance(stage, ExactStage):
            return self._read_copies(stage)
        if isinstance(stage, NearStage):
            return self._read_similarities(stage)
        if isinstance(stage, SubstringStage):
            layouts = scratch / f"{stage.unique_name}{_LAYOUTS_SUFFIX}"
            return self._read_passages(stage, layouts)
        raise TypeError(f"{type(stage).__name__} has verdicts that are not settled")

    def _read_copies(self, stage: ExactStage) -> tuple[CopyJudge, list[int]]:
        name = stage.unique_name
        documents = [np.empty(0, np.int64)]
        groups = [np.empty(0, np.int64)]
        for first_document, table in self._read_groups([f"{name}.group"], name):
            column = table.column(0)
            documents.append(np.flatnonzero(mark_valid(column)) + first_document)
            groups.append(column.drop_null().to_numpy())
        all_documents = np.concatenate(documents)
        judge = CopyJudge(all_documents, np.concatenate(groups))
        return judge, all_documents.tolist()

    def _read_similarities(self, stage: NearStage) -> tuple[SimilarityJudge, list[int]]:
        name = stage.unique_name
        # A pair stands with the later of its documents, and names the one before.
        lows = [np.empty(0, np.int64)]
        highs = [np.empty(0, np.int64)]
        similarities = [np.empty(0)]
        for first_document, table in self._read_groups([f"{name}.pairs"], name):
            column = table.column(0)
            documents = np.arange(table.num_rows) + first_document
            num_pairs = column.value_lengths().fill_null(0).to_numpy()
            low, jaccard = column.flatten().flatten()
            lows.append(low.to_numpy())
            highs.append(np.repeat(documents, num_pairs))
            similarities.append(jaccard.to_numpy())
        graph = SimilarityGraph(
            np.concatenate(lows), np.concatenate(highs), np.concatenate(similarities)
        )
        return SimilarityJudge(graph), graph.documents.tolist()

    def _read_passages(
        self, stage: SubstringStage, layouts_path: Path
    ) -> tuple[PassageJudge, list[int]]:
        name = stage.unique_name
        passages = DocumentPassages(layouts_path)
        columns = [f"{name}.repeats", f"{name}.layout"]
        for first_document, table in self._read_groups(columns, name):
            stop_document = first_document + table.num_rows
            rows = np.flatnonzero(self._is_kept[first_document:stop_document])
            repeats, layouts = table.take(pa.array(rows)).columns
            passages.add(rows + first_document, repeats, layouts)
        return PassageJudge(stage.min_tokens, passages), passages.documents

    def _read_related(self) -> pa.Table:
        """Reads the labels of documents that are like others which rules and conditions
        name."""
        names = ["id", *self._rules.label_names, *self._rules.cut]
        for verdict_stage in self._plan.stages:
            names += verdict_stage.labels
            if verdict_stage.where is not None:
                names += verdict_stage.where.label_names
        for phase in self._plan.phases:
            names += [label.removeprefix("-") for _, label in get_order_labels(phase)]
        # Spans that are settled are long, and needed here by no one.
        names = [
            name
            for name in names
            if not (self._is_verdict(name) and pa.types.is_list(self._types[name]))
        ]
        tables = []
        for first_document, table in self._read_groups(names, "labels"):
            bounds = [first_document, first_document + table.num_rows]
            start, stop = np.searchsorted(self._related, bounds)
            rows = self._related[start:stop] - first_document
            tables.append(table.take(pa.array(rows)))
        return pa.Table.from_batches(tables)

    def _decide_phase(self, phase: Sequence[VerdictStage]) -> None:
        """Decides one document after the other."""
        rules = [
            _RowCondition(rule, self._types)
            for rule in self._rules.keep.values()
            if not self._dependent.isdisjoint(rule.label_names)
        ]
        conditions = {
            verdict_stage.stage.unique_name: _RowCondition(
                verdict_stage.where, self._types
            )
            for verdict_stage in self._plan.stages
            if verdict_stage.where is not None
        }
        for row in self._order_rows(phase):
            document = int(self._related[row])
            if not self._is_kept[document]:
                continue  # The phase before dropped it.
            labels = self._read_labels(row, document)
            cuts = DocumentCuts(SpanSet(), SpanSet())
            self._add_fixed_cuts(document, labels, phase, cuts)
            judged = self._judge_document(document, phase, conditions, labels, cuts)
            is_kept = all(rule.holds(labels) for rule in rules)
            self._is_kept[document] = is_kept
            if is_kept:
                for judge, judge_cuts in judged:
                    judge.keep(document, judge_cuts)

    def _order_rows(self, phase: Sequence[VerdictStage]) -> list[int]:
        """Returns the rows of the related documents in the order in which a phase
        decides them: the best first, of equals the first of the corpus."""
        ranks = np.zeros(len(self._related))
        for _, keep_by in get_order_labels(phase):
            column = self._table.select([keep_by.removeprefix("-")])
            batches = column.combine_chunks().to_batches()
            if batches:  # There is none of a table without rows.
                ranks = compute_keep_scores(batches[0], keep_by)
        return np.lexsort((self._related, -ranks)).tolist()

    def _judge_document(
        self,
        document: int,
        phase: Sequence[VerdictStage],
        conditions: Mapping[str, _RowCondition],
        labels: dict[str, LabelValue],
        cuts: DocumentCuts,
    ) -> list[tuple[VerdictJudge, DocumentCuts]]:
        """Settles the verdicts of a phase's stages on a document.

        Args:
            conditions: `where` of stages, by the stage's name.
            labels: the document's labels; settled ones are replaced.
            cuts: what is cut of the document; what stages cut is added.

        Returns:
            The judges of the stages that look at the document, with what they cut.
        """
        judged: list[tuple[VerdictJudge, DocumentCuts]] = []
        for verdict_stage in phase:
            stage = verdict_stage.stage
            name = stage.unique_name
            if name in conditions and not conditions[name].holds(labels):
                self._deselected[name].add(document)
                labels.update(dict.fromkeys(verdict_stage.labels))
                continue
            if not isinstance(stage, CrossDocumentStage):
                continue
            if labels[_get_seen_label(stage)] is None:
                continue
            # What is found and not cut leaves the text to others.
            if verdict_stage.is_cut:
                stage_cuts = cuts
            else:
                stage_cuts = DocumentCuts(SpanSet(), SpanSet())
            judge = self._judges[name]
            judgement = judge.judge(document, stage_cuts)
            judged.append((judge, stage_cuts))

            # Rules that are asked next see the verdicts, and so do later phases.
            verdicts = dict(judgement.labels)
            if judgement.kept_document is not None:
                verdicts["of"] = self._get_id(judgement.kept_document)
                verdicts[KEPT_DOCUMENT] = judgement.kept_document
            for label, value in verdicts.items():
                labels[f"{name}.{label}"] = value
                self._settled.setdefault(f"{name}.{label}", {})[document] = value
        return judged

    def _is_verdict(self, name: str) -> bool:
        for verdict_stage in self._plan.stages:
            stage = verdict_stage.stage
            if isinstance(stage, CrossDocumentStage) and name in stage.neutral_verdicts:
                return True
        return False

    def _get_id(self, document: int) -> str:
        row = int(np.searchsorted(self._related, document))
        return self._table.column("id")[row].as_py()

    def _read_labels(self, row: int, document: int) -> dict[str, LabelValue]:
        """Reads the labels of a document, with what is settled of it so far."""
        labels: dict[str, LabelValue] = {}
        for name in self._table.column_names:
            labels[name] = self._table.column(name)[row].as_py()
        # Verdicts begin neutral: as on a document that loses no text.
        for verdict_stage in self._plan.stages:
            stage = verdict_stage.stage
            if isinstance(stage, CrossDocumentStage):
                is_seen = labels[_get_seen_label(stage)] is not None
                for name, neutral in stage.neutral_verdicts.items():
                    labels[name] = neutral if is_seen else None
        # Phases before this one have settled some, or left the document out.
        for name, settled in self._settled.items():
            if document in settled:
                labels[name] = settled[document]
        for verdict_stage in self._plan.stages:
            if document in self._deselected[verdict_stage.stage.unique_name]:
                labels.update(dict.fromkeys(verdict_stage.labels))
        return labels

    def _add_fixed_cuts(
        self,
        document: int,
        labels: Mapping[str, LabelValue],
        phase: Sequence[VerdictStage],
        cuts: DocumentCuts,
    ) -> None:
        """Adds the words that are cut of a document whatever the verdicts are."""
        spans: list[Span] = []
        for name in self._rules.cut:
            if self._is_verdict(name):
                continue
            label = labels[name]
            if isinstance(label, list):  # Null where the stage did not look.
                spans += get_span_edges(label)
        if not spans:
            return
        for verdict_stage in phase:
            judge = self._judges.get(verdict_stage.stage.unique_name)
            if verdict_stage.is_cut and isinstance(judge, PassageJudge):
                for word_span in judge.find_words(document, spans):
                    cuts.cut.add(*word_span)

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Writes the settled labels, as files of `folder`."""
        types = dict(self._types)
        for name in names:
            if name.endswith(f".{KEPT_DOCUMENT}"):
                types[name] = pa.int64()
        schema = pa.schema([(name, types[name]) for name in names])
        columns = [name for name in names if name in self._types]
        for index, shard in enumerate(self._shards):
            first_document = self._offsets[index]
            with open_shard_writer(folder / f"{shard.name}.parquet", schema) as writer:
                for table in shard.read_row_groups(columns):
                    settled = self._settle_group(table, first_document, schema)
                    writer.write_row_group(settled)
                    first_document += table.num_rows
            self._progress("settling copies: writing", index + 1, len(self._shards))
        for path in folder.glob(f"*{_LAYOUTS_SUFFIX}"):
            path.unlink()

    def _settle_group(
        self, table: pa.RecordBatch, first_document: int, schema: pa.Schema
    ) -> pa.RecordBatch:
        """Returns the settled labels of a row group."""
        columns: dict[str, pa.Array] = {}
        bounds = [first_document, first_document + table.num_rows]
        start, stop = np.searchsorted(self._related, bounds)
        related = self._related[start:stop].tolist()
        for verdict_stage in self._plan.stages:
            stage = verdict_stage.stage
            deselected = self._deselected[stage.unique_name]
            for label in schema.names:
                if label.rpartition(".")[0] != stage.unique_name:
                    continue
                values = _list_unsettled_values(table, stage, label)
                settled = self._settled.get(label, {})
                for document in related:
                    if document in deselected:
                        values[document - first_document] = None
                    elif document in settled:
                        values[document - first_document] = settled[document]
                columns[label] = pa.array(values, schema.field(label).type)
        return pa.RecordBatch.from_pydict(columns, schema=schema)


def _get_seen_label(stage: CrossDocumentStage) -> str:
    """Names a label that is null where the stage did not look, and only there."""
    for name, neutral in stage.neutral_verdicts.items():
        if neutral not in (None, ()):
            return name
    raise TypeError(f"{type(stage).__name__} has no verdict that tells where it looked")


def _list_unsettled_values(
    table: pa.RecordBatch, stage: Stage, label: str
) -> list[LabelValue]:
    """Lists a label of the documents of a row group on which nothing is settled.

    Verdicts are those on a document that loses no text, None where the stage did not
    look; other labels are as the stage wrote them.
    """
    if isinstance(stage, CrossDocumentStage):
        # Only settled labels have `kept_document`, which the table has not.
        is_verdict = label in stage.neutral_verdicts or label not in table.schema.names
        if is_verdict:
            neutral = stage.neutral_verdicts.get(label)
            is_seen = table.column(_get_seen_label(stage)).is_valid().to_pylist()
            return [neutral if seen else None for seen in is_seen]
    return table.column(label).to_pylist()
