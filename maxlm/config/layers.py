"""A config as layers of settings: files, what they include, and overrides on top.

Nothing is filled in, the environment least of all: a config may be another's, and what
it resolves to is printed into jobs and kept with runs.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from maxlm.config.assets import find_shipped_config, find_similar_configs
from maxlm.config.errors import MaxlmError
from maxlm.config.keys import (
    COMMAND_LINE,
    DERIVED,
    Key,
    SettingOrigin,
    format_path,
    format_value,
    get_descendant,
    join_key,
    split_key,
)
from maxlm.config.yaml_text import MAX_DEPTH, Setting, parse_yaml

MAX_FILES = 100
"""Files that a config may be made of, all includes together; each takes milliseconds to
read."""


@dataclass(frozen=True)
class SettingsTree:
    """Plain settings and where each of their nodes was written; that of the root is
    known."""

    settings: dict[str, Any]
    origins: Mapping[Key, SettingOrigin]

    def locate(self, key: Key) -> SettingOrigin:
        """Returns where the node at `key` was written, else its nearest parent that
        was."""
        return self.origins[self._find_written(key)]

    def find_value_origin(self, key: Key, value: object) -> SettingOrigin | None:
        """Returns where the `value` a config holds at `key` comes from; None for a
        default."""
        written = get_descendant(self.settings, key)
        are_numbers = isinstance(written, int | float) and isinstance(
            value, int | float
        )
        if are_numbers and written != value:
            return DERIVED
        nearest = self._find_written(key)
        # A validator takes text such as `fsdp=2` apart: its parts come from there. Below
        # a mapping or a list, what is not written is a default.
        is_container = isinstance(get_descendant(self.settings, nearest), dict | list)
        if nearest != key and is_container:
            return None
        return self.origins[nearest]

    def _find_written(self, key: Key) -> Key:
        while key not in self.origins:
            key = key[:-1]
        return key


def build_tree(
    path: Path | None, overrides: Sequence[str], base: Setting | None = None
) -> SettingsTree:
    """Lays `base`, a mapping, `path`, its includes and the overrides over one
    another."""
    root = base or Setting({}, COMMAND_LINE)
    if path is not None:
        for layer in _read_layers(path, (), count(1)):
            root = _merge(root, layer, ())
    for override in overrides:
        root = _override(root, override)
    return SettingsTree(root.to_plain(), dict(root.list_origins()))


def _read_layers(
    path: Path, trail: tuple[Path, ...], numbers: Iterator[int]
) -> list[Setting]:
    """Returns what makes up a file, lowest first: its includes in order, then itself.

    ``include:`` at the top is a path or a list of paths, each relative to the file, or
    the name of a shipped config. ``numbers`` counts the files of all levels.
    """
    if next(numbers) > MAX_FILES:
        message = f"the config is made of more than {MAX_FILES} files"
        fix = "include fewer: files that include others again and again count each time"
        raise MaxlmError(message, where=format_path(trail[0]), fix=fix)
    document = _read_file(path)
    no_includes = Setting([], document.origin)
    include = document.value.pop("include", no_includes)
    includes = include.value if isinstance(include.value, list) else [include]
    # This file behind those that include it, outermost first.
    trail = (*trail, path)
    open_files = [includer.resolve() for includer in trail]
    layers = []
    for item in includes:
        if not isinstance(item.value, str):
            shown = format_value(item.to_plain())
            message = f"include must be a path or a list of paths, not {shown}"
            raise MaxlmError(message, where=str(item.origin))
        target = _find_included(path, item)
        if target.resolve() in open_files:
            cycle = " -> ".join(format_path(step) for step in (*trail, target))
            fix = "remove one of these includes"
            raise MaxlmError(f"include cycle: {cycle}", where=str(item.origin), fix=fix)
        layers += _read_layers(target, trail, numbers)
    return [*layers, document]


def _read_file(path: Path) -> Setting:
    name = format_path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MaxlmError(f"cannot be read: {error.strerror}", where=name) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"
        raise MaxlmError(
            message, where=f"{name}:{line}", fix="save it as UTF-8"
        ) from None
    document = parse_yaml(text, name)
    if not isinstance(document.value, dict | None):
        message = "a config must be a mapping of keys to values"
        raise MaxlmError(message, where=str(document.origin))
    return Setting(document.value or {}, SettingOrigin(name))


def _find_included(includer: Path, item: Setting) -> Path:
    """Returns the file that an ``include`` names: relative to the file that it stands
    in, else a shipped config."""
    named = Path(item.value).expanduser()
    path = Path(os.path.normpath(includer.parent / named))
    if path.is_file():
        return path
    shipped = find_shipped_config(item.value)
    if shipped is None:
        similar = find_similar_configs(path)
        message = f"include {item.value!r}: there is no {format_path(path)}"
        fix = f"did you mean {' or '.join(similar)}?" if similar else None
        raise MaxlmError(message, where=str(item.origin), fix=fix)
    return shipped


def _merge(below: Setting | None, above: Setting, key: Key) -> Setting:
    """`above` laid over `below`: mappings deeply, all else replaced."""
    if below is None:
        return above
    below_is_mapping = isinstance(below.value, dict)
    if {type(below.value), type(above.value)} == {dict, list}:
        above_kind = "list" if below_is_mapping else "mapping"
        below_kind = "mapping" if below_is_mapping else "list"
        message = (
            f"{join_key(key)} is a {above_kind} here, but a {below_kind} in "
            f"{below.origin}"
        )
        raise MaxlmError(message, where=str(above.origin), fix="write both alike")
    if not below_is_mapping or not isinstance(above.value, dict):
        return above
    children = dict(below.value)
    for name, child in above.value.items():
        children[name] = _merge(below.value.get(name), child, (*key, name))
    return Setting(children, above.origin)


def _override(root: Setting, override: str) -> Setting:
    """Sets ``key.path=value``, where the value is YAML and a list index a part of the
    key."""
    name, equals, text = override.partition("=")
    parts = split_key(name.strip())
    if not equals or parts is None or len(parts) > MAX_DEPTH:
        message = f"{format_value(override)} is not an override"
        fix = "write key=value, such as model.num_layers=4"
        raise MaxlmError(message, where=str(COMMAND_LINE), fix=fix)
    try:
        value = parse_yaml(text, COMMAND_LINE.source, track_lines=False)
    except MaxlmError as error:
        where = f"{COMMAND_LINE}: {override[:60]}"
        raise MaxlmError(error.message, where=where, fix=error.fix) from None
    return _set_value(root, parts, value, ())


def _set_value(
    node: Setting | None, parts: Sequence[str], value: Setting, key: Key
) -> Setting:
    """`node`, which stands at `key`, with `value` merged in at `parts` below it."""
    if not parts:
        return _merge(node, value, key)
    first, *rest = parts

    # An element of a list, by its index.
    if node and isinstance(node.value, list):
        size = len(node.value)
        if not first.isdecimal() or int(first) >= size:
            elements = f"{size} element{'' if size == 1 else 's'}"
            message = (
                f"{join_key(key)} is a list of {elements}; there is no "
                f"{join_key((*key, first))}"
            )
            fix = "count from 0, or give the whole list"
            raise MaxlmError(message, where=str(COMMAND_LINE), fix=fix)
        index = int(first)
        items = [*node.value]
        items[index] = _set_value(items[index], rest, value, (*key, index))
        return Setting(items, node.origin)

    # A key of a mapping; what is no mapping gives way to one.
    mapping = Setting({}, COMMAND_LINE)
    if node and isinstance(node.value, dict):
        mapping = node
    child = _set_value(mapping.value.get(first), rest, value, (*key, first))
    return Setting({**mapping.value, first: child}, mapping.origin)
