"""Impossible models are refused when their config is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.architectures.encoder_decoder import EncoderDecoderConfig
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.positions import PositionsConfig
from maxlm.sharding import AxisRules
from tests.models.building import GPT2, LLAMA_GQA


def refused(config: DecoderConfig, **changes) -> str:
    tree = config.model_dump()
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for name in path:
            node = node[name]
        node[last] = value
    with pytest.raises(ValidationError) as error:
        DecoderConfig.model_validate(tree)
    (only,) = error.value.errors()
    return f"{'.'.join(map(str, only['loc']))}: {only['msg']}"


def test_query_heads_must_be_a_multiple_of_kv_heads():
    with pytest.raises(MaxlmError) as error:
        AttentionConfig(num_heads=4, num_kv_heads=3, head_dim=6)
    assert str(error.value) == (
        "num_heads=4 is not a multiple of num_kv_heads=3; let every kv head serve as many query "
        "heads as the others"
    )


def test_rope_needs_pairs():
    assert refused(LLAMA_GQA, attention__head_dim=7) == (
        ": Value error, rope needs an even head_dim, not 7"
    )
    assert GPT2.attention.head_dim % 2  # learned positions do not


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "num_layers",
        "d_model",
        "max_seq_len",
        "init_std",
        "attention__num_heads",
        "attention__num_kv_heads",
        "attention__head_dim",
        "mlp__d_ff",
        "norm__eps",
    ],
)
def test_sizes_are_positive(key):
    dotted = key.replace("__", ".")
    assert refused(LLAMA_GQA, **{key: 0}) == f"{dotted}: Input should be greater than 0"


def test_unknown_keys_and_names_are_refused():
    assert refused(LLAMA_GQA, dropout=0.1) == "dropout: Extra inputs are not permitted"
    assert refused(LLAMA_GQA, remat="some") == (
        "remat: Input should be 'none', 'full', 'attention', 'mlp' or 'matmuls'"
    )


BOTH = {"architecture": "encoder_decoder", "encoder_layers": 2}
LATENT = {"kv_rank": 8, "rotary_dim": 4, "value_dim": 6}


@pytest.mark.parametrize(
    ("config", "changes", "what"),
    [
        (BOTH, {"placement": "parallel"}, "placement=parallel with cross-attention"),
        (BOTH, {"placement": "sandwich"}, "placement=sandwich with cross-attention"),
        (BOTH, {"attention": {"num_kv_heads": 4, "latent": LATENT}}, "cross-attention with"),
        ({}, {"attention": {"window": 4}, "pattern": [{}]}, "attention.window=4 with a pattern"),
        ({}, {"positions": {"theta": 1.0}}, "greater than 1"),
        ({}, {"positions": {"rotary_dim": 2, "scaling": {"kind": "ntk", "factor": 2}}}, "one pair"),
        ({}, {"positions": {"kind": "relative", "buckets": 8, "max_distance": 4}}, "not beyond"),
        (
            {},
            {
                "positions": {
                    "scaling": {
                        "kind": "llama3",
                        "factor": 8,
                        "original_length": 64,
                        "low_freq_factor": 4,
                    }
                }
            },
            "low_freq_factor=4.0 is not below",
        ),
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
            {"pattern": [{"window": 2}, {"positions": {"kind": "relative", "buckets": 16}}]},
            "a pattern of positions of kind=relative",
        ),
    ],
)
def test_what_is_not_computed_is_refused(config, changes, what):
    kind = EncoderDecoderConfig if config is BOTH else DecoderConfig
    tree = LLAMA_GQA.model_dump(exclude={"architecture"}) | config
    changes = dict(changes)
    tree["attention"] |= changes.pop("attention", {})
    with pytest.raises((MaxlmError, ValidationError), match=what):
        kind.model_validate(tree | changes)


def test_a_layer_s_own_slopes_are_used(one_device_mesh):
    own = LLAMA_GQA.model_copy(update={"positions": PositionsConfig(kind="alibi")})
    kinds = [{"window": 3}, {"positions": {"kind": "alibi", "max_bias": 2.0}}]
    own = DecoderConfig.model_validate(own.model_dump() | {"pattern": kinds, "num_layers": 2})
    with jax.set_mesh(one_device_mesh):
        trunk = own.build(rules=AxisRules(), dtype=jnp.float32)
        (part,) = own.parts
        first, second = trunk.attention_inputs_by_kind(part, jnp.zeros((1, 1), jnp.int32), None)
    np.testing.assert_allclose(first.slopes, 2.0 ** -np.arange(2, 9, 2))
    np.testing.assert_allclose(second.slopes, 2.0 ** (-np.arange(1, 5) / 2))
