"""Settings that name the files of documents and say how to read them."""

from typing import ClassVar, Literal

from pydantic import Field

from maxlm.config import Config, LocalPath

PYTHON_STDLIB = "python-stdlib"
PYTHON_PACKAGE = "python-package:"
"""Begins an entry that names an installed package: ``python-package:numpy``."""

BadBytes = Literal["error", "replace"]


def is_installed_text(entry: str) -> bool:
    """Tells an entry that means text installed with Python from paths and globs."""
    return entry == PYTHON_STDLIB or entry.startswith(PYTHON_PACKAGE)


class FilesConfig(Config):
    """Files of documents."""

    documents: tuple[LocalPath, ...] = Field(min_length=1)
    """Files, folders, globs, `python-stdlib` or `python-package:NAME`.

    The folder of a corpus (`maxlm corpus run`) means the documents that its rules keep;
    any other folder every text file below it, in sorted order; hidden and binary files
    (by a NUL byte; never JSONL, nor HTML in a recipe) are left out. `.jsonl`/`.ndjson`
    hold one document a line, `.parquet` one a row, any other file is one document. Text
    and JSONL may be compressed (`.gz`, `.zst`). `python-stdlib` is the source of the
    running Python's standard library, without tests and the parts that distributions
    package apart: 10 MB of real text that need no download. `python-package:NAME` is
    the source of an installed package, its tests included: the same text wherever the
    same version is installed."""

    text_field: str = "text"
    """The JSON key or Parquet column that holds a document's text."""

    piece_bytes: int | None = Field(default=None, gt=0)
    """Cut text files longer than this into documents of about this many bytes, at line
    ends; null: a file is one document. For a corpus of few, long files (a book, a log),
    which otherwise has too few documents to hold any out."""

    reads_html: ClassVar[bool] = False
    """Whether HTML files are documents in any encoding, so that a NUL does not make one
    binary."""

    @property
    def replaces_bad_bytes(self) -> bool:
        """Whether bytes that are not UTF-8 become U+FFFD, and are no error."""
        return True


class SourceConfig(FilesConfig):
    """The files of a corpus and how to read them."""

    on_bad_bytes: BadBytes = "error"
    """Treatment of text that is not valid UTF-8: `error` stops and names the place,
    `replace` puts U+FFFD for each bad sequence."""

    keep: dict[str, str] | None = None
    """Rules by name that replace those of a corpus's recipe, expressions over labels of
    which a document must fulfil all; null: the recipe's."""

    cut: tuple[str, ...] | None = None
    """Labels with spans to cut out of a corpus's texts; null: the recipe's."""

    @property
    def replaces_bad_bytes(self) -> bool:
        return self.on_bad_bytes == "replace"
