"""Documents laid over one another, and command line overrides on top."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config import includes
from maxlm.config.errors import MaxlmError
from maxlm.config.keys import (
    COMMAND_LINE,
    Key,
    SettingOrigin,
    format_value,
    get_child,
    get_descendant,
    join_key,
    split_key,
)
from maxlm.config.references import ReferenceResolver, is_reference
from maxlm.config.yaml_text import SizeLimit, YamlDocument, parse_yaml


@dataclass(frozen=True)
class SettingsTree:
    """Plain settings and where each of their nodes was written."""

    settings: dict[str, Any]
    origins: Mapping[Key, SettingOrigin]

    def locate(self, key: Key) -> SettingOrigin:
        """Where the node at `key` was written, else its nearest parent that was."""
        while key not in self.origins and key:
            key = key[:-1]
        return self.origins.get(key, COMMAND_LINE)

    def find_value_origin(self, key: Key) -> SettingOrigin | None:
        """Where the value a config holds at `key` comes from; None for a default."""
        if key in self.origins:
            return self.origins[key]
        while key not in self.origins and key:
            key = key[:-1]
            written = get_descendant(self.settings, key)
            # Below a value that a validator took apart, such as the text `fsdp=2`.
            if key in self.origins and not isinstance(written, dict | list):
                return self.origins[key]
        return None


def build_tree(path: Path | None, overrides: Sequence[str]) -> SettingsTree:
    """Lays `path`, its includes and the overrides over one another and resolves ``${...}``.

    Raises:
        MaxlmError: whatever is wrong with a file, an override or a reference.
    """
    tree = SettingsTree({}, {})
    for document in includes.read_documents(path) if path is not None else ():
        tree = _merge(tree, (), document)
    for override in overrides:
        tree = _override(tree, override)
    resolved = ReferenceResolver(tree.settings, tree.locate).expand(tree.settings)
    # What a reference brought in is written where the reference is.
    brought = {key: tree.locate(key) for key in _nodes(resolved) if key and key not in tree.origins}
    return SettingsTree(resolved, {**tree.origins, **brought})


def _merge(tree: SettingsTree, key: Key, document: YamlDocument) -> SettingsTree:
    """`tree` with a document laid over what is at `key`."""
    _refuse_mixed(tree, key, document)
    settings = _merged(tree.settings, key, document.data)
    return SettingsTree(settings, _relaid(tree.origins, key, document))


def _merged(node: Any, key: Key, data: Any) -> Any:
    """`node` with `data` merged in at `key`: mappings deeply, all else replaced."""
    if key and isinstance(node, list):
        return [_merged(v, key[1:], data) if i == key[0] else v for i, v in enumerate(node)]
    if key:
        data = {key[0]: _merged(get_child(node, key[0]), key[1:], data)}
        return {**node, **data} if isinstance(node, dict) else data
    if isinstance(node, dict) and isinstance(data, dict):
        return {**node, **{name: _merged(node.get(name), (), v) for name, v in data.items()}}
    return data


def _override(tree: SettingsTree, override: str) -> SettingsTree:
    """Sets ``key.path=value``, where the value is YAML and a list index a part of the key."""
    name, equals, text = override.partition("=")
    parts = split_key(name.strip())
    if not equals or parts is None:
        what = f"{format_value(override)} is not an override"
        fix = "write key=value, such as model.num_layers=4"
        raise MaxlmError(what, where=str(COMMAND_LINE), fix=fix)
    try:
        document = parse_yaml(text, COMMAND_LINE.source, lines=False)
    except MaxlmError as error:
        where = f"{COMMAND_LINE}: {override[:60]}"
        raise MaxlmError(error.what, where=where, fix=error.fix) from None
    SizeLimit().add(None, len(parts), COMMAND_LINE, parts)
    key = _indexed(tree, parts)
    parents = [key[:depth] for depth in range(len(key))]
    made = [at for at in parents if not isinstance(get_descendant(tree.settings, at), dict | list)]
    origins = {(): COMMAND_LINE, **tree.origins, **dict.fromkeys(made, COMMAND_LINE)}
    return _merge(SettingsTree(tree.settings, origins), key, document)


def _relaid(
    origins: Mapping[Key, SettingOrigin], key: Key, document: YamlDocument
) -> dict[Key, SettingOrigin]:
    """The origins after `document` was merged in at `key`; what it replaced is forgotten."""
    paths = document.origins
    replaced = {
        key + path for path in paths if not isinstance(get_descendant(document.data, path), dict)
    }
    gone = {old for old in origins if any(old[:end] in replaced for end in range(len(old) + 1))}
    kept = {old: at for old, at in origins.items() if old not in gone}
    return kept | {key + path: origin for path, origin in paths.items()}


def _indexed(tree: SettingsTree, parts: Sequence[str]) -> Key:
    """`parts` with the indices of lists as integers."""
    key: Key = ()
    for part in parts:
        node = get_descendant(tree.settings, key)
        if is_reference(node):
            what = f"{join_key(key)} is {node}; {join_key((*key, part))} cannot be set on its own"
            raise MaxlmError(what, where=str(COMMAND_LINE), fix="set what it stands for")
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                size = f"{len(node)} element{'' if len(node) == 1 else 's'}"
                what = f"{join_key(key)} is a list of {size}; there is no {join_key((*key, part))}"
                fix = "count from 0, or give the whole list"
                raise MaxlmError(what, where=str(COMMAND_LINE), fix=fix)
            key = (*key, int(part))
        else:
            key = (*key, part)
    return key


def _refuse_mixed(tree: SettingsTree, key: Key, document: YamlDocument) -> None:
    """Refuses a list over a mapping, or the reverse."""
    for path, origin in document.origins.items():
        new, old = get_descendant(document.data, path), get_descendant(tree.settings, key + path)
        if {type(new), type(old)} == {dict, list}:
            kind, other = ("mapping", "list") if isinstance(new, dict) else ("list", "mapping")
            there = tree.locate(key + path)
            what = f"{join_key(key + path)} is a {kind} here, but a {other} in {there}"
            raise MaxlmError(what, where=str(origin), fix="write both alike")


def _nodes(data: Any, key: Key = ()) -> Iterator[Key]:
    yield key
    for part in (
        data if isinstance(data, dict) else range(len(data if isinstance(data, list) else []))
    ):
        yield from _nodes(get_child(data, part), (*key, part))
