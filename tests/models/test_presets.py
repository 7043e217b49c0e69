"""Every preset builds the published model: its parameter count, to the last digit."""

import json
import re
import runpy
from math import prod
from pathlib import Path

import jax.numpy as jnp
import pytest
from pydantic import TypeAdapter

from maxlm.config import asset
from maxlm.models.architectures import ModelConfig
from maxlm.models.families import FAMILIES, family_of
from maxlm.models.params import named, param_specs
from maxlm.sharding import AxisRules

PRESETS = sorted(path.stem for path in asset("configs/models").glob("*.yaml"))
ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "parameter_counts.py"))
preset, counts, family_name = SCRIPT["preset"], SCRIPT["counts"], SCRIPT["family"]


# As published with the weights; the sum beside each is worked out by hand from the papers' tables.
def gpt2(layers: int, d: int) -> int:
    attention = (d * 3 * d + 3 * d) + (d * d + d)
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    return 50257 * d + 1024 * d + layers * (attention + mlp + 4 * d) + 2 * d


def llama(layers: int, d: int, kv: int, ff: int, vocab: int, tables: int = 2) -> int:
    """``kv``: total width of the keys."""
    return tables * vocab * d + layers * (2 * d * d + 2 * d * kv + 3 * d * ff + 2 * d) + d


def mixtral(layers: int, d: int, kv: int, ff: int, vocab: int, experts: int) -> int:
    """Llama with ``experts`` MLPs a layer and a router."""
    more = (experts - 1) * 3 * d * ff + experts * d
    return llama(layers, d, kv, ff, vocab) + layers * more


def qwen2(layers: int, d: int, kv: int, ff: int, vocab: int, tables: int) -> int:
    """Llama with offsets of queries, keys and values."""
    return llama(layers, d, kv, ff, vocab, tables) + layers * (d + 2 * kv)


def qwen3(layers: int, d: int, heads: int, kv: int, mlp: int, tables: int = 2) -> int:
    """``heads``, ``kv``: numbers of heads of size 128, with a norm for queries and one for keys."""
    attention = 2 * d * 128 * heads + 2 * d * 128 * kv + 2 * 128
    return tables * 151936 * d + layers * (attention + mlp + 2 * d) + d


def gemma(layers: int, d: int, q: int, kv: int, ff: int, norms: int, vocab: int = 256000) -> int:
    """``q``, ``kv``: total widths; ``norms``: scales of a layer."""
    return vocab * d + layers * (2 * d * q + 2 * d * kv + 3 * d * ff + norms) + d


def gemma2(layers: int, d: int, q: int, kv: int, ff: int) -> int:
    return gemma(layers, d, q, kv, ff, 4 * d)


def gemma3(layers: int, d: int, q: int, kv: int, ff: int, head: int, vocab: int) -> int:
    return gemma(layers, d, q, kv, ff, 4 * d + 2 * head, vocab)


def falcon(layers: int, d: int, kv: int, norms: int) -> int:
    """``norms``: of a layer, scale and offset each."""
    return 65024 * d + layers * (2 * d * d + 2 * d * kv + 8 * d * d + norms * 2 * d) + 2 * d


def phi(layers: int, d: int) -> int:
    attention, mlp = 4 * (d * d + d), (d * 4 * d + 4 * d) + (4 * d * d + d)
    return 51200 * d + (51200 * d + 51200) + layers * (attention + mlp + 2 * d) + 2 * d


def bloom(layers: int, d: int) -> int:
    attention, mlp = 4 * (d * d + d), (d * 4 * d + 4 * d) + (4 * d * d + d)
    return (250880 * d + 2 * d) + layers * (attention + mlp + 4 * d) + 2 * d


def mpt(layers: int, d: int) -> int:
    return 50432 * d + layers * (4 * d * d + 8 * d * d + 2 * d) + d


GROK_EXPERT = 3 * 6144 * 32768
GROK = 131072 * 6144 + 6144  # tied
GROK += 64 * (2 * 6144**2 + 2 * 6144 * 1024 + 8 * GROK_EXPERT + 8 * 6144 + 4 * 6144)
DBRX_EXPERT = 3 * 6144 * 10752
DBRX = mixtral(40, 6144, 1024, 10752, 100352, 16)


def deepseek(layers: int, d: int, heads: int, q: int, ff: int, experts: int, expert: int) -> int:
    """``q``: parameters of the queries' maps; heads see 128 + 64 dimensions and have values of 128;
    a layer, not the first, has two shared experts more."""
    kv = d * (512 + 64) + 512 + 512 * heads * (128 + 128)
    attention = q + kv + heads * 128 * d
    moe = (experts + 2) * 3 * d * expert + experts * d
    outer = 2 * 102400 * d + d
    return outer + layers * (attention + 2 * d) + 3 * d * ff + (layers - 1) * moe


def bert(layers: int, d: int) -> int:
    """With the head that names masked tokens, which has a layer of its own."""
    attention, mlp = 4 * (d * d + d), (d * 4 * d + 4 * d) + (4 * d * d + d)
    head = (d * d + d) + 2 * d + 30522
    return (30522 + 512 + 2) * d + 2 * d + layers * (attention + mlp + 4 * d) + head


def t5(layers: int, d: int, heads: int, head: int, mlp: int, tables: int = 1) -> int:
    """As many layers on each side, and 32 biases by distance a head on each."""
    attention = 4 * d * heads * head
    encoder, decoder = (attention + mlp + 2 * d), (2 * attention + mlp + 3 * d)
    return tables * 32128 * d + layers * (encoder + decoder) + 2 * (d + 32 * heads)


def bart(layers: int, d: int) -> int:
    """As many layers on each side; without the logits' offsets."""
    attention, mlp = 4 * (d * d + d), (d * 4 * d + 4 * d) + (4 * d * d + d)
    encoder, decoder = (attention + mlp + 4 * d), (2 * attention + mlp + 6 * d)
    return 50265 * d + 2 * (1026 * d + 2 * d) + layers * (encoder + decoder)


QUERIES = 5120 * 1536 + 1536 + 1536 * 128 * 192

PUBLISHED = {
    "gpt2": (124_439_808, gpt2(12, 768)),
    "gpt2_medium": (354_823_168, gpt2(24, 1024)),
    "gpt2_large": (774_030_080, gpt2(36, 1280)),
    "gpt2_xl": (1_557_611_200, gpt2(48, 1600)),
    "llama_7b": (6_738_415_616, llama(32, 4096, 4096, 11008, 32000)),
    "llama_13b": (13_015_864_320, llama(40, 5120, 5120, 13824, 32000)),
    "llama_33b": (32_528_943_616, llama(60, 6656, 6656, 17920, 32000)),
    "llama_65b": (65_285_660_672, llama(80, 8192, 8192, 22016, 32000)),
    "llama2_7b": (6_738_415_616, llama(32, 4096, 4096, 11008, 32000)),
    "llama2_13b": (13_015_864_320, llama(40, 5120, 5120, 13824, 32000)),
    "llama2_70b": (68_976_648_192, llama(80, 8192, 1024, 28672, 32000)),
    "llama3_8b": (8_030_261_248, llama(32, 4096, 1024, 14336, 128256)),
    "llama3_70b": (70_553_706_496, llama(80, 8192, 1024, 28672, 128256)),
    "llama3_405b": (405_853_388_800, llama(126, 16384, 1024, 53248, 128256)),
    "llama3_1_8b": (8_030_261_248, llama(32, 4096, 1024, 14336, 128256)),
    "llama3_1_70b": (70_553_706_496, llama(80, 8192, 1024, 28672, 128256)),
    "llama3_1_405b": (405_853_388_800, llama(126, 16384, 1024, 53248, 128256)),
    "llama3_2_1b": (1_235_814_400, llama(16, 2048, 512, 8192, 128256, tables=1)),
    "llama3_2_3b": (3_212_749_824, llama(28, 3072, 1024, 8192, 128256, tables=1)),
    "llama3_3_70b": (70_553_706_496, llama(80, 8192, 1024, 28672, 128256)),
    "smollm2_135m": (134_515_008, llama(30, 576, 192, 1536, 49152, tables=1)),
    "smollm2_360m": (361_821_120, llama(32, 960, 320, 2560, 49152, tables=1)),
    "smollm2_1_7b": (1_711_376_384, llama(24, 2048, 2048, 8192, 49152, tables=1)),
    "mistral_7b": (7_241_732_096, llama(32, 4096, 1024, 14336, 32000)),
    "mixtral_8x7b": (46_702_792_704, mixtral(32, 4096, 1024, 14336, 32000, 8)),
    "mixtral_8x22b": (140_620_634_112, mixtral(56, 6144, 1024, 16384, 32000, 8)),
    "qwen2_5_0_5b": (494_032_768, qwen2(24, 896, 128, 4864, 151936, 1)),
    "qwen2_5_1_5b": (1_543_714_304, qwen2(28, 1536, 256, 8960, 151936, 1)),
    "qwen2_5_3b": (3_085_938_688, qwen2(36, 2048, 256, 11008, 151936, 1)),
    "qwen2_5_7b": (7_615_616_512, qwen2(28, 3584, 512, 18944, 152064, 2)),
    "qwen2_5_14b": (14_770_033_664, qwen2(48, 5120, 1024, 13824, 152064, 2)),
    "qwen2_5_32b": (32_763_876_352, qwen2(64, 5120, 1024, 27648, 152064, 2)),
    "qwen2_5_72b": (72_706_203_648, qwen2(80, 8192, 1024, 29568, 152064, 2)),
    "qwen3_0_6b": (596_049_920, qwen3(28, 1024, 16, 8, 3 * 1024 * 3072, 1)),
    "qwen3_1_7b": (1_720_574_976, qwen3(28, 2048, 16, 8, 3 * 2048 * 6144, 1)),
    "qwen3_4b": (4_022_468_096, qwen3(36, 2560, 32, 8, 3 * 2560 * 9728, 1)),
    "qwen3_8b": (8_190_735_360, qwen3(36, 4096, 32, 8, 3 * 4096 * 12288)),
    "qwen3_14b": (14_768_307_200, qwen3(40, 5120, 40, 8, 3 * 5120 * 17408)),
    "qwen3_32b": (32_762_123_264, qwen3(64, 5120, 64, 8, 3 * 5120 * 25600)),
    "qwen3_30b_a3b": (30_532_122_624, qwen3(48, 2048, 32, 4, 128 * (3 * 768 + 1) * 2048)),
    "qwen3_235b_a22b": (235_093_634_560, qwen3(94, 4096, 64, 4, 128 * (3 * 1536 + 1) * 4096)),
    "gemma_2b": (2_506_172_416, gemma(18, 2048, 2048, 256, 16384, 2 * 2048)),
    "gemma_7b": (8_537_680_896, gemma(28, 3072, 4096, 4096, 24576, 2 * 3072)),
    "gemma2_2b": (2_614_341_888, gemma2(26, 2304, 2048, 1024, 9216)),
    "gemma2_9b": (9_241_705_984, gemma2(42, 3584, 4096, 2048, 14336)),
    "gemma2_27b": (27_227_128_320, gemma2(46, 4608, 4096, 2048, 36864)),
    "gemma3_270m": (268_098_176, gemma3(18, 640, 1024, 256, 2048, 256, 262144)),
    "gemma3_1b": (999_885_952, gemma3(26, 1152, 1024, 256, 6912, 256, 262144)),
    "gemma3_4b": (3_880_263_168, gemma3(34, 2560, 2048, 1024, 10240, 256, 262208)),
    "gemma3_12b": (11_766_034_176, gemma3(48, 3840, 4096, 2048, 15360, 256, 262208)),
    "gemma3_27b": (27_009_346_304, gemma3(62, 5376, 4096, 2048, 21504, 128, 262208)),
    # The files hold the table a second time, as the head.
    "falcon_7b": (7_217_189_760 - 65024 * 4544, falcon(32, 4544, 64, norms=1)),
    "falcon_40b": (41_835_970_560 - 65024 * 8192, falcon(60, 8192, 512, norms=2)),
    "falcon_180b": (179_522_565_120 - 65024 * 14848, falcon(80, 14848, 512, norms=2)),
    "phi_1_5": (1_418_270_720, phi(24, 2048)),
    "phi_2": (2_779_683_840, phi(32, 2560)),
    "phi3_mini": (3_821_079_552, llama(32, 3072, 3072, 8192, 32064)),
    "phi3_medium": (13_960_238_080, llama(40, 5120, 1280, 17920, 32064)),
    "bloom_560m": (559_214_592, bloom(24, 1024)),
    "bloom_1b1": (1_065_314_304, bloom(24, 1536)),
    "bloom_1b7": (1_722_408_960, bloom(24, 2048)),
    "bloom_3b": (3_002_557_440, bloom(30, 2560)),
    "bloom_7b1": (7_069_016_064, bloom(30, 4096)),
    "bloom_176b": (176_247_271_424, bloom(70, 14336)),
    "mpt_7b": (6_649_286_656, mpt(32, 4096)),
    "mpt_30b": (29_957_200_896, mpt(48, 7168)),
    "grok_1": (315_684_820_992, GROK),
    "dbrx": (131_596_523_520, DBRX),
    "deepseek_v2": (235_741_434_880, deepseek(60, 5120, 128, QUERIES, 12288, 160, 1536)),
    "deepseek_v2_lite": (
        15_706_484_224,
        deepseek(27, 2048, 16, 2048 * 16 * 192, 10944, 64, 1408),
    ),
    "bert_base": (109_514_298, bert(12, 768)),
    "bert_large": (335_174_458, bert(24, 1024)),
    "t5_small": (60_506_624, t5(6, 512, 8, 64, 2 * 512 * 2048)),
    "t5_base": (222_903_552, t5(12, 768, 12, 64, 2 * 768 * 3072)),
    "t5_large": (737_668_096, t5(24, 1024, 16, 64, 2 * 1024 * 4096)),
    "t5_3b": (2_851_598_336, t5(24, 1024, 32, 128, 2 * 1024 * 16384)),
    "t5_11b": (11_307_321_344, t5(24, 1024, 128, 128, 2 * 1024 * 65536)),
    "t5_v1_1_small": (76_961_152, t5(8, 512, 6, 64, 3 * 512 * 1024, tables=2)),
    "t5_v1_1_base": (247_577_856, t5(12, 768, 12, 64, 3 * 768 * 2048, tables=2)),
    "t5_v1_1_large": (783_150_080, t5(24, 1024, 16, 64, 3 * 1024 * 2816, tables=2)),
    "t5_v1_1_xl": (2_849_757_184, t5(24, 2048, 32, 64, 3 * 2048 * 5120, tables=2)),
    "t5_v1_1_xxl": (11_135_332_352, t5(24, 4096, 64, 64, 3 * 4096 * 10240, tables=2)),
    "ul2_20b": (19_459_613_696, t5(32, 4096, 16, 256, 3 * 4096 * 16384)),
    # The offsets of logits, which are zero and never trained, are not counted as published.
    "bart_base": (139_420_416 + 50265, bart(6, 768) + 50265),
    "bart_large": (406_291_456 + 50265, bart(12, 1024) + 50265),
}

# Less the experts of every layer that a token is not sent to.
ACTIVE = {
    "mixtral_8x7b": PUBLISHED["mixtral_8x7b"][1] - 32 * 6 * 3 * 4096 * 14336,
    "mixtral_8x22b": PUBLISHED["mixtral_8x22b"][1] - 56 * 6 * 3 * 6144 * 16384,
    "qwen3_30b_a3b": PUBLISHED["qwen3_30b_a3b"][1] - 48 * 120 * 3 * 2048 * 768,
    "qwen3_235b_a22b": PUBLISHED["qwen3_235b_a22b"][1] - 94 * 120 * 3 * 4096 * 1536,
    "grok_1": GROK - 64 * 6 * GROK_EXPERT,
    "dbrx": DBRX - 40 * 12 * DBRX_EXPERT,
    "deepseek_v2": PUBLISHED["deepseek_v2"][1] - 59 * 154 * 3 * 5120 * 1536,
    "deepseek_v2_lite": PUBLISHED["deepseek_v2_lite"][1] - 26 * 58 * 3 * 2048 * 1408,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    published, by_hand = PUBLISHED[name]
    total, active = counts(preset(name))
    assert total == published == by_hand
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
    text = Path(asset(f"configs/models/{name}.yaml")).read_text()
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"( et al\.|Sutskever| Team|DeepSeek-AI|xAI) \(20\d\d\)", comment)
    if name in PUBLISHED:
        assert f"{PUBLISHED[name][0]:,} parameters" in comment
    if name in ACTIVE:
        assert f"parameters, of which a token meets {ACTIVE[name]:,}." in comment


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_its_familys_config_json_and_back(name):
    """So it is what conversion makes of the published file, and nothing in it is without a name
    there."""
    config, family = preset(name), FAMILIES[family_name(name)]
    values = json.loads(json.dumps(family.config_json(config)))
    assert family_of(values, "config.json") is family
    settings, _ = family.settings(values, "config.json")
    assert TypeAdapter(ModelConfig).validate_python(settings) == config
    tensors = family.entries(config)
    assert sum(prod(tensor.shape) for tensor in tensors) == PUBLISHED[name][0]


def test_presets_are_built_without_allocating(monkeypatch):
    """405B parameters are 1.6 TB in fp32: any allocation of one would fail, or hang."""
    model = preset("llama3_405b")
    specs = named(param_specs(model.build(rules=AxisRules(), dtype=jnp.float32)))
    assert sum(spec.nbytes for spec in specs.values()) == 4 * 405_853_388_800
    assert specs["layers.mlp.gate.kernel"].shape == (126, 16384, 53248)
    assert json.loads(model.model_dump_json())["positions"]["theta"] == 500_000
