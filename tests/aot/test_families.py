"""Every kind of layer that a family brings, compiled by the TPU's and the GPU's own
compilers."""

import pytest

from maxlm.config.assets import find_asset
from maxlm.config.load import load_config
from maxlm.plan.compiled.program import compile_step, compute_peak_bytes
from maxlm.plan.topology import parse_topology
from maxlm.run.config import RunConfig

pytestmark = pytest.mark.timeout(1800)

# What is special about each: a pattern of windows with what it leaves over, and two
# thetas; caps and windows by turns; ALiBi; latent attention and a dense layer first;
# RoPE on part of a head beside a parallel FFN and a biased head; clips and many
# experts; both ways; biases by distance and cross-attention. Heads and widths are the
# models' own, layers, experts and vocabulary few.
FAMILIES = {
    "gemma3_1b": {"num_layers": 8},
    "gemma2_2b": {"num_layers": 4},
    "bloom_560m": {"num_layers": 2},
    "deepseek_v2_lite": {"num_layers": 3, "vocab_size": 8192},
    "phi_2": {"num_layers": 2, "vocab_size": 8192},
    "dbrx": {"num_layers": 1, "vocab_size": 8192},
    "bert_base": {"num_layers": 2, "vocab_size": 8192},
    "t5_v1_1_base": {"num_layers": 2, "encoder_layers": 2, "vocab_size": 8192},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_compiles(machine, name):
    if machine.startswith(("v5e", "v6e")):
        pytest.skip("one TPU is enough")
    devices = parse_topology(machine).devices
    overrides = [f"model.{key}={value}" for key, value in FAMILIES[name].items()]
    overrides += [
        "mesh.fsdp=-1",
        f"data.batch_size={devices}",
        "task.chunk_tokens=1024",
    ]
    overrides += [] if "t5" in name else ["data.seq_len=512"]
    # Tables whose rows do not divide are padded in training; here they are made to.
    config = load_config(
        RunConfig, find_asset(f"configs/models/{name}.yaml"), overrides
    ).value
    step = compile_step(config, machine)
    assert compute_peak_bytes(step.compiled.memory_analysis()) > 0
    if machine.startswith("v5p") and not name.startswith(
        "t5"
    ):  # whose biases are XLA's to add
        assert "tpu_custom_call" in step.compiled.as_text()
