"""Every preset has the published model's settings, whether or not they change its size."""

from typing import Any

import pytest
from pydantic import BaseModel

from maxlm.config import asset, load
from maxlm.models.architectures import ModelConfig
from maxlm.run import RunConfig
from tests.models.preset_facts import FACTS, NAMES

PRESETS = sorted(path.stem for path in asset("configs/models").glob("*.yaml"))
# What parameter counts depend on, which test_presets.py holds to the published ones.
COUNTED = {"vocab_size", "num_layers", "d_model", "mlp.d_ff", "moe.d_ff", "encoder_layers"}
COUNTED |= {"attention.bias", "attention.out_bias", "mlp.bias", "norm.bias", "head_bias"}
COUNTED.add("token_types")


def preset(name: str) -> ModelConfig:
    return load(RunConfig, asset(f"configs/models/{name}.yaml")).value.model


def setting(config: Any, path: str) -> Any:
    """None where a part of the model is not there."""
    for part in path.split("."):
        config = getattr(config, part, None)
    return config


def facts(config: ModelConfig) -> dict[str, Any]:
    found = {fact: setting(config, path) for fact, path in NAMES.items()}
    found["scale"] = config.attention.scale or config.attention.head_dim**-0.5
    kinds = [(kind.window, kind.positions or config.positions) for kind in config.pattern]
    found["pattern"] = tuple(
        (window, own.theta, own.scaling and own.scaling.factor) for window, own in kinds
    )
    return found


def same(found: Any, published: Any) -> bool:
    """Roots are rounded in files."""
    return found == (pytest.approx(published, abs=0) if isinstance(published, float) else published)


def given(config: BaseModel, before: str = "") -> set[str]:
    """The settings in a preset's file."""
    found = set()
    for name in config.model_fields_set:
        value, path = getattr(config, name), before + name
        found |= given(value, f"{path}.") if isinstance(value, BaseModel) else {path}
    return found


@pytest.mark.parametrize("name", FACTS)
def test_settings_are_the_published_ones(name):
    found = facts(preset(name))
    pairs = {fact: (found[fact], published) for fact, published in FACTS[name].items()}
    assert {fact: pair for fact, pair in pairs.items() if not same(*pair)} == {}


@pytest.mark.parametrize("name", FACTS)
def test_nothing_else_is_set(name):
    named = {NAMES[fact] for fact in FACTS[name]}
    assert given(preset(name)) <= named | COUNTED


def test_every_published_preset_has_its_facts():
    assert set(PRESETS) - {"demo"} == set(FACTS)
