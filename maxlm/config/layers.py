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

    def find_value_origin(self, key: Key, value: Any) -> SettingOrigin | None:
        """Returns where the `value` a config holds at `key` comes from; None for a
        default."""
        at = self._find_written(key)
        written = get_descendant(self.settings, key)
        if (
            isinstance(written, int | float)
            and isinstance(value, int | float)
            and written != value
        ):
            return DERIVED
        # A validator takes text such as `fsdp=2` apart; below a mapping stand defaults.
        whole = not isinstance(get_descendant(self.settings, at), dict | list)
        return self.origins[at] if at == key or whole else None

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
    for layer in _read_layers(path, (), count(1)) if path is not None else ():
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
        what = f"the config is made of more than {MAX_FILES} files"
        fix = "include fewer: files that include others again and again count each time"
        raise MaxlmError(what, where=format_path(trail[0]), fix=fix)
    document = _read_file(path)
    include = document.value.pop("include", Setting([], document.origin))
    trail = (*trail, path)
    layers = []
    for item in include.value if isinstance(include.value, list) else [include]:
        if not isinstance(item.value, str):
            what = f"include must be a path or a list of paths, not {format_value(item.to_plain())}"
            raise MaxlmError(what, where=str(item.origin))
        target = _find_included(path, item)
        if target.resolve() in [earlier.resolve() for earlier in trail]:
            ring = " -> ".join(format_path(step) for step in (*trail, target))
            fix = "remove one of these includes"
            raise MaxlmError(f"include cycle: {ring}", where=str(item.origin), fix=fix)
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
        what = f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"
        raise MaxlmError(what, where=f"{name}:{line}", fix="save it as UTF-8") from None
    document = parse_yaml(text, name)
    if not isinstance(document.value, dict | None):
        what = "a config must be a mapping of keys to values"
        raise MaxlmError(what, where=str(document.origin))
    return Setting(document.value or {}, SettingOrigin(name))


def _find_included(includer: Path, item: Setting) -> Path:
    path = Path(os.path.normpath(includer.parent / Path(item.value).expanduser()))
    found = path if path.is_file() else find_shipped_config(item.value)
    if found is None:
        near = find_similar_configs(path)
        what = f"include {item.value!r}: there is no {format_path(path)}"
        fix = f"did you mean {' or '.join(near)}?" if near else None
        raise MaxlmError(what, where=str(item.origin), fix=fix)
    return found


def _merge(below: Setting | None, above: Setting, key: Key) -> Setting:
    """`above` laid over `below`: mappings deeply, all else replaced."""
    if below and {type(below.value), type(above.value)} == {dict, list}:
        kind, other = (
            ("list", "mapping")
            if isinstance(below.value, dict)
            else ("mapping", "list")
        )
        what = f"{join_key(key)} is a {kind} here, but a {other} in {below.origin}"
        raise MaxlmError(what, where=str(above.origin), fix="write both alike")
    if (
        not below
        or not isinstance(below.value, dict)
        or not isinstance(above.value, dict)
    ):
        return above
    merged = {
        name: _merge(below.value.get(name), child, (*key, name))
        for name, child in above.value.items()
    }
    return Setting({**below.value, **merged}, above.origin)


def _override(root: Setting, override: str) -> Setting:
    """Sets ``key.path=value``, where the value is YAML and a list index a part of the
    key."""
    name, equals, text = override.partition("=")
    parts = split_key(name.strip())
    if not equals or parts is None or len(parts) > MAX_DEPTH:
        what = f"{format_value(override)} is not an override"
        fix = "write key=value, such as model.num_layers=4"
        raise MaxlmError(what, where=str(COMMAND_LINE), fix=fix)
    try:
        value = parse_yaml(text, COMMAND_LINE.source, track_lines=False)
    except MaxlmError as error:
        where = f"{COMMAND_LINE}: {override[:60]}"
        raise MaxlmError(error.what, where=where, fix=error.fix) from None
    return _set_value(root, parts, value, ())


def _set_value(
    node: Setting | None, parts: Sequence[str], value: Setting, key: Key
) -> Setting:
    """`node`, which stands at `key`, with `value` merged in at `parts` below it."""
    if not parts:
        return _merge(node, value, key)
    name = join_key((*key, parts[0]))
    where = str(COMMAND_LINE)
    if node and isinstance(node.value, list):
        size = len(node.value)
        if not parts[0].isdecimal() or int(parts[0]) >= size:
            count = f"{size} element{'' if size == 1 else 's'}"
            what = f"{join_key(key)} is a list of {count}; there is no {name}"
            raise MaxlmError(
                what, where=where, fix="count from 0, or give the whole list"
            )
        index = int(parts[0])
        items = [*node.value]
        items[index] = _set_value(items[index], parts[1:], value, (*key, index))
        return Setting(items, node.origin)
    part = parts[0]
    mapping = (
        node if node and isinstance(node.value, dict) else Setting({}, COMMAND_LINE)
    )
    child = _set_value(mapping.value.get(part), parts[1:], value, (*key, part))
    return Setting({**mapping.value, part: child}, mapping.origin)
