"""YAML text to settings that know their lines, and plain data to YAML."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from maxlm.config.errors import MaxlmError
from maxlm.config.keys import Key, SettingOrigin, format_value

MAX_DEPTH = 64
# Aliases of aliases grow exponentially ("billion laughs").
_MAX_COPIES = 20_000
_ENDLESS = "nested too deep, perhaps without end"
_STR = "tag:yaml.org,2002:str"
_SEQ = "tag:yaml.org,2002:seq"
_MERGE = "tag:yaml.org,2002:merge"
_SURROGATE = re.compile("[\ud800-\udfff]")
# A reference as OmegaConf, Hydra and shells write it, behind any number of dollars.
_REFERENCE = re.compile(r"\$+\{[^{}]*\}")

# YAML 1.2's plain scalars. PyYAML follows 1.1, which reads 1e-3 as text, `no` as a
# boolean, 1:30 as the number 90 and 010 as 8. A field typed bool still takes
# yes/no/on/off as text.
_FLOAT = r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.(?:inf|Inf|INF))
    |\.(?:nan|NaN|NAN)"""
_INT = "[-+]?(?:0|[1-9][0-9_]{,99})|0x[0-9a-fA-F][0-9a-fA-F_]{,99}"
# Tag → pattern, and the characters that such scalars begin with.
_PLAIN_SCALARS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (_INT, "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": ("<<", "<"),
}


@dataclass(frozen=True)
class Setting:
    """A value as it is written, and where."""

    value: Any
    """A mapping of names to settings, a list of settings, or a str, int, float, bool or
    None."""
    origin: SettingOrigin

    def to_plain(self) -> Any:
        """Return the value as plain data."""
        if isinstance(self.value, list):
            return [item.to_plain() for item in self.value]
        if isinstance(self.value, dict):
            return {name: child.to_plain() for name, child in self.value.items()}
        return self.value

    def list_origins(self, key: Key = ()) -> Iterator[tuple[Key, SettingOrigin]]:
        """Yield the key and place of this setting and of all inside it."""
        yield key, self.origin
        if isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.list_origins((*key, index))
        elif isinstance(self.value, dict):
            for name, child in self.value.items():
                yield from child.list_origins((*key, name))


class _Loader(yaml.SafeLoader):
    """Builds settings; expands aliases and merges as far as the limit allows."""

    yaml_implicit_resolvers: ClassVar = {}

    def __init__(self, text: str, source: str, track_lines: bool):
        super().__init__(text)
        self.source = source
        self.track_lines = track_lines
        self.seen_nodes: set[int] = set()
        """The ids of the nodes built so far: one that comes again is an alias."""
        self.num_copies = 0

    def locate(self, mark: yaml.Mark | None) -> SettingOrigin:
        line = mark.line + 1 if self.track_lines and mark else None
        return SettingOrigin(self.source, line)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # PyYAML hands a node for the index of a mapping's value; its stubs say int.
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag:
            where = str(self.locate(event.start_mark))
            raise MaxlmError(f"the tag {format_value(tag)} is not allowed", where=where)
        return super().compose_node(parent, index)

    def build(self, node: yaml.Node, origin: SettingOrigin, depth: int = 0) -> Setting:
        self._count(node, origin)
        if depth > MAX_DEPTH:
            raise MaxlmError(_ENDLESS, where=str(origin))
        if isinstance(node, yaml.MappingNode):
            children = {}
            for name, (child_origin, child) in self._list_pairs(node, origin).items():
                children[name] = self.build(child, child_origin, depth + 1)
            return Setting(children, origin)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for item in node.value:
                item_origin = self.locate(item.start_mark)
                items.append(self.build(item, item_origin, depth + 1))
            return Setting(items, origin)
        value = self.construct_object(node)
        if isinstance(value, str):
            value = _unescape_references(_join_surrogates(value, origin), origin)
        return Setting(value, origin)

    def _count(self, node: yaml.Node, origin: SettingOrigin) -> None:
        if id(node) in self.seen_nodes:
            self.num_copies += 1
        self.seen_nodes.add(id(node))
        if self.num_copies > _MAX_COPIES:
            message = f"aliases stand for more than {_MAX_COPIES:,} values"
            raise MaxlmError(message, where=str(origin))

    def _list_pairs(
        self, node: yaml.MappingNode, origin: SettingOrigin
    ) -> dict[str, tuple[SettingOrigin, yaml.Node]]:
        """Name → its place and value; those of ``<<`` count less than a mapping's
        own."""
        pairs: dict[str, tuple[SettingOrigin, yaml.Node]] = {}
        merged_pairs: dict[str, tuple[SettingOrigin, yaml.Node]] = {}
        for name, value in node.value:
            place = self.locate(name.start_mark)
            if not isinstance(name, yaml.ScalarNode):
                raise MaxlmError("a key must be a plain name", where=str(place))
            name.value = _join_surrogates(name.value, place)
            if name.tag == _MERGE:
                is_list = isinstance(value, yaml.SequenceNode)
                for mapping in value.value if is_list else [value]:
                    if not isinstance(mapping, yaml.MappingNode):
                        message = "<< takes a mapping or a list of mappings"
                        raise MaxlmError(message, where=str(place))
                    self._count(mapping, place)
                    # Of several mappings the first that has a name counts.
                    merged_pairs = self._list_pairs(mapping, place) | merged_pairs
            elif name.value in pairs:
                earlier, _ = pairs[name.value]
                message = f"key {name.value!r} is already set on line {earlier.line}"
                raise MaxlmError(message, where=str(place), fix="remove one of the two")
            else:
                pairs[name.value] = (place, value)
        return merged_pairs | pairs


def _join_surrogates(text: str, origin: SettingOrigin) -> str:
    """Text in which the two halves of a character beyond the first 65,536, as JSON
    escapes it, are that character; raises MaxlmError for one half, which nothing that
    writes UTF-8 takes."""
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        message = f"{format_value(text)} holds half of a character (a lone surrogate)"
        fix = 'write the character itself, or both halves: "\\ud83d\\ude42" is 🙂'
        raise MaxlmError(message, where=str(origin), fix=fix) from None


def _unescape_references(text: str, origin: SettingOrigin) -> str:
    """Text in which ``$${name}`` is ``${name}``; raises MaxlmError for ``${name}``
    itself, which other tools fill in and which would here be taken as it stands."""

    def unescape(match: re.Match[str]) -> str:
        reference = match[0]
        if not reference.startswith("$$"):
            message = (
                f"{reference} is not filled in: configs have no references and no "
                "environment"
            )
            fix = (
                "write the value, pass it on the command line, or write "
                f"${reference} for this text"
            )
            raise MaxlmError(message, where=str(origin), fix=fix)
        return reference[1:]

    return _REFERENCE.sub(unescape, text)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or `_Loader` would read as something other than the text
    it is."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        text = _REFERENCE.sub(lambda match: f"${match[0]}", text)
        # Only double quotes can write what is not printable, as escapes.
        style = None if text.isprintable() else '"'
        return self.represent_scalar(_STR, text, style=style)

    def represent_list(self, items: list[Any]) -> yaml.SequenceNode:
        has_containers = any(isinstance(item, list | dict) for item in items)
        return self.represent_sequence(_SEQ, items, flow_style=not has_containers)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_list)
for _tag, (_pattern, _first_chars) in _PLAIN_SCALARS.items():
    _regex = re.compile(f"(?:{_pattern})$", re.VERBOSE)
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", _regex, list(_first_chars)
        )


def parse_yaml(text: str, source: str, *, track_lines: bool = True) -> Setting:
    """Reads one YAML document. Keys of mappings are always text (``on:`` is the key
    "on"). ``source``: the file, or "command line", for messages and origins.
    ``track_lines``: whether line numbers mean anything to the user."""
    try:
        loader = _Loader(text, source, track_lines)
        node = loader.get_single_node()
        if node is None:
            return Setting(None, SettingOrigin(source))
        return loader.build(node, loader.locate(node.start_mark))
    except RecursionError:
        raise MaxlmError(_ENDLESS, where=source) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        fix = "indent with spaces, not tabs" if "'\\t'" in message else None
        where = f"{source}:{mark.line + 1}" if track_lines and mark else source
        raise MaxlmError(f"not YAML: {message}", where=where, fix=fix) from None
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise MaxlmError(f"not YAML: {message}", where=source) from None


def dump_yaml(data: object) -> str:
    """Returns plain data as YAML that `parse_yaml` reads back equal; a list of scalars
    takes one line."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        allow_unicode=True,
        sort_keys=False,
        default_flow_style=False,
        width=2**31,  # no line is folded
    )
