"""Shards of a corpus on disk: documents, and beside them the labels of each stage, row
by row.

A corpus is a folder with a folder for each stage; `CORPUS/STAGE/SHARD.parquet` holds
that stage's columns for the shard's documents, in the documents' order and in the same
row groups. So labels are added without a text being written again, and any set of
columns can be read side by side a row group at a time, which bounds memory whatever the
size of a shard.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maxlm.config import MaxlmError
from maxlm.corpus.expression import Expression
from maxlm.data.documents.streams import open_parquet, open_stream
from maxlm.runtime.checksums import (
    CHECKSUMS_NAME,
    check_files,
    parse_checksums,
    read_checksums,
    write_checksums,
)
from maxlm.runtime.files import convert_write_errors, hash_file, replace_file

_REPAIR = (
    "delete each such file and run the corpus's recipe again, which makes them anew"
)
DOCUMENTS = "documents"
"""The name of the stage that reads sources."""
DOCUMENT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("url", pa.string()),
        ("text", pa.large_string()),
        ("html", pa.large_binary()),
        ("meta", pa.string()),
    ]
)
"""A document: text as it was read, or HTML that no stage has turned into text yet; meta
is JSON."""


@dataclass(frozen=True)
class SelectedRows:
    """The documents of one row group that a stage is to label."""

    batch: pa.RecordBatch
    """The columns that were asked for."""
    row_indices: np.ndarray
    """Indices of the rows of `batch` in the row group: int64 [batch.num_rows],
    rising."""
    num_rows: int
    """Rows in the row group."""
    first_row: int
    """The row group's first row, counted within the shard."""


@dataclass(frozen=True)
class StageShardView:
    """The view that a stage has of one shard. Picklable, and small."""

    folder: Path
    """The corpus."""
    name: str
    text_stages: tuple[str, ...] = (DOCUMENTS,)
    """The stages before this one that wrote a version of the text, oldest first."""
    where: Expression | None = None
    """Condition on the documents to label; None: all."""
    output_stage: str = ""
    """The stage that writes."""
    settled_labels: tuple[str, ...] = ()
    """Labels that are read from `settled_folder`, as `settling.settle_verdicts` wrote
    them."""
    settled_folder: str = ""
    """Folder of the settled labels, below the corpus."""

    def path(self, stage: str) -> Path:
        """The file with a stage's columns."""
        return self.folder / stage / f"{self.name}.parquet"

    def count_documents(self) -> int:
        """Counts the shard's documents, whatever `where` says."""
        with open_parquet(self.path(DOCUMENTS)) as parquet:
            return parquet.metadata.num_rows

    def read_selected_rows(self, columns: Sequence[str]) -> Iterator[SelectedRows]:
        """Yields the documents to label, a row group at a time; those without a text
        only if "text" is not among the columns. `columns`: columns of `DOCUMENT_SCHEMA`
        or labels as "stage.label". "text" is the newest version a document has."""
        condition_labels = self.where.label_names if self.where else ()
        needed = dict.fromkeys([*columns, *condition_labels])
        first_row = 0
        for table in self.read_row_groups(list(needed)):
            if self.where:
                is_selected = self.where.evaluate(table)
            else:
                is_selected = np.ones(table.num_rows, np.bool_)
            if "text" in columns:
                is_selected = is_selected & mark_valid(table.column("text"))
            row_indices = np.flatnonzero(is_selected)
            batch = table.select(list(columns))
            if len(row_indices) < table.num_rows:
                batch = batch.take(pa.array(row_indices))
            yield SelectedRows(batch, row_indices, table.num_rows, first_row)
            first_row += table.num_rows

    def read_row_groups(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields every row of the given columns, a row group at a time, whatever
        `where` says."""
        # Those of the documents are always opened: they say how many row groups there
        # are.
        stages = {DOCUMENTS}
        for column in columns:
            stages.update(stage for stage, _ in self.find_column_sources(column))
        with ExitStack() as stack:
            files = {
                stage: stack.enter_context(open_parquet(self.path(stage)))
                for stage in sorted(stages)
            }
            for group in range(files[DOCUMENTS].num_row_groups):
                arrays = [self._read(files, group, column) for column in columns]
                yield pa.RecordBatch.from_arrays(arrays, list(columns))

    def _read(
        self, files: Mapping[str, pq.ParquetFile], group: int, column: str
    ) -> pa.Array:
        """Reads a column of a row group: of several versions each row's newest."""
        versions = []
        for stage, name in self.find_column_sources(column):
            if name not in files[stage].schema_arrow.names:
                message = (
                    f'there is no column "{name}": another version of maxlm made this '
                    "file"
                )
                fix = "delete the stage's folder and run the recipe again"
                raise MaxlmError(message, where=str(self.path(stage)), fix=fix)
            table = files[stage].read_row_group(group, columns=[name])
            versions.append(pa.concat_arrays(table.column(name).chunks))
        newest, *older_versions = versions
        for older in older_versions:
            newest = newest.fill_null(older)
        return newest

    def find_column_sources(self, column: str) -> list[tuple[str, str]]:
        """Finds the files that hold a column: (stage, column in its file), newest text
        first."""
        if column in self.settled_labels:
            return [(self.settled_folder, column)]
        if column == "text":
            return [(stage, "text") for stage in reversed(self.text_stages)]
        stage, dot, label = column.rpartition(".")
        return [(stage, label)] if dot else [(DOCUMENTS, column)]

    def open_writer(self, schema: pa.Schema) -> AbstractContextManager["ShardWriter"]:
        """Writes this shard's labels: `write_selected_rows` for each of
        `read_selected_rows`."""
        return open_shard_writer(self.path(self.output_stage), schema)


class ShardWriter:
    """Writes row groups to a Parquet file, and counts its labels."""

    def __init__(self, parquet: pq.ParquetWriter):
        self._parquet = parquet
        self.counts = Counter[str]()

    def write_selected_rows(self, rows: SelectedRows, labels: pa.RecordBatch) -> None:
        """Writes the labels of `rows.batch`; the row group's other documents get
        nulls."""
        num_selected = len(rows.row_indices)
        if num_selected < rows.num_rows:
            label_rows = np.full(rows.num_rows, -1, np.int64)
            label_rows[rows.row_indices] = np.arange(num_selected)
            labels = labels.take(pa.array(label_rows, mask=label_rows < 0))
        self.write_row_group(labels, num_labelled=num_selected)

    def write_row_group(
        self, batch: pa.RecordBatch, num_labelled: int | None = None
    ) -> None:
        """Writes one row group. `num_labelled`: rows that were selected; None:
        all."""
        num_rows: int = batch.num_rows
        self.counts["rows"] += num_rows
        self.counts["labelled"] += num_rows if num_labelled is None else num_labelled
        for field, column in zip(batch.schema, batch.columns, strict=True):
            is_category = (
                pa.types.is_string(field.type)
                and field.name not in DOCUMENT_SCHEMA.names
            )
            if pa.types.is_boolean(field.type):
                num_true = column.sum().as_py()  # None, if all are null.
                self.counts[f"{field.name}=true"] += num_true or 0
            elif is_category:
                for entry in column.drop_null().value_counts().to_pylist():
                    self.counts[f"{field.name}={entry['values']}"] += entry["counts"]
        batch = batch.cast(self._parquet.schema)
        self._parquet.write_batch(batch, row_group_size=batch.num_rows)


@contextmanager
def open_shard_writer(path: Path, schema: pa.Schema) -> Iterator[ShardWriter]:
    """Opens a Parquet file to write, which appears when complete, with counts of its
    labels."""
    with convert_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replace_file(path) as new,
        pq.ParquetWriter(
            new, schema, compression="zstd", write_page_checksum=True
        ) as parquet,
    ):
        writer = ShardWriter(parquet)
        yield writer
        parquet.add_key_value_metadata({"counts": json.dumps(writer.counts)})


def mark_valid(column: pa.Array) -> np.ndarray:
    """Marks the rows of a column that are not null: bool [rows]."""
    return column.is_valid().to_numpy(zero_copy_only=False)


def read_counts(path: Path) -> Counter[str]:
    """Reads a finished shard's counts: rows, labelled ones, true flags and categories
    by value."""
    with open_parquet(path) as parquet:
        metadata = parquet.metadata.metadata or {}
    return Counter(json.loads(metadata.get(b"counts", b"{}")))


FileIdentity = tuple[int, int, int]
"""Inode, size in bytes and time of the last change in nanoseconds: equal only while a
file is not replaced."""


def read_file_identities(paths: Iterable[Path]) -> dict[Path, FileIdentity]:
    """Reads the identity of each of the files that exist."""
    identities = {}
    for path in paths:
        with suppress(FileNotFoundError):
            state = path.stat()
            identities[path] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return identities


def write_shard_checksums(
    folder: Path, paths: Sequence[Path], before: Mapping[Path, FileIdentity]
) -> str:
    """Writes the list of the SHA-256s of a stage's shards into its folder; returns the
    SHA-256 of the list.

    A shard that the last list has and that is the file it was `before` keeps its
    SHA-256: damage since then must not become what is checked against.
    """
    with convert_write_errors(folder):
        text = ""
        with suppress(FileNotFoundError):
            text = (folder / CHECKSUMS_NAME).read_text("utf-8", "replace")
        now = read_file_identities(paths)
        unchanged = {path.name for path in paths if before.get(path) == now[path]}
        known_digests = {
            name: digest
            for name, digest in parse_checksums(text).items()
            if name in unchanged
        }
        return write_checksums(folder, [path.name for path in paths], known_digests)


def verify_shards(folder: Path, paths: Sequence[Path], list_sha256: str | None) -> None:
    """Reads the shards of a stage, and raises MaxlmError if one is not as it was
    written.

    `list_sha256`: of the list of checksums in `folder`; None: the stage has none, and
    the checksums of the pages are checked alone.
    """
    if list_sha256 is not None:
        check_files(folder, {"": list_sha256}, _REPAIR)
        return
    for path in paths:
        with open_parquet(path) as parquet:
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group)


def read_shard_checksums(folder: Path, list_sha256: str | None) -> dict[Path, str]:
    """Reads the SHA-256 of each of a stage's shards; none if the stage has no list of
    them."""
    if list_sha256 is None:
        return {}
    digest_by_name = read_checksums(folder, list_sha256, _REPAIR)
    return {folder / name: digest for name, digest in digest_by_name.items()}


def check_shard(path: Path, digest: str | None) -> None:
    """Raises MaxlmError if a shard is not the one with this SHA-256; None: it is not
    known."""
    if digest is None:
        return
    with open_stream(path, "none"):  # Says what keeps a file from being read.
        is_same = hash_file(path) == digest
    if not is_same:
        message = "this file has changed since maxlm corpus run wrote it"
        raise MaxlmError(message, where=str(path), fix=_REPAIR)
