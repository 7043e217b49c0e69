"""A run with an adapter becomes one without, for models that no published family
computes: the parameters are those that a run in use has."""

from pathlib import Path

import numpy as np
import pytest

from maxlm.adapters.lora import LoraAdapter
from maxlm.cli.main import main
from maxlm.config import MaxlmError
from maxlm.config.show import to_yaml
from maxlm.huggingface.checkpoint import RunCheckpointWriter
from maxlm.models.params import flatten_names, param_specs
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert, open_run_checkpoint
from maxlm.run.merge import write_merged_run
from maxlm.sharding import AxisRules
from tests.train import tiny

HYBRID = {
    "kinds": {
        "delta": {
            "mixer": {"kind": "gated_delta_net", "num_heads": 4, "num_key_heads": 2}
            | {"key_dim": 3, "value_dim": 5}
        },
        "full": {},
    },
    "pattern": ["delta", "delta", "full"],
    "num_layers": 3,
}


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """A run of a hybrid with LoRA on all maps, of random parameters."""
    settings = tiny.settings(tmp_path, "")
    settings["model"] |= HYBRID
    settings["adapter"] = {"kind": "lora", "rank": 2, "alpha": 6}
    config = RunConfig.model_validate(settings)
    assert isinstance(config.adapter, LoraAdapter)
    specs = param_specs(config.model.build(rules=AxisRules(), dtype=np.float32))
    folder = tmp_path / "tuned"
    writer = RunCheckpointWriter(folder / "checkpoints", step=7)
    rng = np.random.default_rng(0)
    for name, spec in flatten_names(config.adapter.adapt(specs)).items():
        writer.declare(name, spec.shape)
        writer.write(name, (), rng.standard_normal(spec.shape).astype(np.float32))
    writer.commit({"config": config.model_dump(mode="json"), "tokenizer": "abc"})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "file").write_text("tokens")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.mark.heavy
def test_a_hybrids_adapter_is_merged(hybrid, tmp_path):
    target = tmp_path / "other" / "merged"
    result = write_merged_run(hybrid, target)
    config, reader = open_run_checkpoint(target, None)
    adapted, adapted_reader = open_run_checkpoint(hybrid, None)
    assert (config.name, config.adapter, reader.step) == ("merged", None, 0)
    assert config.model == adapted.model
    assert (target / "tokenizer" / "file").read_text() == "tokens"

    specs = param_specs(config.model.build(rules=AxisRules(), dtype=np.float32))
    by_name = flatten_names(specs)
    assert result.num_params == sum(spec.size for spec in by_name.values())
    assert set(reader.shapes) == set(by_name)
    changed = set()
    for name, spec in by_name.items():
        merged = reader.open(name).read()
        if name in adapted_reader.shapes:
            np.testing.assert_array_equal(merged, adapted_reader.open(name).read())
            continue
        changed.add(name.removesuffix(".kernel"))
        base, a, b = (
            adapted_reader.open(f"{name}.{part}").read().astype(np.float64)
            for part in ("base", "lora_a", "lora_b")
        )
        for layer in np.ndindex(*spec.shape[: spec.num_layer_axes]):
            expected = base[layer] + 6 / 2 * np.tensordot(a[layer], b[layer], 1)
            np.testing.assert_allclose(merged[layer], expected, rtol=0, atol=1e-5)
    # Every projection of the mixer, not its convolutions, decays or norms.
    maps = ("query", "key", "value", "gate", "beta", "decay", "out")
    mixer = {f"layers.delta.gated_delta_net.{name}" for name in maps}
    assert {name for name in changed if "delta_net" in name} == mixer


@pytest.mark.more
@pytest.mark.heavy
def test_the_way_of_a_model_of_no_family_is_named(hybrid, tmp_path, capsys):
    with pytest.raises(MaxlmError) as caught:
        convert(hybrid, tmp_path / "published")
    assert str(caught.value) == (
        "config.yaml: model: no published family computes what this model does; "
        "--merge writes it as a run with its adapter merged"
    )
    assert main(["convert", str(hybrid), str(tmp_path / "merged"), "--merge"]) == 0
    assert "merged: a run, " in capsys.readouterr().out
    options = ["convert", str(hybrid), str(tmp_path / "both"), "--merge", "--adapter"]
    assert main(options) == 2
    message = "--adapter beside --merge, which writes a run; leave one of them out"
    assert message in capsys.readouterr().err
    with pytest.raises(MaxlmError, match="this run has no adapter; leave out --merge"):
        write_merged_run(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(MaxlmError, match="not an empty folder; name a new one"):
        write_merged_run(hybrid, tmp_path / "merged")
