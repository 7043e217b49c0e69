"""Stages of the corpus pipeline: settings that know how to label documents.

A stage that looks at documents one by one is a `PerDocumentStage`; one that compares
them with each other (deduplication) is a `CrossDocumentStage`. Neither changes a text,
except that a stage whose schema has a column "text" writes a new version, which the
stages after it read.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import pyarrow as pa
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.text import UNICODE
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.files import hash_file
from maxlm.runtime.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")
LabelTypes = Mapping[str, pa.DataType]
Verdicts = Mapping[str, bool | float | tuple[()] | None]
"""Labels by name and their values; the empty tuple: no spans."""
BatchLabelFn = Callable[[pa.RecordBatch], pa.RecordBatch]
"""Maps the columns a stage reads to the columns it adds, row by row. Pure."""


class JobRunner:
    """Runs the jobs of a stage and shows their progress."""

    def __init__(self, title: str, executor: TaskExecutor, progress: Progress):
        self._title = title
        self._executor = executor
        self._progress = progress

    def __call__(
        self,
        function: Callable[[Job], Result],
        jobs: Sequence[Job],
        step: str | None = None,
        num_done: int = 0,
    ) -> list[Result]:
        """Runs a function over jobs, `num_done` being done before; returns results as
        they come."""
        title = self._title if step is None else f"{self._title}: {step}"
        results = []
        total = len(jobs) + num_done
        self._progress(title, num_done, total)
        for result in self._executor.map_unordered(function, jobs):
            results.append(result)
            self._progress(title, num_done + len(results), total)
        return results


class Stage(Config):
    """Settings that every stage has. A subclass adds `stage: Literal["kind"] =
    "kind"`."""

    stage: str
    """Kind of the stage."""
    name: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]*$")
    """Prefix of its labels, and its folder; null: its kind. For stages that come
    twice."""
    where: str | None = None
    """Condition on the documents to label, an expression over the labels of earlier
    stages; null: all. The others' labels are null."""

    document_columns: ClassVar[tuple[str, ...]] = ("text",)
    """The columns of the documents that it reads."""
    label_types: ClassVar[LabelTypes] = {}
    """The columns that it adds. Strings that are no categories are large: they are not
    counted by value."""
    version: ClassVar[int] = 1
    """Raised when the same settings give other labels."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions of the extra `corpus` that it may import; see
    :meth:`list_packages`."""
    depends_on_unicode: ClassVar[bool] = False
    """Whether its labels depend on the version of Unicode's tables."""
    files_fix: ClassVar[str] = "check the names of the stage's files"
    """What to do about a file that cannot be read, for errors."""

    @property
    def unique_name(self) -> str:
        """The name that its labels begin with."""
        return self.name or self.stage

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns it reads: of the documents, or labels as "stage.label"."""
        return (*self.document_columns, *self.input_labels)

    @property
    def input_labels(self) -> Mapping[str, Literal["numbers", "strings"]]:
        """The labels it reads beside the text, and what each must hold."""
        return {}

    def schema(self) -> pa.Schema:
        """The columns it adds."""
        return pa.schema(dict(self.label_types))

    def list_packages(self) -> tuple[str, ...]:
        """Lists packages that its settings import; their versions go into the
        manifest."""
        return self.packages

    def list_input_files(self) -> Iterable[Path]:
        """Lists the files whose content decides its labels: models, lists, evaluation
        sets."""
        return ()

    def fingerprint(self) -> str:
        """A hash of all that decides its labels, but for the documents and labels it
        reads."""
        # `memory` changes no label, and `where` is in the key by other means.
        settings = self.model_dump(mode="json", exclude={"where", "memory"})
        parts = [type(self).__name__, self.version, settings]
        try:
            parts += [(path.name, hash_file(path)) for path in self.list_input_files()]
        except OSError as error:
            what = f"cannot read {error.filename}: {error.strerror}"
            raise MaxlmError(
                what, where=self.unique_name, fix=self.files_fix
            ) from error
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return f"{digest} {UNICODE}" if self.depends_on_unicode else digest


class PerDocumentStage(Stage):
    """A stage that labels each document by itself; opening it, once a process, loads
    models."""

    @abstractmethod
    def make_row_label_fn(self) -> Callable[..., Mapping[str, Any]]:
        """Returns a function from a row's `input_columns` to labels by name; others are
        null."""

    def make_batch_label_fn(self) -> BatchLabelFn:
        """The labelling function of a batch."""
        label = self.make_row_label_fn()
        schema = self.schema()

        def label_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
            # A row at a time: as Python values a batch would take several times its
            # size.
            rows = [
                label(*(v.as_py() for v in row))
                for row in zip(*batch.columns, strict=True)
            ]
            return pa.RecordBatch.from_pylist(rows, schema=schema)

        return label_rows


class CrossDocumentStage(Stage):
    """A stage that compares documents with each other: all that `where` selects.

    Which of several documents keeps a text depends on rules, so its `verdicts` are
    settled for each set of rules (`maxlm.corpus.settling`), from what it finds."""

    keep_by: str | None = None
    """The label by which the best of several documents is kept: the highest value wins,
    or with a minus in front ("-perplexity.value") the lowest; null, and among equals:
    the first document. Where rules name several stages that compare documents, one
    order goes for all of them: one label, which need be named once."""
    memory: int = Field(default=1 << 29, ge=1 << 10)
    """Bytes that a job may use, about; smaller means more files and jobs."""

    verdicts: ClassVar[Verdicts] = {}
    """Labels that say which of several documents loses a text, and what they are of a
    document that loses none. The stage's file has them as if every rule kept every
    document."""

    internal_labels: ClassVar[tuple[str, ...]] = ()
    """Labels from which verdicts are settled, and which tell a person nothing."""

    @property
    def neutral_verdicts(self) -> Verdicts:
        """The values of `verdicts` for a document that loses no text, by
        "stage.label"."""
        return {
            f"{self.unique_name}.{name}": value for name, value in self.verdicts.items()
        }

    @property
    def input_labels(self) -> Mapping[str, Literal["numbers", "strings"]]:
        return (
            {} if self.keep_by is None else {self.keep_by.removeprefix("-"): "numbers"}
        )

    @abstractmethod
    def label(
        self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner
    ) -> None:
        """Write the labels of every shard (`StageShardView.open_writer`).

        Large work goes through `run_jobs`, in jobs whose memory does not grow with the
        corpus; they pass data on by files in `scratch`, which stays if the run is
        killed and is deleted when the stage is done. The labels must not depend on the
        order in which jobs finish.
        """


class ShardLabeller:
    """Writes a stage's labels, shard by shard; the stage is opened with the first of
    them."""

    def __init__(self, stage: PerDocumentStage):
        self._stage = stage
        self._label: BatchLabelFn | None = None

    def __call__(self, shard: StageShardView) -> None:
        """Label one shard."""
        stage = self._stage
        try:
            self._label = self._label or stage.make_batch_label_fn()
            with shard.open_writer(stage.schema()) as writer:
                for rows in shard.read_selected_rows(stage.input_columns):
                    writer.write_selected_rows(rows, self._label(rows.batch))
        except MaxlmError as error:
            where = error.where or f"{stage.unique_name}, shard {shard.name}"
            raise MaxlmError(error.what, where=where, fix=error.fix) from error


def check_packages(packages: Sequence[str], required_by: str) -> None:
    """Checks that packages of the extra `corpus` are installed."""
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError as error:
            what = f"{required_by} needs {package}, which is not installed"
            raise MaxlmError(what, fix="pip install 'maxlm[corpus]'") from error
