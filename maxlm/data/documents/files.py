"""The formats of documents, and from paths, folders and globs to files in a fixed
order.

A folder that `maxlm corpus run` made is one source. What reads it registers itself as a
document reader (an entry point of maxlm's own package, see pyproject.toml), and is
imported when such a folder is first listed or read.
"""

import glob
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maxlm.config import MaxlmError
from maxlm.config.registry import Registry
from maxlm.data.documents.config import (
    PYTHON_PACKAGE,
    PYTHON_STDLIB,
    FilesConfig,
    is_installed_text,
)
from maxlm.data.documents.document import Document, FileSlice, SourceFile
from maxlm.data.documents.streams import COMPRESSIONS, DamagedFile, open_stream
from maxlm.runtime.json_files import check_regular_file

_SNIFF_BYTES = 8192
# Distributions install Python without its tests (two thirds of its text), and IDLE, Tk
# and what later versions removed as packages of their own, or not at all. Without them
# the standard library is nearly the same text wherever it was installed from.
_OPTIONAL_STDLIB = ("test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo")
_OPTIONAL_STDLIB += (
    "distutils",
    "lib2to3",
    "ensurepip",
    "site-packages",
    "dist-packages",
)

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
}
"""Formats by the suffix of a file's name, in lower case and before `.gz` or `.zst`; the
others are text."""


class DocumentReader(Protocol):
    """Reads folders of documents that are no files of their own."""

    def list_corpus_files(
        self, folder: Path, config: FilesConfig
    ) -> Iterable[SourceFile]:
        """Lists a folder's documents as files that can be read in slices."""
        ...

    def read_corpus_slice(self, part: FileSlice) -> Iterator[Document]:
        """Yields the documents of a slice of one of these files, in order."""
        ...

    def describe_filter_rules(self, files: Iterable[SourceFile]) -> str:
        """Describes which documents are taken from the folders of ``files``."""
        ...


DOCUMENT_READERS = Registry[DocumentReader]("document reader")


def is_corpus(folder: Path) -> bool:
    """Tells a folder that `maxlm corpus run` made, which is one source, from a folder
    of files."""
    return (folder / "corpus.json").exists() and (folder / "documents").exists()


def check_corpus_packages(error_location: str) -> None:
    """Checks that the packages that reading a corpus takes are installed."""
    for package in ("pyarrow", "regex"):
        if importlib.util.find_spec(package) is None:
            what = f"a corpus needs {package}, which is not installed"
            raise MaxlmError(
                what, where=error_location, fix="pip install 'maxlm[corpus]'"
            )


def find_corpus_reader(error_location: str) -> DocumentReader:
    """Returns the reader of corpora; `error_location` is what it is to read. Raises
    MaxlmError: a package that it needs is missing."""
    check_corpus_packages(error_location)
    return DOCUMENT_READERS.get("corpus")


def describe_filter_rules(files: Iterable[SourceFile]) -> str | None:
    """Describes which documents are taken from the corpora among `files`; None: no
    such."""
    corpora = [file for file in files if file.format == "corpus"]
    return (
        find_corpus_reader(corpora[0].name).describe_filter_rules(corpora)
        if corpora
        else None
    )


@dataclass(frozen=True)
class FileListing:
    """The files of a source, and how many were skipped as binary."""

    files: tuple[SourceFile, ...]
    num_binary_files: int


def find_files(config: FilesConfig) -> FileListing:
    """Resolve `config.documents` to files.

    Entries keep their order; within a folder or glob the order is that of the sorted
    paths. A file reached twice is listed once. Files that come from a folder or glob
    are left out when hidden, or binary (a NUL in the first 8 KiB); a file named
    outright never is. Formats that say themselves what is broken are never binary: all
    but text, and in a crawl also HTML, which may be UTF-16. A folder's links to other
    folders are not followed (a glob's are). Raises MaxlmError: an entry that does not
    exist, matches nothing or holds no text file; a file that cannot be read; compressed
    Parquet."""
    files: dict[str, SourceFile] = {}
    num_binary_files = 0
    for entry in config.documents:
        found = binary = 0
        for root in resolve_glob(entry):
            if is_corpus(root):
                for file in find_corpus_reader(entry).list_corpus_files(root, config):
                    found += 1
                    files.setdefault(os.path.realpath(file.path), file)
                continue
            for path, name, is_text in _expand(
                root, named=root == Path(entry).expanduser()
            ):
                file = _source_file(path, name)
                if not is_text and _is_binary(file, config):
                    binary += 1
                    continue
                found += 1
                files.setdefault(os.path.realpath(path), file)
        if not found:
            what = f"no text files here ({binary} binary files skipped)"
            raise MaxlmError(
                what, where=entry, fix="name a folder or files that hold text"
            )
        num_binary_files += binary
    return FileListing(tuple(files.values()), num_binary_files)


def resolve_glob(entry: str) -> list[Path]:
    """Finds the files and folders that an entry stands for."""
    path = Path(entry).expanduser()
    if is_installed_text(entry) or path.exists():
        return [path]
    if not glob.has_magic(entry):
        fix = f"give a file, a folder, a quoted glob, {PYTHON_STDLIB} or {PYTHON_PACKAGE}NAME"
        raise MaxlmError("no such file or folder", where=entry, fix=fix)
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not matches:
        fix = "check the pattern (and quote it, so that the shell leaves it alone)"
        raise MaxlmError("the pattern matches nothing", where=entry, fix=fix)
    return matches


def _expand(root: Path, named: bool) -> Iterator[tuple[Path, str, bool]]:
    """Yield (path, name, known to be text) for each file of a root; `named`:
    outright."""
    if str(root) == PYTHON_STDLIB:
        stdlib = Path(sysconfig.get_path("stdlib"))
        yield from _list_modules(stdlib, stdlib, skip=_OPTIONAL_STDLIB)
    elif str(root).startswith(PYTHON_PACKAGE):
        for folder in _find_package_folders(str(root)):
            yield from _list_modules(folder, folder.parent, skip=())
    elif root.is_dir():
        for path in _walk(root):
            yield path, path.as_posix(), False
    elif named or root.is_file():
        check_regular_file(root, "write what it holds into a file, and name that")
        yield root, root.as_posix(), named


def _list_modules(
    root: Path, named_from: Path, skip: tuple[str, ...]
) -> Iterator[tuple[Path, str, bool]]:
    """Yields Python modules below a folder as :func:`_expand` does, named from
    another."""
    for path in _walk(root, skip):
        # A handful of test fixtures are written in other encodings on purpose.
        if path.suffix == ".py" and _is_utf8(path):
            yield path, path.relative_to(named_from).as_posix(), True


def _find_package_folders(entry: str) -> list[Path]:
    """Finds an installed package's folders (several: a namespace), without importing
    it."""
    name = entry.removeprefix(PYTHON_PACKAGE)
    # Of a dotted name find_spec would import the parent.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        what = f"no package {name!r} is installed in this Python's environment"
        fix = f"install it, or name another that is imported so, such as {PYTHON_PACKAGE}numpy"
        raise MaxlmError(what, where=entry, fix=fix)
    return sorted({Path(folder) for folder in spec.submodule_search_locations})


def _walk(root: Path, skip: tuple[str, ...] = ()) -> list[Path]:
    """Regular, non-hidden files below `root`, in the order of their POSIX paths."""

    def fail(error: OSError) -> None:
        what = f"cannot list the folder: {error.strerror}"
        raise MaxlmError(
            what, where=error.filename, fix="check its permissions"
        ) from error

    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skip]
        for each in folders:
            if is_corpus(Path(folder, each)):
                what = "a corpus lies among the files of this folder"
                raise MaxlmError(
                    what, where=str(Path(folder, each)), fix="name what is meant"
                )
        files = (Path(folder, name) for name in names if not name.startswith("."))
        paths += [file for file in files if file.is_file()]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _source_file(path: Path, name: str) -> SourceFile:
    stem = Path(path.name.lower())
    compression = COMPRESSIONS.get(stem.suffix, "none")
    inner = stem if compression == "none" else stem.with_suffix("")
    format_ = FORMATS.get(inner.suffix, "text")
    if format_ == "parquet" and compression != "none":
        what = "Parquet inside another compression cannot be read in pieces"
        fix = "decompress it (Parquet compresses its own pages)"
        raise MaxlmError(what, where=str(path), fix=fix)
    # A file system's names are bytes; Python has surrogates for those that are not
    # UTF-8.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    state = path.stat()
    return SourceFile(
        path, name, format_, compression, state.st_size, state.st_mtime_ns
    )


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
