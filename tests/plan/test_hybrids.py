"""Plans of the presets whose layers are of several kinds or pass states, on a TPU's and
a GPU's mesh."""

import pytest

from maxlm.config.load import load_config
from maxlm.models.layers.mamba import MambaConfig
from maxlm.plan.machine import Machine
from maxlm.plan.memory import PARTS
from maxlm.plan.predict import plan_run
from maxlm.plan.topology import parse_topology
from maxlm.run.config import RunConfig
from tests.models.published import COUNTS

# Machine and mesh; the GPUs' has two devices a head of keys, of which some presets
# have two.
LAYOUTS = {
    "v5p-128": {"fsdp": -1},
    "h100x64": {"fsdp": -1, "tensor": 2},
}
TOKENS = 2048
CHEAPEST = ("qwen3_next_80b_a3b", "v5p-128")
PRESETS = (
    "bamba_9b",
    "codestral_mamba_7b",
    "deepseek_v3_2",
    "falcon_h1_0_5b",
    "falcon_mamba_7b",
    "glm_5",
    "granite4_h_small",
    "granite4_h_tiny",
    "jamba_v0_1",
    "kimi_linear_48b_a3b",
    "lfm2_8b_a1b",
    "mamba2_2_7b",
    "mamba_130m",
    "minimax_text_01",
    "nemotron3_nano_30b_a3b",
    "nemotron_h_8b",
    "qwen3_next_80b_a3b",
)
CASES = [(preset, machine) for preset in PRESETS for machine in LAYOUTS]


@pytest.mark.parametrize(
    ("preset", "machine"),
    [
        pytest.param(*case, marks=() if case == CHEAPEST else pytest.mark.more)
        for case in CASES
    ],
)
def test_a_hybrid_is_planned(preset, machine):
    settings = [f"mesh.{axis}={size}" for axis, size in LAYOUTS[machine].items()]
    settings += [f"data.seq_len={TOKENS}", "data.batch_size=128"]
    config = load_config(RunConfig, f"models/{preset}", settings).value
    plan = plan_run(config, Machine.from_name(machine))
    layout = plan.layout
    assert (layout.parameters, layout.active_parameters) == COUNTS[preset]

    # Six a parameter that a token meets, which the table of embeddings is not unless
    # it is the head too; and recurrences and scores, which are less than that again.
    table = config.model.vocab_size * config.model.d_model
    products = 6 * layout.active_parameters
    assert products - 6 * table < layout.flops_per_token < 2 * products
    mfu = plan.mfu()
    mfu_full_attention = plan.mfu(full_attention=True)
    assert mfu is not None
    assert mfu_full_attention is not None
    assert 0 < mfu <= mfu_full_attention < 1

    # fp32 parameters and two moments, over all devices. FSDP does not split vectors,
    # nor Mamba's maps between channels and step sizes.
    has_mamba = any(
        isinstance(mixer, MambaConfig) for mixer in config.model.list_mixers()
    )
    most_copies = 5 if has_mamba else 1.2
    num_devices = parse_topology(machine).devices
    memory = {part: float(getattr(plan.memory, part)) for part in PARTS}
    stored = memory["parameters"] + memory["optimizer"]
    assert min(memory.values()) >= 0
    assert stored >= 12 * layout.parameters / num_devices
    assert stored < most_copies * 12 * layout.parameters / num_devices
    assert memory["working"] > 0
