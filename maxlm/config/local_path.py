"""Paths that must lie on a disk."""

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from maxlm.config.errors import MaxlmError

_Path = TypeVar("_Path", bound=str | Path)
_TOOLS = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r"}


def check_local_path(path: _Path) -> _Path:
    """Return a path as it is.

    Raises:
        MaxlmError: it is a URL, for which a folder such as `s3:` would be made.
    """
    # A Path has made one slash of two.
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path)):
        what = f"{found[1]}://{found[2]} is not on a disk; only a token store to read and "
        fix = f"use a folder here, and copy it with {_TOOLS.get(found[1], 'a tool of its own')}"
        raise MaxlmError(f"{what}checkpoint.remote_folder may be URLs", fix=fix)
    return path


def _check_setting(path: str) -> str:
    try:
        return check_local_path(path)
    except MaxlmError as error:
        # With a ValueError, pydantic tells which key it is.
        raise ValueError(str(error)) from None


LocalPath = Annotated[str, AfterValidator(_check_setting)]
"""A path in a config, which must lie on a disk."""
