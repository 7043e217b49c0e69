"""Promise: a config is what its layers say, and each value knows where it was written."""

import textwrap
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from maxlm.config import Config, load_config
from maxlm.config.keys import COMMAND_LINE, DEFAULT, flatten, join_key


class Mesh(Config):
    data: int = 1
    fsdp: int = 1


class Model(Config):
    d_model: int
    bias: bool = False
    rate: float = 0.5
    labels: list[str] = Field([])


class Source(Config):
    path: str = "a"
    weight: float = 1.0


class Adamw(Config):
    kind: Literal["adamw"] = "adamw"
    beta: float = 0.9


class Lion(Config):
    kind: Literal["lion"]


class Run(Config):
    name: str = "run"
    model: Model = Model(d_model=8)
    sources: list[Source] = Field([])
    mesh: Mesh = Mesh()
    optimizer: Annotated[Adamw | Lion, Field(discriminator="kind")] = Adamw()
    extra: dict[str, int] = Field({})

    @field_validator("mesh", mode="before")
    @classmethod
    def _parse(cls, value):
        if isinstance(value, str):
            return {k: int(v) for k, v in (part.split("=") for part in value.split(","))}
        return value


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file below the working directory and gives its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def origins(loaded):
    return {key: str(origin) for key, origin in loaded.origins.items()}


def test_a_file_and_overrides_with_their_origins(write):
    source = write(
        "run.yaml",
        """\
        # comment
        name: demo
        model:
          d_model: 64
          rate: 1e-3
        sources:
          - path: x
          - {path: y, weight: 3}
        """,
    )
    loaded = load_config(
        Run, source, ["sources.1.weight=2", "sources[0].weight=5", "model.bias=true"]
    )
    assert loaded.value == Run(
        name="demo",
        model=Model(d_model=64, rate=0.001, bias=True),
        sources=[Source(path="x", weight=5), Source(path="y", weight=2)],
    )
    assert origins(loaded) == {
        "name": "run.yaml:2",
        "model.d_model": "run.yaml:4",
        "model.bias": "command line",
        "model.rate": "run.yaml:5",
        "model.labels": "default",
        "sources.0.path": "run.yaml:7",
        "sources.0.weight": "command line",
        "sources.1.path": "run.yaml:8",
        "sources.1.weight": "command line",
        "mesh.data": "default",
        "mesh.fsdp": "default",
        "optimizer.kind": "default",
        "optimizer.beta": "default",
        "extra": "default",
    }


def test_an_empty_file_gives_the_defaults_and_overrides_need_no_file(write):
    assert load_config(Run, write("empty.yaml", "# nothing\n")).value == Run()
    loaded = load_config(Run, None, ["extra.a=3", "optimizer.kind=lion"])
    assert loaded.value == Run(extra={"a": 3}, optimizer=Lion(kind="lion"))
    assert (loaded.origins["extra.a"], loaded.origins["name"]) == (COMMAND_LINE, DEFAULT)


def test_an_include_may_name_a_shipped_config(write, monkeypatch, tmp_path):
    package = tmp_path / "site" / "maxlm"
    write("site/maxlm/_assets/configs/models/tiny.yaml", "model: {d_model: 5}\n")
    monkeypatch.setattr("maxlm.config.assets._PACKAGE", package)
    assert load_config(Run, write("run.yaml", "include: models/tiny\n")).value.model.d_model == 5
    assert load_config(Run, "tiny").value.model.d_model == 5


def test_references_are_written_where_they_stand(write):
    class Parts(Config):
        a: dict[str, list[int]]
        b: dict[str, list[int]]
        c: int
        texts: list[str]

    path = write(
        "run.yaml",
        "a: {x: [3, 5]}\nb: ${a}\nc: ${b.x[1]}\n"
        r"texts: ['${c}-${b.x.0}', '\${c}', '\\${c}', 'a\\b', '\\\${c}${c}', '${texts.1}']",
    )
    loaded = load_config(Parts, path, ["a.x.1=7"])
    assert loaded.value == Parts(
        a={"x": [3, 7]},
        b={"x": [3, 7]},
        c=7,
        texts=["7-3", "${c}", r"\7", r"a\\b", r"\${c}7", "${c}"],
    )
    assert {key: at.line for key, at in loaded.origins.items() if at != COMMAND_LINE} == {
        "a.x.0": 1,
        "b.x.0": 2,
        "b.x.1": 2,
        "c": 3,
        **{f"texts.{index}": 4 for index in range(6)},
    }


def test_a_replaced_value_forgets_what_it_replaced(write):
    write("base.yaml", "mesh:\n  data: 2\n")
    source = write("run.yaml", "include: base.yaml\nmesh: fsdp=4\n")
    loaded = load_config(Run, source)
    assert loaded.value.mesh == Mesh(fsdp=4)
    # A validator took the text apart.
    assert {origins(loaded)["mesh.data"], origins(loaded)["mesh.fsdp"]} == {"run.yaml:2"}
    again = load_config(Run, source, ["mesh={fsdp: 2}"])
    assert again.value.mesh == Mesh(fsdp=2)
    assert origins(again)["mesh.data"] == "default"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.rate=1e-3", "rate", 0.001),
        ("model.d_model=1_024", "d_model", 1024),
        ("model.bias=yes", "bias", True),
        ("model.labels=[a, no, '3', 1:30]", "labels", ["a", "no", "3", "1:30"]),
        ("model.labels=[a=b, c.d]", "labels", ["a=b", "c.d"]),
    ],
)
def test_overrides_are_yaml(override, key, value):
    loaded = load_config(Run, None, ["model.d_model=2", override])
    assert getattr(loaded.value.model, key) == value
    assert type(getattr(loaded.value.model, key)) is type(value)


def test_overrides_apply_in_order_and_mappings_merge(write):
    source = write("run.yaml", "extra: {a: 1, b: 2}\nsources: [{path: x}]\n")
    loaded = load_config(Run, source, ["extra={b: 3, c: 4}", "extra.c=5", "sources=[]"])
    assert loaded.value == Run(extra={"a": 1, "b": 3, "c": 5})
    assert origins(loaded)["extra.a"] == "run.yaml:1"
    assert loaded.origins["sources"] == COMMAND_LINE


def test_yaml_merge_keys_and_anchors(write):
    source = write(
        "run.yaml",
        """\
        sources:
          - &first {path: x, weight: 2}
          - <<: *first
            path: y
        """,
    )
    loaded = load_config(Run, source)
    assert loaded.value.sources == [Source(path="x", weight=2), Source(path="y", weight=2)]
    assert (loaded.origins["sources.1.path"].line, loaded.origins["sources.1.weight"].line) == (
        4,
        2,
    )


int64 = st.integers(-(2**63), 2**63 - 1)


@given(
    layers=st.lists(
        st.dictionaries(
            st.sampled_from("abc"),
            int64 | st.dictionaries(st.sampled_from("xyz"), int64, min_size=1),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_layers_merge_as_nested_dicts_do(layers, tmp_path_factory):
    class Any(Config):
        tree: dict[str, int | dict[str, int]] = Field({})

    folder = tmp_path_factory.mktemp("layers")
    expected: dict = {}
    origin: dict[str, str] = {}
    for number, layer in enumerate(layers):
        include = f"include: {number - 1}.yaml\n" if number else ""
        (folder / f"{number}.yaml").write_text(f"{include}tree: {layer}\n")
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(expected.get(key), dict)
            expected[key] = {**expected[key], **value} if both else value
            for leaf in value if isinstance(value, dict) else [None]:
                origin[f"tree.{key}" + (f".{leaf}" if leaf else "")] = f"{number}.yaml"
    loaded = load_config(Any, folder / f"{len(layers) - 1}.yaml")
    assert loaded.value.tree == expected
    for key, _ in flatten(expected, ("tree",)):
        if key != ("tree",):
            assert Path(loaded.origins[join_key(key)].source).name == origin[join_key(key)]
