"""Every preset builds the published model: its parameter count, to the last digit."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from maxlm.config import Config, asset, load
from maxlm.models.architectures.decoder import Decoder, DecoderConfig
from maxlm.models.params import named, param_specs
from maxlm.sharding import AxisRules

PRESETS = sorted(path.stem for path in asset("configs/models").glob("*.yaml"))


class Preset(Config):
    """What a preset file holds."""

    model: DecoderConfig


def preset(name: str) -> DecoderConfig:
    return load(Preset, asset(f"configs/models/{name}.yaml")).value.model


def count(name: str) -> int:
    specs = param_specs(Decoder(preset(name), rules=AxisRules(), dtype=jnp.float32))
    return sum(spec.size for spec in named(specs).values())


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


PUBLISHED = {
    "gpt2": (124_439_808, gpt2(12, 768)),
    "gpt2_medium": (354_823_168, gpt2(24, 1024)),
    "gpt2_large": (774_030_080, gpt2(36, 1280)),
    "gpt2_xl": (1_557_611_200, gpt2(48, 1600)),
    "llama2_7b": (6_738_415_616, llama(32, 4096, 4096, 11008, 32000)),
    "llama2_13b": (13_015_864_320, llama(40, 5120, 5120, 13824, 32000)),
    "llama2_70b": (68_976_648_192, llama(80, 8192, 1024, 28672, 32000)),
    "llama3_8b": (8_030_261_248, llama(32, 4096, 1024, 14336, 128256)),
    "llama3_70b": (70_553_706_496, llama(80, 8192, 1024, 28672, 128256)),
    "llama3_405b": (405_853_388_800, llama(126, 16384, 1024, 53248, 128256)),
    "mixtral_8x7b": (46_702_792_704, mixtral(32, 4096, 1024, 14336, 32000, 8)),
    "mixtral_8x22b": (140_620_634_112, mixtral(56, 6144, 1024, 16384, 32000, 8)),
    "smollm2_135m": (134_515_008, llama(30, 576, 192, 1536, 49152, tables=1)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    published, by_hand = PUBLISHED[name]
    assert count(name) == published == by_hand


def test_every_published_preset_is_counted():
    assert set(PRESETS) - {"demo"} == set(PUBLISHED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_a_model_and_says_where_it_comes_from(name):
    text = Path(asset(f"configs/models/{name}.yaml")).read_text()
    comment = "".join(line for line in text.splitlines() if line.startswith("#"))
    assert " et al. (20" in comment or " Sutskever (20" in comment or " Team (20" in comment
    published = PUBLISHED.get(name)
    assert published is None or f"{published[0]:,} parameters" in comment


def test_presets_are_built_without_allocating(monkeypatch):
    """405B parameters are 1.6 TB in fp32: any allocation of one would fail, or hang."""
    specs = named(param_specs(Decoder(preset("llama3_405b"), rules=AxisRules(), dtype=jnp.float32)))
    assert sum(spec.nbytes for spec in specs.values()) == 4 * 405_853_388_800
    assert specs["layers.mlp.gate.kernel"].shape == (126, 16384, 53248)
    assert json.loads(preset("llama3_405b").model_dump_json())["positions"]["theta"] == 500_000
