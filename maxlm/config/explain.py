"""pydantic's errors as one line: the key, what is wrong with it, where it stands, what
to do."""

import collections.abc
import re
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeGuard, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

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

# A member of a union as `typing.get_args` gives it: a class, `None`'s type, a `Literal`,
# `list[int]`, .... Python has no name for the type of all of these.
TypeForm: TypeAlias = Any

_LISTS = (list, tuple, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)

_EXPECTATION_PREFIX = "Input should be "
# How pydantic's words for what it would accept begin → ours.
_EXPECTATIONS = {
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
    allowed_types: list[TypeForm]
    """The types allowed at the key."""
    parent_types: list[TypeForm]
    """The types allowed at its parent."""
    errors: list[ErrorDetails]


def describe_validation_error(
    error: ValidationError, cls: type[BaseModel], tree: SettingsTree
) -> MaxlmError:
    """Returns the first fault, with how many more there are. Unknown keys come first: a
    misspelt required key would otherwise be reported as missing."""
    faults: dict[Key, ConfigFault] = {}
    for details in error.errors(include_url=False):
        fault = _find_fault(details, cls, tree.settings)
        faults.setdefault(fault.key, fault).errors.append(details)

    def is_known_key(fault: ConfigFault) -> bool:
        return fault.errors[0]["type"] != "extra_forbidden"

    first = min(faults.values(), key=is_known_key)  # False comes first
    described = _describe(first, cls, tree)
    if len(faults) == 1:
        return described
    return MaxlmError(f"{described} (and {len(faults) - 1} more)")


def _find_fault(
    details: ErrorDetails, cls: type[BaseModel], data: object
) -> ConfigFault:
    """Maps pydantic's location, which mixes in labels of unions, onto a key of the
    data."""
    key: Key = ()
    allowed_types: list[TypeForm] = [cls]
    parent_types: list[TypeForm] = []
    for part in details["loc"]:
        child = get_descendant(data, (part,))
        child_types = _list_child_types(allowed_types, part, child)
        is_in_data = isinstance(data, dict) and part in data
        if isinstance(part, int) or child_types or is_in_data:
            key = (*key, part)
            parent_types = allowed_types
            allowed_types = child_types
            data = child
        elif part != "[key]":  # else the label of a union's member
            allowed_types = _select_tagged_types(allowed_types, part)
    if details["type"].startswith("union_tag"):
        # Pydantic locates the union; what is wrong is the key that tells its members.
        discriminator: str = details.get("ctx", {})["discriminator"].strip("'")
        key = (*key, discriminator)
        parent_types = allowed_types
        allowed_types = _list_child_types(allowed_types, discriminator)
    return ConfigFault(key, allowed_types, parent_types, [])


def _describe(
    fault: ConfigFault, cls: type[BaseModel], tree: SettingsTree
) -> MaxlmError:
    details = fault.errors[0]
    kind = details["type"]
    name = join_key(fault.key)
    where = str(tree.locate(fault.key))
    if kind == "extra_forbidden":
        fix = _suggest_keys(fault, cls)
        return MaxlmError(f"unknown key {name}", where=where, fix=fix)
    if kind in ("value_error", "assertion_error", "maxlm_error"):
        return _describe_raised_error(details.get("ctx", {})["error"], fault.key, tree)
    if kind in ("missing", "union_tag_not_found"):
        choices = _list_fault_choices(fault)
        fix = f"add it, or pass {name}=..."
        if choices:
            fix = f"set it to {_join_choices(choices)}"
        return MaxlmError(f"{name} is required", where=where, fix=fix)
    return _describe_wrong_value(fault, where)


def _describe_raised_error(
    raised: Exception, key: Key, tree: SettingsTree
) -> MaxlmError:
    """An error that a validator of a config raised, with where its settings stand."""
    message = str(raised)
    fix = None
    where = None
    if isinstance(raised, MaxlmError):
        message = raised.message
        fix = raised.fix
        where = raised.where
    if not where:
        where = _find_origins(tree, key, f"{message} {fix}")
        if key:
            where += f": {join_key(key)}"
    return MaxlmError(message, where=where, fix=fix)


def _describe_wrong_value(fault: ConfigFault, where: str) -> MaxlmError:
    """A value of a type, or from outside the choices, that the key does not allow."""
    details = fault.errors[0]
    name = join_key(fault.key)
    value = details.get("input")
    if details["type"] == "union_tag_invalid":
        value = details.get("ctx", {})["tag"]
    choices = _list_fault_choices(fault)

    # What the key allows: choices, then what each member of a union expects.
    expectations = [_join_choices(choices)] if choices else []
    fix = None
    for item in fault.errors:
        if item["type"] in ("literal_error", "union_tag_invalid"):
            continue  # the choices say it
        text = item["msg"]
        if not text.startswith(_EXPECTATION_PREFIX):
            return MaxlmError(f"{name}: {text[0].lower() + text[1:]}", where=where)
        expectation = _translate_expectation(text.removeprefix(_EXPECTATION_PREFIX))
        field_names = _list_field_names(fault.allowed_types)
        if item["type"].startswith("model_") and field_names:
            expectation += f" ({_join_names(field_names)})"
            fix = None
            # A kind's name stands where its mapping belongs.
            if "kind" in field_names and isinstance(value, str):
                fix = f"set {name}.kind={value}"
        if expectation not in expectations:
            expectations.append(expectation)

    text_choices = [choice for choice in choices if isinstance(choice, str)]
    close = get_close_matches(str(value), text_choices, n=1)
    if close:
        fix = f"did you mean {close[0]}?"
    elif details["type"] == "string_type" and isinstance(value, bool | int | float):
        quoted = f"'{format_value(value)}'"
        fix = f"put quotes around it: {quoted}"
        if where == str(COMMAND_LINE):  # the shell takes one pair of quotes away
            fix = f'write {name}="{quoted}"'
    message = f"{name} must be {' or '.join(expectations)}, not {format_value(value)}"
    return MaxlmError(message, where=where, fix=fix)


def _translate_expectation(text: str) -> str:
    for theirs, ours in _EXPECTATIONS.items():
        if text.startswith(theirs):
            return ours
    return text


def _join_choices(choices: list[Any]) -> str:
    joined = ", ".join(format_value(choice) for choice in choices)
    return f"one of {joined}" if len(choices) > 1 else joined


def _suggest_keys(fault: ConfigFault, cls: type[BaseModel]) -> str:
    """The names most like an unknown key: the same name elsewhere, then its
    siblings."""
    *parents, last = fault.key
    leaf = str(last)
    siblings = _list_field_names(fault.parent_types)
    schema_keys = list(iterate_schema_keys([cls]))
    if leaf == "include":
        return "`include` stands at the top of a file only"
    if "." in leaf and (*parents, *leaf.split(".")) in schema_keys:
        return "write it nested, one mapping inside the other"

    # The same name elsewhere, similar ones beside it, and similar ones elsewhere: far
    # from here only a closer match is worth naming.
    same = [join_key(key) for key in schema_keys if key[-1] == leaf]
    close_names = get_close_matches(leaf, siblings, n=3)
    close = [join_key((*parents, name)) for name in close_names]
    # Of several keys with one name, that which comes first in the schema.
    key_by_leaf = {str(key[-1]): join_key(key) for key in reversed(schema_keys)}
    far_leaves = get_close_matches(leaf, key_by_leaf, n=3, cutoff=0.8)
    far = [key_by_leaf[name] for name in far_leaves]
    suggestions = list(dict.fromkeys([*same, *close, *far]))
    unknown_key = join_key(fault.key)
    if unknown_key in suggestions:
        suggestions.remove(unknown_key)

    valid = "no keys are allowed here"
    if siblings:
        valid = f"valid here: {_join_names(siblings)}"
    if not suggestions:
        return valid
    guess = f"did you mean {' or '.join(suggestions[:3])}?"
    return guess if close or not siblings else f"{guess} {valid}"


def _find_origins(tree: SettingsTree, key: Key, text: str) -> str:
    """Finds where the settings that `text` names below `key` were written, else where
    `key` was."""
    origins: list[SettingOrigin] = []
    for word in re.findall(r"[A-Za-z_]\w*(?:\.\w+)*", text):
        parts: Key = tuple(
            int(part) if part.isdigit() else part for part in word.split(".")
        )
        candidates = [key + parts]
        if "." in word:  # it may be a whole key; a single word only one below `key`
            candidates.append(parts)
        for candidate in candidates:
            origin = tree.origins.get(candidate)
            is_leaf = not isinstance(get_descendant(tree.settings, candidate), dict)
            if origin and is_leaf and origin not in origins:
                origins.append(origin)
    if not origins:
        origins = [tree.locate(key)]
    return ", ".join(str(origin) for origin in origins[:3])


def _join_names(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _split_union(
    annotation: TypeForm, metadata: Sequence[object] = (), settings: object = None
) -> list[TypeForm]:
    """Returns the members of a union, however nested or annotated; else the type
    itself. Of a registered config, it returns the kind that ``settings`` name, or all
    kinds."""
    for item in metadata:
        if isinstance(item, RegisteredConfig):
            return list(item.select_types(settings))
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        annotation, *metadata = arguments
        return _split_union(annotation, metadata, settings)
    if origin not in (Union, types.UnionType):
        return [annotation]
    members: list[TypeForm] = []
    for argument in arguments:
        members += _split_union(argument, settings=settings)
    return members


def _is_model(kind: TypeForm) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _select_models(kinds: list[TypeForm]) -> list[type[BaseModel]]:
    return [kind for kind in kinds if _is_model(kind)]


def _list_child_types(
    kinds: list[TypeForm], part: str | int, settings: object = None
) -> list[TypeForm]:
    """Returns the types allowed at a name or index below values of the given types;
    ``settings`` are what stands there."""
    child_types: list[TypeForm] = []
    for kind in kinds:
        origin = typing.get_origin(kind)
        arguments = typing.get_args(kind)
        if _is_model(kind):
            if part in kind.model_fields:
                field = kind.model_fields[str(part)]
                child_types += _split_union(field.annotation, field.metadata, settings)
        elif origin in _MAPPINGS and len(arguments) == 2:
            child_types += _split_union(arguments[1], settings=settings)
        elif origin in _LISTS and arguments and isinstance(part, int):
            # tuple[int, str] has a type for each place; list[int] and tuple[int, ...]
            # have one for all.
            has_type_per_place = len(arguments) > part and ... not in arguments
            element_type = arguments[part if has_type_per_place else 0]
            child_types += _split_union(element_type, settings=settings)
    return child_types


def _list_field_names(kinds: list[TypeForm]) -> list[str]:
    names = [name for model in _select_models(kinds) for name in model.model_fields]
    return list(dict.fromkeys(names))


def _list_fault_choices(fault: ConfigFault) -> list[Any]:
    """Returns the values that the key allows; where its type does not say them, the
    kinds that a registry has."""
    choices = _list_choices(fault.allowed_types)
    if not choices:
        choices = list(fault.errors[0].get("ctx", {}).get("kinds", ()))
    return choices


def _list_choices(kinds: list[TypeForm]) -> list[Any]:
    literals = [kind for kind in kinds if typing.get_origin(kind) is Literal]
    return [value for kind in literals for value in typing.get_args(kind)]


def _select_tagged_types(kinds: list[TypeForm], label: str) -> list[TypeForm]:
    """Returns the types that pydantic means by a label in an error's location: a class
    or union tag."""
    tagged = [
        model
        for model in _select_models(kinds)
        if model.__name__ == label or _has_tag(model, label)
    ]
    return tagged or kinds


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    for info in model.model_fields.values():
        if tag in _list_choices(_split_union(info.annotation)):
            return True
    return False


def iterate_schema_keys(
    model_types: list[TypeForm],
    key: Key = (),
    ancestors: tuple[type[BaseModel], ...] = (),
) -> Iterator[Key]:
    """Yields every key of the tree, parents first; an element of a list is shown as its
    first. A model within itself (a mixer beside another) is not walked again.

    Args:
        ancestors: models that the key lies within.
    """
    for model in _select_models(model_types):
        if model in ancestors:
            continue
        path = (*ancestors, model)
        for name, info in model.model_fields.items():
            field_key = (*key, name)
            yield field_key
            field_types = _split_union(info.annotation, info.metadata)
            yield from iterate_schema_keys(field_types, field_key, path)
            for kind in field_types:
                part = 0 if typing.get_origin(kind) in _LISTS else "NAME"
                child_types = _list_child_types([kind], part)
                yield from iterate_schema_keys(child_types, (*field_key, part), path)
