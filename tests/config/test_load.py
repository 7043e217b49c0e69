"""Promise: a config is what its layers say, and each value knows where it was
written."""

import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.config.keys import (
    COMMAND_LINE,
    DEFAULT,
    flatten,
    get_descendant,
    join_key,
    split_key,
)
from maxlm.config.layers import MAX_FILES
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.run.config import RunConfig
from tests.config.example import Data, Lion, Mesh, Model, Run, Source


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
        share: 1e-3
        data:
          sources:
            - &first {path: x, weight: 4}
            - path: y
              weight: 3
            - <<: *first
              path: z
        """,
    )
    overrides = [
        "data.sources.1.weight=2",
        "data.sources[0].weight=5",
        "model.bias=true",
    ]
    loaded = load_config(Run, source, overrides)
    sources = [
        Source(path="x", weight=5),
        Source(path="y", weight=2),
        Source(path="z", weight=4),
    ]
    data = Data(sources=sources)
    assert loaded.value == Run(
        name="demo", share=0.001, model=Model(bias=True), data=data
    )
    assert {key: at for key, at in origins(loaded).items() if at != "default"} == {
        "name": "run.yaml:2",
        "share": "run.yaml:3",
        "data.sources.0.path": "run.yaml:6",
        "data.sources.0.weight": "command line",
        "data.sources.1.path": "run.yaml:7",
        "data.sources.1.weight": "command line",
        "data.sources.2.path": "run.yaml:10",
        "data.sources.2.weight": "run.yaml:6",
        "model.bias": "command line",
    }
    assert loaded.origins.keys() >= {"model.d_model", "optimizer.kind", "extra", "out"}


def test_an_empty_file_gives_the_defaults_and_overrides_need_no_file(write):
    assert load_config(Run, write("empty.yaml", "# nothing\n")).value == Run()
    loaded = load_config(Run, None, ["extra.a=3", "optimizer.kind=lion"])
    assert loaded.value == Run(extra={"a": 3}, optimizer=Lion(kind="lion"))
    assert (loaded.origins["extra.a"], loaded.origins["name"]) == (
        COMMAND_LINE,
        DEFAULT,
    )


def test_an_include_may_name_a_shipped_config(write):
    path = write("run.yaml", "include: models/gpt2\nname: mine\n")
    want = load_config(RunConfig, "models/gpt2", ["name=mine"]).value
    assert load_config(RunConfig, path).value == want


def test_nothing_is_filled_in(write, monkeypatch):
    """Not the environment, whose secrets would be printed into jobs."""
    monkeypatch.setenv("SECRET", "s")
    path = write("run.yaml", "name: x\nlabels: [$SECRET, '$', '${', '{name}']")
    assert load_config(Run, path).value.labels == ["$SECRET", "$", "${", "{name}"]


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${name}", "${}", "a ${b.c} d"])
def test_references_are_refused_and_their_text_is_written_with_two_dollars(write, text):
    reference = text[text.index("$") : text.index("}") + 1]
    path = write("run.yaml", f"name: x\nlabels: ['{text}']")
    for source, overrides in ((path, []), (None, ["name=x", f"labels=['{text}']"])):
        with pytest.raises(MaxlmError) as caught:
            load_config(Run, source, overrides)
        assert f": {reference} is not filled in" in str(caught.value)
        assert str(caught.value).endswith(f"or write ${reference} for this text")
    for dollars in ("$", "$$", "$$$"):
        escaped = text.replace("$", f"${dollars}")
        loaded = load_config(Run, write("run.yaml", f"labels: ['{escaped}']")).value
        assert loaded.labels == [text.replace("$", dollars)]
        assert load_config(Run, write("again.yaml", to_yaml(loaded))).value == loaded


def test_a_config_is_made_of_a_bounded_number_of_files(write):
    """A list of many, and files that each include the last twice: two to the power of
    20."""
    write("leaf.yaml", "name: x\n")
    for count, is_read in ((MAX_FILES - 1, True), (MAX_FILES, False)):
        path = write("run.yaml", f"include: [{', '.join(['leaf.yaml'] * count)}]\n")
        if is_read:
            assert load_config(Run, path).value.name == "x"
            continue
        with pytest.raises(
            MaxlmError, match=r"run\.yaml: the config is made of more than 100 files"
        ):
            load_config(Run, path)
    for level in range(20):
        below = f"level{level - 1}.yaml" if level else "leaf.yaml"
        path = write(f"level{level}.yaml", f"include: [{below}, {below}]\n")
    with pytest.raises(
        MaxlmError, match=r"level19\.yaml: the config is made of more than 100"
    ):
        load_config(Run, path)


def test_a_replaced_value_forgets_what_it_replaced(write):
    write("base.yaml", "mesh:\n  data: 2\n")
    source = write("run.yaml", "include: base.yaml\nmesh: fsdp=4\n")
    loaded = load_config(Run, source)
    assert loaded.value.mesh == Mesh(fsdp=4)
    # A validator took the text apart.
    assert {origins(loaded)["mesh.data"], origins(loaded)["mesh.fsdp"]} == {
        "run.yaml:2"
    }
    again = load_config(Run, source, ["mesh={fsdp: 2}"])
    assert again.value.mesh == Mesh(fsdp=2)
    assert origins(again)["mesh.data"] == "default"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("share=1e-3", 0.001),
        ("model.d_model=1_024", 1024),
        ("model.bias=yes", True),
        ("labels=[a, no, '3', 1:30]", ["a", "no", "3", "1:30"]),
        ("labels=[a=b, c.d]", ["a=b", "c.d"]),
    ],
)
def test_overrides_are_yaml(override, value):
    loaded = load_config(Run, None, [override])
    read_value = get_descendant(
        loaded.value.model_dump(mode="json"), split_key(override.partition("=")[0])
    )
    assert (read_value, type(read_value)) == (value, type(value))


def test_overrides_apply_in_order_and_mappings_merge(write):
    source = write("run.yaml", "extra: {a: 1, b: 2}\nlabels: [x]\n")
    loaded = load_config(Run, source, ["extra={b: 3, c: 4}", "extra.c=5", "labels=[]"])
    assert loaded.value == Run(extra={"a": 1, "b": 3, "c": 5})
    assert origins(loaded)["extra.a"] == "run.yaml:1"
    assert loaded.origins["labels"] == COMMAND_LINE


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
            assert (
                Path(loaded.origins[join_key(key)].source).name == origin[join_key(key)]
            )
