"""Documents of crawl archives: WARC and WET (ISO 28500).

A crawl is never clean. What cannot be a document is counted by reason and passed over,
and after a broken place reading goes on at the next record that can be found.
"""

import io
import mmap
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.encoding import decode, remove_control_characters
from maxlm.corpus.stage import check_packages
from maxlm.data.documents.config import FilesConfig

SkipCallback = Callable[[str], None]
"""Called with the reason, for each record that is no document."""

_LINE_START = b"\nWARC/"
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_CHARSET = re.compile(r"charset\s*=\s*(?:[\"']\s*)?([\w.:-]+)", re.I)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body|title|meta)\b", re.I)
_SNIFF = 1024
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_MOST_FALSE_STARTS = (
    256  # Else a file made of nothing but magic numbers would take for ever.
)
_BOMB = 1 << 30  # So long a record is not even decompressed.


@dataclass(frozen=True)
class RawDocument:
    """A page as it was fetched: HTML, or a text that somebody extracted before."""

    id: str
    """The record's UUID; without one `file:offset`."""
    url: str | None
    html: bytes | None
    text: str | None
    meta: dict[str, str] = field(default_factory=dict)
    """The keys date (ISO 8601), content_type and charset (both as HTTP gave them),
    where known."""


class CrawlSource(FilesConfig):
    """Files of raw documents."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """The source that its documents are said to come from: web, code, books, ..."""
    url_field: str = "url"
    """The JSON key or Parquet column of a document's address, if there is one."""
    max_document_bytes: int = Field(default=64 << 20, gt=0)
    """Longer documents are skipped and counted, compressed ones by their decompressed
    size."""

    reads_html: ClassVar[bool] = True


class _PassOver(Exception):
    """The record is no document; the argument says why."""


class _Damaged(_PassOver):
    """The record is not all there: what follows may be anything."""


def read_warc(
    path: Path, on_skip: SkipCallback, max_record_bytes: int = 1 << 24
) -> Iterator[RawDocument]:
    """Reads the documents of a WARC or WET file; plain, .gz or .zst, told by content.

    Documents are successful HTML responses (HTTP transfer and content codings decoded),
    WET's `conversion` records, and resources that are HTML or text. The others are
    counted: by record type ("request", "revisit", ...), or as "status" (not 2xx),
    "not_html", "empty", "too_large" (record or decoded page longer than
    `max_record_bytes`) and "broken" (also: each place where no record could be read; in
    a .gz that is one member nothing is found after it).
    """
    try:
        with open(path, "rb") as file:
            if not path.stat().st_size:
                on_skip("broken")
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                yield from _read_records(
                    file, view, path.name, on_skip, max_record_bytes
                )
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
        raise MaxlmError(
            what, where=str(path), fix="check the file and its permissions"
        ) from error


def _read_records(
    file: io.BufferedReader,
    view: mmap.mmap,
    name: str,
    count: SkipCallback,
    max_bytes: int,
) -> Iterator[RawDocument]:
    """Yields the documents; starts again at the next possible place when a record is
    broken."""
    check_packages(("fastwarc",), "reading a WARC")
    from fastwarc.warc import ArchiveIterator

    # What a record begins with; told by the file's name where its beginning is damaged.
    marks = {".gz": _GZIP, ".zst": _ZSTD}
    mark = next((m for m in marks.values() if view[:4].startswith(m)), None)
    if mark is None:
        mark = (
            _LINE_START
            if view[:5] == b"WARC/"
            else marks.get(Path(name).suffix, _LINE_START)
        )
    start, false_starts, is_counted = 0, 0, False
    while start >= 0 and false_starts < _MOST_FALSE_STARTS:
        file.seek(start)
        false_starts += 1
        try:
            # HTTP is left alone: its codings' errors would end the iteration.
            for record in ArchiveIterator(file, parse_http=False):
                false_starts = 0
                start = record.stream_pos
                try:
                    yield _read_document(record, name, max_bytes)
                    is_counted = False
                except _PassOver as why:
                    count(str(why))
                    is_counted = isinstance(why, _Damaged)
                    if is_counted or record.content_length > _BOMB:
                        break
            else:
                if not false_starts:
                    return
                raise OSError("no record here")
        except OSError:
            if not is_counted:
                count("broken")
            is_counted = True
        start = view.find(mark, start + 1)
        start += mark == _LINE_START and start >= 0


def _read_document(record: Any, name: str, max_bytes: int) -> RawDocument:
    """Reads a record of fastwarc's. Raises _PassOver: it is no document, or broken."""
    kind = str(record.record_type)
    headers = record.headers
    if kind not in ("response", "resource", "conversion"):
        raise _PassOver(kind)
    if record.content_length > max_bytes:
        raise _PassOver("too_large")
    record.parse_http(quirks_mode=True)
    http = record.http_headers
    length = record.content_length
    body = record.reader.read()
    # A Content-Length that is too large swallows the records that follow; a wrong one
    # reads as 0.
    is_whole = len(body) >= length and b"\r\n\r\nWARC/" not in body
    if not is_whole or (record.is_http and (http is None or http.status_code is None)):
        raise _Damaged("broken")
    content_type = headers.get("Content-Type") or ""
    codings = ()
    if record.is_http:
        if http.status_code // 100 != 2:
            raise _PassOver("status")
        content_type = http.get("Content-Type", "")
        names = ("Transfer-Encoding", "Content-Encoding")
        codings = [c for each in names for c in reversed(http.get(each, "").split(","))]
    media = content_type.partition(";")[0].strip().lower()
    is_text = media == "text/plain" and kind != "response"
    if media and media not in _HTML_TYPES and not is_text:
        raise _PassOver("not_html")
    for coding in codings:
        body = _undo(body, coding.strip().lower(), max_bytes)
    if not body.strip():
        raise _PassOver("empty")
    if not media and not _HTML.search(body, 0, _SNIFF):
        raise _PassOver("not_html")
    charset = _CHARSET.search(content_type[:_SNIFF])
    found = {"date": headers.get("WARC-Date"), "content_type": media}
    found["charset"] = charset[1] if charset else None
    meta = {key: value for key, value in found.items() if value}
    id_ = (headers.get("WARC-Record-ID") or "").strip("<> ").removeprefix("urn:uuid:")
    return RawDocument(
        id=id_ or f"{name}:{record.stream_pos}",
        url=(headers.get("WARC-Target-URI") or "").strip("<> ")
        or None,  # wget writes <URL>
        html=None if is_text else body,
        text=remove_control_characters(decode(body, meta.get("charset"))[0])
        if is_text
        else None,
        meta=meta,
    )


def _undo(body: bytes, coding: str, max_bytes: int) -> bytes:
    """Undo one HTTP coding. Crawlers often store the decoded body under the old
    headers. Raises _PassOver: what comes out is longer than `max_bytes`; it is neither
    coded so nor HTML."""
    from fastwarc import stream_io

    if coding in ("", "identity", "none") or not body:
        return body
    open_ = {
        "chunked": stream_io.ChunkedReader,
        "gzip": stream_io.GzipReader,
        "deflate": partial(_open_deflate, max_bytes + 1),
        "br": stream_io.BrotliReader,
        "zstd": stream_io.ZstdReader,
    }.get(coding.removeprefix("x-"))
    try:
        decoded = open_(io.BytesIO(body)).read(max_bytes + 1) if open_ else b""
    except (OSError, zlib.error):
        decoded = b""
    if len(decoded) > max_bytes:
        raise _PassOver("too_large")
    if not decoded and b"<" not in body[:_SNIFF]:
        raise _PassOver("broken")
    return decoded or body


def _open_deflate(size: int, stream: io.BytesIO) -> io.BytesIO:
    """The first `size` bytes of deflate data, which come with or without zlib's
    header."""
    data = stream.read()
    unpack = zlib.decompressobj(
        zlib.MAX_WBITS if data[:1] == b"\x78" else -zlib.MAX_WBITS
    )
    return io.BytesIO(unpack.decompress(data, size))
