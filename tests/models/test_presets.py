"""Every preset builds the published model: its parameter count, to the last digit. What else it
says is held to the published config.json in test_published_configs.py."""

import json
import re
import runpy
from math import prod
from pathlib import Path

import jax.numpy as jnp
import pytest
from pydantic import TypeAdapter

from maxlm.config import find_asset
from maxlm.models.architectures import ModelConfig
from maxlm.models.families import FAMILIES, find_family
from maxlm.models.params import flatten_names, param_specs
from maxlm.sharding import AxisRules

PRESETS = sorted(path.stem for path in find_asset("configs/models").glob("*.yaml"))
ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "parameter_counts.py"))
preset, counts, family_name = SCRIPT["preset"], SCRIPT["counts"], SCRIPT["family"]


# As published with the weights.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_33b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_3_70b": 70_553_706_496,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma3_12b": 11_766_034_176,
    "gemma3_27b": 27_009_346_304,
    # The files hold the table a second time, as the head.
    "falcon_7b": 7_217_189_760 - 65024 * 4544,
    "falcon_40b": 41_835_970_560 - 65024 * 8192,
    "falcon_180b": 179_522_565_120 - 65024 * 14848,
    "phi_1_5": 1_418_270_720,
    "phi_2": 2_779_683_840,
    "phi3_mini": 3_821_079_552,
    "phi3_medium": 13_960_238_080,
    "bloom_560m": 559_214_592,
    "bloom_1b1": 1_065_314_304,
    "bloom_1b7": 1_722_408_960,
    "bloom_3b": 3_002_557_440,
    "bloom_7b1": 7_069_016_064,
    "bloom_176b": 176_247_271_424,
    "mpt_7b": 6_649_286_656,
    "mpt_30b": 29_957_200_896,
    "grok_1": 315_684_820_992,
    "dbrx": 131_596_523_520,
    "deepseek_v2": 235_741_434_880,
    "deepseek_v2_lite": 15_706_484_224,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
    "ul2_20b": 19_459_613_696,
    # The offsets of logits, which are zero and never trained, are not counted as published.
    "bart_base": 139_420_416 + 50265,
    "bart_large": 406_291_456 + 50265,
}

# Less the experts of every layer that a token is not sent to.
ACTIVE = {
    "mixtral_8x7b": PUBLISHED["mixtral_8x7b"] - 32 * 6 * 3 * 4096 * 14336,
    "mixtral_8x22b": PUBLISHED["mixtral_8x22b"] - 56 * 6 * 3 * 6144 * 16384,
    "qwen3_30b_a3b": PUBLISHED["qwen3_30b_a3b"] - 48 * 120 * 3 * 2048 * 768,
    "qwen3_235b_a22b": PUBLISHED["qwen3_235b_a22b"] - 94 * 120 * 3 * 4096 * 1536,
    "grok_1": PUBLISHED["grok_1"] - 64 * 6 * 3 * 6144 * 32768,
    "dbrx": PUBLISHED["dbrx"] - 40 * 12 * 3 * 6144 * 10752,
    "deepseek_v2": PUBLISHED["deepseek_v2"] - 59 * 154 * 3 * 5120 * 1536,
    "deepseek_v2_lite": PUBLISHED["deepseek_v2_lite"] - 26 * 58 * 3 * 2048 * 1408,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    total, active = counts(preset(name))
    assert total == PUBLISHED[name]
    assert active == ACTIVE.get(name, total)


def test_every_published_preset_is_counted():
    assert set(PRESETS) - {"demo"} == set(PUBLISHED) == set(SCRIPT["PUBLISHED"])


# Papers that leave a table out of these figures, though not of others.
WITHOUT_A_TABLE = {("phi_1_5", "1.3B"), ("deepseek_v2_lite", "2.4B")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_papers_say_about_as_much(name):
    """6 %: as figures are rounded in names; Falcon's 40B is 41.3B, T5 v1.1's 3B is 2.85B."""
    model = preset(name)
    for figure, count in zip(SCRIPT["PUBLISHED"][name], counts(model), strict=False):
        scale = {"M": 1e6, "B": 1e9}[figure[-1]]
        if (name, figure) in WITHOUT_A_TABLE:
            count -= model.vocab_size * model.d_model
        assert float(figure[:-1].replace(",", "")) * scale == pytest.approx(count, rel=0.06)


def test_the_page_has_the_table_as_it_is():
    before, after = SCRIPT["MARKERS"]
    page = SCRIPT["PAGE"].read_text()
    assert page.split(before)[1].split(after)[0] == SCRIPT["table"]()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_a_model_and_says_where_it_comes_from(name):
    text = Path(find_asset(f"configs/models/{name}.yaml")).read_text()
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"( et al\.|Sutskever| Team|DeepSeek-AI|xAI) \(20\d\d\)", comment)
    if name in PUBLISHED:
        assert f"{PUBLISHED[name]:,} parameters" in comment
    if name in ACTIVE:
        assert f"parameters, of which a token meets {ACTIVE[name]:,}." in comment


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_its_familys_config_json_and_back(name):
    """So it is what conversion makes of the published file, and nothing in it is without a name
    there."""
    config, family = preset(name), FAMILIES[family_name(name)]
    values = json.loads(json.dumps(family.write_config(config)))
    assert find_family(values, "config.json") is family
    settings, _ = family.read_config(values, "config.json")
    assert TypeAdapter(ModelConfig).validate_python(settings) == config
    tensors = family.list_entries(config)
    assert sum(prod(tensor.shape) for tensor in tensors) == PUBLISHED[name]


def test_presets_are_built_without_allocating(monkeypatch):
    """405B parameters are 1.6 TB in fp32: any allocation of one would fail, or hang."""
    model = preset("llama3_405b")
    specs = flatten_names(param_specs(model.build(rules=AxisRules(), dtype=jnp.float32)))
    assert sum(spec.nbytes for spec in specs.values()) == 4 * 405_853_388_800
    assert specs["layers.mlp.gate.kernel"].shape == (126, 16384, 53248)
    assert json.loads(model.model_dump_json())["positions"]["theta"] == 500_000
