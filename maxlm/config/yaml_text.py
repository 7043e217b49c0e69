"""YAML text to settings that know their lines, and plain data to YAML."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from maxlm.config.errors import MaxlmError
from maxlm.config.keys import Key, SettingOrigin, format_value

MAX_DEPTH = 64
_MAX_COPIES = 20_000
_ENDLESS = "nested too deep, perhaps without end"
_STR, _SEQ = "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq"
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
        inside = (
            dict(enumerate(self.value)) if isinstance(self.value, list) else self.value
        )
        for part, child in inside.items() if isinstance(inside, dict) else ():
            yield from child.list_origins((*key, part))


class _Loader(yaml.SafeLoader):
    """Builds settings; expands aliases and merges as far as the limit allows."""

    yaml_implicit_resolvers: ClassVar = {}

    def __init__(self, text: str, source: str, lines: bool):
        super().__init__(text)
        self.source, self.lines = source, lines
        self.seen: set[int] = set()
        self.num_copies = 0

    def locate(self, mark: yaml.Mark | None) -> SettingOrigin:
        return SettingOrigin(
            self.source, mark.line + 1 if self.lines and mark else None
        )

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            where = str(self.locate(event.start_mark))
            raise MaxlmError(f"the tag {format_value(tag)} is not allowed", where=where)
        return super().compose_node(parent, index)

    def build(self, node: yaml.Node, origin: SettingOrigin, depth: int = 0) -> Setting:
        self._count(node, origin)
        if depth > MAX_DEPTH:
            raise MaxlmError(_ENDLESS, where=str(origin))
        depth += 1
        if isinstance(node, yaml.MappingNode):
            pairs = self._list_pairs(node, origin).items()
            return Setting(
                {k: self.build(v, at, depth) for k, (at, v) in pairs}, origin
            )
        if isinstance(node, yaml.SequenceNode):
            items = [
                self.build(item, self.locate(item.start_mark), depth)
                for item in node.value
            ]
            return Setting(items, origin)
        value = self.construct_object(node)
        if isinstance(value, str):
            value = _unescape_references(_join_surrogates(value, origin), origin)
        return Setting(value, origin)

    def _count(self, node: yaml.Node, origin: SettingOrigin) -> None:
        self.num_copies += id(node) in self.seen
        self.seen.add(id(node))
        if self.num_copies > _MAX_COPIES:
            what = f"aliases stand for more than {_MAX_COPIES:,} values"
            raise MaxlmError(what, where=str(origin))

    def _list_pairs(
        self, node: yaml.MappingNode, origin: SettingOrigin
    ) -> dict[str, Any]:
        """Name → its place and value; those of ``<<`` count less than a mapping's
        own."""
        own, merged = {}, {}
        for name, value in node.value:
            where = self.locate(name.start_mark)
            if not isinstance(name, yaml.ScalarNode):
                raise MaxlmError("a key must be a plain name", where=str(where))
            name.value = _join_surrogates(name.value, where)
            if name.tag == _MERGE:
                for each in (
                    value.value if isinstance(value, yaml.SequenceNode) else [value]
                ):
                    if not isinstance(each, yaml.MappingNode):
                        what = "<< takes a mapping or a list of mappings"
                        raise MaxlmError(what, where=str(where))
                    self._count(each, where)
                    merged = self._list_pairs(each, where) | merged
            elif name.value in own:
                what = f"key {name.value!r} is already set on line {own[name.value][0].line}"
                raise MaxlmError(what, where=str(where), fix="remove one of the two")
            else:
                own[name.value] = (where, value)
        return merged | own


def _join_surrogates(text: str, origin: SettingOrigin) -> str:
    """Text in which the two halves of a character beyond the first 65,536, as JSON
    escapes it, are that character; raises MaxlmError for one half, which nothing that
    writes UTF-8 takes."""
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        what = f"{format_value(text)} holds half of a character (a lone surrogate)"
        fix = 'write the character itself, or both halves: "\\ud83d\\ude42" is 🙂'
        raise MaxlmError(what, where=str(origin), fix=fix) from None


def _unescape_references(text: str, origin: SettingOrigin) -> str:
    """Text in which ``$${name}`` is ``${name}``; raises MaxlmError for ``${name}``
    itself, which other tools fill in and which would here be taken as it stands."""

    def unescape(match: re.Match[str]) -> str:
        if not match[0].startswith("$$"):
            what = f"{match[0]} is not filled in: configs have no references and no environment"
            fix = f"write the value, pass it on the command line, or write ${match[0]} for this text"
            raise MaxlmError(what, where=str(origin), fix=fix)
        return match[0][1:]

    return _REFERENCE.sub(unescape, text)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or `_Loader` would read as something other than the text
    it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        text = _REFERENCE.sub(lambda match: f"${match[0]}", text)
        return self.represent_scalar(
            _STR, text, style=None if text.isprintable() else '"'
        )

    def represent_list(self, items: list[Any]) -> yaml.SequenceNode:
        scalars = not any(isinstance(item, list | dict) for item in items)
        return self.represent_sequence(_SEQ, items, flow_style=scalars)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_list)
for _tag, (_pattern, _first) in _PLAIN_SCALARS.items():
    for _cls in (_Loader, _Dumper):
        _whole = re.compile(f"(?:{_pattern})$", re.VERBOSE)
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_first))


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
        what = " ".join(part for part in (error.context, error.problem) if part)
        fix = "indent with spaces, not tabs" if "'\\t'" in what else None
        where = f"{source}:{mark.line + 1}" if track_lines and mark else source
        raise MaxlmError(f"not YAML: {what}", where=where, fix=fix) from None
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise MaxlmError(f"not YAML: {what}", where=source) from None


def dump_yaml(data: Any) -> str:
    """Returns plain data as YAML that `parse_yaml` reads back equal; a list of scalars
    takes one line."""
    options: dict[str, Any] = {
        "sort_keys": False,
        "default_flow_style": False,
        "width": 2**31,
    }
    return yaml.dump(data, Dumper=_Dumper, allow_unicode=True, **options)
