"""The reader of text, JSONL and Parquet, for token stores and for a corpus.

`read_records` yields a record for every document of a slice, readable or not.
`read_slice` and `read_documents` stop at the first record that cannot be read; a corpus
counts it and goes on.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from maxlm.config import MaxlmError
from maxlm.data.documents.config import FilesConfig, SourceConfig
from maxlm.data.documents.document import Document, FileSlice, SourceFile
from maxlm.data.documents.files import find_corpus_reader, find_files
from maxlm.data.documents.streams import make_whole_slice, open_parquet, open_stream

if TYPE_CHECKING:
    import pyarrow

# Rows of Parquet that are decoded at a time.
_BATCH_ROWS = 64
# How many times as long as the longest text that is taken a line of JSON may be, with its
# escapes and other fields, and each of Parquet's other fields.
_MAX_ROW_FACTOR = 8
_BOM = b"\xef\xbb\xbf"
_BAD_BYTES_FIX = (
    "set on_bad_bytes (data.sources.N.on_bad_bytes of a run, --on-bad-bytes of maxlm "
    'corpus build) to "replace", or convert the text to UTF-8'
)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """A document as it stands in a file, or the reason why it cannot be read."""

    id: str
    """The id, as a `Document` has it."""
    text: bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    """The other fields of a row of JSONL or Parquet."""
    skip_reason: str = ""
    """Why there is no text: "broken" or "too_large"."""
    error: MaxlmError | None = None
    """The error that a broken record would raise."""


def read_documents(
    source: SourceConfig, file: SourceFile | None = None
) -> Iterator[Document]:
    """Reads the documents of a source, or of one of its files, in order.

    Text that is empty or null is no document. JSONL is read line by line and Parquet
    batch by batch, so neither is ever in memory as a whole. Raises MaxlmError: see
    `find_files`; also undecodable bytes (if `on_bad_bytes` is "error"), lines that are
    not JSON objects with `text_field`, Parquet without that column, missing
    packages."""
    files = [file] if file else find_files(source).files
    for source_file in files:
        for document in read_slice(source, make_whole_slice(source_file)):
            if document and document.text:
                yield document


def read_slice(source: SourceConfig, part: FileSlice) -> Iterator[Document | None]:
    """Reads the documents of a part of a file of any format, empty ones too; None for
    each that the rules of a corpus drop."""
    where = str(part.file.path)
    if part.file.format == "warc":
        fix = (
            "make a corpus of it with maxlm corpus run, and name that corpus's folder "
            "here"
        )
        raise MaxlmError("a crawl holds pages, not texts", where=where, fix=fix)
    if part.file.format == "corpus":
        yield from find_corpus_reader(where).read_corpus_slice(part)
        return
    for record in read_records(source, part):
        if record.error is not None:
            raise record.error
        yield Document(record.id, record.text or b"")


def read_records(
    source: FilesConfig,
    part: FileSlice,
    *,
    max_bytes: int | None = None,
    with_fields: bool = False,
) -> Iterator[Record]:
    """Reads a slice of text, JSONL or Parquet.

    Args:
        max_bytes: skip longer texts, and rows eight times as long, without holding them
            in memory.
        with_fields: read Parquet's other columns too; a column of texts that is missing
            then makes each row broken, instead of the file an error.

    Raises:
        MaxlmError: undecodable bytes, unless `source` replaces them; the file cannot be
            read.
        DamagedFile: compressed data or Parquet is damaged from here on.
    """
    match part.file.format:
        case "text":
            return _read_text(source, part, max_bytes)
        case "jsonl":
            return _read_jsonl(source, part, max_bytes)
    return _read_parquet(source, part, max_bytes, with_fields)


def _read_text(
    source: FilesConfig, part: FileSlice, max_bytes: int | None
) -> Iterator[Record]:
    """Reads a file as one text, or in pieces of whole lines, each the shortest of
    `piece_bytes`."""
    file = part.file
    piece_bytes = source.piece_bytes
    if piece_bytes is not None:
        read_size = piece_bytes
    elif max_bytes is not None:
        read_size = max_bytes + 1  # One byte more tells that the text is too long.
    else:
        read_size = -1
    position = 0
    with open_stream(file.path, file.compression) as stream:
        for index in count():
            piece = stream.read(read_size)
            if not piece and index:
                return
            is_whole = index == 0 and (piece_bytes is None or not stream.peek(1))
            if piece_bytes is not None and not piece.endswith(b"\n"):
                piece += stream.readline()
            name = file.name if is_whole else f"{file.name}#{index}"
            if max_bytes is not None and len(piece) > max_bytes:
                yield Record(name, skip_reason="too_large")
            else:
                text = _decode(source, piece, str(file.path), position)
                yield Record(name, text.encode())
            if piece_bytes is None:
                return
            position += len(piece)


def _read_jsonl(
    source: FilesConfig, part: FileSlice, max_bytes: int | None
) -> Iterator[Record]:
    file = part.file
    position = part.start
    # An escape of JSON has six bytes a character at worst.
    max_line_bytes = -1 if max_bytes is None else _MAX_ROW_FACTOR * max_bytes
    with open_stream(file.path, file.compression) as stream:
        if position:
            stream.seek(position)
        for number in count(part.first_row):
            if part.stop is not None and position >= part.stop:
                return
            line = stream.readline(max_line_bytes)
            if not line:
                return
            position += len(line)
            name = f"{file.name}:{number}"
            if len(line) == max_line_bytes and not line.endswith(b"\n"):
                # Read to the end of the line, but hold no more than a part of it.
                while line and not line.endswith(b"\n"):
                    line = stream.readline(max_line_bytes)
                    position += len(line)
                yield Record(name, skip_reason="too_large")
            elif line.strip():
                line = line.removeprefix(_BOM)
                yield _parse_line(source, name, line, f"{file.path}:{number}")


def _parse_line(source: FilesConfig, name: str, line: bytes, where: str) -> Record:
    try:
        row = json.loads(_decode(source, line, where))
    except (ValueError, RecursionError) as error:
        # A JSONDecodeError has a message without the place in the line.
        reason = getattr(error, "msg", "nested too deeply")
        fix = "put one JSON object on each line"
        return _make_broken_record(name, f"not valid JSON ({reason})", where, fix)
    if not isinstance(row, dict):
        message = f"a JSON object was expected, not {type(row).__name__}"
        return _make_broken_record(
            name, message, where, f'write {{"{source.text_field}": "..."}}'
        )
    return _make_record(source, name, row, where)


def _make_record(
    source: FilesConfig, name: str, row: dict[str, Any], where: str
) -> Record:
    """Makes a record of named fields, in which bytes are meant to be UTF-8."""
    if source.text_field not in row:
        error = _make_no_field_error(source, list(row), "key", where)
        return Record(name, skip_reason="broken", error=error)
    text = row.pop(source.text_field)
    for key, value in row.items():
        if isinstance(value, bytes):
            row[key] = value.decode("utf-8", "replace")
    if text is None:
        return Record(name, None, row)
    if not isinstance(text, str | bytes):
        message = f'"{source.text_field}" holds {type(text).__name__}, not a string'
        fix = "set text_field to the key or column of the text"
        return _make_broken_record(name, message, where, fix)
    if isinstance(text, bytes):
        text = _decode(source, text, where)
    return Record(name, _encode(source, text, where), row)


def _make_broken_record(name: str, message: str, where: str, fix: str) -> Record:
    error = MaxlmError(message, where=where, fix=fix)
    return Record(name, skip_reason="broken", error=error)


def _make_no_field_error(
    source: FilesConfig, present: list[str], kind: str, where: str
) -> MaxlmError:
    names = ", ".join(f'"{name}"' for name in present[:8]) or "none"
    message = f'there is no {kind} "{source.text_field}"'
    return MaxlmError(message, where=where, fix=f"set text_field to one of: {names}")


def _read_parquet(
    source: FilesConfig, part: FileSlice, max_bytes: int | None, with_fields: bool
) -> Iterator[Record]:
    file = part.file
    row_number = part.first_row
    with open_parquet(file.path) as parquet:
        columns = None
        if not with_fields:
            _check_text_column(source, parquet.schema_arrow, str(file.path))
            columns = [source.text_field]
        max_text_bytes = math.inf if max_bytes is None else max_bytes
        stop = parquet.num_row_groups if part.stop is None else part.stop
        groups = range(part.start, stop)
        for batch in parquet.iter_batches(
            _BATCH_ROWS, row_groups=groups, columns=columns
        ):
            columns_by_name = dict(zip(batch.schema.names, batch.columns, strict=True))
            for i in range(batch.num_rows):
                name = f"{file.name}:{row_number}"
                where = f"{file.path}, row {row_number}"
                row_number += 1
                fields = {}
                is_too_large = False
                for field_name, column in columns_by_name.items():
                    value, num_bytes = _read_cell(column, i)
                    fields[field_name] = value
                    is_text = field_name == source.text_field
                    factor = 1 if is_text else _MAX_ROW_FACTOR
                    is_too_large |= num_bytes > factor * max_text_bytes
                if is_too_large:
                    yield Record(name, skip_reason="too_large")
                else:
                    yield _make_record(source, name, fields, where)


def _check_text_column(
    source: FilesConfig, schema: "pyarrow.Schema", where: str
) -> None:
    """Rows cannot tell a column of another type from one without texts."""
    import pyarrow.types as types

    if source.text_field not in schema.names:
        raise _make_no_field_error(source, schema.names, "column", where)
    column_type = schema.field(source.text_field).type
    value_type = column_type
    if types.is_dictionary(column_type):
        value_type = column_type.value_type
    is_text = (
        types.is_string(value_type)
        or types.is_large_string(value_type)
        or types.is_binary(value_type)
        or types.is_large_binary(value_type)
    )
    if not is_text:
        message = f'column "{source.text_field}" holds {column_type}, not text'
        fix = "set text_field to a column of strings"
        raise MaxlmError(message, where=where, fix=fix)


def _read_cell(column: "pyarrow.Array", row: int) -> tuple[Any, int]:
    """Reads a value of a column, None if Python cannot hold it, and its size in bytes;
    strings come as bytes, since Arrow does not check that they are UTF-8."""
    import pyarrow as pa

    try:
        scalar = column[row]
        if isinstance(scalar, pa.DictionaryScalar):
            scalar = scalar.value
        if isinstance(scalar, pa.BinaryScalar):
            buffer = scalar.as_buffer()
            if buffer is None:
                return None, 0
            return buffer.to_pybytes(), buffer.size
        # A slice of a dictionary's column counts the whole dictionary.
        is_dictionary = pa.types.is_dictionary(column.type)
        size = 0 if is_dictionary else column.slice(row, 1).nbytes
        return scalar.as_py(), size
    # Unknown time zones, durations of millions of years, ...: Arrow raises errors of many
    # types for what Python cannot hold.
    except Exception:
        return None, 0


def _decode(source: FilesConfig, data: bytes, where: str, offset: int = 0) -> str:
    """Decodes UTF-8. `offset` is the place of `data` in its file, for the error."""
    if source.replaces_bad_bytes:
        return data.decode("utf-8", "replace")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        place = offset + error.start
        message = f"byte 0x{byte:02x} at offset {place} is not valid UTF-8"
        raise MaxlmError(message, where=where, fix=_BAD_BYTES_FIX) from error


def _encode(source: FilesConfig, text: str, where: str) -> bytes:
    r"""Encodes a string as UTF-8; JSON escapes like "\ud800" can make lone surrogates
    in it."""
    surrogate = _SURROGATE.search(text)
    if surrogate is None:
        return text.encode()
    if source.replaces_bad_bytes:
        return _SURROGATE.sub("\ufffd", text).encode()
    message = (
        f"character {surrogate.start()} is a lone surrogate "
        f"(U+{ord(surrogate[0]):04X}), not valid UTF-8"
    )
    raise MaxlmError(message, where=where, fix=_BAD_BYTES_FIX)
