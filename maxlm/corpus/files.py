"""From paths, folders and globs to a list of source files in a fixed order."""

import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from maxlm.config import MaxlmError
from maxlm.corpus.config import PYTHON_STDLIB, CrawlSource, FilesConfig
from maxlm.corpus.streams import (
    COMPRESSIONS,
    Compression,
    DamagedFile,
    open_stream,
    require_corpus_packages,
)

if TYPE_CHECKING:
    from maxlm.corpus.selection import KeptShard

Format = Literal["text", "jsonl", "parquet", "warc", "corpus"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
}
_HTML = (".html", ".htm", ".xhtml")
_SNIFF_BYTES = 8192
CORPUS_FILE = "corpus.json"
"""What tells the folder of a corpus that `maxlm corpus run` made."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus."""

    path: Path
    name: str
    """What documents and manifests call it: the path as the user gave it (below a folder: that
    folder's path and the rest), or the path inside the standard library. Always valid Unicode;
    U+FFFD stands for what is not in the path, so that two files may have one name."""
    format: Format
    compression: Compression
    size: int
    """Bytes on disk."""
    labels: tuple[Path, ...] = ()
    """Of a corpus's shard: the files with labels that decide what is taken from it."""
    digests: tuple[str | None, ...] = ()
    """Of a corpus's shard: the SHA-256 of `path` and `labels`; None where its version kept none."""
    kept: "KeptShard | None" = None
    """Of a corpus's shard: what reads it."""

    @property
    def is_html(self) -> bool:
        """Whether it is a file of one web page, by its name."""
        name = self.path.name.lower().removesuffix(".gz").removesuffix(".zst")
        return self.format == "text" and name.endswith(_HTML)


@dataclass(frozen=True)
class Listing:
    """The files of a corpus, and how many were passed over as binary."""

    files: tuple[SourceFile, ...]
    num_binary: int


def list_files(config: FilesConfig) -> list[SourceFile]:
    """The files of a corpus in reading order; see `find_files`."""
    return list(find_files(config).files)


def find_files(config: FilesConfig) -> Listing:
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
    num_binary = 0
    for entry in config.documents:
        found = binary = 0
        for root in find_roots(entry):
            if is_corpus(root):
                require_corpus_packages(entry)
                from maxlm.corpus.selection import corpus_files

                for file in corpus_files(root, config):
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
        num_binary += binary
    return Listing(tuple(files.values()), num_binary)


def is_corpus(folder: Path) -> bool:
    """Whether `maxlm corpus run` made this folder."""
    return (folder / CORPUS_FILE).is_file() and (folder / "documents").is_dir()


def find_roots(entry: str) -> list[Path]:
    """The files and folders that an entry stands for."""
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
        yield from _python_stdlib()
    elif root.is_dir():
        yield from _walk(root)
    elif named or root.is_file():
        yield root, root.as_posix(), named


def _walk(root: Path) -> Iterator[tuple[Path, str, bool]]:
    for relative in _relative_paths(root, skip=()):
        path = root / relative
        yield path, path.as_posix(), False


def _python_stdlib() -> Iterator[tuple[Path, str, bool]]:
    root = Path(sysconfig.get_path("stdlib"))
    for relative in _relative_paths(root, skip=("site-packages", "dist-packages")):
        path = root / relative
        # A handful of test fixtures are written in other encodings on purpose.
        if relative.endswith(".py") and _is_utf8(path):
            yield path, relative, True


def _relative_paths(root: Path, skip: tuple[str, ...]) -> list[str]:
    """Regular, non-hidden files below `root`, as sorted POSIX paths relative to it."""

    def fail(error: OSError) -> None:
        what = f"cannot list the folder: {error.strerror}"
        raise MaxlmError(what, where=error.filename, fix="check its permissions") from error

    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skip]
        for each in folders:
            if is_corpus(Path(folder, each)):
                what = "a corpus lies among the files of this folder"
                raise MaxlmError(what, where=str(Path(folder, each)), fix="name what is meant")
        files = (Path(folder, name) for name in names if not name.startswith("."))
        paths += [file.relative_to(root).as_posix() for file in files if file.is_file()]
    return sorted(paths)


def _source_file(path: Path, name: str) -> SourceFile:
    stem = Path(path.name.lower())
    compression = COMPRESSIONS.get(stem.suffix, "none")
    inner = stem if compression == "none" else stem.with_suffix("")
    format_ = _FORMATS.get(inner.suffix, "text")
    if format_ == "parquet" and compression != "none":
        what = "Parquet inside another compression cannot be read in pieces"
        fix = "decompress it (Parquet compresses its own pages)"
        raise MaxlmError(what, where=str(path), fix=fix)
    if inner.suffix == ".arc":
        fix = "make a WARC of it: warcio recompress IN.arc.gz OUT.warc.gz"
        raise MaxlmError("ARC archives cannot be read", where=str(path), fix=fix)
    # A file system's names are bytes; Python has surrogates for those that are not UTF-8.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return SourceFile(path, name, format_, compression, path.stat().st_size)


def _is_binary(file: SourceFile, config: FilesConfig) -> bool:
    if file.format != "text" or (file.is_html and isinstance(config, CrawlSource)):
        return False
    try:
        with open_stream(file.path, file.compression) as stream:
            return b"\0" in stream.read(_SNIFF_BYTES)
    except DamagedFile:
        return False  # For the reader to say.


def _is_utf8(path: Path) -> bool:
    with open_stream(path, "none") as stream:
        try:
            stream.read().decode()
        except UnicodeDecodeError:
            return False
    return True
