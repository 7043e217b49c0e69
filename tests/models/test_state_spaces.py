"""Mixers with a state: what of them no other implementation says. That they compute
what transformers does is in golden/ (test_families.py) and in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.layers.lightning import LightningConfig
from maxlm.models.layers.mamba2 import Mamba2Config
from maxlm.models.parallel_heads import ParallelHeadsConfig
from maxlm.models.params import bind, init_params, param_specs
from maxlm.parallel.config import ParallelConfig
from maxlm.run.model_placement import place_model
from maxlm.sharding import MESH_AXES, AxisRules, ShardingConfig

ATTENTION = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
SPACE = {"kind": "mamba2", "num_heads": 6, "head_dim": 5, "state_size": 3}
SIZES = {"vocab_size": 29, "num_layers": 7, "d_model": 10, "max_seq_len": 16}
LINES = DecoderConfig.model_validate(
    SIZES
    | {
        "attention": ATTENTION,
        "mlp": {"d_ff": 12},
        "kinds": {
            "line": {"mixer": {"kind": "lightning", "num_heads": 3, "head_dim": 4}},
            "full": {},
        },
        "pattern": ["line", "full", "line"],
    }
)


@pytest.fixture
def lines():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield LINES.build(rules=AxisRules(), dtype=jnp.float32)


def test_slopes_follow_from_the_head_and_the_layer_of_the_model(lines):
    """Layers 0 to 6 are line, full, line, line, full, line, and behind whole periods
    line again: the slopes of MiniMax-01's published code, by numbers of the model."""
    params = init_params(param_specs(lines), jax.random.key(3))
    by_head = np.float64(2) ** (-8 * np.arange(1, 4) / 3)

    def slopes(*layers: int) -> np.ndarray:
        share = 1 - np.array(layers) / (6 + 1e-5) + 1e-5
        return share[:, None] * by_head

    first = params["layers"]["line"]["lightning"]["slopes"]
    np.testing.assert_allclose(first, slopes(0, 2, 3, 5), rtol=1e-6)
    last = params["last_layers"]["lightning"]["slopes"]
    np.testing.assert_allclose(last, slopes(6), rtol=1e-6)


@pytest.mark.more
@pytest.mark.heavy
def test_slopes_are_not_trained_and_all_else_is(lines):
    params = init_params(param_specs(lines), jax.random.key(3))
    tokens = jnp.arange(12, dtype=jnp.int32)[None] % 29
    places = jnp.arange(12, dtype=jnp.int32)[None]

    @jax.jit
    def differentiate(params):
        def loss(params):
            bound = bind(lines, params)
            hidden, _ = bound(tokens, places)
            return jnp.sum(bound.logits(hidden)[0, :, 3] ** 2)

        return jax.grad(loss)(params)

    gradients = differentiate(params)["layers"]["line"]["lightning"]
    assert not np.asarray(gradients.pop("slopes")).any()
    for name, gradient in gradients.items():
        assert all(np.asarray(x).any() for x in jax.tree.leaves(gradient)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 4}, "num_heads=6 is not a multiple of num_groups=4"),
        ({"norm_groups": 5}, "num_heads=6 is not a multiple of norm_groups=5"),
        ({"min_step": 2.0, "max_step": 1.0}, "max_step=1.0 below min_step=2.0"),
        ({"initial_steps": [0.1, 0.01]}, "initial_steps=[0.1, 0.01]"),
        ({"initial_decay": [0.0, 1.0]}, "initial_decay=[0.0, 1.0]"),
    ],
)
def test_impossible_state_spaces_are_refused(changes, message):
    with pytest.raises((MaxlmError, ValidationError)) as error:
        Mamba2Config.model_validate(SPACE | changes)
    assert message in str(error.value)


def test_parallel_heads_within_each_other_are_refused():
    inner = {"kind": "parallel_heads", "attention": ATTENTION, "mixer": SPACE}
    with pytest.raises((MaxlmError, ValidationError)) as error:
        ParallelHeadsConfig.model_validate(inner | {"mixer": inner})
    assert "parallel_heads within parallel_heads" in str(error.value)


@pytest.mark.parametrize(("groups", "is_refused"), [(1, False), (2, False), (3, True)])
def test_groups_of_heads_are_whole_or_divide(groups, is_refused):
    """Over two devices: one group is whole, two are split, three are refused."""
    mixer = SPACE | {"num_groups": groups}
    config = DecoderConfig.model_validate(
        SIZES
        | {"mixer": mixer, "ffn": "none", "positions": {"kind": "none"}}
        | {"vocab_size": 30, "d_model": 12}
    )
    sizes = dict.fromkeys(MESH_AXES, 1) | {"tensor": 2}
    rules = (ShardingConfig(), ParallelConfig(), sizes, "float32")
    if not is_refused:
        placed = place_model(config, *rules, training=None)
        key = placed.specs["layers"]["mamba2"]["key"]["kernel"]
        assert key.axes[2] == ("state" if groups == 1 else "heads")
        return
    with pytest.raises(MaxlmError) as error:
        place_model(config, *rules, training=None)
    assert "\n" not in str(error.value)
    assert "mamba2" in str(error.value)


def test_small_ones_are_of_the_same_kind():
    space = Mamba2Config.model_validate(
        SPACE | {"num_heads": 24, "num_groups": 8, "norm_groups": 4, "state_size": 128}
    )
    small = space.shrunk(head_dim=8, seq_len=32)
    assert (small.num_heads, small.num_groups, small.norm_groups) == (4, 2, 2)
    assert (small.head_dim, small.state_size) == (8, 8)
    both = ParallelHeadsConfig.model_validate(
        {"attention": ATTENTION, "mixer": space.model_dump()}
    )
    assert both.shrunk(head_dim=8, seq_len=32).mixer == small
    line = LightningConfig(num_heads=64, head_dim=128)
    assert line.shrunk(8, 32) == LightningConfig(num_heads=2, head_dim=8)
