"""pydantic's errors as one line: the key, what is wrong with it, where it stands, what to do."""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from maxlm.config import fields
from maxlm.config.errors import MaxlmError
from maxlm.config.keys import (
    COMMAND_LINE,
    Key,
    SettingOrigin,
    format_value,
    get_child,
    get_descendant,
    join_key,
)
from maxlm.config.merge import SettingsTree

_WANTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "bytes": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen": "a list",
    "iterable": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "none": "null",
}


@dataclass
class ConfigFault:
    """The errors that pydantic reports for one key: several where all members of a union fail."""

    key: Key
    kinds: list[Any]
    """The types allowed at the key."""
    siblings: list[Any]
    """The types allowed at its parent."""
    errors: list[Any] = field(default_factory=list)


def describe_validation_error(
    error: ValidationError, cls: type[BaseModel], tree: SettingsTree
) -> MaxlmError:
    """Returns the first fault, with how many more there are. Unknown keys come first: a misspelt
    required key would otherwise be reported as missing."""
    faults: dict[Key, ConfigFault] = {}
    for item in error.errors(include_url=False):
        found = _find(item, cls, tree.settings)
        faults.setdefault(found.key, found).errors.append(item)
    ordered = sorted(faults.values(), key=lambda f: f.errors[0]["type"] != "extra_forbidden")
    first = _describe(ordered[0], cls, tree)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if first.fix:
        return MaxlmError(first.what, where=first.where, fix=first.fix + more)
    return MaxlmError(first.what + more, where=first.where)


def locate_error(error: MaxlmError, cls: type[BaseModel], tree: SettingsTree) -> MaxlmError:
    """Returns an error that a validator raised, with the place of the settings it speaks of.

    pydantic lets it through without saying which config was being checked, so each part is checked
    again on its own, innermost first, until one raises the same.
    """
    if error.where:
        return error
    key = _culprit([cls], tree.settings, str(error), ()) or ()
    where = _origins(tree, key, f"{error.what} {error.fix or ''}")
    return MaxlmError(
        error.what, where=": ".join(filter(None, (where, join_key(key)))), fix=error.fix
    )


def _find(item: Any, cls: type[BaseModel], data: Any) -> ConfigFault:
    """Maps pydantic's location, which mixes in labels of unions, onto a key of the data."""
    key: Key = ()
    kinds: list[Any] = [cls]
    siblings: list[Any] = []
    for part in item["loc"]:
        inner = fields.list_child_types(kinds, part)
        written = isinstance(data, dict) and part in data
        if inner or written or isinstance(part, int):
            key, siblings, kinds = (*key, part), kinds, inner
            data = get_child(data, part)
        elif part != "[key]":
            kinds = fields.select_tagged_types(kinds, part)
    if item["type"].startswith("union_tag"):
        part = item["ctx"]["discriminator"].strip("'")
        key, siblings, kinds = (*key, part), kinds, fields.list_child_types(kinds, part)
    return ConfigFault(key, kinds, siblings)


def _describe(fault: ConfigFault, cls: type[BaseModel], tree: SettingsTree) -> MaxlmError:
    error = fault.errors[0]
    kind, value, name = error["type"], error.get("input"), join_key(fault.key)
    where = str(tree.locate(fault.key))
    if kind == "extra_forbidden":
        return MaxlmError(f"unknown key {name}", where=where, fix=_near(fault, cls))
    if kind in ("missing", "union_tag_not_found"):
        allowed = fields.list_choices(fault.kinds)
        fix = f"set it to {_one_of(allowed)}" if allowed else f"add it, or pass {name}=..."
        return MaxlmError(f"{name} is required", where=where, fix=fix)
    if kind in ("value_error", "assertion_error"):
        text = str(error["ctx"]["error"])
        where = _origins(tree, fault.key, text)
        return MaxlmError(text, where=": ".join(filter(None, (where, name))))
    if kind == "union_tag_invalid":
        value = error["ctx"]["tag"]
    allowed = fields.list_choices(fault.kinds)
    wanted = [] if not allowed else [_one_of(allowed)]
    for item in fault.errors:
        phrase = _wanted(item, fault)
        if phrase is None:
            text = item["msg"][0].lower() + item["msg"][1:]
            return MaxlmError(f"{name}: {text}", where=where)
        if phrase and phrase not in wanted:
            wanted.append(phrase)
    fix = None
    texts = [choice for choice in allowed if isinstance(choice, str)]
    if near := get_close_matches(str(value), texts, n=1):
        fix = f"did you mean {near[0]}?"
    elif kind == "string_type" and isinstance(value, bool | int | float):
        quoted = f"'{format_value(value)}'"
        on_line = where == str(COMMAND_LINE)  # where the shell takes one pair of quotes away
        fix = f'write {name}="{quoted}"' if on_line else f"put quotes around it: {quoted}"
    what = f"{name} must be {' or '.join(wanted)}, not {format_value(value)}"
    return MaxlmError(what, where=where, fix=fix)


def _wanted(error: Any, fault: ConfigFault) -> str | None:
    """Return what one error would accept instead; "" where `list_choices` says it, None where
    it is another kind of error."""
    kind = error["type"]
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        return ""
    stem, _, rest = kind.partition("_")
    if stem in _WANTED and (
        rest.startswith(("type", "parsing", "from_float", "set", "attributes"))
    ):
        wanted = _WANTED[stem]
        names = fields.list_field_names(fault.kinds)
        return f"{wanted} ({_listed(names)})" if stem == "model" and names else wanted
    prefix = "Input should be "
    return error["msg"].removeprefix(prefix) if error["msg"].startswith(prefix) else None


def _near(fault: ConfigFault, cls: type[BaseModel]) -> str:
    """The names most like an unknown key: the same name elsewhere, then its siblings."""
    *parents, last = fault.key
    leaf = str(last)
    siblings = fields.list_field_names(fault.siblings)
    everywhere = list(fields.iterate_keys([cls]))
    if not parents and leaf in (renamed := getattr(cls, "renamed", {})):
        return f"did you mean {renamed[leaf]}?"
    if leaf == "include":
        return "`include` stands at the top of a file only"
    if "." in leaf and (*parents, *leaf.split(".")) in everywhere:
        return "write it nested, one mapping inside the other"
    here = {name: join_key((*parents, name)) for name in siblings}
    anywhere: dict[str, str] = {}
    for key in everywhere:
        anywhere.setdefault(str(key[-1]), join_key(key))
    found = [join_key(key) for key in everywhere if key[-1] == leaf]
    for name in get_close_matches(leaf, {**anywhere, **here}, n=3):
        # Far from here, only a close match is worth naming.
        if name in here or get_close_matches(leaf, [name], cutoff=0.8):
            found.append(here.get(name) or anywhere[name])
    found = [name for name in dict.fromkeys(found) if name != join_key(fault.key)][:3]
    valid = f"valid here: {_listed(siblings)}" if siblings else "no keys are allowed here"
    if not found:
        return valid
    guess = f"did you mean {' or '.join(found)}?"
    return guess if set(found) & {*here.values()} or not siblings else f"{guess} {valid}"


def _culprit(kinds: list[Any], data: Any, text: str, key: Key) -> Key | None:
    """The innermost key whose own validation raises the MaxlmError that reads `text`."""
    parts = data if isinstance(data, dict) else range(len(data) if isinstance(data, list) else 0)
    for part in parts:
        inner = _culprit(
            fields.list_child_types(kinds, part), get_child(data, part), text, (*key, part)
        )
        if inner is not None:
            return inner
    for model in fields.select_models(kinds):
        try:
            model.model_validate(data)
        except MaxlmError as error:
            if str(error) == text:
                return key
        except ValidationError:
            continue
    return None


def _origins(tree: SettingsTree, key: Key, text: str) -> str:
    """Where the settings that `text` names below `key` were written; else where `key` was."""
    found: list[SettingOrigin] = []
    for word in re.findall(r"[A-Za-z_]\w*(?:\.\w+)*", text):
        parts: Key = tuple(int(part) if part.isdigit() else part for part in word.split("."))
        for mentioned in (key + parts, parts if "." in word else key + parts):
            origin = tree.origins.get(mentioned)
            leaf = not isinstance(get_descendant(tree.settings, mentioned), dict)
            if origin and leaf and origin not in found:
                found.append(origin)
    return ", ".join(str(origin) for origin in found[:3] or [tree.locate(key)])


def _one_of(values: list[Any]) -> str:
    return ("one of " if len(values) > 1 else "") + ", ".join(
        format_value(value) for value in values
    )


def _listed(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
