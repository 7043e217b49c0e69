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
# The column of comments stands behind the longest line of at most so many characters;
# the comments of longer lines follow them.
_MAX_COMMENT_COLUMN = 40


def compare_configs(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Returns the leaves in which two configs, as JSON values, differ: (dotted key,
    value in a, value in b). Keys come in a's order, then those only b has. A key one
    side lacks has the value `ABSENT`."""
    a_leaves = {join_key(key): value for key, value in flatten(a)}
    b_leaves = {join_key(key): value for key, value in flatten(b)}
    differences = []
    for key in {**a_leaves, **b_leaves}:
        a_value = a_leaves.get(key, ABSENT)
        b_value = b_leaves.get(key, ABSENT)
        if a_value != b_value:
            differences.append((key, a_value, b_value))
    return differences


def to_yaml(config: Config) -> str:
    """Returns the whole config as YAML that `load_config` reads back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def to_annotated_yaml(loaded: LoadedConfig[Any]) -> str:
    """Returns `to_yaml` with a column of comments on the right: where each value comes
    from."""
    text = to_yaml(loaded.value)
    comment_by_line: dict[int | None, str] = {}
    for key, place in parse_yaml(text, "").list_origins():
        # A list of leaves stands on one line: its first leaf speaks for all. Other
        # containers have no comment.
        for leaf in (join_key(key), join_key((*key, 0))):
            if leaf in loaded.origins:
                comment_by_line[place.line] = str(loaded.origins[leaf])
    column = 0
    for number, line in enumerate(text.splitlines(), 1):
        if number in comment_by_line and len(line) <= _MAX_COMMENT_COLUMN:
            column = max(column, len(line))
    annotated = []
    for number, line in enumerate(text.splitlines(), 1):
        if number in comment_by_line:
            line = f"{line:<{column}}  # {comment_by_line[number]}"
        annotated.append(line)
    return "\n".join(annotated)


class _PartialJsonSchema(GenerateJsonSchema):
    """A file may hold a part of a config and take the rest from others: nothing is
    required."""

    def field_is_required(self, field: object, total: bool) -> bool:
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
            "shipped configs. A later one overrides an earlier one; this file "
            "overrides them all.",
        },
        **body.get("properties", {}),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body}
