"""Settings that name the files of documents and say how to read them."""

from typing import ClassVar, Literal

from pydantic import Field

from maxlm.config import Config, LocalPath

PYTHON_STDLIB = "python-stdlib"

BadBytes = Literal["error", "replace"]


class FilesConfig(Config):
    """Files of documents."""

    documents: tuple[LocalPath, ...] = Field(min_length=1)
    """Files, folders, globs, or `python-stdlib`.

    The folder of a corpus (`maxlm corpus run`) means the documents that its rules keep; any other
    folder every text file below it, in sorted order; hidden and binary files (by a NUL byte;
    never JSONL, nor HTML in a recipe) are left out. `.jsonl`/`.ndjson` hold one document a line,
    `.parquet` one a row, any other file is one document. Text and JSONL may be compressed (`.gz`,
    `.zst`). `python-stdlib` is the source of the running Python's standard library: tens of MB of
    real text that need no download, but which differ between Python versions."""

    text_field: str = "text"
    """The JSON key or Parquet column that holds a document's text."""

    piece_bytes: int | None = Field(default=None, gt=0)
    """Cut text files longer than this into documents of about this many bytes, at line ends; null:
    a file is one document. For a corpus of few, long files (a book, a log), which otherwise has
    too few documents to hold any out."""

    reads_html: ClassVar[bool] = False
    """Whether HTML files are documents in any encoding, so that a NUL does not make one binary."""

    @property
    def replaces_bad_bytes(self) -> bool:
        """Whether bytes that are not UTF-8 become U+FFFD, and are no error."""
        return True


class SourceConfig(FilesConfig):
    """The files of a corpus and how to read them."""

    on_bad_bytes: BadBytes = "error"
    """Treatment of text that is not valid UTF-8: `error` stops and names the place, `replace` puts
    U+FFFD for each bad sequence."""

    keep: dict[str, str] | None = None
    """Rules by name that replace those of a corpus's recipe, expressions over labels of which a
    document must fulfil all; null: the recipe's."""

    cut: tuple[str, ...] | None = None
    """Labels with spans to cut out of a corpus's texts; null: the recipe's."""

    @property
    def replaces_bad_bytes(self) -> bool:
        return self.on_bad_bytes == "replace"
