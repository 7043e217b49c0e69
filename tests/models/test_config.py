"""Impossible models are refused when their config is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.models.architectures.encoder_decoder import EncoderDecoderConfig
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.layers.positions import PositionsConfig
from maxlm.sharding import AxisRules
from tests.models.building import LLAMA_GQA, make_uniform_batch

BOTH = {"architecture": "encoder_decoder", "encoder_layers": 2}
FAR = {"kind": "llama3", "factor": 8, "original_length": 64, "low_freq_factor": 5}
LATENT = {"kv_rank": 8, "rotary_dim": 4, "value_dim": 6}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (BOTH, {"placement": "parallel"}, "placement=parallel with cross-attention"),
        (
            BOTH,
            {"attention": {"num_kv_heads": 4, "latent": LATENT}},
            "cross-attention with",
        ),
        (
            {},
            {"attention": {"window": 4}, "pattern": [{}]},
            "attention.window=4 with a pattern",
        ),
        ({}, {"dropout": 0.1}, "dropout\n  Extra inputs are not permitted"),
        ({}, {"attention": {"head_dim": 7}}, "rope needs an even head_dim, not 7"),
        (
            {},
            {"attention": {"num_kv_heads": 3}},
            "num_heads=4 is not a multiple of num_kv_heads=3",
        ),
        ({}, {"positions": {"theta": 1.0}}, "greater than 1"),
        (
            {},
            {"positions": {"rotary_dim": 2, "scaling": {"kind": "ntk", "factor": 2}}},
            "one pair",
        ),
        (
            {},
            {"positions": {"kind": "relative", "buckets": 8, "max_distance": 4}},
            "not beyond",
        ),
        ({}, {"positions": {"scaling": FAR}}, "low_freq_factor=5.0 is above"),
        (
            {},
            {"attention": {"num_kv_heads": 4, "latent": LATENT | {"rotary_dim": 3}}},
            "even head_dim, not 3",
        ),
        (
            {"positions": {"rotary_dim": 2}},
            {"attention": {"num_kv_heads": 4, "latent": LATENT}},
            "rotary_dim=2 with latent attention",
        ),
        (
            {"positions": {"kind": "relative"}},
            {
                "pattern": [
                    {"window": 2},
                    {"positions": {"kind": "relative", "buckets": 16}},
                ]
            },
            "a pattern of positions of kind=relative",
        ),
    ],
)
def test_what_is_not_computed_is_refused(config, changes, message):
    kind = EncoderDecoderConfig if config is BOTH else DecoderConfig
    tree = LLAMA_GQA.model_dump(exclude={"architecture"}) | config
    changes = dict(changes)
    tree["attention"] |= changes.pop("attention", {})
    with pytest.raises((MaxlmError, ValidationError), match=message):
        kind.model_validate(tree | changes)


def test_a_layer_s_own_slopes_are_used(one_device_mesh):
    config = LLAMA_GQA.model_copy(update={"positions": PositionsConfig(kind="alibi")})
    kinds = [{"window": 3}, {"positions": {"kind": "alibi", "max_bias": 2.0}}]
    config = DecoderConfig.model_validate(
        config.model_dump() | {"pattern": kinds, "num_layers": 2}
    )
    with jax.set_mesh(one_device_mesh):
        trunk = config.build(rules=AxisRules(), dtype=jnp.float32)
        (part,) = config.layer_stacks
        batch, _ = make_uniform_batch(0, 1, 1, 4)
        first, second = trunk.attention_inputs_by_kind(part, batch)
    np.testing.assert_allclose(first.slopes, 2.0 ** -np.arange(2, 9, 2))
    np.testing.assert_allclose(second.slopes, 2.0 ** (-np.arange(1, 5) / 2))
