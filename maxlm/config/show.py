"""Configs to look at: as YAML with the origin of each value, their differences, their
schema."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema

from maxlm.config.base import Config
from maxlm.config.keys import flatten, join_key
from maxlm.config.load import LoadedConfig
from maxlm.config.yaml_text import dump_yaml, parse_yaml

ABSENT: Final = "(absent)"
"""Stands for a key that one side does not have."""
_WIDEST = 40


def compare_configs(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Returns the leaves in which two configs, as JSON values, differ: (dotted key,
    value in a, value in b). Keys come in a's order, then those only b has. A key one
    side lacks has the value `ABSENT`."""
    left, right = (
        {join_key(key): value for key, value in flatten(side)} for side in (a, b)
    )
    pairs = (
        (key, left.get(key, ABSENT), right.get(key, ABSENT))
        for key in {**left, **right}
    )
    return [pair for pair in pairs if pair[1] != pair[2]]


def to_yaml(config: Config) -> str:
    """Returns the whole config as YAML that `load_config` reads back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def to_annotated_yaml(loaded: LoadedConfig[Any]) -> str:
    """Returns `to_yaml` with a column of comments on the right: where each value comes
    from."""
    text = to_yaml(loaded.value)
    comments = {}
    for key, origin in parse_yaml(text, "").list_origins():
        # Of a list of leaves, by its first; other containers have none.
        for leaf in (join_key(key), join_key((*key, 0))):
            if leaf in loaded.origins:
                comments[origin.line] = str(loaded.origins[leaf])
    lines = text.splitlines()
    lengths = [len(line) for number, line in enumerate(lines, 1) if number in comments]
    column = max((length for length in lengths if length <= _WIDEST), default=0)
    return "\n".join(
        f"{line:<{column}}  # {comments[number]}" if number in comments else line
        for number, line in enumerate(lines, 1)
    )


class _PartialJsonSchema(GenerateJsonSchema):
    """A file may hold a part of a config and take the rest from others: nothing is
    required."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return False


def build_json_schema(cls: type[Config]) -> dict[str, Any]:
    """Builds a JSON Schema (draft 2020-12) for editors, with the fields' docstrings."""
    body = cls.model_json_schema(schema_generator=_PartialJsonSchema)
    body["properties"] = {
        "include": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
            ],
            "description": "Files that this one builds on, relative to it, or names of "
            "shipped "
            "configs. A later one overrides an earlier one; this file overrides them "
            "all.",
        },
        **body.get("properties", {}),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body}
