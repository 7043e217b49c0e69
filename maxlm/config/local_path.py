"""Paths that must lie on a disk."""

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from maxlm.config.errors import MaxlmError

_Path = TypeVar("_Path", bound=str | Path)


def check_local(path: _Path) -> _Path:
    """Return a path as it was given.

    Raises:
        MaxlmError: it is a URL, which would name a folder such as `s3:` here.
    """
    # A Path has made one slash of two.
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path))
    if found is None:
        return path
    copy = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r"}.get(found[1], "its own tool")
    raise MaxlmError(
        f"{found[1]}://{found[2]} is not on a disk: in object stores lie only token stores to read "
        "and checkpoint.remote_folder",
        fix=f"use a folder here, and copy it with {copy}",
    )


LocalPath = Annotated[str, AfterValidator(check_local)]
"""A path in a config."""
