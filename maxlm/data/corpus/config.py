"""What a corpus is made of."""

from typing import Literal

from pydantic import Field

from maxlm.config import Config

PYTHON_STDLIB = "python-stdlib"

BadBytes = Literal["error", "replace", "keep", "skip"]


class SourceConfig(Config):
    """The files of a corpus and how to read them."""

    documents: tuple[str, ...] = Field(min_length=1)
    """Files, folders, globs, or `python-stdlib`.

    A folder means every text file below it, in sorted order; hidden and binary files are left
    out. `.jsonl`/`.ndjson` hold one document a line, `.parquet` one a row, any other file is one
    document. Text and JSONL may be compressed (`.gz`, `.zst`). `python-stdlib` is the source of
    the running Python's standard library: tens of MB of real text that need no download, but
    which differ between Python versions."""

    text_field: str = "text"
    """The JSON key or Parquet column that holds a document's text."""

    on_bad_bytes: BadBytes = "error"
    """What to do with text that is not valid UTF-8.

    `error` stops and names the place. `replace` puts U+FFFD for each bad sequence: always valid
    text, but the original bytes are lost. `keep` passes the bytes on as they are: nothing is
    lost, but the model learns to produce invalid UTF-8. `skip` leaves out the whole document."""

    piece_bytes: int | None = Field(default=None, gt=0)
    """Cut text files longer than this into documents of about this many bytes, at line ends; null:
    a file is one document. For a corpus of few, long files (a book, a log), which otherwise has
    too few documents to hold any out."""
