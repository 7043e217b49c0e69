"""YAML text to plain data and the line of every value, and back."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from maxlm.config.errors import MaxlmError
from maxlm.config.keys import Key, SettingOrigin, format_value, join_key

MAX_VALUES, MAX_DEPTH = 20_000, 64
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
        re.compile(r"[-+]?(?:0|[1-9][0-9_]{,99})|0x[0-9a-fA-F][0-9a-fA-F_]{,99}"),
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


_FORBIDDEN = re.compile("[\0\ud800-\udfff]")  # in no path and no UTF-8


@dataclass
class SizeLimit:
    """Counts what a config comes to, so that no short file fills the memory or the stack."""

    num_values: int = 0
    """Values so far; a text counts once more for every 100 characters."""

    def add(self, value: Any, depth: int, origin: SettingOrigin, key: Key) -> None:
        """
        Raises:
            MaxlmError: there are too many values by now, or levels above this one.
        """
        self.num_values += 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if self.num_values > MAX_VALUES or depth > MAX_DEPTH:
            what = f"more than {MAX_VALUES:,} values"
            if depth > MAX_DEPTH:
                what = f"nested more than {MAX_DEPTH} levels deep, perhaps without end"
            where = ": ".join(filter(None, (str(origin), join_key(key[:4]))))
            fix = "write less (aliases, includes and ${...} count as what they stand for)"
            raise MaxlmError(what, where=where, fix=fix)

    def add_tree(self, node: Any, origin: SettingOrigin, key: Key = ()) -> None:
        """Count a value and everything below it; raises as :meth:`add` does."""
        self.add(node, len(key), origin, key)
        if isinstance(node, dict | list):
            for name, value in node.items() if isinstance(node, dict) else enumerate(node):
                self.add_tree(value, origin, (*key, name))


class _Loader(yaml.SafeLoader):
    """Expands aliases and merges itself, as far as the limit allows."""

    yaml_implicit_resolvers = _resolvers()

    def __init__(self, text: str, origin: Callable[[yaml.Mark], SettingOrigin], size: SizeLimit):
        super().__init__(text)
        self.origin, self.size, self.depth = origin, size, 0
        self.origins: dict[Key, SettingOrigin] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        origin = self.origin(event.start_mark)
        if getattr(event, "tag", None):
            raise MaxlmError(f"the tag {format_value(event.tag)} is not allowed", where=str(origin))
        if found := _FORBIDDEN.search(getattr(event, "value", "")):
            raise yaml.reader.ReaderError("", event.start_mark.index, ord(found[0]), "", "")
        SizeLimit().add(None, self.depth, origin, ())
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def build(self, node: yaml.Node, at: SettingOrigin, key: Key) -> Any:
        """Returns a node as plain data; records where it and all below it stand."""
        self.origins[key] = at
        self.size.add(node.value, len(key), at, key)
        if isinstance(node, yaml.MappingNode):
            return {
                name: self.build(value, self.origin(mark), (*key, name))
                for name, (mark, value) in self._pairs(node, at, key, len(key)).items()
            }
        if isinstance(node, yaml.SequenceNode):
            return [
                self.build(item, self.origin(item.start_mark), (*key, index))
                for index, item in enumerate(node.value)
            ]
        return self.construct_object(node)

    def _pairs(self, node: yaml.Node, at: SettingOrigin, key: Key, depth: int) -> dict[str, Any]:
        """Name → its place and value; those of ``<<`` count less than a mapping's own."""
        if not isinstance(node, yaml.MappingNode):
            raise MaxlmError("<< takes a mapping or a list of mappings", where=str(at))
        if depth > len(key):  # Merging takes time for keys that are overridden as well.
            self.size.num_values += len(node.value)
        self.size.add(None, depth, at, key)
        own, merged = {}, {}
        for name, value in node.value:
            where = self.origin(name.start_mark)
            if not isinstance(name, yaml.ScalarNode):
                raise MaxlmError("a key must be a plain name", where=str(where))
            if name.tag == _MERGE:
                for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = self._pairs(each, where, key, depth + 1) | merged
            elif name.value in own:
                line = own[name.value][0].line + 1
                what = f"key {name.value!r} is already set on line {line}"
                raise MaxlmError(what, where=str(where), fix="remove one of the two")
            else:
                own[name.value] = (name.start_mark, value)
        return merged | own


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
class YamlDocument:
    """Plain data (dict, list, str, int, float, bool, None) and where each of its nodes stands."""

    data: Any
    origins: dict[Key, SettingOrigin]


def parse_yaml(
    text: str, source: str, *, lines: bool = True, size: SizeLimit | None = None
) -> YamlDocument:
    """Reads one YAML document.

    Keys of mappings are always text (``on:`` is the key "on").

    Args:
        source: the file, or "command line", for messages and origins.
        lines: whether line numbers mean anything to the user.
        size: what is read counts in it.

    Raises:
        MaxlmError: a syntax error, a duplicate key, a tag, character or number that is not
            allowed, or too much of it all.
    """

    def origin(mark: yaml.Mark | None) -> SettingOrigin:
        return SettingOrigin(source, mark.line + 1 if lines and mark else None)

    try:
        loader = _Loader(text, origin, size or SizeLimit())
        node = loader.get_single_node()
        if node is None:
            return YamlDocument(None, {(): SettingOrigin(source)})
        data = loader.build(node, origin(node.start_mark), ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = SettingOrigin(source, line if lines else None)
        raise MaxlmError(
            f"not YAML: character U+{_codepoint(error.character):04X} is not allowed",
            where=str(where),
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        fix = "indent with spaces, not tabs" if "'\\t'" in what else None
        raise MaxlmError(f"not YAML: {what}", where=str(origin(mark)), fix=fix) from None
    return YamlDocument(data, loader.origins)


def dump_yaml(data: Any) -> str:
    """Returns plain data as YAML that `parse_yaml` reads back equal; a list of scalars takes one
    line."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=2**31,
    )


def _codepoint(character: Any) -> int:
    return character if isinstance(character, int) else ord(character)
