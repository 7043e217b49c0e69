"""The formats of documents, and from paths, folders and globs to files in a fixed order.

A format names its reader as "module:attribute", which is imported when a file of that format is
first listed or read. So the readers of a corpus come from `maxlm.corpus`, which this package never
imports; other packages may add formats of their own.
"""

import glob
import importlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maxlm.config import MaxlmError
from maxlm.data.documents.config import PYTHON_STDLIB, FilesConfig, SourceConfig
from maxlm.data.documents.document import Document, FileSlice, SkipReason, SourceFile
from maxlm.data.documents.streams import COMPRESSIONS, DamagedFile, open_stream

_SNIFF_BYTES = 8192


class DocumentReader(Protocol):
    """Reads the files of a format."""

    def read(self, source: SourceConfig, part: FileSlice) -> Iterator[Document | SkipReason]:
        """Yields the documents of a part of a file, and for each one left out the reason."""
        ...


class FolderReader(DocumentReader, Protocol):
    """Reads folders that are one source, such as a corpus that `maxlm corpus run` made."""

    def list_files(self, folder: Path, source: FilesConfig) -> list[SourceFile]:
        """Lists a folder's files in reading order."""
        ...

    def describe_filter_rules(self, files: Iterable[SourceFile]) -> str:
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
_CRAWL = "maxlm.corpus.opened:CRAWL_READER"
_CORPUS = "maxlm.corpus.opened:CORPUS_READER"
_PACKAGES = ("pyarrow", "regex")
FORMATS: dict[str, DocumentFormat] = {
    each.name: each
    for each in (
        DocumentFormat("text", _FILES),
        DocumentFormat("jsonl", _FILES, suffixes=(".jsonl", ".ndjson")),
        DocumentFormat("parquet", _FILES, suffixes=(".parquet",)),
        DocumentFormat("warc", _CRAWL, suffixes=(".warc", ".wet"), packages=_PACKAGES),
        DocumentFormat(
            "corpus", _CORPUS, folder_entries=("corpus.json", "documents"), packages=_PACKAGES
        ),
    )
}
"""Formats by name; a package may add its own."""


def find_folder_format(folder: Path) -> str | None:
    """Finds the format of a folder that is one source; None: a folder of files."""
    for each in FORMATS.values():
        if each.folder_entries and all((folder / entry).exists() for entry in each.folder_entries):
            return each.name
    return None


def check_format_packages(format_name: str, error_location: str) -> None:
    """Checks that the packages that a format's reader imports are installed."""
    for package in FORMATS[format_name].packages:
        if importlib.util.find_spec(package) is None:
            what = f"a {format_name} needs {package}, which is not installed"
            raise MaxlmError(what, where=error_location, fix="pip install 'maxlm[corpus]'")


def load_reader(format_name: str, error_location: str) -> Any:
    """Imports the reader of a format, of folders a `FolderReader`; `error_location` is what it is
    to read, for the error."""
    check_format_packages(format_name, error_location)
    module, _, attribute = FORMATS[format_name].reader.partition(":")
    return getattr(importlib.import_module(module), attribute)


def describe_filter_rules(files: Iterable[SourceFile]) -> str | None:
    """Describes which documents are taken from the folder formats among `files`; None: no such."""
    files = list(files)
    names = dict.fromkeys(f.format for f in files if FORMATS[f.format].folder_entries)
    parts = [
        load_reader(name, name).describe_filter_rules(f for f in files if f.format == name)
        for name in names
    ]
    return "; ".join(parts) or None


@dataclass(frozen=True)
class FileListing:
    """The files of a source, and how many were skipped as binary."""

    files: tuple[SourceFile, ...]
    num_binary_files: int


def list_files(config: FilesConfig) -> list[SourceFile]:
    """Lists the files of a source in reading order; see `find_files`."""
    return list(find_files(config).files)


def find_files(config: FilesConfig) -> FileListing:
    """Resolve `config.documents` to files.

    Entries keep their order; within a folder or glob the order is that of the sorted paths. A
    file reached twice is listed once. Files that come from a folder or glob are left out when
    hidden, or binary (a NUL in the first 8 KiB); a file named outright never is. Formats that say
    themselves what is broken are never binary: all but text, and in a crawl also HTML, which may
    be UTF-16. A folder's links to other folders are not followed (a glob's are).

    Raises:
        MaxlmError: an entry that does not exist, matches nothing or holds no text file; a file
            that cannot be read; compressed Parquet.
    """
    files: dict[str, SourceFile] = {}
    num_binary_files = 0
    for entry in config.documents:
        found = binary = 0
        for root in resolve_glob(entry):
            if folder_format := find_folder_format(root):
                for file in load_reader(folder_format, entry).list_files(root, config):
                    found += 1
                    files.setdefault(os.path.realpath(file.path), file)
                continue
            for path, name, is_text in _expand(root, named=root == Path(entry).expanduser()):
                file = _source_file(path, name)
                if not is_text and _is_binary(file, config):
                    binary += 1
                    continue
                found += 1
                files.setdefault(os.path.realpath(path), file)
        if not found:
            what = f"no text files here ({binary} binary files skipped)"
            raise MaxlmError(what, where=entry, fix="name a folder or files that hold text")
        num_binary_files += binary
    return FileListing(tuple(files.values()), num_binary_files)


def resolve_glob(entry: str) -> list[Path]:
    """Finds the files and folders that an entry stands for."""
    path = Path(entry).expanduser()
    if entry == PYTHON_STDLIB or path.exists():
        return [path]
    if not glob.has_magic(entry):
        fix = f"give a file, a folder, a quoted glob or {PYTHON_STDLIB}"
        raise MaxlmError("no such file or folder", where=entry, fix=fix)
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not matches:
        fix = "check the pattern (and quote it, so that the shell leaves it alone)"
        raise MaxlmError("the pattern matches nothing", where=entry, fix=fix)
    return matches


def _expand(root: Path, named: bool) -> Iterator[tuple[Path, str, bool]]:
    """Yield (path, name, known to be text) for each file of a root; `named`: outright."""
    if str(root) == PYTHON_STDLIB:
        stdlib = Path(sysconfig.get_path("stdlib"))
        for path in _walk(stdlib, skip=("site-packages", "dist-packages")):
            # A handful of test fixtures are written in other encodings on purpose.
            if path.suffix == ".py" and _is_utf8(path):
                yield path, path.relative_to(stdlib).as_posix(), True
    elif root.is_dir():
        for path in _walk(root):
            yield path, path.as_posix(), False
    elif named or root.is_file():
        yield root, root.as_posix(), named


def _walk(root: Path, skip: tuple[str, ...] = ()) -> list[Path]:
    """Regular, non-hidden files below `root`, in the order of their POSIX paths."""

    def fail(error: OSError) -> None:
        what = f"cannot list the folder: {error.strerror}"
        raise MaxlmError(what, where=error.filename, fix="check its permissions") from error

    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skip]
        for each in folders:
            if found := find_folder_format(Path(folder, each)):
                what = f"a {found} lies among the files of this folder"
                raise MaxlmError(what, where=str(Path(folder, each)), fix="name what is meant")
        files = (Path(folder, name) for name in names if not name.startswith("."))
        paths += [file for file in files if file.is_file()]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _source_file(path: Path, name: str) -> SourceFile:
    stem = Path(path.name.lower())
    compression = COMPRESSIONS.get(stem.suffix, "none")
    inner = stem if compression == "none" else stem.with_suffix("")
    formats = (each.name for each in FORMATS.values() if inner.suffix in each.suffixes)
    format_ = next(formats, "text")
    if format_ == "parquet" and compression != "none":
        what = "Parquet inside another compression cannot be read in pieces"
        fix = "decompress it (Parquet compresses its own pages)"
        raise MaxlmError(what, where=str(path), fix=fix)
    # A file system's names are bytes; Python has surrogates for those that are not UTF-8.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    state = path.stat()
    return SourceFile(path, name, format_, compression, state.st_size, state.st_mtime_ns)


def _is_binary(file: SourceFile, config: FilesConfig) -> bool:
    if file.format != "text" or (file.is_html and config.reads_html):
        return False
    try:
        with open_stream(file.path, file.compression) as stream:
            return b"\0" in stream.read(_SNIFF_BYTES)
    except DamagedFile:
        return False  # For the reader to say.


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True
