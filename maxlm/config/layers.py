"""Documents laid over one another by OmegaConf, and command line overrides on top."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config import includes
from maxlm.config.errors import MaxlmError
from maxlm.config.keys import COMMAND_LINE, Key, Origin, child, descend, dotted, split_key
from maxlm.config.yaml_text import Document, parse


@dataclass(frozen=True)
class Tree:
    """Plain settings and where each of their nodes was written."""

    settings: dict[str, Any]
    origins: Mapping[Key, Origin]

    def where(self, key: Key) -> Origin:
        """Where the node at `key` was written, else its nearest parent that was."""
        while key not in self.origins and key:
            key = key[:-1]
        return self.origins.get(key, COMMAND_LINE)

    def origin(self, key: Key) -> Origin | None:
        """Where the value a config holds at `key` comes from; None for a default."""
        if key in self.origins:
            return self.origins[key]
        while key not in self.origins and key:
            key = key[:-1]
            written = descend(self.settings, key)
            # Below a value that a validator took apart, such as the text `fsdp=2`.
            if key in self.origins and not isinstance(written, dict | list):
                return self.origins[key]
        return None


def build(path: Path | None, overrides: Sequence[str]) -> Tree:
    """Lays `path`, its includes and the overrides over one another and resolves ``${...}``.

    Raises:
        MaxlmError: whatever is wrong with a file, an override or an interpolation.
    """
    from omegaconf import OmegaConf

    tree = Tree({}, {})
    for document in includes.read(path) if path is not None else ():
        tree = _merge(tree, document)
    for override in overrides:
        tree = _override(tree, override)
    with _interpolation_errors(tree):
        resolved = OmegaConf.to_container(
            OmegaConf.create(tree.settings), resolve=True, throw_on_missing=True
        )
    assert isinstance(resolved, dict)
    # What an interpolation brought in is written where the interpolation is.
    brought = {key: tree.where(key) for key in _nodes(resolved) if key and key not in tree.origins}
    return Tree(resolved, {**tree.origins, **brought})  # pyright: ignore[reportArgumentType]


def _merge(tree: Tree, document: Document) -> Tree:
    from omegaconf import OmegaConf

    _refuse_mixed(tree, (), document)
    with _interpolation_errors(Tree(document.data, document.origins)):
        merged = OmegaConf.to_container(OmegaConf.merge(tree.settings, document.data))
    return Tree(merged, _relaid(tree.origins, (), document))  # pyright: ignore[reportArgumentType]


def _override(tree: Tree, override: str) -> Tree:
    """Sets ``key.path=value``, where the value is YAML and a list index a part of the key."""
    from omegaconf import OmegaConf

    name, equals, text = override.partition("=")
    parts = split_key(name.strip())
    if not equals or parts is None:
        what = f"{override!r} is not an override"
        fix = "write key=value, such as model.num_layers=4"
        raise MaxlmError(what, where=str(COMMAND_LINE), fix=fix)
    try:
        document = parse(text, COMMAND_LINE.source, lines=False)
    except MaxlmError as error:
        raise MaxlmError(error.what, where=f"{COMMAND_LINE}: {override}", fix=error.fix) from None
    key = _indexed(tree, parts)
    _refuse_mixed(tree, key, document)
    settings = OmegaConf.create(tree.settings)
    with _interpolation_errors(Tree({}, {key: COMMAND_LINE})):
        OmegaConf.update(settings, dotted(key), document.data, merge=True)
    parents = [key[:depth] for depth in range(len(key))]
    made = [at for at in parents if not isinstance(descend(tree.settings, at), dict | list)]
    origins = {(): COMMAND_LINE, **tree.origins, **dict.fromkeys(made, COMMAND_LINE)}
    origins = _relaid(origins, key, document)
    return Tree(OmegaConf.to_container(settings), origins)  # pyright: ignore[reportArgumentType]


def _relaid(origins: Mapping[Key, Origin], key: Key, document: Document) -> dict[Key, Origin]:
    """The origins after `document` was merged in at `key`; what it replaced is forgotten."""
    laid = dict(origins)
    for path, origin in document.origins.items():
        node = key + path
        if not isinstance(descend(document.data, path), dict):
            laid = {old: at for old, at in laid.items() if old[: len(node)] != node}
        laid[node] = origin
    return laid


def _indexed(tree: Tree, parts: Sequence[str]) -> Key:
    """`parts` with the indices of lists as integers."""
    key: Key = ()
    for part in parts:
        node = descend(tree.settings, key)
        if isinstance(node, str) and "${" in node:
            what = f"{dotted(key)} is {node}; {dotted((*key, part))} cannot be set on its own"
            raise MaxlmError(what, where=str(COMMAND_LINE), fix="set what it stands for")
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                size = f"{len(node)} element{'' if len(node) == 1 else 's'}"
                what = f"{dotted(key)} is a list of {size}; there is no {dotted((*key, part))}"
                fix = "count from 0, or give the whole list"
                raise MaxlmError(what, where=str(COMMAND_LINE), fix=fix)
            key = (*key, int(part))
        else:
            key = (*key, part)
    return key


def _refuse_mixed(tree: Tree, key: Key, document: Document) -> None:
    """A list over a mapping, or the reverse: OmegaConf refuses it too, but without a name."""
    for path, origin in document.origins.items():
        new, old = descend(document.data, path), descend(tree.settings, key + path)
        if {type(new), type(old)} == {dict, list}:
            kind, other = ("mapping", "list") if isinstance(new, dict) else ("list", "mapping")
            there = tree.where(key + path)
            what = f"{dotted(key + path)} is a {kind} here, but a {other} in {there}"
            raise MaxlmError(what, where=str(origin), fix="write both alike")


def _nodes(data: Any, key: Key = ()) -> Iterator[Key]:
    yield key
    for part in (
        data if isinstance(data, dict) else range(len(data if isinstance(data, list) else []))
    ):
        yield from _nodes(child(data, part), (*key, part))


@contextmanager
def _interpolation_errors(tree: Tree) -> Iterator[None]:
    """OmegaConf's errors as one line with the key and where it was written."""
    from omegaconf import errors

    try:
        yield
    except errors.OmegaConfBaseException as error:
        key: Key = ()
        for part in split_key(str(error.full_key or "")) or ():
            at_list = isinstance(descend(tree.settings, key), list)
            key = (*key, int(part) if at_list else part)
        text = str(error).splitlines()[0].replace("'", "`")
        fix = None
        if isinstance(error, errors.MissingMandatoryValue):
            text, fix = "left open (???)", f"set {dotted(key)}"
        elif isinstance(error, errors.InterpolationKeyError):
            fix = "write that key too: interpolations see what is written, not the defaults"
        elif isinstance(error, errors.GrammarParseError):
            text, fix = f"bad interpolation: {text}", r"for a plain ${ write \${"
        raise MaxlmError(f"{dotted(key)}: {text}", where=str(tree.where(key)), fix=fix) from None
