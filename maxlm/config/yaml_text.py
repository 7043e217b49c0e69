"""YAML text to plain data and the line of every value, and back."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from maxlm.config.errors import MaxlmError
from maxlm.config.keys import Key, Origin

_STR = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"

# YAML 1.2's plain scalars. PyYAML follows 1.1, which reads 1e-3 as text, `no` as a boolean,
# 1:30 as the number 90 and 010 as 8. A field typed bool still takes yes/no/on/off as text.
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
       |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
       |[0-9][0-9_]*[eE][-+]?[0-9]+
       |\.(?:inf|Inf|INF))
       |\.(?:nan|NaN|NAN)""",
    re.VERBOSE,
)
_PLAIN_SCALARS = (
    ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    (
        "tag:yaml.org,2002:int",
        re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+"),
        "-+0123456789",
    ),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
    ("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    (_MERGE, re.compile(r"<<"), "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in _PLAIN_SCALARS:
        whole = re.compile(f"(?:{pattern.pattern})$", pattern.flags)
        for character in first_characters:
            table.setdefault("" if character == "\0" else character, []).append((tag, whole))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or `_Loader` would read as something other than the text it is."""

    yaml_implicit_resolvers: ClassVar = {
        character: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(character, []),
            *_resolvers().get(character, []),
        ]
        for character in {*yaml.SafeDumper.yaml_implicit_resolvers, *_resolvers()}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar(_STR, text, style=None if text.isprintable() else '"')

    def represent_list(self, items: list[Any]) -> yaml.SequenceNode:
        scalars = not any(isinstance(item, list | dict) for item in items)
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=scalars)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_list)


@dataclass(frozen=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and where each of its nodes stands."""

    data: Any
    origins: dict[Key, Origin]


def parse(text: str, source: str, *, lines: bool = True) -> Document:
    """Reads one YAML document.

    Keys of mappings are always text (``on:`` is the key "on").

    Args:
        source: the file, or "command line", for messages and origins.
        lines: whether line numbers mean anything to the user.

    Raises:
        MaxlmError: a syntax error, a duplicate key or an anchor that contains itself.
    """

    def origin(mark: yaml.Mark | None) -> Origin:
        return Origin(source, mark.line + 1 if lines and mark else None)

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None, {(): Origin(source)})
        _check(node, origin, active=set(), done=set())
        data = loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = Origin(source, line if lines else None)
        raise MaxlmError(
            f"not YAML: character U+{_codepoint(error.character):04X} is not allowed",
            where=str(where),
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        fix = "indent with spaces, not tabs" if "'\\t'" in what else None
        raise MaxlmError(f"not YAML: {what}", where=str(origin(mark)), fix=fix) from None
    origins: dict[Key, Origin] = {}
    _locate(node, origin(node.start_mark), (), origin, origins)
    return Document(data, origins)


def dump(data: Any) -> str:
    """Plain data as YAML that `parse` reads back equal; a list of scalars takes one line."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=2**31,
    )


def _check(node: yaml.Node, origin: Any, active: set[int], done: set[int]) -> None:
    """Refuses duplicate keys and recursion; marks every key as text."""
    if id(node) in active:
        raise MaxlmError("this anchor contains itself", where=str(origin(node.start_mark)))
    if id(node) in done:
        return
    active.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first_line: dict[str, int] = {}
        for key, value in node.value:
            where = str(origin(key.start_mark))
            if not isinstance(key, yaml.ScalarNode):
                raise MaxlmError("a key must be a plain name", where=where)
            if key.tag != _MERGE:
                key.tag = _STR
                if key.value in first_line:
                    what = f"key {key.value!r} is already set on line {first_line[key.value]}"
                    raise MaxlmError(what, where=where, fix="remove one of the two")
                first_line[key.value] = key.start_mark.line + 1
            _check(value, origin, active, done)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, origin, active, done)
    active.discard(id(node))
    done.add(id(node))


def _locate(
    node: yaml.Node, at: Origin, path: Key, origin: Any, origins: dict[Key, Origin]
) -> None:
    """Records where each node stands. Runs after construction, which has expanded ``<<``."""
    origins[path] = at
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _locate(value, origin(key.start_mark), (*path, key.value), origin, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _locate(item, origin(item.start_mark), (*path, index), origin, origins)


def _codepoint(character: Any) -> int:
    return character if isinstance(character, int) else ord(character)
