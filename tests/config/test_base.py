"""Promise: a setting takes a value of its own type; a name stays one component of a
path."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from maxlm.config import Config, FileName
from maxlm.config.keys import flatten, get_descendant
from maxlm.config.load import load_config
from maxlm.run.config import RunConfig


class Nested(Config):
    name: FileName = "x"
    counts: Mapping[str, tuple[int | None, float]] | None = None
    flags: tuple[bool, ...] = ()
    size: Annotated[int, Field(gt=0)] | str = 1


def test_no_boolean_passes_as_a_number_nor_a_number_as_a_boolean():
    good = load_config(RunConfig, "demo").value.model_dump(mode="json")
    leaves = [
        (key, value) for key, value in flatten(good) if isinstance(value, int | float)
    ]
    assert len(leaves) > 60
    for key, value in leaves:
        tree: Any = deepcopy(good)
        get_descendant(tree, key[:-1])[key[-1]] = 1 if isinstance(value, bool) else True
        with pytest.raises(ValidationError) as caught:
            RunConfig.model_validate(tree)
        assert [part for part in caught.value.errors()[0]["loc"] if part in key] == [
            *key
        ]


NAMES = (
    *("", ".", "..", "../x", "a//b", "a/../b", "/x", "a\\b", "-rf", " a"),
    *("a\n", "a\0", "β" * 100 + "n"),
)


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"counts": {"a": [True, 1]}}, ("counts", "a", 0)),
        ({"counts": {"a": [None, False]}}, ("counts", "a", 1)),
        ({"flags": [True, 1.0]}, ("flags", 1)),
        ({"size": False}, ("size",)),
        ({"size": 2**63}, ("size",)),
        *(({"name": name}, ("name",)) for name in NAMES),
    ],
)
def test_the_same_at_any_depth_and_names_that_are_paths(settings, at):
    with pytest.raises(ValidationError) as caught:
        Nested.model_validate(settings)
    assert caught.value.errors()[0]["loc"][: len(at)] == at


def test_what_means_the_type_still_passes():
    config = Nested.model_validate(
        {"counts": {"a": [2e9, 3]}, "flags": ["yes", "off", True]}
    )
    assert (config.counts, config.flags) == (
        {"a": (2_000_000_000, 3.0)},
        (True, False, True),
    )
    assert Nested(size=2**63 - 1, name="exp/run-2.β_" + "n" * 187).size == 2**63 - 1
