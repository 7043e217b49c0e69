"""SHA-256 of the files of a folder, in a list as `sha256sum` writes and checks it.

Formats keep checksums of their parts (zarr's chunks, Parquet's pages), which tell a
damaged part, but not one whole good file that stands where another belongs. The list
does: it names each file. Its own SHA-256 belongs into the manifest of what the folder
holds, so that a list of another folder is not taken for this one's.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from maxlm.config import MaxlmError
from maxlm.runtime.files import replace_file
from maxlm.runtime.pool import count_usable_cores
from maxlm.runtime.storage import Place, hash_stored_file, join_place, read_file

CHECKSUMS_NAME = "checksums.sha256"
"""Name of the list. Names in it are relative to its folder."""
# A line of an error has room for no more.
_NAMED_FILES = 3


def write_checksums(
    folder: Path,
    names: Iterable[str] | None = None,
    known: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Writes the list of a folder's files, and returns the SHA-256 of the list.

    Args:
        names: files to list, relative to the folder; None: all that are below it now.
        known: digests by name of files that need not be read again.
    """
    if names is None:
        paths = (path for path in folder.rglob("*") if path.is_file())
        names = (path.relative_to(folder).as_posix() for path in paths)
    listed = sorted(name for name in names if name != CHECKSUMS_NAME)
    unknown = [name for name in listed if name not in known]
    digest_by_name = dict(known)
    with ThreadPoolExecutor(count_usable_cores()) as threads:
        digests = threads.map(lambda name: hash_stored_file(folder, name), unknown)
        digest_by_name.update(zip(unknown, digests, strict=True))
    # Two spaces, as sha256sum writes them.
    text = "".join(f"{digest_by_name[name]}  {name}\n" for name in listed)
    with replace_file(folder / CHECKSUMS_NAME) as new:
        new.write_text(text, "utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def read_checksums(place: Place, list_sha256: str, fix: str) -> dict[str, str]:
    """Reads the SHA-256 of each file of a list, by name. Raises MaxlmError, with this
    `fix`, if the list is lost or is not the one with this SHA-256."""
    where = str(join_place(place, CHECKSUMS_NAME))
    try:
        content = read_file(place, CHECKSUMS_NAME)
    except FileNotFoundError as error:
        raise MaxlmError("this file is missing", where=where, fix=fix) from error
    except OSError as error:
        message = f"this file cannot be read: {error.strerror or error}"
        raise MaxlmError(message, where=where, fix=fix) from error
    if hashlib.sha256(content).hexdigest() != list_sha256:
        message = "this file has changed since it was written"
        raise MaxlmError(message, where=where, fix=fix)
    return parse_checksums(content.decode())


def parse_checksums(text: str) -> dict[str, str]:
    """Parses a list: the SHA-256 of each file, by name."""
    lines = (line.partition("  ") for line in text.splitlines())
    return {name: digest for digest, _, name in lines}


def check_files(
    place: Place, list_sha256_by_folder: Mapping[str, str], fix: str
) -> None:
    """Reads every file of the lists of some folders; raises MaxlmError, with this
    `fix`, that names those that are not as their list says.

    `list_sha256_by_folder`: SHA-256 of the list itself, from the folder's manifest, by
    the folder's name in `place`; "" is the place.
    """
    digest_by_name: dict[str, str] = {}
    for folder, list_sha256 in list_sha256_by_folder.items():
        if not folder:
            digest_by_name |= read_checksums(place, list_sha256, fix)
            continue
        folder_place = join_place(place, folder)
        for name, digest in read_checksums(folder_place, list_sha256, fix).items():
            digest_by_name[f"{folder}/{name}"] = digest

    def find_fault(name: str, digest: str) -> str | None:
        try:
            is_same = hash_stored_file(place, name) == digest
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return None if is_same else "has changed since it was written"

    with ThreadPoolExecutor(count_usable_cores()) as threads:
        faults = threads.map(find_fault, digest_by_name.keys(), digest_by_name.values())
        fault_by_name = {
            name: fault
            for name, fault in zip(digest_by_name, faults, strict=True)
            if fault
        }
    if not fault_by_name:
        return
    first, *others = fault_by_name
    message = f"this file {fault_by_name[first]}"
    if others:
        names = ", ".join(others[:_NAMED_FILES])
        more = ", ..." if len(others) > _NAMED_FILES else ""
        noun = "other" if len(others) == 1 else "others"
        message += f" (and {len(others)} {noun}: {names}{more})"
    raise MaxlmError(message, where=str(join_place(place, first)), fix=fix)
