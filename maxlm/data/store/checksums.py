"""Checksums of a store's files, as `sha256sum` writes and checks them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maxlm.runtime.pool import count_usable_cores
from maxlm.runtime.storage import Place, hash_stored_file, read_file

CHECKSUMS_NAME = "checksums.sha256"
"""Names in it are relative to its folder."""


def write_checksums(folder: Path) -> str:
    """Write the checksums of all files that are below the folder now; returns the list's own."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(count_usable_cores()) as threads:
        digests = threads.map(lambda name: hash_stored_file(folder, name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    (folder / CHECKSUMS_NAME).write_text("".join(lines))
    return hash_stored_file(folder, CHECKSUMS_NAME)


def find_damaged_files(place: Place, digest: str | None) -> Iterator[tuple[str, str]]:
    """Returns (name, what is wrong) of files that are not as they were written.

    Args:
        digest: the SHA-256 of the list of checksums; None: it is not known.
    """

    def find_fault(digest: str, name: str) -> str | None:
        try:
            same = hash_stored_file(place, name) == digest
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return None if same else "has changed since it was written"

    if digest is not None and (found := find_fault(digest, CHECKSUMS_NAME)):
        yield CHECKSUMS_NAME, found
        return
    try:
        lines = read_file(place, CHECKSUMS_NAME).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return
    if not lines:
        yield CHECKSUMS_NAME, "is empty"
        return
    digests, _, names = zip(*(line.partition("  ") for line in lines), strict=True)
    with ThreadPoolExecutor(count_usable_cores()) as threads:
        for name, found in zip(names, threads.map(find_fault, digests, names), strict=True):
            if found:
                yield name, found
