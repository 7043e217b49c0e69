"""pydantic's errors as one line: the key, what is wrong with it, where it stands, what
to do."""

import collections.abc
import re
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import BaseModel, ValidationError

from maxlm.config.errors import MaxlmError
from maxlm.config.keys import (
    COMMAND_LINE,
    Key,
    SettingOrigin,
    format_value,
    get_descendant,
    join_key,
)
from maxlm.config.layers import SettingsTree
from maxlm.config.registry import RegisteredConfig

_LISTS = (list, tuple, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)

# How pydantic's words for what it would accept begin → ours.
_WANTED = {
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "a valid dictionary": "a mapping",
    "None": "null",
}


class ConfigFault(NamedTuple):
    """The errors that pydantic reports for one key: several where all members of a
    union fail."""

    key: Key
    allowed_types: list[Any]
    """The types allowed at the key."""
    parent_types: list[Any]
    """The types allowed at its parent."""
    errors: list[Any]


def describe_validation_error(
    error: ValidationError, cls: type[BaseModel], tree: SettingsTree
) -> MaxlmError:
    """Returns the first fault, with how many more there are. Unknown keys come first: a
    misspelt required key would otherwise be reported as missing."""
    faults: dict[Key, ConfigFault] = {}
    for item in error.errors(include_url=False):
        found = _find_fault(item, cls, tree.settings)
        faults.setdefault(found.key, found).errors.append(item)
    first = min(faults.values(), key=lambda f: f.errors[0]["type"] != "extra_forbidden")
    found = _describe(first, cls, tree)
    return (
        MaxlmError(f"{found} (and {len(faults) - 1} more)")
        if len(faults) > 1
        else found
    )


def _find_fault(item: Any, cls: type[BaseModel], data: Any) -> ConfigFault:
    """Maps pydantic's location, which mixes in labels of unions, onto a key of the
    data."""
    key: Key = ()
    kinds: list[Any] = [cls]
    siblings: list[Any] = []
    for part in item["loc"]:
        child = get_descendant(data, (part,))
        inner = _list_child_types(kinds, part, child)
        if inner or (isinstance(data, dict) and part in data) or isinstance(part, int):
            key = (*key, part)
            siblings = kinds
            kinds = inner
            data = child
        elif part != "[key]":
            kinds = _select_tagged_types(kinds, part)
    if item["type"].startswith("union_tag"):
        part = item["ctx"]["discriminator"].strip("'")
        key = (*key, part)
        siblings = kinds
        kinds = _list_child_types(kinds, part)
    return ConfigFault(key, kinds, siblings, [])


def _describe(
    fault: ConfigFault, cls: type[BaseModel], tree: SettingsTree
) -> MaxlmError:
    error = fault.errors[0]
    kind = error["type"]
    value = error.get("input")
    name = join_key(fault.key)
    where = str(tree.locate(fault.key))
    if kind == "extra_forbidden":
        return MaxlmError(
            f"unknown key {name}", where=where, fix=_suggest_keys(fault, cls)
        )
    if kind in ("value_error", "assertion_error", "maxlm_error"):
        raised = error["ctx"]["error"]
        what, fix = getattr(raised, "what", str(raised)), getattr(raised, "fix", None)
        where = _find_origins(tree, fault.key, f"{what} {fix}") + (
            f": {name}" if name else ""
        )
        return MaxlmError(what, where=getattr(raised, "where", None) or where, fix=fix)
    allowed = _list_choices(fault.allowed_types)
    choices = ("one of " if len(allowed) > 1 else "") + ", ".join(
        map(format_value, allowed)
    )
    if kind in ("missing", "union_tag_not_found"):
        fix = f"set it to {choices}" if allowed else f"add it, or pass {name}=..."
        return MaxlmError(f"{name} is required", where=where, fix=fix)
    if kind == "union_tag_invalid":
        value = error["ctx"]["tag"]
    wanted = [choices] if allowed else []
    fix = None
    for item in fault.errors:
        prefix = "Input should be "
        words = item["msg"]
        if item["type"] in ("literal_error", "union_tag_invalid"):
            continue
        if not words.startswith(prefix):
            return MaxlmError(f"{name}: {words[0].lower() + words[1:]}", where=where)
        words = words.removeprefix(prefix)
        words = next(
            (ours for theirs, ours in _WANTED.items() if words.startswith(theirs)),
            words,
        )
        if item["type"].startswith("model_") and (
            names := _list_field_names(fault.allowed_types)
        ):
            words += f" ({_join_names(names)})"
            fix = (
                f"set {name}.kind={value}"
                if "kind" in names and isinstance(value, str)
                else None
            )
        wanted += [] if words in wanted else [words]
    if near := get_close_matches(
        str(value), [x for x in allowed if isinstance(x, str)], n=1
    ):
        fix = f"did you mean {near[0]}?"
    elif kind == "string_type" and isinstance(value, bool | int | float):
        quoted = f"'{format_value(value)}'"
        on_line = where == str(
            COMMAND_LINE
        )  # where the shell takes one pair of quotes away
        fix = (
            f'write {name}="{quoted}"' if on_line else f"put quotes around it: {quoted}"
        )
    what = f"{name} must be {' or '.join(wanted)}, not {format_value(value)}"
    return MaxlmError(what, where=where, fix=fix)


def _suggest_keys(fault: ConfigFault, cls: type[BaseModel]) -> str:
    """The names most like an unknown key: the same name elsewhere, then its
    siblings."""
    *parents, last = fault.key
    leaf = str(last)
    siblings = _list_field_names(fault.parent_types)
    everywhere = list(iterate_schema_keys([cls]))
    if leaf == "include":
        return "`include` stands at the top of a file only"
    if "." in leaf and (*parents, *leaf.split(".")) in everywhere:
        return "write it nested, one mapping inside the other"
    here = {name: join_key((*parents, name)) for name in siblings}
    anywhere = {str(key[-1]): join_key(key) for key in reversed(everywhere)}
    same = [join_key(key) for key in everywhere if key[-1] == leaf]
    close = [here[name] for name in get_close_matches(leaf, here, n=3)]
    # Far from here, only a close match is worth naming.
    far = [
        anywhere[name] for name in get_close_matches(leaf, anywhere, n=3, cutoff=0.8)
    ]
    found = [
        name
        for name in dict.fromkeys([*same, *close, *far])
        if name != join_key(fault.key)
    ]
    valid = (
        f"valid here: {_join_names(siblings)}"
        if siblings
        else "no keys are allowed here"
    )
    if not found:
        return valid
    guess = f"did you mean {' or '.join(found[:3])}?"
    return guess if close or not siblings else f"{guess} {valid}"


def _find_origins(tree: SettingsTree, key: Key, text: str) -> str:
    """Finds where the settings that `text` names below `key` were written, else where
    `key` was."""
    found: list[SettingOrigin] = []
    for word in re.findall(r"[A-Za-z_]\w*(?:\.\w+)*", text):
        parts: Key = tuple(
            int(part) if part.isdigit() else part for part in word.split(".")
        )
        for mentioned in (key + parts, parts if "." in word else key + parts):
            origin = tree.origins.get(mentioned)
            leaf = not isinstance(get_descendant(tree.settings, mentioned), dict)
            if origin and leaf and origin not in found:
                found.append(origin)
    return ", ".join(str(origin) for origin in found[:3] or [tree.locate(key)])


def _join_names(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _split_union(
    annotation: Any, metadata: Sequence[Any] = (), settings: Any = None
) -> list[Any]:
    """Returns the members of a union, however nested or annotated; else the type
    itself. Of a registered config, it returns the kind that ``settings`` name, or all
    kinds."""
    for item in metadata:
        if isinstance(item, RegisteredConfig):
            return list(item.select_types(settings))
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        annotation, *metadata = typing.get_args(annotation)
        return _split_union(annotation, metadata, settings)
    if origin in (Union, types.UnionType):
        return [
            kind
            for member in typing.get_args(annotation)
            for kind in _split_union(member, settings=settings)
        ]
    return [annotation]


def _select_models(kinds: list[Any]) -> list[type[BaseModel]]:
    return [
        kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]


def _list_child_types(
    kinds: list[Any], part: str | int, settings: Any = None
) -> list[Any]:
    """Returns the types allowed at a name or index below values of the given types;
    ``settings`` are what stands there."""
    found: list[Any] = []
    for kind in kinds:
        arguments = typing.get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part in kind.model_fields:
                field = kind.model_fields[str(part)]
                found += _split_union(field.annotation, field.metadata, settings)
        elif typing.get_origin(kind) in _MAPPINGS and len(arguments) == 2:
            found += _split_union(arguments[1], settings=settings)
        elif typing.get_origin(kind) in _LISTS and arguments and isinstance(part, int):
            whole = len(arguments) > part and ... not in arguments
            found += _split_union(arguments[part if whole else 0], settings=settings)
    return found


def _list_field_names(kinds: list[Any]) -> list[str]:
    names = [name for model in _select_models(kinds) for name in model.model_fields]
    return list(dict.fromkeys(names))


def _list_choices(kinds: list[Any]) -> list[Any]:
    literals = [kind for kind in kinds if typing.get_origin(kind) is Literal]
    return [value for kind in literals for value in typing.get_args(kind)]


def _select_tagged_types(kinds: list[Any], label: str) -> list[Any]:
    """Returns the types that pydantic means by a label in an error's location: a class
    or union tag."""
    found = []
    for model in _select_models(kinds):
        tags = [
            _list_choices(_split_union(f.annotation))
            for f in model.model_fields.values()
        ]
        if model.__name__ == label or any(label in each for each in tags):
            found.append(model)
    return found or kinds


def iterate_schema_keys(model_types: list[Any], key: Key = ()) -> Iterator[Key]:
    """Yields every key of the tree, parents first; an element of a list is shown as its
    first."""
    for model in _select_models(model_types):
        for name, info in model.model_fields.items():
            here = (*key, name)
            yield here
            inner = _split_union(info.annotation, info.metadata)
            yield from iterate_schema_keys(inner, here)
            for kind in inner:
                part = 0 if typing.get_origin(kind) in _LISTS else "NAME"
                yield from iterate_schema_keys(
                    _list_child_types([kind], part), (*here, part)
                )
