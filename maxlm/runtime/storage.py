"""Places of stores: a folder, or a prefix in an object store (`gs://`, `s3://`) to read
from.

Object stores are read by TensorStore's own drivers. Credentials come from where their
tools look for them (`AWS_ACCESS_KEY_ID`, `~/.aws`, Google's application default
credentials, ...).
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.runtime.files import hash_file

Place = Path | str
"""A folder's path, or an object store's URL without a slash at its end."""
_DRIVERS = {"s3": "s3", "gs": "gcs"}
# Some ten seconds, after which a store that cannot be reached is said to be so.
_FEW_RETRIES = {"max_retries": 5, "initial_delay": "500ms", "max_delay": "4s"}


def to_place(path: Path | str) -> Place:
    """Returns the place of a path or URL; raises MaxlmError for a URL of another
    kind."""
    # Also from a Path, which has made one slash of two.
    match = re.fullmatch(r"([a-z0-9+]+):/+([^/]+(?:/.*?)?)/*", str(path))
    if match is None:
        return Path(path)
    if match[1] not in _DRIVERS:
        fix = "give a folder, or a URL that begins with gs:// or s3://"
        raise MaxlmError(
            f"stores cannot be read from {match[1]}://", where=str(path), fix=fix
        )
    return f"{match[1]}://{match[2]}"


def join_place(place: Place, name: str) -> Place:
    """Returns the place of `name` (which may hold slashes) within a place."""
    return place / name if isinstance(place, Path) else f"{place}/{name}"


def get_read_failure_fix(place: Place, disk_fix: str) -> str:
    """Returns the fix for a place that cannot be read: `disk_fix` for a folder."""
    return (
        disk_fix
        if isinstance(place, Path)
        else "check the URL, the network and the credentials"
    )


def make_kvstore_spec(place: Place, *, long_retries: bool = True) -> dict[str, Any]:
    """Returns TensorStore's KvStore spec of a place.

    The address of an S3 service other than Amazon's is read from `AWS_ENDPOINT_URL` and
    its region from `AWS_REGION`, as by its own tools. ``long_retries``: try for minutes
    to reach a store.
    """
    if isinstance(place, Path):
        return {"driver": "file", "path": f"{place.resolve()}/"}
    scheme, _, rest = place.partition("://")
    bucket, _, path = rest.partition("/")
    spec: dict[str, object] = {
        "driver": _DRIVERS[scheme],
        "bucket": bucket,
        "path": f"{path}/" if path else "",
    }
    if scheme == "s3":
        names = {"endpoint": "AWS_ENDPOINT_URL", "aws_region": "AWS_REGION"}
        spec |= {
            key: os.environ[name] for key, name in names.items() if os.environ.get(name)
        }
        if os.environ.get(
            "AWS_ACCESS_KEY_ID"
        ):  # Else a missing ~/.aws is told of at each read.
            spec["aws_credentials"] = {"type": "environment"}
    if not long_retries:
        spec[f"{_DRIVERS[scheme]}_request_retries"] = _FEW_RETRIES
    return spec


def read_file(place: Place, name: str) -> bytes:
    """Returns the bytes of a file in a place; raises OSError if it cannot be read."""
    if isinstance(place, Path):
        return (place / name).read_bytes()
    with _storage_errors():
        found = _open(place).read(name).result()
    if found.state != "value":
        raise FileNotFoundError(f"there is no {name} in {place}")
    return found.value


def hash_stored_file(place: Place, name: str) -> str:
    """Returns the SHA-256 of a file's bytes, in hex; raises OSError if it cannot be
    read."""
    if isinstance(place, Path):
        return hash_file(place / name)
    return hashlib.sha256(read_file(place, name)).hexdigest()


def download_folder(place: Place, name: str, to: Path) -> None:
    """Copy the files below folder `name` of an object store into the folder `to`;
    raises OSError if one cannot be read or written."""
    folder = join_place(place, name)
    with _storage_errors():
        keys = [key.decode() for key in _open(folder).list().result()]
    for key in keys:
        if not key or key.endswith(
            "/"
        ):  # Some tools put an empty object where a folder is.
            continue
        if ".." in key.split("/") or key.startswith("/"):
            raise OSError(f"there is an object with the name {key!r}")
        (to / key).parent.mkdir(parents=True, exist_ok=True)
        (to / key).write_bytes(read_file(folder, key))


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Turns TensorStore's errors into OSError, in one line."""
    try:
        yield
    except ValueError as error:
        raise OSError(str(error).split(" [")[0].splitlines()[0]) from error


def _open(place: Place):
    import tensorstore as ts

    return ts.KvStore.open(make_kvstore_spec(place, long_retries=False)).result()
