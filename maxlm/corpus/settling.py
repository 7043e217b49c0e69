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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from maxlm.config import MaxlmError
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
from maxlm.corpus.dedup.passages import (
    SpanSet,
)
from maxlm.corpus.expression import Expression
from maxlm.corpus.recipe import FilterRules, RecipeConfig, get_label_types
from maxlm.corpus.shards import StageShardView, open_shard_writer
from maxlm.corpus.stage import CrossDocumentStage
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
_MOST_RESULTS = 1 << 16  # Of a condition that are remembered.


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
    description = [_VERSION, list(manifests), rules.describe()]
    key = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]
    corpus = shards[0].folder
    home = corpus / SETTLED / key
    names = [*plan.label_names]
    for stage in plan.stages:
        if isinstance(stage.stage, ExactStage | NearStage):
            names.append(f"{stage.stage.unique_name}.{KEPT_DOCUMENT}")
    if not home.exists():
        with convert_write_errors(home):
            home.parent.mkdir(exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=home.parent))
        try:
            settling = _Settling(
                recipe, shards, rules, plan, error_location, building, progress
            )
            settling.write(building, names)
            with suppress(OSError):  # Another process was faster.
                building.rename(home)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    folder = f"{SETTLED}/{key}"
    return [
        replace(shard, settled_labels=tuple(names), settled_folder=folder)
        for shard in shards
    ]


def add_neutral_verdicts(
    table: pa.RecordBatch, stages: Sequence[VerdictStage]
) -> pa.RecordBatch:
    """Replaces verdicts by those on documents that lose no text: null where a stage did
    not look."""
    columns = dict(zip(table.schema.names, table.columns, strict=True))
    for bound in stages:
        if not isinstance(bound.stage, CrossDocumentStage):
            continue
        for name, neutral in bound.stage.neutral_verdicts.items():
            if name not in columns:
                continue
            column = columns[name]
            if pa.types.is_list(column.type):
                continue  # An expression only tells whether spans are null.
            if neutral is None:
                columns[name] = pa.nulls(len(column), column.type)
                continue
            values = np.full(len(column), neutral)
            is_null = column.is_null().to_numpy(zero_copy_only=False)
            columns[name] = pa.array(values, column.type, mask=is_null)
    return pa.RecordBatch.from_pydict(columns)


class _RowCondition:
    """An expression on one document at a time."""

    def __init__(self, expression: Expression, types: Mapping[str, pa.DataType]):
        self._expression = expression
        self._names = expression.label_names
        self._schema = pa.schema([(name, types[name]) for name in self._names])
        # Most documents have one of few combinations of verdicts.
        self._results: dict[tuple[Any, ...], bool] = {}

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Tells whether a document with these labels fulfils it."""
        row = [values[name] for name in self._names]
        # An expression only tells whether spans are null.
        row = [() if isinstance(value, list) else value for value in row]
        key = tuple(row)
        if key not in self._results:
            if len(self._results) >= _MOST_RESULTS:
                self._results.clear()
            columns = [
                pa.array([value], field.type)
                for value, field in zip(row, self._schema, strict=True)
            ]
            batch = pa.RecordBatch.from_arrays(columns, schema=self._schema)
            self._results[key] = bool(self._expression.evaluate(batch)[0])
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
        self._dependent = {name for stage in plan.stages for name in stage.labels}
        # By label, what is settled of documents, by their numbers; of others it is
        # neutral.
        self._settled: dict[str, dict[int, Any]] = {}
        self._masked: dict[str, set[int]] = {
            stage.stage.unique_name: set() for stage in plan.stages
        }

        with convert_write_errors(scratch):
            self._kept = self._mark_kept_alone()
            judges = {
                stage.stage.unique_name: self._make_judge(stage, scratch)
                for stage in plan.stages
                if isinstance(stage.stage, CrossDocumentStage)
            }
        self._judges: dict[str, VerdictJudge] = {}
        related: set[int] = set()
        for name, (judge, documents) in judges.items():
            self._judges[name] = judge
            related.update(documents)
        numbers = np.array(sorted(related), np.int64)
        self._related = numbers[self._kept[numbers]] if len(numbers) else numbers
        self._table = self._read_related()
        for phase in plan.phases:
            self._decide(phase)

    def _read_groups(
        self, columns: Sequence[str], step: str
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yields each row group with the number of its first document."""
        names = list(dict.fromkeys(columns))
        for index, shard in enumerate(self._shards):
            document = self._offsets[index]
            for table in shard.read_row_groups(names):
                yield document, table
                document += table.num_rows
            self._progress(f"settling copies: {step}", index + 1, len(self._shards))

    def _mark_kept_alone(self) -> np.ndarray:
        """Marks documents that the rules keep if none loses a text: bool
        [documents]."""
        is_kept = np.zeros(self._offsets[-1], np.bool_)
        wheres = [stage for stage in self._plan.stages if stage.where is not None]
        names = ["text", *self._rules.label_names]
        names += [
            name for stage in wheres if stage.where for name in stage.where.label_names
        ]
        for document, table in self._read_groups([*names, "id"], "rules"):
            neutral = add_neutral_verdicts(table, self._plan.stages)
            has_text = table.column("text").is_valid().to_numpy(zero_copy_only=False)
            passes = has_text
            for rule_name, rule in self._rules.keep.items():
                result = rule.evaluate(neutral)
                self._check_falls(rule, f"keep.{rule_name}", table, result & has_text)
                passes = passes & result
            for stage in wheres:
                if stage.where is not None:
                    place = f"stages.{self._recipe.stages.index(stage.stage)}.where"
                    result = stage.where.evaluate(neutral)
                    self._check_falls(stage.where, place, table, result)
            is_kept[document : document + table.num_rows] = passes
        return is_kept

    def _check_falls(
        self,
        condition: Expression,
        place: str,
        table: pa.RecordBatch,
        neutral: np.ndarray,
    ) -> None:
        """Checks that no document fulfils a condition because it loses a text.

        Args:
            table: documents with the verdicts as if every rule kept every document.
            neutral: which documents fulfil it if they lose no text: bool [documents].
        """
        names = [name for name in condition.label_names if name in self._dependent]
        if not names:
            return
        has_text = table.column("text").is_valid().to_numpy(zero_copy_only=False)
        gained = np.flatnonzero(condition.evaluate(table) & ~neutral & has_text)
        if len(gained) == 0:
            return
        document_id = table.column("id")[int(gained[0])].as_py()
        where = f"{self._error_location}: {place}" if self._error_location else place
        message = (
            f"{condition.text!r} selects documents, such as {document_id!r}, because "
            f"others like "
            f"them are kept ({', '.join(names)}), and which are kept depends on this"
        )
        fix = "write it so that it selects fewer by these labels, like: not near.duplicate"
        raise MaxlmError(message, where=where, fix=fix)

    def _make_judge(
        self, bound: VerdictStage, scratch: Path
    ) -> tuple[VerdictJudge, list[int]]:
        """Reads what a stage found; returns also the documents that are like others."""
        stage = bound.stage
        name = stage.unique_name
        if isinstance(stage, ExactStage):
            documents = []
            groups = []
            for first, table in self._read_groups([f"{name}.group"], name):
                column = table.column(0)
                rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                documents.append(rows + first)
                groups.append(column.drop_null().to_numpy())
            numbers = np.concatenate([np.empty(0, np.int64), *documents])
            numbers_of_groups = np.concatenate([np.empty(0, np.int64), *groups])
            return CopyJudge(numbers, numbers_of_groups), numbers.tolist()
        if isinstance(stage, NearStage):
            highs = [np.empty(0, np.int64)]
            lows = [np.empty(0, np.int64)]
            similarities = [np.empty(0)]
            for first, table in self._read_groups([f"{name}.pairs"], name):
                column = table.column(0)
                counts = column.value_lengths().fill_null(0).to_numpy()
                low, jaccard = column.flatten().flatten()
                highs.append(np.repeat(np.arange(table.num_rows) + first, counts))
                lows.append(low.to_numpy())
                similarities.append(jaccard.to_numpy())
            graph = SimilarityGraph(*map(np.concatenate, (lows, highs, similarities)))
            return SimilarityJudge(graph), graph.documents.tolist()
        if isinstance(stage, SubstringStage):
            passages = DocumentPassages(scratch / f"{name}.layouts")
            for first, table in self._read_groups(
                [f"{name}.repeats", f"{name}.layout"], name
            ):
                rows = np.flatnonzero(self._kept[first : first + table.num_rows])
                repeats, layouts = table.take(pa.array(rows)).columns
                passages.add(rows + first, repeats, layouts)
            return PassageJudge(stage.min_tokens, passages), passages.documents
        raise TypeError(f"{type(stage).__name__} has verdicts that are not settled")

    def _read_related(self) -> pa.Table:
        """Reads the labels of documents that are like others which rules and conditions
        name."""
        names = ["id", *self._rules.label_names, *self._rules.cut]
        for stage in self._plan.stages:
            names += stage.labels
            if stage.where is not None:
                names += stage.where.label_names
        for phase in self._plan.phases:
            names += [label.removeprefix("-") for _, label in get_order_labels(phase)]
        # Spans that are settled are long, and needed here by no one.
        names = [
            name
            for name in names
            if not (self._is_verdict(name) and pa.types.is_list(self._types[name]))
        ]
        tables = []
        for first, table in self._read_groups(names, "labels"):
            start, stop = np.searchsorted(
                self._related, [first, first + table.num_rows]
            )
            tables.append(table.take(pa.array(self._related[start:stop] - first)))
        return pa.Table.from_batches(tables)

    def _decide(self, phase: Sequence[VerdictStage]) -> None:
        """Decides one document after the other."""
        documents = self._related
        rank = np.zeros(len(documents))
        for _, label in get_order_labels(phase):
            column = (
                self._table.select([label.removeprefix("-")])
                .combine_chunks()
                .to_batches()
            )
            if column:
                rank = compute_keep_scores(column[0], label)
        rules = [
            _RowCondition(rule, self._types)
            for rule in self._rules.keep.values()
            if not self._dependent.isdisjoint(rule.label_names)
        ]
        wheres = {
            bound.stage.unique_name: _RowCondition(bound.where, self._types)
            for bound in self._plan.stages
            if bound.where is not None
        }
        fixed_cuts = [name for name in self._rules.cut if not self._is_verdict(name)]
        for row in np.lexsort((documents, -rank)).tolist():
            document = int(documents[row])
            if not self._kept[document]:
                continue  # Decided in the phase before.
            values = self._read_values(row, document)
            cuts = DocumentCuts(SpanSet(), SpanSet())
            self._add_fixed_cuts(document, fixed_cuts, values, phase, cuts)
            looked: list[tuple[VerdictJudge, DocumentCuts]] = []
            for bound in phase:
                name = bound.stage.unique_name
                if name in wheres and not wheres[name].holds(values):
                    self._masked[name].add(document)
                    values.update(dict.fromkeys(bound.labels))
                    continue
                if not isinstance(bound.stage, CrossDocumentStage):
                    continue
                if values[self._seen_label(bound.stage)] is None:
                    continue
                # What is found and not cut leaves the text to others.
                stage_cuts = (
                    cuts if bound.is_cut else DocumentCuts(SpanSet(), SpanSet())
                )
                judge = self._judges[name]
                verdicts = judge.judge(document, stage_cuts)
                looked.append((judge, stage_cuts))
                kept_document = verdicts.get(KEPT_DOCUMENT)
                if kept_document is not None:
                    verdicts["of"] = self._get_id(kept_document)
                for label, value in verdicts.items():
                    values[f"{name}.{label}"] = value
                    self._settled.setdefault(f"{name}.{label}", {})[document] = value
            self._kept[document] = all(rule.holds(values) for rule in rules)
            if self._kept[document]:
                for judge, stage_cuts in looked:
                    judge.keep(document, stage_cuts)

    def _is_verdict(self, name: str) -> bool:
        return any(
            isinstance(bound.stage, CrossDocumentStage)
            and name in bound.stage.neutral_verdicts
            for bound in self._plan.stages
        )

    def _seen_label(self, stage: CrossDocumentStage) -> str:
        """Names a label that is null where the stage did not look, and only there."""
        return next(
            name
            for name, neutral in stage.neutral_verdicts.items()
            if neutral not in (None, ())
        )

    def _get_id(self, document: int) -> str:
        row = int(np.searchsorted(self._related, document))
        return self._table.column("id")[row].as_py()

    def _read_values(self, row: int, document: int) -> dict[str, Any]:
        """Reads the labels of a document, with what is settled of it so far."""
        values: dict[str, Any] = {}
        for name in self._table.column_names:
            values[name] = self._table.column(name)[row].as_py()
        for bound in self._plan.stages:
            if not isinstance(bound.stage, CrossDocumentStage):
                continue
            is_seen = values[self._seen_label(bound.stage)] is not None
            for name, neutral in bound.stage.neutral_verdicts.items():
                values[name] = neutral if is_seen else None
        for name, settled in self._settled.items():
            if document in settled:
                values[name] = settled[document]
        for bound in self._plan.stages:
            if document in self._masked[bound.stage.unique_name]:
                values.update(dict.fromkeys(bound.labels))
        return values

    def _add_fixed_cuts(
        self,
        document: int,
        names: Sequence[str],
        values: Mapping[str, Any],
        phase: Sequence[VerdictStage],
        cuts: DocumentCuts,
    ) -> None:
        """Adds the words that are cut of a document whatever the verdicts are."""
        spans = [
            (span["start"], span["end"])
            for name in names
            for span in values[name] or ()
        ]
        judges = [
            self._judges.get(bound.stage.unique_name) for bound in phase if bound.is_cut
        ]
        for judge in judges if spans else ():
            if isinstance(judge, PassageJudge):
                for span in judge.find_words(document, spans):
                    cuts.cut.add(*span)

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Write the settled labels, as files of `folder`."""
        types = self._types | {
            name: pa.int64() for name in names if name.endswith(f".{KEPT_DOCUMENT}")
        }
        schema = pa.schema([(name, types[name]) for name in names])
        columns = [name for name in names if name in self._types]
        for index, shard in enumerate(self._shards):
            document = self._offsets[index]
            with open_shard_writer(folder / f"{shard.name}.parquet", schema) as writer:
                for table in shard.read_row_groups(columns):
                    writer.write_row_group(self._settle_group(table, document, schema))
                    document += table.num_rows
            self._progress("settling copies: writing", index + 1, len(self._shards))
        for path in folder.glob("*.layouts"):
            path.unlink()

    def _settle_group(
        self, table: pa.RecordBatch, first: int, schema: pa.Schema
    ) -> pa.RecordBatch:
        """Returns the settled labels of a row group, whose first document is
        `first`."""
        columns: dict[str, pa.Array] = {}
        start, stop = np.searchsorted(self._related, [first, first + table.num_rows])
        related = self._related[start:stop].tolist()
        for bound in self._plan.stages:
            name = bound.stage.unique_name
            masked = self._masked[name]
            neutral: Mapping[str, Any] = {}
            if isinstance(bound.stage, CrossDocumentStage):
                neutral = bound.stage.neutral_verdicts
            labels = [
                label for label in schema.names if label.rpartition(".")[0] == name
            ]
            for label in labels:
                if isinstance(bound.stage, CrossDocumentStage) and (
                    label in neutral or label not in self._types
                ):
                    values = self._list_neutral_values(table, bound.stage, label)
                else:
                    values = table.column(label).to_pylist()
                settled = self._settled.get(label, {})
                for document in related:
                    if document in masked:
                        values[document - first] = None
                    elif document in settled:
                        values[document - first] = settled[document]
                columns[label] = pa.array(values, schema.field(label).type)
        return pa.RecordBatch.from_pydict(columns, schema=schema)

    def _list_neutral_values(
        self, table: pa.RecordBatch, stage: CrossDocumentStage, label: str
    ) -> list[Any]:
        """Lists a verdict for documents that lose no text; None where the stage did not
        look."""
        value = stage.neutral_verdicts.get(label)
        seen = table.column(self._seen_label(stage)).is_valid().to_pylist()
        return [value if is_seen else None for is_seen in seen]
