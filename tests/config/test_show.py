"""Promise: what is shown is the config, each value beside its origin; the schema fits
editors; two configs differ exactly where their settings do."""

import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from maxlm.config import Config
from maxlm.config.load import load_config
from maxlm.config.show import (
    ABSENT,
    build_json_schema,
    compare_configs,
    to_annotated_yaml,
    to_yaml,
)


class Part(Config):
    width: int
    """Channels of the residual stream."""

    kind: Literal["a", "b"] = "a"
    required: bool = False


class Run(Config):
    """One run."""

    name: str = "x"
    labels: list[str] = Field([])
    parts: list[Part] = Field([])
    sizes: dict[str, float] = Field({})
    out: Path | None = None


def test_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "name: |\n  two\n  lines\nlabels: [a, b]\nparts:\n- {width: 3}\n"
    )
    shown = to_annotated_yaml(
        load_config(Run, Path("run.yaml"), ["parts.0.kind=b", "sizes.small=1e-5"])
    )
    assert shown.splitlines() == [
        'name: "two\\nlines\\n"  # run.yaml:1',
        "labels: [a, b]        # run.yaml:4",
        "parts:",
        "- width: 3            # run.yaml:6",
        "  kind: b             # command line",
        "  required: false     # default",
        "sizes:",
        "  small: 1.0e-05      # command line",
        "out: null             # default",
    ]


def test_a_long_value_does_not_push_the_column_out():
    shown = to_annotated_yaml(load_config(Run, None, [f"name={'n' * 80}"])).splitlines()
    assert shown[:2] == [f"name: {'n' * 80}  # command line", "labels: []  # default"]


characters = st.characters(codec="utf-8", exclude_characters="\0")
parts = st.builds(
    Part, width=st.integers(-(2**63), 2**63 - 1), kind=st.sampled_from("ab")
)
runs = st.builds(
    Run,
    name=st.text(characters) | st.from_regex(r"\\*\$\{[a-z.]*\}", fullmatch=True),
    labels=st.lists(st.text(characters, max_size=5), max_size=3),
    parts=st.lists(parts, max_size=2),
    sizes=st.dictionaries(
        st.from_regex(r"[a-z]+", fullmatch=True),
        st.floats(allow_nan=False, allow_infinity=False),
        max_size=2,
    ),
)


@pytest.mark.heavy
@given(runs)
def test_what_is_written_loads_back_equal(tmp_path_factory, run):
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_config(Run, path).value == run


def test_schema():
    body = build_json_schema(Run)
    assert body["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(body["properties"]) == [
        "include",
        "name",
        "labels",
        "parts",
        "sizes",
        "out",
    ]
    part = body["$defs"]["Part"]
    assert (
        part["properties"]["width"]["description"] == "Channels of the residual stream."
    )
    assert part["properties"]["kind"]["enum"] == ["a", "b"]
    assert "required" not in part
    assert body["additionalProperties"] is part["additionalProperties"] is False
    json.dumps(body)


def test_differences():
    a = Run(labels=["x", "y"], sizes={"u": 1.0}).model_dump(mode="json")
    b = {"name": "z", "labels": ["x", "w", "v"], "parts": [], "out": None, "old": None}
    assert compare_configs(a, b) == [
        ("name", "x", "z"),
        ("labels.1", "y", "w"),
        ("sizes.u", 1.0, ABSENT),
        ("labels.2", ABSENT, "v"),
        ("old", ABSENT, None),
    ]
    assert compare_configs(a, json.loads(json.dumps(a))) == []
