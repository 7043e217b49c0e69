"""The formats of documents: built-in ones, and those that other packages add.

A format names its reader as "module:attribute", which is imported when a file of that format is
first listed or read. So the readers of a corpus come from `maxlm.corpus`, which this package never
imports.
"""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from maxlm.config import MaxlmError
from maxlm.data.documents.config import FilesConfig, SourceConfig
from maxlm.data.documents.document import Document, FileSlice, LeftOut, SourceFile


class DocumentReader(Protocol):
    """Reads the files of a format."""

    def read(self, source: SourceConfig, part: FileSlice) -> Iterator[Document | LeftOut]:
        """Yields the documents of a part of a file, and for each one left out the reason."""
        ...


class FolderReader(DocumentReader, Protocol):
    """Reads folders that are one source, such as a corpus that `maxlm corpus run` made."""

    def list_files(self, folder: Path, source: FilesConfig) -> list[SourceFile]:
        """Lists a folder's files in reading order."""
        ...

    def describe_selected_documents(self, files: Iterable[SourceFile]) -> str:
        """Describes, as text, the rules that decide which documents are read from `files`."""
        ...


@dataclass(frozen=True)
class DocumentFormat:
    """A format: how its files or folders are recognised, and what reads them."""

    name: str
    reader: str
    """A `DocumentReader`, or for a format of folders a `FolderReader`, as "module:attribute"."""
    suffixes: tuple[str, ...] = ()
    """Endings of its files' names, in lower case and before `.gz` or `.zst`."""
    folder_entries: tuple[str, ...] = ()
    """Files and folders that tell a folder of this format; none: it is a format of files."""
    packages: tuple[str, ...] = ()
    """Packages that its reader imports, of the extra with the format's name."""


_FILES = "maxlm.data.documents.reader:FILE_READER"
_CRAWL = "maxlm.corpus.reader:CRAWL_READER"
_CORPUS = "maxlm.corpus.reader:CORPUS_READER"
FORMATS: dict[str, DocumentFormat] = {
    each.name: each
    for each in (
        DocumentFormat("text", _FILES),
        DocumentFormat("jsonl", _FILES, suffixes=(".jsonl", ".ndjson")),
        DocumentFormat("parquet", _FILES, suffixes=(".parquet",)),
        DocumentFormat("warc", _CRAWL, suffixes=(".warc", ".wet"), packages=("pyarrow",)),
        DocumentFormat(
            "corpus", _CORPUS, folder_entries=("corpus.json", "documents"), packages=("pyarrow",)
        ),
    )
}
"""By name; a package may add its own."""


def find_file_format(suffix: str) -> str:
    """Finds the format of files whose names end in `suffix` (".jsonl"); others are text."""
    return next((each.name for each in FORMATS.values() if suffix in each.suffixes), "text")


def find_folder_format(folder: Path) -> str | None:
    """Finds the format of a folder that is one source; None: a folder of files."""
    for each in FORMATS.values():
        if each.folder_entries and all((folder / entry).exists() for entry in each.folder_entries):
            return each.name
    return None


def check_format_packages(name: str, where: str) -> None:
    """Checks that the packages that a format's reader imports are installed."""
    for package in FORMATS[name].packages:
        if importlib.util.find_spec(package) is None:
            what = f"a {name} needs {package}, which is not installed"
            raise MaxlmError(what, where=where, fix="pip install 'maxlm[corpus]'")


def load_reader(name: str, where: str) -> DocumentReader:
    """Imports the reader of a format; `where` is what it is to read, for the error."""
    check_format_packages(name, where)
    module, _, attribute = FORMATS[name].reader.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_folder_reader(name: str, where: str) -> FolderReader:
    """Imports the reader of a format of folders; see `load_reader`."""
    return cast(FolderReader, load_reader(name, where))


def describe_selected_documents(files: Iterable[SourceFile]) -> str | None:
    """Describes which documents are taken from the folder formats among `files`; None: no such."""
    files = list(files)
    names = dict.fromkeys(f.format for f in files if FORMATS[f.format].folder_entries)
    parts = [
        load_folder_reader(name, name).describe_selected_documents(
            f for f in files if f.format == name
        )
        for name in names
    ]
    return "; ".join(parts) or None
