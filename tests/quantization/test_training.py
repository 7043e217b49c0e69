"""LoRA over a quantized base: the base is that of the run it starts from, rounded, and
stays; what is trained lies beside it."""

from typing import Any

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.params import flatten_names, is_packed, param_specs
from maxlm.quantization.config import QuantizationConfig
from maxlm.quantization.leaf import QuantizedParam
from maxlm.run.config import RunConfig
from maxlm.run.load import load_run
from maxlm.sharding import AxisRules
from maxlm.train.program import train_model
from tests.train import tiny


@pytest.fixture
def make_config(tmp_path):
    """``make_config(name, mesh, train, **parts)``: a run's config."""
    text = tiny.write_text(tmp_path / "text")

    def make(
        name: str, mesh: dict[str, int], train: dict[str, Any], **parts: Any
    ) -> RunConfig:
        settings = tiny.settings(tmp_path, text) | {"name": name, "mesh": mesh}
        attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
        settings["model"]["attention"] = attention
        settings["data"]["heldout_fraction"] = 0
        settings |= {"train": train, "checkpoint": {"every_steps": 2}}
        settings |= {
            "sharding": {"max_unsharded": 1},
            "reporting": {"tensorboard": False},
        }
        return RunConfig.model_validate(settings | parts)

    return make


def train(config: RunConfig) -> Any:
    return train_model(config, say=lambda _: None)


@pytest.mark.heavy
@pytest.mark.usefixtures("compiled_once")
def test_a_run_trains_lora_over_the_rounded_base_on_any_mesh(make_config):
    base_config = make_config("base", {"data": 8}, {"steps": 2})
    base = train(base_config)
    parts = {
        "adapter": {"kind": "lora", "rank": 2},
        "quantization": {"format": "nf4-g32-double"},
    }
    start = {"steps": 4, "start_from": str(base.folder)}
    whole = train(make_config("whole", {"fsdp": 4, "tensor": 2}, start, **parts))

    # The base is what each matrix of the start rounds to: scales to the last bit of
    # their sums.
    dense = flatten_names(base.state.params)
    specs = param_specs(base_config.model.build(rules=AxisRules(), dtype=np.float32))
    quantized = QuantizationConfig(format="nf4-g32-double").transform_specs(specs)
    params = whole.state.params
    num_packed = 0
    for name, spec in flatten_names(quantized, is_packed).items():
        if not isinstance(spec, QuantizedParam):
            continue
        num_packed += 1
        expected = jax.jit(spec.from_dense)(dense[name])
        trained: Any = params
        for part in name.split("."):
            trained = trained[part]
        for plane, array in expected.arrays.items():
            stored = trained.base.arrays[plane]
            assert stored.dtype == array.dtype
            np.testing.assert_allclose(stored, array, rtol=1e-5)
    assert num_packed == 7

    # The optimizer knows A and B alone, which have moved.
    moments = [n for n, x in flatten_names(whole.state.opt_state).items() if x.ndim]
    assert all(".lora_" in name for name in moments)
    arrays = flatten_names(params)
    assert all(np.any(arrays[name]) for name in arrays if name.endswith("lora_b"))

    # With data parallelism alone the losses are the same; the run loads with its base quantized.
    alone = train(make_config("alone", {"data": 8}, start, **parts))
    losses = [
        [row["loss"] for row in tiny.read_metrics(run.folder)] for run in (whole, alone)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    loaded = load_run(whole.folder)
    assert loaded.config.adapter is not None
    stored = flatten_names(whole.state.params)
    for name, array in flatten_names(loaded.params).items():
        np.testing.assert_array_equal(array, stored[name])

    # Another run goes on from it; one that is not quantized says why it does not.
    again = {"steps": 1, "start_from": str(whole.folder)}
    going_on = train(make_config("going_on", {"data": 8}, again, **parts))
    assert going_on.folder.exists()
    with pytest.raises(MaxlmError, match="the run is quantized"):
        train(make_config("plain", {"data": 8}, again, adapter=parts["adapter"]))


def test_quantized_matrices_are_not_trained(make_config):
    config = make_config(
        "alone", {"data": 8}, {"steps": 1}, quantization={"format": "int8"}
    )
    with pytest.raises(MaxlmError, match="are not trained, and there is no adapter"):
        train(config)
