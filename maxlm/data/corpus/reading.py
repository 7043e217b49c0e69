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

from maxlm.config import MaxlmError
from maxlm.data.corpus.config import CrawlSource
from maxlm.data.corpus.crawl import RawDocument, read_warc
from maxlm.data.corpus.files import SourceFile, find_files
from maxlm.data.corpus.shards import DOCUMENT_SCHEMA, DOCUMENTS, Shard, ShardWriter
from maxlm.data.corpus.slices import FileSlice, open_parquet, scan_file, whole
from maxlm.data.corpus.streams import open_stream

# What is in memory at once, and so in a row group.
_GROUP_ROWS = 1024
_GROUP_BYTES = 16 << 20
_PARQUET_ROWS = 64
_HTML = (".html", ".htm", ".xhtml")
_SURROGATE = re.compile("[\ud800-\udfff]")

Count = Callable[[str], None]


@dataclass(frozen=True)
class ReadJob:
    """One shard to be read."""

    shard: Shard
    source: CrawlSource
    slices: tuple[FileSlice, ...]


def plan_shards(folder: Path, sources: Sequence[CrawlSource], shard_bytes: int) -> list[ReadJob]:
    """Cut sources into shards.

    A shard's name is made from what is in it (names, sizes and times of files, and how they are
    read): a shard of the same name holds the same documents, and new files make new shards.

    Raises:
        MaxlmError: anything `find_files` refuses.
    """
    jobs = []
    for source in sources:
        slices: list[FileSlice] = []
        size = 0
        for file in find_files(source).files:
            if file.format == "corpus":
                fix = "name the files it was made of, or use it in a mixture"
                raise MaxlmError("this is a corpus already", where=file.name, fix=fix)
            for each in _slices(file, shard_bytes):
                slices.append(each)
                size += each.size
                if size >= shard_bytes:
                    jobs.append(_job(folder, source, slices))
                    slices, size = [], 0
        if slices:
            jobs.append(_job(folder, source, slices))
    return jobs


def _slices(file: SourceFile, shard_bytes: int) -> tuple[FileSlice, ...]:
    try:
        return scan_file(file, shard_bytes, digest=False).slices
    except MaxlmError:
        return (whole(file),)  # Damaged, which the reader will count.


def _job(folder: Path, source: CrawlSource, slices: Sequence[FileSlice]) -> ReadJob:
    parts: list[Any] = [source.model_dump(exclude={"documents"})]
    for each in slices:
        state = each.file.path.stat()
        parts.append([each.file.name, state.st_size, state.st_mtime_ns, each.start, each.stop])
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return ReadJob(Shard(folder, f"{source.name}-{digest[:16]}"), source, tuple(slices))


def read_shard(job: ReadJob) -> None:
    """Write a shard's documents."""
    with ShardWriter(job.shard.path(DOCUMENTS), DOCUMENT_SCHEMA) as writer:
        rows: list[RawDocument] = []
        size = 0
        for document in _documents(job, writer.count):
            rows.append(document)
            size += len(document.html or b"") + len(document.text or "")
            if size >= _GROUP_BYTES or len(rows) == _GROUP_ROWS:
                writer.add(_batch(job.source.name, rows))
                rows, size = [], 0
        if rows:
            writer.add(_batch(job.source.name, rows))


def _batch(source: str, rows: Sequence[RawDocument]) -> pa.RecordBatch:
    columns = {
        "id": [row.id for row in rows],
        "source": [source] * len(rows),
        "url": [row.url for row in rows],
        "text": [row.text for row in rows],
        "html": [row.html for row in rows],
        "meta": [json.dumps(row.meta, default=str) if row.meta else None for row in rows],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in DOCUMENT_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=DOCUMENT_SCHEMA)


def _documents(job: ReadJob, count: Count) -> Iterator[RawDocument]:
    for part in job.slices:
        try:
            for document in _reader(part)(job.source, part, count):
                if len(document.html or document.text or "") > job.source.max_document_bytes:
                    count("too_large")
                elif document.html or (document.text and document.text.strip()):
                    yield document
                else:
                    count("empty")
        except MaxlmError as error:
            # The rest of a damaged file; what came before is kept.
            if "not installed" in error.what:
                raise
            count("broken")


Reader = Callable[[CrawlSource, FileSlice, Count], Iterator[RawDocument]]


def _reader(part: FileSlice) -> Reader:
    if part.file.format == "warc":
        return _read_warc
    if part.file.format == "text" and part.file.path.name.lower().endswith(_HTML):
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
                return
            if (text := _text(source, piece)) is None:
                count("bad_bytes")
            else:
                yield RawDocument(id=name, url=None, html=None, text=text, meta={})
            number += 1


def _read_jsonl(source: CrawlSource, part: FileSlice, count: Count) -> Iterator[RawDocument]:
    file, number, position = part.file, part.first, part.start
    # A line holds a text with its escapes, six bytes a character at worst, and other fields.
    limit = 8 * source.max_document_bytes
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
                    row = json.loads(line.decode("utf-8-sig", "replace"))
                    yield _from_row(source, name, row)
                except (ValueError, RecursionError, TypeError, KeyError):
                    count("broken")


def _read_parquet(source: CrawlSource, part: FileSlice, count: Count) -> Iterator[RawDocument]:
    row = part.first
    with open_parquet(part.file.path) as parquet:
        stop = parquet.num_row_groups if part.stop is None else part.stop
        groups = list(range(part.start, stop))
        for batch in parquet.iter_batches(_PARQUET_ROWS, row_groups=groups) if groups else ():
            for each in batch.to_pylist():
                try:
                    yield _from_row(source, f"{part.file.name}:{row}", each)
                except (TypeError, KeyError):
                    count("broken")
                row += 1


def _from_row(source: CrawlSource, name: str, row: dict[str, Any]) -> RawDocument:
    """A document from named fields. Raises KeyError or TypeError where there is no text in them."""
    text = row.pop(source.text_field)
    if text is not None:
        if not isinstance(text, str | bytes):
            raise TypeError(type(text).__name__)
        raw = _SURROGATE.sub("\ufffd", text).encode() if isinstance(text, str) else text
        text = _text(source, raw)
    url = row.pop(source.url_field, None)
    id_ = row.pop("id", None)
    return RawDocument(
        id=str(id_) if id_ is not None else name,
        url=url if isinstance(url, str) else None,
        html=None,
        text=text,
        meta={k: v for k, v in row.items() if v is not None},
    )


def _text(source: CrawlSource, data: bytes) -> str | None:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if source.on_bad_bytes == "skip":
            return None
        text = data.decode("utf-8-sig", "replace")
    return text.replace("\0", "")
