"""The first stage: source files of every format to shards of raw documents.

Nothing in a source file is fatal: what cannot be read is passed over and counted by
reason. A text is valid Unicode without NUL (bytes that are not UTF-8 and lone
surrogates become U+FFFD).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from maxlm.data.documents.reader import read_records
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


def plan_shards(
    folder: Path, sources: Sequence[CrawlSource], shard_bytes: int
) -> tuple[list[ReadJob], int]:
    """Cut sources into shards; returns those to be read, and how many files are binary.

    A shard's name is made from what is in it (paths, sizes and times of files, and how
    they are read): a shard of the same name holds the same documents, and new files
    make new shards.
    """
    jobs = []
    num_binary_files = 0
    for source in sources:
        listing = find_files(source)
        num_binary_files += listing.num_binary_files
        slices = (
            each for file in listing.files for each in _cut_file(file, shard_bytes)
        )
        for parts in batch_by_size(slices, lambda each: each.size_bytes, shard_bytes):
            jobs.append(_make_job(folder, source, parts))
    return jobs, num_binary_files


def _cut_file(file: SourceFile, shard_bytes: int) -> Sequence[FileSlice]:
    if file.format == "corpus":
        fix = "name the files it was made of, or use it in a mixture"
        raise MaxlmError("this is a corpus already", where=file.name, fix=fix)
    try:
        return scan_file(file, shard_bytes, digest=False).slices
    except DamagedFile:  # Which the reader will count.
        return [make_whole_slice(file)]


def _make_job(
    folder: Path, source: CrawlSource, slices: Sequence[FileSlice]
) -> ReadJob:
    # A file by its path: two names that are not Unicode may have become one.
    parts: list[Any] = [source.model_dump(exclude={"documents"})] + [
        [str(each.file.path), each.file.size, each.file.mtime_ns, each.start, each.stop]
        for each in slices
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return ReadJob(
        StageShardView(folder, f"{source.name}-{digest[:16]}"), source, tuple(slices)
    )


def write_document_shard(job: ReadJob) -> None:
    """Write a shard's documents."""
    with open_shard_writer(job.shard.path(DOCUMENTS), DOCUMENT_SCHEMA) as writer:
        rows = _make_rows(job, lambda reason: writer.counts.update([reason]))
        sizes = lambda row: sum(len(value or b"") for value in row.values())  # noqa: E731
        for group in batch_by_size(rows, sizes, _GROUP_BYTES, _GROUP_ROWS):
            writer.write_row_group(
                pa.RecordBatch.from_pylist(group, schema=DOCUMENT_SCHEMA)
            )
        for part in job.slices:
            check_unchanged(part.file, "corpus")


def _make_rows(job: ReadJob, count: SkipCallback) -> Iterator[dict[str, bytes | None]]:
    for part in job.slices:
        try:
            for document in _read_raw(job.source, part, count):
                row = _make_row(job.source, document)
                if isinstance(row, str):
                    count(row)
                else:
                    yield row
        except DamagedFile:
            count("broken")  # The rest of the file; what came before is kept.


def _read_raw(
    source: CrawlSource, part: FileSlice, count: SkipCallback
) -> Iterator[RawDocument]:
    file, longest = part.file, source.max_document_bytes
    if file.format == "warc":
        yield from read_warc(file.path, count, max_record_bytes=longest)
    elif file.is_html:
        with open_stream(file.path, file.compression) as stream:
            data = stream.read(longest + 1)
        yield RawDocument(id=file.name, url=None, html=data, text=None)
    else:
        for record in read_records(source, part, max_bytes=longest, with_fields=True):
            if record.skip_reason:
                count(record.skip_reason)
                continue
            meta = {
                key: value for key, value in record.fields.items() if value is not None
            }
            url, id_ = meta.pop(source.url_field, None), meta.pop("id", record.id)
            text = (
                None
                if record.text is None
                else record.text.decode().removeprefix("\ufeff")
            )
            yield RawDocument(
                str(id_), url if isinstance(url, str) else None, None, text, meta
            )


def _make_row(
    source: CrawlSource, document: RawDocument
) -> dict[str, bytes | None] | str:
    """Makes a document's columns, or returns the reason why it is left out.

    Texts of all kinds are UTF-8 without NUL from here on.
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
        return "too_large"
    if not document.html and not (text and text.strip()):
        return "empty"
    try:
        meta = json.dumps(document.meta, default=str) if document.meta else None
    except RecursionError:
        return "broken"
    return {**row, "meta": _utf8(meta)}


def _utf8(text: str | None) -> bytes | None:
    return (
        None
        if text is None
        else _SURROGATE.sub("\ufffd", text.replace("\0", "")).encode()
    )
