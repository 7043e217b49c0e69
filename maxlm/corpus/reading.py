"""The first stage: source files of every format to shards of raw documents.

Nothing in a source file is fatal: what cannot be read is passed over and counted by
reason. A text is valid Unicode without NUL (bytes that are not UTF-8 and lone
surrogates become U+FFFD).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from maxlm.config import MaxlmError
from maxlm.corpus.crawl import CrawlSource, RawDocument, SkipCallback, read_warc
from maxlm.corpus.shards import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    StageShardView,
    open_shard_writer,
)
from maxlm.data.batching import batch_by_size
from maxlm.data.documents.document import FileSlice, SourceFile
from maxlm.data.documents.files import find_files
from maxlm.data.documents.reader import Record, read_records
from maxlm.data.documents.streams import (
    DamagedFile,
    check_unchanged,
    make_whole_slice,
    open_stream,
    scan_file,
)

# What is in memory at once, and so in a row group.
_GROUP_ROWS = 1024
_GROUP_BYTES = 16 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ReadJob:
    """One shard to be read."""

    shard: StageShardView
    source: CrawlSource
    slices: tuple[FileSlice, ...]


DocumentRow = dict[str, bytes | None]
"""The columns of a document, by name."""


class _LeftOut(Exception):
    """A document is left out; the argument is the reason."""


def plan_shards(
    folder: Path, sources: Sequence[CrawlSource], shard_bytes: int
) -> tuple[list[ReadJob], int]:
    """Cuts sources into shards; returns those to be read, and how many files are
    binary.

    A shard's name is made from what is in it (paths, sizes and times of files, and how
    they are read): a shard of the same name holds the same documents, and new files
    make new shards.
    """
    jobs = []
    num_binary_files = 0
    for source in sources:
        listing = find_files(source)
        num_binary_files += listing.num_binary_files
        slices = _cut_files(listing.files, shard_bytes)
        for parts in batch_by_size(slices, lambda part: part.size_bytes, shard_bytes):
            jobs.append(_make_job(folder, source, parts))
    return jobs, num_binary_files


def _cut_files(files: Iterable[SourceFile], shard_bytes: int) -> Iterator[FileSlice]:
    for file in files:
        if file.format == "corpus":
            fix = "name the files it was made of, or use it in a mixture"
            raise MaxlmError("this is a corpus already", where=file.name, fix=fix)
        try:
            slices = scan_file(file, shard_bytes, digest=False).slices
        except DamagedFile:  # Which the reader will count.
            slices = [make_whole_slice(file)]
        yield from slices


def _make_job(
    folder: Path, source: CrawlSource, slices: Sequence[FileSlice]
) -> ReadJob:
    description: list[object] = [source.model_dump(exclude={"documents"})]
    for part in slices:
        file = part.file
        # A file by its path: two names that are not Unicode may have become one.
        description.append(
            [str(file.path), file.size, file.mtime_ns, part.start, part.stop]
        )
    digest = hashlib.sha256(json.dumps(description).encode()).hexdigest()
    shard = StageShardView(folder, f"{source.name}-{digest[:16]}")
    return ReadJob(shard, source, tuple(slices))


def write_document_shard(job: ReadJob) -> None:
    """Writes a shard's documents."""
    with open_shard_writer(job.shard.path(DOCUMENTS), DOCUMENT_SCHEMA) as writer:
        rows = _make_rows(job, lambda reason: writer.counts.update([reason]))
        for group in batch_by_size(rows, _count_bytes, _GROUP_BYTES, _GROUP_ROWS):
            writer.write_row_group(
                pa.RecordBatch.from_pylist(group, schema=DOCUMENT_SCHEMA)
            )
        for part in job.slices:
            check_unchanged(part.file, "corpus")


def _count_bytes(row: DocumentRow) -> int:
    return sum(len(value or b"") for value in row.values())


def _make_rows(job: ReadJob, count: SkipCallback) -> Iterator[DocumentRow]:
    for part in job.slices:
        try:
            for document in _read_raw(job.source, part, count):
                try:
                    row = _make_row(job.source, document)
                except _LeftOut as reason:
                    count(str(reason))
                    continue
                yield row
        except DamagedFile:
            count("broken")  # The rest of the file; what came before is kept.


def _read_raw(
    source: CrawlSource, part: FileSlice, count: SkipCallback
) -> Iterator[RawDocument]:
    """Yields the documents of a part of a file; those that cannot be read are
    counted."""
    file = part.file
    max_bytes = source.max_document_bytes
    if file.format == "warc":
        yield from read_warc(file.path, count, max_record_bytes=max_bytes)
    elif file.is_html:
        with open_stream(file.path, file.compression) as stream:
            # One byte more tells that it is too long.
            page = stream.read(max_bytes + 1)
        yield RawDocument(id=file.name, url=None, html=page, text=None)
    else:
        for record in read_records(source, part, max_bytes=max_bytes, with_fields=True):
            if record.skip_reason:
                count(record.skip_reason)
            else:
                yield _convert_record(source, record)


def _convert_record(source: CrawlSource, record: Record) -> RawDocument:
    """Makes a document of a row of JSONL or Parquet or of a text; its other fields
    become `meta`."""
    meta = {key: value for key, value in record.fields.items() if value is not None}
    url = meta.pop(source.url_field, None)
    document_id = meta.pop("id", record.id)
    text = None
    if record.text is not None:
        text = record.text.decode().removeprefix("\ufeff")  # A byte order mark.
    return RawDocument(
        id=str(document_id),
        url=url if isinstance(url, str) else None,
        html=None,
        text=text,
        meta=meta,
    )


def _make_row(source: CrawlSource, document: RawDocument) -> DocumentRow:
    """Makes a document's columns. Raises _LeftOut: it is no document.

    Texts of all kinds are UTF-8 without NUL from here on.
    """
    text = _encode(document.text)
    content = document.html or text or b""
    if len(content) > source.max_document_bytes:
        raise _LeftOut("too_large")
    has_text = document.text is not None and document.text.strip()
    if not document.html and not has_text:
        raise _LeftOut("empty")
    meta = None
    if document.meta:
        try:
            meta = json.dumps(document.meta, default=str)
        except RecursionError as error:
            raise _LeftOut("broken") from error
    return {
        "id": _encode(document.id),
        "source": source.name.encode(),
        "url": _encode(document.url),
        "text": text,
        "html": document.html,
        "meta": _encode(meta),
    }


def _encode(text: str | None) -> bytes | None:
    """Encodes a text as UTF-8, without what no text column can hold."""
    if text is None:
        return None
    return _SURROGATE.sub("\ufffd", text.replace("\0", "")).encode()
