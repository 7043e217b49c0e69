"""Checksums of a store's files, as `sha256sum` writes and checks them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.data.store.places import Place, below, read_file, sha256
from maxlm.data.work.pool import default_workers

CHECKSUMS_NAME = "checksums.sha256"
"""Names in it are relative to its folder."""


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files that are below the folder now."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(default_workers()) as threads:
        digests = threads.map(lambda name: sha256(folder, name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    (folder / CHECKSUMS_NAME).write_text("".join(lines))


def damaged_files(place: Place) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of files that are not as they were written; None are known to be in a
    store of an older version, which has no checksums.

    Raises:
        MaxlmError: the list of checksums is no such list.
    """
    try:
        lines = read_file(place, CHECKSUMS_NAME).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return
    pairs = [line.split("  ", 1) for line in lines]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        where = str(below(place, CHECKSUMS_NAME))
        raise MaxlmError("damaged list of checksums", where=where, fix="build the store again")

    def fault(pair: list[str]) -> str | None:
        try:
            same = sha256(place, pair[1]) == pair[0]
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return None if same else "has changed since it was written"

    with ThreadPoolExecutor(default_workers()) as threads:
        for pair, found in zip(pairs, threads.map(fault, pairs), strict=True):
            if found:
                yield pair[1], found
