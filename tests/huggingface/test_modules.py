"""Promise: modules that predict further tokens go from published files to runs and back
bit for bit; the names of tensors say how many there are."""

from pathlib import Path

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.huggingface.families import FAMILIES
from maxlm.models.architectures.config import TransformerConfig
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert, find_inexpressible_setting
from tests.models.published import folder_of, golden
from tests.parity import compare

COUNT = "num_nextn_predict_layers"
COPIES = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}


def make_tensors(num_modules: int) -> tuple[int, dict[str, np.ndarray]]:
    """A tiny GLM-4.5 with modules as published: its layers, and their tensors."""
    case = golden("glm4_moe")
    tensors = dict(case.tensors)
    num_layers = case.values["num_hidden_layers"]
    random = np.random.default_rng(0)
    vector = tensors["model.norm.weight"]
    width = len(vector)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(1, 0.3, shape).astype(vector.dtype)

    for layer in range(num_layers, num_layers + num_modules):
        stem = f"model.layers.{layer}"
        last = f"model.layers.{num_layers - 1}."
        for name, tensor in case.tensors.items():
            if name.startswith(last):
                ending = name.removeprefix(last)
                tensors[f"{stem}.{ending}"] = draw(*tensor.shape)
        tensors[f"{stem}.eh_proj.weight"] = draw(width, 2 * width)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{stem}.{name}.weight"] = draw(width)
        for name, original in COPIES.items():
            tensors[f"{stem}.{name}.weight"] = tensors[f"{original}.weight"]
    return num_layers, tensors


def read_model(run: Path) -> TransformerConfig:
    return load_config(RunConfig, run / "config.yaml").value.model


@pytest.mark.parametrize(
    "has_copies", [True, pytest.param(False, marks=pytest.mark.more)]
)
def test_modules_come_back_bit_for_bit(tmp_path, has_copies):
    _, tensors = make_tensors(2)
    if not has_copies:
        for name in [*tensors]:
            if any(name.endswith(f".{copy}.weight") for copy in COPIES):
                del tensors[name]
        tensors["model.embed_tokens.weight"] = golden("glm4_moe").tensors[
            "model.embed_tokens.weight"
        ]
    published, run, again = (tmp_path / part for part in ("published", "run", "again"))
    folder_of("glm4_moe", published, tensors, **{COUNT: 2})
    convert(published, run)
    model = read_model(run)
    assert model.mtp is not None
    assert model.mtp.num_modules == 2

    convert(run, again)
    values, back = compare.tensors_of(again)
    assert values[COUNT] == 2
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name


def test_a_config_that_tells_of_modules_without_tensors_is_of_a_model_without(tmp_path):
    """As transformers saves it."""
    run = tmp_path / "run"
    published = folder_of("glm4_moe", tmp_path / "published", **{COUNT: 1})
    notes = convert(published, run).notes
    assert read_model(run).mtp is None
    assert not [note for note in notes if "further" in note]


@pytest.mark.more
def test_modules_that_config_json_does_not_tell_of_are_left_out_in_a_line(tmp_path):
    num_layers, tensors = make_tensors(2)
    published = folder_of("glm4_moe", tmp_path / "published", tensors, **{COUNT: 1})
    run = tmp_path / "run"
    notes = convert(published, run).notes
    model = read_model(run)
    assert model.mtp is not None
    assert model.mtp.num_modules == 1
    layer = f"model.layers.{num_layers + 1}"
    count = sum(name.startswith(layer) for name in tensors)
    note = f"left out: {layer} ({count} tensors), which predicts further tokens"
    assert note in notes


def test_a_copy_that_differs_is_named(tmp_path):
    num_layers, tensors = make_tensors(1)
    name = f"model.layers.{num_layers}.shared_head.head.weight"
    tensors[name] = tensors[name] * 2
    published = folder_of("glm4_moe", tmp_path / "published", tensors, **{COUNT: 1})
    notes = convert(published, tmp_path / "run").notes
    expected = f"warning: {name} differs from lm_head.weight, which stands for it here"
    assert [note for note in notes if "differs" in note] == [expected]


def test_a_module_without_all_of_its_tensors_is_refused(tmp_path):
    num_layers, tensors = make_tensors(1)
    del tensors[f"model.layers.{num_layers}.hnorm.weight"]
    published = folder_of("glm4_moe", tmp_path / "published", tensors, **{COUNT: 1})
    with pytest.raises(MaxlmError, match=r"lack model\.layers\.3\.hnorm\.weight"):
        convert(published, tmp_path / "run")


def test_families_say_whether_they_can_hold_modules():
    values = golden("glm4_moe").values
    glm, model = compare.read(values)
    with_modules = type(model).model_validate(
        model.model_dump() | {"mtp": {"num_modules": 2, "loss_weight": 0.1}}
    )
    assert find_inexpressible_setting(with_modules, glm) is None
    # A layer of another kind than the last is none of GLM's modules.
    other = {"num_modules": 1, "layer": {"ffn": "mlp"}}
    dense = type(model).model_validate(model.model_dump() | {"mtp": other})
    assert "mtp.layer" in str(find_inexpressible_setting(dense, glm))

    llama, small = compare.read(golden("llama").values)
    with_modules = type(small).model_validate(
        small.model_dump() | {"mtp": {"num_modules": 1}}
    )
    assert "model.mtp" in str(find_inexpressible_setting(with_modules, llama))
    assert FAMILIES.get("llama").modules is None
