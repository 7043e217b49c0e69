"""Keys of a config tree and where each value came from."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]
"""A path into nested mappings (names) and lists (indices); the root is ``()``."""

_OVERRIDE_KEY = re.compile(r"[^\s.\[\]=]+(?:\.[^\s.\[\]=]+|\[\d+\])*")


@dataclass(frozen=True)
class SettingOrigin:
    """Place where a value was written: a file and line, the command line, or none (a
    default)."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


DEFAULT = SettingOrigin("default")
COMMAND_LINE = SettingOrigin("command line")
DERIVED = SettingOrigin("from another setting")


def join_key(key: Iterable[str | int]) -> str:
    """Formats ``("data", "sources", 0, "weight")`` as ``data.sources.0.weight``."""
    return ".".join(str(part) for part in key)


def split_key(text: str) -> tuple[str, ...] | None:
    """Returns the parts of ``data.sources[0].weight`` or ``data.sources.0.weight``;
    else None."""
    if not _OVERRIDE_KEY.fullmatch(text):
        return None
    return tuple(re.split(r"[.\[]", text.replace("]", "")))


def flatten(data: object, prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yields the leaves of nested mappings and lists, in order. An empty container is a
    leaf."""
    if isinstance(data, Mapping) and data:
        for name, value in data.items():
            yield from flatten(value, (*prefix, name))
    elif isinstance(data, list | tuple) and data:
        for index, value in enumerate(data):
            yield from flatten(value, (*prefix, index))
    else:
        yield prefix, data


def select_leaves(
    config: Mapping[str, Any], keys: Sequence[str], ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns leaves of a config by their dotted keys.

    Args:
        keys: dotted keys, each with all below it ("model", "data.seed").
        ignored: patterns of keys that are left out ("data.sources.*.weight").
    """
    leaves: dict[str, Any] = {}
    for key, value in flatten(config):
        name = join_key(key)
        is_below = any(name == top or name.startswith(f"{top}.") for top in keys)
        is_ignored = any(fnmatchcase(name, pattern) for pattern in ignored)
        if is_below and not is_ignored:
            leaves[name] = value
    return leaves


def get_descendant(node: object, key: Key) -> Any:
    """Returns the value at `key` below `node`, or None."""
    for part in key:
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list | tuple) and isinstance(part, int):
            if part >= len(node):
                return None
            node = node[part]
        else:
            return None
    return node


def format_value(value: object, limit: int = 60) -> str:
    """Returns a value for a message, much as YAML writes it, in at most `limit`
    characters."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    else:
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def format_path(path: Path) -> str:
    """Returns a path as messages show it: relative when it lies below the working
    directory."""
    absolute = Path(os.path.abspath(path))
    working = Path.cwd()
    if absolute.is_relative_to(working):
        return str(absolute.relative_to(working))
    return str(absolute)
