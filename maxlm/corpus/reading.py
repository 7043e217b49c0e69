"""The first stage: source files of every format to shards of raw documents.

Nothing in a source file is fatal: what cannot be read is passed over and counted by reason. A text
is valid Unicode without NUL (bytes that are not UTF-8 and lone surrogates become U+FFFD).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maxlm.config import MaxlmError
from maxlm.corpus.config import CrawlSource
from maxlm.corpus.crawl import RawDocument, read_warc
from maxlm.corpus.files import SourceFile, find_files
from maxlm.corpus.shards import DOCUMENT_SCHEMA, DOCUMENTS, Shard, ShardWriter
from maxlm.corpus.slices import FileSlice, check_unchanged, open_parquet, scan_file, whole
from maxlm.corpus.streams import DamagedFile, open_stream

# What is in memory at once, and so in a row group.
_GROUP_ROWS = 1024
_GROUP_BYTES = 16 << 20
_BATCH_ROWS = 64
_BATCH_BYTES = 64 << 20
_ROW = 8  # A line of JSON may be so much longer than a document, and so may Parquet's other fields.
_SURROGATE = re.compile("[\ud800-\udfff]")

Count = Callable[[str], None]


@dataclass(frozen=True)
class ReadJob:
    """One shard to be read."""

    shard: Shard
    source: CrawlSource
    slices: tuple[FileSlice, ...]
    mtimes_ns: tuple[int, ...]
    """Of their files."""


@dataclass(frozen=True)
class Planned:
    """What is to be read, and how many files were passed over as binary."""

    jobs: list[ReadJob]
    num_binary: int


def plan_shards(folder: Path, sources: Sequence[CrawlSource], shard_bytes: int) -> Planned:
    """Cut sources into shards.

    A shard's name is made from what is in it (paths, sizes and times of files, and how they are
    read): a shard of the same name holds the same documents, and new files make new shards.

    Raises:
        MaxlmError: anything `find_files` refuses.
    """
    jobs = []
    num_binary = 0
    for source in sources:
        slices: list[tuple[FileSlice, int]] = []
        size = 0
        listing = find_files(source)
        num_binary += listing.num_binary
        for file in listing.files:
            if file.format == "corpus":
                fix = "name the files it was made of, or use it in a mixture"
                raise MaxlmError("this is a corpus already", where=file.name, fix=fix)
            mtime, parts = _slices(file, shard_bytes)
            for each in parts:
                slices.append((each, mtime))
                size += each.size
                if size >= shard_bytes:
                    jobs.append(_job(folder, source, slices))
                    slices, size = [], 0
        if slices:
            jobs.append(_job(folder, source, slices))
    return Planned(jobs, num_binary)


def _slices(file: SourceFile, shard_bytes: int) -> tuple[int, tuple[FileSlice, ...]]:
    """When a file was changed last, and its slices."""
    mtime = file.path.stat().st_mtime_ns
    try:
        scan = scan_file(file, shard_bytes, digest=False)
    except DamagedFile:
        return mtime, (whole(file),)  # Damaged, which the reader will count.
    return scan.mtime_ns, scan.slices


def _job(folder: Path, source: CrawlSource, dated: Sequence[tuple[FileSlice, int]]) -> ReadJob:
    slices, mtimes = zip(*dated, strict=True)
    parts: list[Any] = [source.model_dump(exclude={"documents"})]
    for each, mtime in dated:
        # By its path: two names that are not Unicode may have become one.
        path = str(each.file.path)
        parts.append([path, each.file.size, mtime, each.start, each.stop])
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return ReadJob(Shard(folder, f"{source.name}-{digest[:16]}"), source, slices, mtimes)


def read_shard(job: ReadJob) -> None:
    """Write a shard's documents.

    Raises:
        MaxlmError: a source file changed since the shards were planned.
    """
    _check_unchanged(job)
    with ShardWriter(job.shard.path(DOCUMENTS), DOCUMENT_SCHEMA) as writer:
        rows: list[dict[str, bytes | None]] = []
        size = 0
        for row in _rows(job, writer.count):
            rows.append(row)
            size += sum(len(value) for value in row.values() if value is not None)
            if size >= _GROUP_BYTES or len(rows) == _GROUP_ROWS:
                writer.add(pa.RecordBatch.from_pylist(rows, schema=DOCUMENT_SCHEMA))
                rows, size = [], 0
        if rows:
            writer.add(pa.RecordBatch.from_pylist(rows, schema=DOCUMENT_SCHEMA))
        _check_unchanged(job)


def _check_unchanged(job: ReadJob) -> None:
    for part, mtime in zip(job.slices, job.mtimes_ns, strict=True):
        check_unchanged(part.file, mtime, "corpus")


def _rows(job: ReadJob, count: Count) -> Iterator[dict[str, bytes | None]]:
    """Rows of `DOCUMENT_SCHEMA`."""
    for part in job.slices:
        try:
            for document in _reader(part)(job.source, part, count):
                try:
                    yield _row(job.source, document)
                except _PassOver as why:
                    count(str(why))
        except DamagedFile:
            count("broken")  # The rest of the file; what came before is kept.


def _row(source: CrawlSource, document: RawDocument) -> dict[str, bytes | None]:
    """A document's columns. Texts of all kinds are UTF-8 without NUL from here on.

    Raises:
        _PassOver: it is too large or empty, or its other fields are nested too deeply.
    """
    text = document.text
    row = {
        "id": _utf8(document.id),
        "source": source.name.encode(),
        "url": _utf8(document.url),
        "text": _utf8(text),
        "html": document.html,
    }
    if len(row["html"] or row["text"] or b"") > source.max_document_bytes:
        raise _PassOver("too_large")
    if not document.html and not (text and text.strip()):
        raise _PassOver("empty")
    try:
        meta = json.dumps(document.meta, default=str) if document.meta else None
    except RecursionError as error:
        raise _PassOver("broken") from error
    return {**row, "meta": _utf8(meta)}


def _utf8(text: str | None) -> bytes | None:
    return None if text is None else _SURROGATE.sub("\ufffd", text.replace("\0", "")).encode()


class _PassOver(Exception):
    """What was read is no document; the argument says why."""


Reader = Callable[[CrawlSource, FileSlice, Count], Iterator[RawDocument]]


def _reader(part: FileSlice) -> Reader:
    if part.file.format == "warc":
        return _read_warc
    if part.file.is_html:
        return _read_html
    return {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[part.file.format]


def _read_warc(source: CrawlSource, part: FileSlice, count: Count) -> Iterator[RawDocument]:
    yield from read_warc(part.file.path, count, max_bytes=source.max_document_bytes)


def _read_html(source: CrawlSource, part: FileSlice, count: Count) -> Iterator[RawDocument]:
    del count  # The caller counts what is too large.
    with open_stream(part.file.path, part.file.compression) as stream:
        data = stream.read(source.max_document_bytes + 1)
    yield RawDocument(id=part.file.name, url=None, html=data, text=None, meta={})


def _read_text(source: CrawlSource, part: FileSlice, count: Count) -> Iterator[RawDocument]:
    limit, size = source.max_document_bytes, source.piece_bytes
    with open_stream(part.file.path, part.file.compression) as stream:
        number = 0
        while piece := stream.read(size or limit + 1):
            if size and not piece.endswith(b"\n"):
                piece += stream.readline(limit)
            name = part.file.name if size is None else f"{part.file.name}#{number}"
            if len(piece) > limit:
                count("too_large")
                if size is None:
                    return
                while piece and not piece.endswith(b"\n"):
                    piece = stream.readline(limit)
            elif (text := _text(source, piece)) is None:
                count("bad_bytes")
            else:
                yield RawDocument(id=name, url=None, html=None, text=text, meta={})
            number += 1


def _read_jsonl(source: CrawlSource, part: FileSlice, count: Count) -> Iterator[RawDocument]:
    file, number, position = part.file, part.first, part.start
    # A line holds a text with its escapes, six bytes a character at worst, and other fields.
    limit = _ROW * source.max_document_bytes
    with open_stream(file.path, file.compression) as stream:
        if position:
            stream.seek(position)
        while (part.stop is None or position < part.stop) and (line := stream.readline(limit)):
            position += len(line)
            name, number = f"{file.name}:{number}", number + 1
            if len(line) == limit and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(limit)
                    position += len(line)
                count("too_large")
            elif line.strip():
                try:
                    if (decoded := _text(source, line)) is None:
                        raise _PassOver("bad_bytes")
                    yield _from_row(source, name, json.loads(decoded))
                except _PassOver as why:
                    count(str(why))
                except (ValueError, RecursionError, TypeError, KeyError):
                    count("broken")


def _read_parquet(source: CrawlSource, part: FileSlice, count: Count) -> Iterator[RawDocument]:
    row = part.first
    with open_parquet(part.file.path) as parquet:
        for batch in _batches(parquet, part):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for i in range(batch.num_rows):
                try:
                    fields = {n: _value(source, n, column, i) for n, column in columns.items()}
                    yield _from_row(source, f"{part.file.name}:{row}", fields)
                except _PassOver as why:
                    count(str(why))
                except (TypeError, KeyError, RecursionError):
                    count("broken")
                row += 1


def _batches(parquet: pq.ParquetFile, part: FileSlice) -> Iterator[pa.RecordBatch]:
    """A slice's rows, of each row group as many at a time as are no more than some MB."""
    for index in range(part.start, parquet.num_row_groups if part.stop is None else part.stop):
        group = parquet.metadata.row_group(index)
        size = sum(group.column(c).total_uncompressed_size for c in range(group.num_columns))
        fit = _BATCH_BYTES * group.num_rows // max(size, 1)
        yield from parquet.iter_batches(min(max(fit, 1), _BATCH_ROWS), row_groups=[index])


def _value(source: CrawlSource, name: str, column: pa.Array, row: int) -> Any:
    """A value of a column, None if Python cannot hold it.

    Strings come as bytes, since Arrow does not check that they are UTF-8.

    Raises:
        _PassOver: it is too large.
    """
    limit = source.max_document_bytes * (1 if name == source.text_field else _ROW)
    try:
        scalar = column[row]
        if isinstance(scalar, pa.DictionaryScalar):
            scalar = scalar.value
        if isinstance(scalar, pa.BinaryScalar):
            buffer = scalar.as_buffer()
            if buffer is None:
                return None
            if buffer.size <= limit:
                return buffer.to_pybytes()
        elif pa.types.is_dictionary(column.type) or column.slice(row, 1).nbytes <= limit:
            return scalar.as_py()
    except Exception:  # Unknown time zones, durations of millions of years, ...: of many types.
        return None
    raise _PassOver("too_large")


def _from_row(source: CrawlSource, name: str, row: Any) -> RawDocument:
    """A document from named fields.

    Raises:
        KeyError, TypeError: there is no text in them.
        _PassOver: its bytes are no text.
    """
    if not isinstance(row, dict):
        raise TypeError(type(row).__name__)
    text = row.pop(source.text_field)
    if text is not None:
        if not isinstance(text, str | bytes):
            raise TypeError(type(text).__name__)
        if (text := _text(source, text)) is None:
            raise _PassOver("bad_bytes")
    fields = {
        k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for k, v in row.items()
    }
    url, id_ = fields.pop(source.url_field, None), fields.pop("id", None)
    return RawDocument(
        id=str(id_) if id_ is not None else name,
        url=url if isinstance(url, str) else None,
        html=None,
        text=text,
        meta={k: v for k, v in fields.items() if v is not None},
    )


def _text(source: CrawlSource, data: bytes | str) -> str | None:
    """The text of UTF-8 bytes, or of a string with lone surrogates; None: it is to be skipped."""
    if isinstance(data, str):
        return None if source.on_bad_bytes == "skip" and _SURROGATE.search(data) else data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None if source.on_bad_bytes == "skip" else data.decode("utf-8-sig", "replace")
