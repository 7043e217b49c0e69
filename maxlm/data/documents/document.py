"""The types of this package: source files, slices of them, and documents."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Compression = Literal["none", "gz", "zst"]
_HTML = (".html", ".htm", ".xhtml")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """Name in documents and manifests: the path as the user gave it (below a folder:
    that folder's path and the rest), or the path inside the standard library. Always
    valid Unicode; U+FFFD stands for what is not in the path, so that two files may have
    one name."""
    format: str
    """One of `files.FORMATS`, "text" or, for a shard of a corpus, "corpus"."""
    compression: Compression
    size: int
    """Bytes on disk."""
    mtime_ns: int
    """Time of its last change, in nanoseconds."""
    extra_paths: tuple[Path, ...] = ()
    """Other files whose content decides which documents are read from this one."""
    details: Any = None
    """Details that the reader of corpora needs; picklable."""

    @property
    def is_html(self) -> bool:
        """Whether the file is one web page, by its name."""
        name = self.path.name.lower().removesuffix(".gz").removesuffix(".zst")
        return self.format == "text" and name.endswith(_HTML)


@dataclass(frozen=True)
class FileSlice:
    """A part of a file that holds whole documents.

    `start` and `stop` (None: the end) count bytes of plain JSONL and row groups of
    Parquet; text and compressed files are never cut. `first_row` is the line (from 1) or
    row (from 0) that the slice begins with.
    """

    file: SourceFile
    start: int
    stop: int | None
    first_row: int
    size_bytes: int
    """About how many bytes on disk the slice covers."""


@dataclass(frozen=True)
class Document:
    """One text: what a model sees between its first and last token."""

    id: str
    """The file's name; for JSONL and Parquet followed by `:line` (from 1) or `:row`
    (from 0); for pieces of a text file by `#index` (from 0)."""
    text: bytes
    """UTF-8."""


def is_heldout(text: str | bytes, fraction: float) -> bool:
    """Tells whether a document belongs to the held-out part, an expected `fraction` in
    [0, 1].

    The first 64 bits of SHA-256 of the UTF-8 text, read as a fraction of 2**64, fall
    below `fraction`. The answer is the same on every machine, does not depend on the
    other documents, and puts equal texts on the same side, so an exact duplicate never
    straddles the split.
    """
    data = text.encode() if isinstance(text, str) else text
    first_64_bits = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return first_64_bits < fraction * 2.0**64
