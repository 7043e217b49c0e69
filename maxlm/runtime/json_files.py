"""JSON from outside: files and texts that others wrote, read in bounded memory and
time.

A published checkpoint, an adapter, a tokenizer or a results file may come from anyone,
and be cut short, be something else under that name, or be made to do harm. Whoever
reads one gets plain data of a bounded size and depth, or a MaxlmError that names the
file and the place in it.
"""

import json
import stat
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError

MAX_JSON_BYTES = 256 << 20
"""Largest file that is read. The largest tokenizers have 50 MB, the longest indices 20
MB."""

MAX_JSON_DEPTH = 100
"""Deepest nesting that is read. Code that walks over the values may recurse, and
Python's own parser gives up at about ten times as many."""


def check_regular_file(path: Path, fix: str) -> None:
    """Checks that a path, if there is anything, is a regular file or leads to one;
    raises MaxlmError. To open a named pipe waits for ever, and a device may have no
    end."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # Whoever opens it says why not.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        message = "neither a file nor a folder, but a pipe or device"
        raise MaxlmError(message, where=str(path), fix=fix)


def read_json_file(path: Path, fix: str) -> Any:
    """Returns the content of a JSON file from outside as plain data.

    Args:
        fix: the remedy to name in an error: "download it again".

    Raises:
        MaxlmError: a file that cannot be read, is no regular file, is larger than
            ``MAX_JSON_BYTES``, is no JSON in UTF-8, or is nested deeper than
            ``MAX_JSON_DEPTH``.
    """
    check_regular_file(path, fix)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            message = (
                f"{size:,} bytes of JSON, where at most {MAX_JSON_BYTES:,} are read"
            )
            raise MaxlmError(message, where=str(path), fix=fix)
        data = path.read_bytes()
    except OSError as error:
        message = f"cannot be read ({error.strerror or error})"
        raise MaxlmError(message, where=str(path), fix=fix) from error
    return parse_json(data, str(path), fix)


def read_json_object(path: Path, fix: str) -> dict[str, Any]:
    """Returns a JSON file that holds an object; raises MaxlmError as
    :func:`read_json_file` does, and for any other value."""
    values = read_json_file(path, fix)
    if not isinstance(values, dict):
        message = f"cannot be read (not a mapping, but {type(values).__name__})"
        raise MaxlmError(message, where=str(path), fix=fix)
    return values


def parse_json(data: bytes | str, where: str, fix: str) -> Any:
    """Returns JSON from outside as plain data; raises MaxlmError as
    :func:`read_json_file` does.

    Args:
        where: the file, or the file and line, for messages.
    """
    try:
        values = json.loads(data)
    except RecursionError:
        raise _make_depth_error(where, fix) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError name the place
        raise MaxlmError(f"cannot be read ({error})", where=where, fix=fix) from error
    if _is_deeper(values, MAX_JSON_DEPTH):
        raise _make_depth_error(where, fix)
    return values


def _make_depth_error(where: str, fix: str) -> MaxlmError:
    message = f"cannot be read (nested deeper than {MAX_JSON_DEPTH} levels)"
    return MaxlmError(message, where=where, fix=fix)


def _is_deeper(values: object, max_depth: int) -> bool:
    """Whether values are nested deeper than so many levels."""
    # Level by level, not by recursion, which is what the depth is limited for.
    level = [values]
    for _ in range(max_depth):
        children = []
        for value in level:
            if isinstance(value, dict):
                children.extend(value.values())
            elif isinstance(value, list):
                children.extend(value)
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True
