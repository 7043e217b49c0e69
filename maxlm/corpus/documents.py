"""Streams of documents out of source files of every format."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.corpus.config import SourceConfig
from maxlm.corpus.files import SourceFile, list_files
from maxlm.corpus.slices import FileSlice, open_parquet, whole
from maxlm.corpus.streams import open_stream
from maxlm.corpus.textbytes import apply_policy, bad_byte, encode_json_text

_ROWS_PER_BATCH = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text: what a model sees between its first and last token."""

    id: str
    """The file's name; for JSONL and Parquet followed by `:line` (from 1) or `:row` (from 0); for
    pieces of a text file by `#number` (from 0)."""
    text: bytes
    """UTF-8, except under the policy `on_bad_bytes="keep"`. Never empty."""


class LeftOut(Enum):
    """Why a document is not taken."""

    EMPTY = "empty, or not decodable under the policy skip"
    RULE = "a corpus's rules drop it"


def read_documents(config: SourceConfig, file: SourceFile | None = None) -> Iterator[Document]:
    """The documents of a corpus, or of one of its files, in order.

    Text that is empty or null is no document. JSONL is read line by line and Parquet batch by
    batch, so neither is ever in memory as a whole.

    Raises:
        MaxlmError: see `find_files`; also undecodable bytes (policy "error"), lines that are not
            JSON objects with `text_field`, Parquet without that column, missing packages.
    """
    for each in [file] if file else list_files(config):
        found = read_slice(config, whole(each))
        yield from (document for document in found if isinstance(document, Document))


def read_slice(config: SourceConfig, part: FileSlice) -> Iterator[Document | LeftOut]:
    """The documents of a part of a file, and for each that is not taken why."""
    readers = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "warc": _refuse_warc,
        "corpus": _read_corpus,
    }
    for id_, text in readers[part.file.format](config, part):
        dropped = text is None and part.file.kept is not None
        yield Document(id_, text) if text else LeftOut.RULE if dropped else LeftOut.EMPTY


def _read_text(config: SourceConfig, part: FileSlice) -> Iterator[tuple[str, bytes | None]]:
    file = part.file
    with open_stream(file.path, file.compression) as stream:
        data = stream.read()
    text = apply_policy(data, config.on_bad_bytes, str(file.path))
    if config.piece_bytes is None or text is None or len(text) <= config.piece_bytes:
        yield file.name, text
        return
    for number, piece in enumerate(_pieces(text, config.piece_bytes)):
        yield f"{file.name}#{number}", piece


def _read_corpus(config: SourceConfig, part: FileSlice) -> Iterator[tuple[str, bytes | None]]:
    from maxlm.corpus.selection import read_corpus

    return read_corpus(config, part)


def _refuse_warc(config: SourceConfig, part: FileSlice) -> Iterator[tuple[str, bytes | None]]:
    fix = "make a corpus of it with maxlm corpus run, and name that corpus's folder here"
    raise MaxlmError("a crawl holds pages, not texts", where=str(part.file.path), fix=fix)


def _pieces(text: bytes, size: int) -> Iterator[bytes]:
    """Runs of whole lines, each the shortest of at least ``size`` bytes."""
    start = 0
    while start < len(text):
        newline = text.find(b"\n", start + size - 1)
        stop = len(text) if newline < 0 else newline + 1
        yield text[start:stop]
        start = stop


def _read_jsonl(config: SourceConfig, part: FileSlice) -> Iterator[tuple[str, bytes | None]]:
    file, number, position = part.file, part.first, part.start
    with open_stream(file.path, file.compression) as stream:
        if position:
            stream.seek(position)
        while (part.stop is None or position < part.stop) and (line := stream.readline()):
            position += len(line)
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield f"{file.name}:{number}", _json_text(config, line, f"{file.path}:{number}")
            number += 1


def _json_text(config: SourceConfig, line: bytes, where: str) -> bytes | None:
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        match config.on_bad_bytes:
            case "error":
                raise bad_byte(error, where) from error
            case "skip":
                return None
            case "replace":
                decoded = line.decode("utf-8", "replace")
            case "keep":
                decoded = line.decode("utf-8", "surrogateescape")
    try:
        row = json.loads(decoded)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        fix = "put one JSON object on each line"
        raise MaxlmError(f"not valid JSON ({reason})", where=where, fix=fix) from error
    if not isinstance(row, dict):
        what = f"a JSON object was expected, not {type(row).__name__}"
        raise MaxlmError(what, where=where, fix=f'write {{"{config.text_field}": "..."}}')
    if config.text_field not in row:
        raise _no_field(config.text_field, list(row), "key", where)
    text = row[config.text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        what = f'"{config.text_field}" holds {type(text).__name__}, not a string'
        raise MaxlmError(what, where=where, fix="set text_field to the key of the text")
    return encode_json_text(text, config.on_bad_bytes, where)


def _read_parquet(config: SourceConfig, part: FileSlice) -> Iterator[tuple[str, bytes | None]]:
    file, field, row = part.file, config.text_field, part.first
    with open_parquet(file.path) as parquet:
        import pyarrow as pa

        schema = parquet.schema_arrow
        if field not in schema.names:
            raise _no_field(field, schema.names, "column", str(file.path))
        _check_textual(schema.field(field).type, field, file.path)
        stop = parquet.num_row_groups if part.stop is None else part.stop
        groups = list(range(part.start, stop))
        batches = parquet.iter_batches(_ROWS_PER_BATCH, row_groups=groups, columns=[field])
        for batch in batches if groups else ():
            # As binary: Arrow does not check that its strings are UTF-8, and we want the bytes.
            for text in batch.column(0).cast(pa.large_binary()).to_pylist():
                where = f"{file.path}, row {row}"
                yield (
                    f"{file.name}:{row}",
                    text and apply_policy(text, config.on_bad_bytes, where),
                )
                row += 1


def _check_textual(type_, field: str, path: Path) -> None:
    import pyarrow.types as types

    value = type_.value_type if types.is_dictionary(type_) else type_
    checks = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(check(value) for check in checks):
        fix = "set text_field to a column of strings"
        raise MaxlmError(f'column "{field}" holds {type_}, not text', where=str(path), fix=fix)


def _no_field(field: str, present: list[str], kind: str, where: str) -> MaxlmError:
    names = ", ".join(f'"{name}"' for name in present[:8]) or "none"
    fix = f"set text_field to one of: {names}"
    return MaxlmError(f'there is no {kind} "{field}"', where=where, fix=fix)
