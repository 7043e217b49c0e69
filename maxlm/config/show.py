"""A loaded config as YAML with the origin of each value, and a config class as JSON Schema."""

import re
from typing import Any

from maxlm.config.base import Config
from maxlm.config.compare import to_plain
from maxlm.config.keys import Key, join_key
from maxlm.config.load import LoadedConfig
from maxlm.config.yaml_text import dump_yaml, parse_yaml

_WIDEST = 40


def to_yaml(config: Config) -> str:
    """Returns the whole config as YAML that `load_config` reads back equal."""
    return dump_yaml(_escaped(to_plain(config)))


def to_annotated_yaml(loaded: LoadedConfig[Any]) -> str:
    """`to_yaml` with a column of comments on the right: where each value comes from."""
    text = to_yaml(loaded.value)
    comments = {}
    for key, origin in parse_yaml(text, "").origins.items():
        found = _origin(loaded, key)
        if found is not None:
            comments[origin.line] = found
    lines = text.splitlines()
    lengths = [len(line) for number, line in enumerate(lines, 1) if number in comments]
    column = max((length for length in lengths if length <= _WIDEST), default=0)
    return "\n".join(
        f"{line:<{column}}  # {comments[number]}" if number in comments else line
        for number, line in enumerate(lines, 1)
    )


def _origin(loaded: LoadedConfig[Any], key: Key) -> str | None:
    """The origin of a leaf, or of a list of leaves by its first; None for other containers."""
    for leaf in (key, (*key, 0)):
        if join_key(leaf) in loaded.origins:
            return str(loaded.origins[join_key(leaf)])
    return None


def build_json_schema(cls: type[Config]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) for editors, described by the docstrings under the fields.

    Nothing is required and ``include`` is allowed, since a file may hold a part of a config and
    take the rest from others.
    """
    body = _without_required(cls.model_json_schema())
    body["properties"] = {
        "include": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            "description": "Files that this one builds on, relative to it, or names of shipped "
            "configs. A later one overrides an earlier one; this file overrides them all.",
        },
        **body.get("properties", {}),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body}


def _without_required(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_required(item) for item in node]
    if not isinstance(node, dict):
        return node
    # `required` is also a legal field name: drop the keyword only, which is a list.
    return {
        key: _without_required(value)
        for key, value in node.items()
        if not (key == "required" and isinstance(value, list))
    }


def _escaped(node: Any) -> Any:
    r"""Text that merely contains ``${`` must not become an interpolation when read again."""
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(item) for item in node]
    if isinstance(node, str):
        return re.sub(r"(?<!\\)(\\*)\$\{", lambda found: found[1] * 2 + r"\${", node)
    return node
