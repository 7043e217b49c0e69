"""The types that a config class allows at each key."""

import collections.abc
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel

from maxlm.config.keys import Key

_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)


def split_union(annotation: Any) -> list[Any]:
    """Returns the members of a union, however nested or annotated; else the type itself."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return split_union(typing.get_args(annotation)[0])
    if hasattr(annotation, "__value__"):  # type X = ...
        return split_union(annotation.__value__)
    if origin in (Union, types.UnionType):
        return [kind for member in typing.get_args(annotation) for kind in split_union(member)]
    return [annotation]


def select_models(kinds: list[Any]) -> list[type[BaseModel]]:
    """Returns the models among types."""
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def list_child_types(kinds: list[Any], part: str | int) -> list[Any]:
    """Returns the types allowed at a name or index below values of the given types."""
    found: list[Any] = []
    for kind in kinds:
        arguments = typing.get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part in kind.model_fields:
                found += split_union(kind.model_fields[str(part)].annotation)
        elif typing.get_origin(kind) in _MAPPINGS and len(arguments) == 2:
            found += split_union(arguments[1])
        elif typing.get_origin(kind) in _LISTS and arguments and isinstance(part, int):
            whole = len(arguments) > part and ... not in arguments
            found += split_union(arguments[part if whole else 0])
    return found


def list_field_names(kinds: list[Any]) -> list[str]:
    """Returns the field names allowed at this level."""
    return list(
        dict.fromkeys(name for model in select_models(kinds) for name in model.model_fields)
    )


def list_choices(kinds: list[Any]) -> list[Any]:
    """Returns the values that Literals and enums allow."""
    found: list[Any] = []
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            found += typing.get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            found += [member.value for member in kind]
    return found


def select_tagged_types(kinds: list[Any], label: str) -> list[Any]:
    """Returns the types that pydantic means by a label in an error's location: a class or union
    tag."""
    found = [
        model
        for model in select_models(kinds)
        if model.__name__ == label
        or any(
            label in list_choices(split_union(f.annotation)) for f in model.model_fields.values()
        )
    ]
    return found or kinds


def iterate_keys(kinds: list[Any], key: Key = (), above: tuple[type, ...] = ()) -> Iterator[Key]:
    """Yields every key of the tree, parents first; an element of a list is shown as its first."""
    for model in select_models(kinds):
        if model in above:
            continue
        for name, info in model.model_fields.items():
            here = (*key, name)
            yield here
            inner = split_union(info.annotation)
            yield from iterate_keys(inner, here, (*above, model))
            for kind in inner:
                part = 0 if typing.get_origin(kind) in _LISTS else "NAME"
                if elements := list_child_types([kind], part) if typing.get_origin(kind) else []:
                    yield from iterate_keys(elements, (*here, part), (*above, model))
