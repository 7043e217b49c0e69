"""Every preset is the published model: what its config.json says, and its parameter
count, to the last digit."""

import json
import re
import runpy
from math import prod
from pathlib import Path

import jax.numpy as jnp
import pytest

from maxlm.config.assets import find_asset
from maxlm.huggingface.families import FAMILIES, find_family
from maxlm.models.params import flatten_names, param_specs
from maxlm.sharding import AxisRules
from tests.models.published import COUNTS, PUBLISHED
from tests.parity.compare import read

PRESETS = sorted(path.stem for path in find_asset("configs/models").glob("*.yaml"))
SCRIPT = runpy.run_path(
    str(Path(__file__).parents[2] / "benchmarks" / "parameter_counts.py")
)
# Papers that leave a table out of these figures, though not of others.
WITHOUT_A_TABLE = {
    ("phi_1_5", "1.3B"),
    ("deepseek_v2_lite", "2.4B"),
    ("gpt_oss_20b", "3.6B"),
    ("gpt_oss_120b", "5.1B"),
    ("minimax_m2", "10B"),
    ("granite3_1b_a400m", "400M"),
    ("granite3_3b_a800m", "800M"),
    ("ernie4_5_21b_a3b", "3B"),
}


def test_every_preset_and_every_family_has_a_published_model():
    assert (
        set(PRESETS) - {"demo", "demo_hybrid", "hybrid_135m"}
        == set(COUNTS)
        == set(SCRIPT["PUBLISHED"])
    )
    assert {find_family(values, "").name for values in PUBLISHED.values()} == set(
        FAMILIES.builtin_kinds()
    )


@pytest.mark.heavy
@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_is_the_published_model(name):
    preset = SCRIPT["preset"](name)
    # BART's presets have the offsets of logits, which files of BartModel lack.
    _, model = read(PUBLISHED[name], ["final_logits_bias"] if "bart" in name else ())
    if name == "grok_1":
        # Its file has a default of the library; the preset has Switch's (Fedus et al.
        # 2021).
        moe = model.moe.model_copy(update={"balance_loss": 0.01})
        model = model.model_copy(update={"moe": moe})
    assert model.model_dump(exclude={"init_std"}) == preset.model_dump(
        exclude={"init_std"}
    )
    assert "init_std" not in preset.model_fields_set

    counts = SCRIPT["counts"](preset)
    assert counts == COUNTS[name]
    # Papers say about as much. 6 %: Falcon's 40B is 41.3B, T5 v1.1's 3B is 2.85B.
    for figure, count in zip(SCRIPT["PUBLISHED"][name], counts, strict=False):
        if (name, figure) in WITHOUT_A_TABLE:
            count -= model.vocab_size * model.d_model
        scale = {"M": 1e6, "B": 1e9}[figure[-1]]
        assert float(figure[:-1].replace(",", "")) * scale == pytest.approx(
            count, rel=0.06
        )

    # What conversion writes for it is read as the same model, and has all of its
    # parameters.
    family = FAMILIES.get(SCRIPT["family"](name))
    values = json.loads(json.dumps(family.write_config(preset)))
    assert read(values) == (family, preset)
    assert (
        sum(prod(tensor.shape) for tensor in family.list_entries(preset)) == counts[0]
    )

    text = find_asset(f"configs/models/{name}.yaml").read_text()
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"( et al\.|Sutskever| Team|DeepSeek-AI|xAI) \(20\d\d\)", comment)
    active = f", {counts[1]:,} active per token" if counts[1] < counts[0] else ""
    assert f"{counts[0]:,} parameters{active}" in comment


def test_the_page_has_the_table_as_it_is():
    before, after = SCRIPT["MARKERS"]
    page = SCRIPT["PAGE"].read_text()
    assert page.split(before)[1].split(after)[0] == SCRIPT["table"]()


def test_presets_are_built_without_allocating():
    """405B parameters are 1.6 TB in fp32: any allocation of one would fail, or hang."""
    model = SCRIPT["preset"]("llama3_405b")
    specs = flatten_names(
        param_specs(model.build(rules=AxisRules(), dtype=jnp.float32))
    )
    assert sum(spec.nbytes for spec in specs.values()) == 4 * 405_853_388_800
    assert specs["layers.mlp.gate.kernel"].shape == (126, 16384, 53248)
