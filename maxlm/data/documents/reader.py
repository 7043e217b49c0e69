"""The reader of text, JSONL and Parquet, for token stores and for a corpus.

`read_records` yields a record for every document of a slice, readable or not. `read_slice` and
`read_documents` stop at the first record that cannot be read; a corpus counts it and goes on.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.documents.config import FilesConfig, SourceConfig
from maxlm.data.documents.document import Document, FileSlice, LeftOut, SourceFile
from maxlm.data.documents.encoding import apply_policy, decode_text, encode_text
from maxlm.data.documents.files import list_files
from maxlm.data.documents.formats import load_reader
from maxlm.data.documents.slices import make_whole_slice, open_parquet
from maxlm.data.documents.streams import open_stream

# Of Parquet, what is decoded at a time.
_BATCH_ROWS = 64
_BATCH_BYTES = 64 << 20
_ROW = 8  # A line of JSON may be so much longer than its text, and so may Parquet's other fields.
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """A document as it stands in a file, or the reason why it cannot be read."""

    id: str
    """The id, as a `Document` has it."""
    text: bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    """The other fields of a row of JSONL or Parquet."""
    reason: str = ""
    """Why there is no text: "broken", "bad_bytes" (under the policy "skip") or "too_large"."""
    error: MaxlmError | None = None
    """Of a broken record."""


def read_documents(source: SourceConfig, file: SourceFile | None = None) -> Iterator[Document]:
    """Reads the documents of a source, or of one of its files, in order.

    Text that is empty or null is no document. JSONL is read line by line and Parquet batch by
    batch, so neither is ever in memory as a whole.

    Raises:
        MaxlmError: see `find_files`; also undecodable bytes (policy "error"), lines that are not
            JSON objects with `text_field`, Parquet without that column, missing packages.
    """
    for each in [file] if file else list_files(source):
        found = read_slice(source, make_whole_slice(each))
        yield from (document for document in found if isinstance(document, Document))


def read_slice(source: SourceConfig, part: FileSlice) -> Iterator[Document | LeftOut]:
    """Reads a part of a file of any format: its documents, and for each one left out the reason.

    Raises:
        MaxlmError: see `read_documents`.
    """
    return load_reader(part.file.format, str(part.file.path)).read(source, part)


class FileReader:
    """Reads text, JSONL and Parquet; see `formats.DocumentReader`."""

    def read(self, source: SourceConfig, part: FileSlice) -> Iterator[Document | LeftOut]:
        for record in read_records(source, part):
            if record.error is not None:
                raise record.error
            yield Document(record.id, record.text) if record.text else LeftOut.EMPTY


FILE_READER = FileReader()


def read_records(
    source: FilesConfig,
    part: FileSlice,
    *,
    max_bytes: int | None = None,
    with_fields: bool = False,
) -> Iterator[Record]:
    """Reads a slice of text, JSONL or Parquet.

    Args:
        max_bytes: skip longer texts, and rows eight times as long, without holding them in memory.
        with_fields: read Parquet's other columns too; a column of texts that is missing then makes
            each row broken, instead of the file an error.

    Raises:
        MaxlmError: undecodable bytes under the policy "error"; the file cannot be read.
        DamagedFile: compressed data or Parquet is damaged from here on.
    """
    match part.file.format:
        case "text":
            return _read_text(source, part, max_bytes)
        case "jsonl":
            return _read_jsonl(source, part, max_bytes)
    return _read_parquet(source, part, max_bytes, with_fields)


def _read_text(source: FilesConfig, part: FileSlice, max_bytes: int | None) -> Iterator[Record]:
    """Reads a file as one text, or in pieces of whole lines, each the shortest of `piece_bytes`."""
    file, piece_bytes = part.file, source.piece_bytes
    longest = -1 if max_bytes is None else max_bytes
    position = 0
    with open_stream(file.path, file.compression) as stream:
        for index in count():
            piece = stream.read(piece_bytes or (longest if max_bytes is None else longest + 1))
            if not piece and index:
                return
            is_whole = index == 0 and len(piece) <= (piece_bytes or len(piece))
            is_whole = is_whole and (piece_bytes is None or not stream.peek(1))
            if piece_bytes and not piece.endswith(b"\n"):
                piece += stream.readline(longest)
            name = file.name if is_whole else f"{file.name}#{index}"
            if max_bytes is not None and len(piece) > max_bytes:
                yield Record(name, reason="too_large")
                if piece_bytes is None:
                    return
                while piece and not piece.endswith(b"\n"):
                    piece = stream.readline(longest)
            else:
                text = apply_policy(piece, source.on_bad_bytes, str(file.path), position)
                yield Record(name, text, reason="bad_bytes" if text is None else "")
            position += len(piece)


def _read_jsonl(source: FilesConfig, part: FileSlice, max_bytes: int | None) -> Iterator[Record]:
    file, position = part.file, part.start
    # A line holds a text with its escapes, six bytes a character at worst, and other fields.
    longest = -1 if max_bytes is None else _ROW * max_bytes
    with open_stream(file.path, file.compression) as stream:
        if position:
            stream.seek(position)
        for number in count(part.first):
            if part.stop is not None and position >= part.stop:
                return
            line = stream.readline(longest)
            if not line:
                return
            position += len(line)
            name = f"{file.name}:{number}"
            if len(line) == longest and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(longest)
                    position += len(line)
                yield Record(name, reason="too_large")
            elif line.strip():
                line = line.removeprefix(_BOM)
                yield _parse_line(source, name, line, f"{file.path}:{number}")


def _parse_line(source: FilesConfig, name: str, line: bytes, where: str) -> Record:
    decoded = decode_text(line, source.on_bad_bytes, where)
    if decoded is None:
        return Record(name, reason="bad_bytes")
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        fix = "put one JSON object on each line"
        return _broken(name, f"not valid JSON ({reason})", where, fix)
    if not isinstance(row, dict):
        what = f"a JSON object was expected, not {type(row).__name__}"
        return _broken(name, what, where, f'write {{"{source.text_field}": "..."}}')
    return _from_row(source, name, row, where)


def _from_row(source: FilesConfig, name: str, row: dict[str, Any], where: str) -> Record:
    """Makes a record of named fields, in which bytes are meant to be UTF-8."""
    if source.text_field not in row:
        return Record(name, reason="broken", error=_no_field(source, list(row), "key", where))
    text = row.pop(source.text_field)
    for key, value in row.items():
        row[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if text is None:
        return Record(name, None, row)
    if not isinstance(text, str | bytes):
        what = f'"{source.text_field}" holds {type(text).__name__}, not a string'
        return _broken(name, what, where, "set text_field to the key of the text")
    convert = apply_policy if isinstance(text, bytes) else encode_text
    text = convert(text, source.on_bad_bytes, where)  # pyright: ignore[reportArgumentType]
    return Record(name, text, row, reason="bad_bytes" if text is None else "")


def _broken(name: str, what: str, where: str, fix: str) -> Record:
    return Record(name, reason="broken", error=MaxlmError(what, where=where, fix=fix))


def _no_field(source: FilesConfig, present: list[str], kind: str, where: str) -> MaxlmError:
    names = ", ".join(f'"{name}"' for name in present[:8]) or "none"
    what = f'there is no {kind} "{source.text_field}"'
    return MaxlmError(what, where=where, fix=f"set text_field to one of: {names}")


def _read_parquet(
    source: FilesConfig, part: FileSlice, max_bytes: int | None, with_fields: bool
) -> Iterator[Record]:
    file, row = part.file, part.first
    with open_parquet(file.path) as parquet:
        if not with_fields:
            _check_text_column(source, parquet.schema_arrow, str(file.path))
        columns = None if with_fields else [source.text_field]
        for batch in _read_batches(parquet, part, columns):
            named = dict(zip(batch.schema.names, batch.columns, strict=True))
            for i in range(batch.num_rows):
                name, where = f"{file.name}:{row}", f"{file.path}, row {row}"
                row += 1
                try:
                    fields = {n: _value(source, n, c, i, max_bytes) for n, c in named.items()}
                except _TooLarge:
                    yield Record(name, reason="too_large")
                else:
                    yield _from_row(source, name, fields, where)


def _read_batches(parquet: Any, part: FileSlice, columns: list[str] | None) -> Iterator[Any]:
    """Yields a slice's rows, of each row group as many at a time as take at most some MB."""
    for index in range(part.start, parquet.num_row_groups if part.stop is None else part.stop):
        group = parquet.metadata.row_group(index)
        size = sum(group.column(c).total_uncompressed_size for c in range(group.num_columns))
        fit = _BATCH_BYTES * group.num_rows // max(size, 1)
        rows = min(max(fit, 1), _BATCH_ROWS)
        yield from parquet.iter_batches(rows, row_groups=[index], columns=columns)


class _TooLarge(Exception):
    """A value is longer than it may be."""


def _value(source: FilesConfig, name: str, column: Any, row: int, max_bytes: int | None) -> Any:
    """Reads a value of a column, None if Python cannot hold it.

    Strings come as bytes, since Arrow does not check that they are UTF-8.

    Raises:
        _TooLarge
    """
    import pyarrow as pa

    longest = None
    if max_bytes is not None:
        longest = max_bytes * (1 if name == source.text_field else _ROW)
    try:
        scalar = column[row]
        if isinstance(scalar, pa.DictionaryScalar):
            scalar = scalar.value
        if isinstance(scalar, pa.BinaryScalar):
            buffer = scalar.as_buffer()
            if buffer is None:
                return None
            if longest is None or buffer.size <= longest:
                return buffer.to_pybytes()
        elif (
            longest is None
            or pa.types.is_dictionary(column.type)
            or column.slice(row, 1).nbytes <= longest
        ):
            return scalar.as_py()
    except Exception:  # Unknown time zones, durations of millions of years, ...: of many types.
        return None
    raise _TooLarge


def _check_text_column(source: FilesConfig, schema: Any, where: str) -> None:
    import pyarrow.types as types

    if source.text_field not in schema.names:
        raise _no_field(source, schema.names, "column", where)
    type_ = schema.field(source.text_field).type
    value = type_.value_type if types.is_dictionary(type_) else type_
    checks = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(check(value) for check in checks):
        what = f'column "{source.text_field}" holds {type_}, not text'
        raise MaxlmError(what, where=where, fix="set text_field to a column of strings")
