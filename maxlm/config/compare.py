"""Comparing configs: which settings differ."""

import json
from collections.abc import Mapping
from typing import Any, Final

from maxlm.config.base import Config
from maxlm.config.keys import flatten, join_key

ABSENT: Final = "(absent)"
"""Stands for a key that one side does not have."""


def to_plain(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config as JSON would hold it: dicts, lists, text, numbers, booleans and None."""
    if isinstance(config, Config):
        return config.model_dump(mode="json")
    return json.loads(json.dumps(config))


def compare_configs(
    a: Config | Mapping[str, Any], b: Config | Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Returns the leaves in which two configs differ, as (dotted key, value in a, value in b).

    Keys come in a's order, then those only b has. A key one side lacks has the value `ABSENT`.
    Saved JSON compares equal to the config it came from.

    Args:
        prefix: put before each key, with a dot: "model" gives "model.d_model".
    """
    left, right = (
        {
            join_key(((prefix,) if prefix else ()) + key): value
            for key, value in flatten(to_plain(side))
        }
        for side in (a, b)
    )
    return [
        (key, left.get(key, ABSENT), right.get(key, ABSENT))
        for key in {**left, **right}
        if left.get(key, ABSENT) != right.get(key, ABSENT)
    ]
