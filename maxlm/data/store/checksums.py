"""Checksums of a store's files, as `sha256sum` writes and checks them."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.runtime.pool import count_workers
from maxlm.runtime.storage import Place, hash_stored_file, join_place, read_failure_hint, read_file

CHECKSUMS_NAME = "checksums.sha256"
"""Names in it are relative to its folder."""


def write_checksums(folder: Path) -> str:
    """Write the checksums of all files that are below the folder now; returns the list's own."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(count_workers()) as threads:
        digests = threads.map(lambda name: hash_stored_file(folder, name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    (folder / CHECKSUMS_NAME).write_text("".join(lines))
    return hash_stored_file(folder, CHECKSUMS_NAME)


def find_damaged_files(place: Place, digest: str | None) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of files that are not as they were written.

    Args:
        digest: the SHA-256 of the list of checksums; None: an older version wrote the store, and
            kept no list at all, or none of its digest.
    """
    where, rebuild = str(join_place(place, CHECKSUMS_NAME)), "build the store again"
    try:
        data = read_file(place, CHECKSUMS_NAME)
    except FileNotFoundError:
        if digest is not None:
            yield CHECKSUMS_NAME, "is missing"
        return
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
        raise MaxlmError(what, where=where, fix=read_failure_hint(place, rebuild)) from error
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        yield CHECKSUMS_NAME, "has changed since it was written"
        return
    pairs = [line.split("  ", 1) for line in data.decode("utf-8", "replace").splitlines()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise MaxlmError("damaged list of checksums", where=where, fix=rebuild)

    def fault(pair: list[str]) -> str | None:
        try:
            same = hash_stored_file(place, pair[1]) == pair[0]
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return None if same else "has changed since it was written"

    with ThreadPoolExecutor(count_workers()) as threads:
        for pair, found in zip(pairs, threads.map(fault, pairs), strict=True):
            if found:
                yield pair[1], found
