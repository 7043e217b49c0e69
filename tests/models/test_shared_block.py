"""Layers that share the weights of a block: one copy of them, a gradient that is the sum
over layers, and the costs of every reading."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.adapters.lora import LoraAdapter
from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import (
    UnstackedParam,
    bind,
    flatten_names,
    init_params,
    param_specs,
)
from maxlm.models.transforms import build_transformed_model
from maxlm.plan.stacks import StackCosts
from maxlm.run.model_placement import describe_pipeline_obstacle
from maxlm.sharding import AxisRules
from tests.models.building import POSITIONS, QUICK, SEGMENTS, decoder
from tests.models.generation import check_generation_equals_forward_pass

D = 12
SPACE = {"kind": "mamba2", "num_heads": 3, "head_dim": 7, "state_size": 5}
BLOCK = {
    "kind": "shared_block",
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "mlp": {"d_ff": 17, "activation": "gelu"},
    "mixer": SPACE,
    "attention_rank": 2,
    "mlp_rank": 3,
}


def make_kind(mixer):
    return {"mixer": mixer, "ffn": "none"}


SETTINGS = {
    "vocab_size": 31,
    "d_model": D,
    "max_seq_len": 64,
    "init_std": 0.3,
    "num_layers": 7,
    "tie_embeddings": True,
    "kinds": {
        "space": make_kind(SPACE),
        "first": make_kind(BLOCK | {"block": "a"}),
        "second": make_kind(BLOCK | {"block": "b", "mlp_rank": None}),
    },
    # Two periods of the first three, and one layer behind them.
    "pattern": ["space", "first", "second"],
}


def make_config(changes=None) -> DecoderConfig:
    return DecoderConfig.model_validate(SETTINGS | (changes or {}))


CONFIG = make_config()


def draw_params(model):
    """Parameters none of which is at its start, low-rank maps' zeros among them."""
    params = init_params(param_specs(model), jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params
    )


def test_layers_of_a_name_have_one_copy_of_its_weights():
    model = CONFIG.build(rules=AxisRules(), dtype=jnp.float32)
    specs = flatten_names(param_specs(model))
    shapes = {
        name.removeprefix("shared_blocks.a."): spec.shape
        for name, spec in specs.items()
        if name.startswith("shared_blocks.a.")
    }
    assert shapes == {
        "attention_norm.scale": (2 * D,),
        "attention.query.kernel": (2 * D, 4, 6),
        "attention.key.kernel": (2 * D, 2, 6),
        "attention.value.kernel": (2 * D, 2, 6),
        "attention.out.kernel": (4, 6, D),
        "mlp_norm.scale": (D,),
        "mlp.gate.kernel": (D, 17),
        "mlp.up.kernel": (D, 17),
        "mlp.down.kernel": (17, D),
    }
    assert {name.split(".")[1] for name in specs if "shared_blocks" in name} == {
        "a",
        "b",
    }
    assert specs["layers.first.shared.mlp_lora.a.kernel"].shape == (2, D, 3)
    assert specs["layers.first.shared.attention_lora.key_b.kernel"].shape == (
        2,
        2,
        2,
        6,
    )
    assert "layers.second.shared.mlp_lora.a.kernel" not in specs
    assert "layers.first.attention_norm.scale" not in specs  # shared.norm is
    assert DecoderConfig.model_validate(CONFIG.model_dump()) == CONFIG


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.parametrize("remat", ["full", "none"])
def test_gradients_are_those_of_layers_written_out(mesh, remat):
    """In float64. JAX adds up by itself what each layer of a plain loop gives."""
    tokens = np.random.default_rng(0).integers(0, 31, POSITIONS.shape)

    def loss(params, model, *, unstack):
        if unstack:
            stacks = {
                name: jax.tree.map(lambda x: UnstackedParam(tuple(x)), params[name])
                for name in ("layers", "last_layers")
            }
            params = params | stacks
        hidden, _ = bind(model, params)(tokens, POSITIONS, SEGMENTS)
        return jnp.sum(jnp.sin(hidden))

    with jax.enable_x64(True), jax.set_mesh(mesh()):
        model = decoder(make_config({"remat": remat}), mesh(), jnp.float64)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), draw_params(model))

        def differentiate(unstack):
            function = partial(loss, model=model, unstack=unstack)
            return jax.jit(jax.grad(function), compiler_options=QUICK)(params)

        gradients = flatten_names(differentiate(False))
        expected = flatten_names(differentiate(True))
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=0, atol=1e-10 * scale, err_msg=name
        )


@pytest.mark.more
@pytest.mark.heavy
def test_generation_equals_the_forward_pass(mesh):
    """With a prompt in chunks: each layer keeps keys and a state of its own."""
    model = decoder(CONFIG, mesh())
    with jax.set_mesh(mesh()):
        params = jax.jit(lambda: draw_params(model))()
        check_generation_equals_forward_pass(model, params, [19, 3])


def test_an_adapter_is_on_a_shared_weight_once(mesh):
    adapter = LoraAdapter(rank=2)
    rules = decoder(CONFIG, mesh()).rules
    model = build_transformed_model(CONFIG, [adapter], rules=rules, dtype=jnp.bfloat16)
    specs = flatten_names(param_specs(model))
    assert specs["shared_blocks.a.attention.query.kernel.lora_a"].shape == (2 * D, 2)
    assert specs["shared_blocks.b.mlp.down.kernel.lora_b"].shape == (2, D)
    # What layers have of their own, they have by layer.
    assert specs["layers.first.shared.linear.kernel.lora_a"].shape == (2, D, 2)

    def loss(params, tokens):
        hidden, _ = bind(model, params)(tokens, tokens)
        return jnp.sum(hidden.astype(jnp.float32))

    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), param_specs(model)
    )
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    with jax.set_mesh(mesh()):
        gradients = jax.eval_shape(jax.grad(loss), params, tokens)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_the_plan_counts_each_reading():
    model = CONFIG.build(rules=AxisRules(), dtype=jnp.float32)
    (trunk,) = CONFIG.trunks
    names = frozenset(flatten_names(param_specs(model)))
    products = 0
    for run in trunk.runs:
        for stack in run.stacks:
            costs = StackCosts(model, trunk, run, stack, 10, 10, names)
            size = sum(group.size for group in costs.matmul_groups)
            products += stack.num_layers * size
    attention = 2 * D * (4 + 2 + 2) * 6 + 4 * 6 * D
    mlp = 3 * D * 17
    space = D * (2 * 3 * 7 + 2 * 5 + 3) + 3 * 7 * D
    attention_lora = 3 * 2 * D * 2 + 2 * (4 + 2 + 2) * 6
    mlp_lora = D * 3 + 3 * 2 * 17
    # Seven layers with a space; two readings of each block.
    assert products == (
        7 * space + 4 * (attention + mlp + D * D + attention_lora) + 2 * mlp_lora
    )


REFUSED = {
    "unlike attention, mlp or norm": {
        "second": BLOCK | {"mlp": {"d_ff": 18}, "block": "a"}
    },
    "within a shared_block": {"second": BLOCK | {"mixer": BLOCK}},
    "within parallel_heads": {
        "second": {
            "kind": "parallel_heads",
            "attention": BLOCK["attention"],
            "mixer": BLOCK,
        }
    },
    "latent attention": {
        "second": BLOCK
        | {
            "attention": {
                "num_heads": 2,
                "num_kv_heads": 2,
                "head_dim": 6,
                "latent": {"kv_rank": 4, "rotary_dim": 2, "value_dim": 3},
            }
        }
    },
}


@pytest.mark.parametrize("problem", REFUSED)
def test_blocks_that_cannot_be_are_refused(problem):
    kinds = {name: make_kind(mixer) for name, mixer in REFUSED[problem].items()}
    with pytest.raises(MaxlmError, match=problem):
        make_config({"kinds": SETTINGS["kinds"] | kinds})


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("placement=post", {"placement": "post"}),
        ("mtp beside", {"mtp": {}}),
        ("one residual stream", {"block": {"kind": "hyper_connections"}}),
    ],
)
def test_models_that_cannot_have_shared_blocks_are_refused(problem, changes):
    with pytest.raises(MaxlmError, match=problem):
        make_config(changes)


def test_stages_are_refused():
    obstacle = describe_pipeline_obstacle(make_config({"num_layers": 6}))
    assert obstacle is not None
    assert "others read too" in obstacle


def test_the_plan_counts_all_of_mamba_s_heads():
    """Three heads of 7 channels, and the layers that have them behind a block."""
    head = {"d_inner": 7, "d_state": 3, "dt_rank": 2}
    heads = {"kind": "mamba_heads", "num_heads": 3, "head": head}
    kinds = {
        "space": make_kind(heads),
        "first": make_kind(BLOCK | {"mixer": heads, "mlp_rank": None}),
    }
    config = make_config({"kinds": kinds, "pattern": ["space", "first"]})
    model = config.build(rules=AxisRules(), dtype=jnp.float32)
    specs = flatten_names(param_specs(model))
    (trunk,) = config.trunks
    (run,) = trunk.runs[:1]
    size_of_head = 3 * D * 7 + 7 * (2 + 2 * 3) + 2 * 7
    for stack in run.stacks:
        costs = StackCosts(model, trunk, run, stack, 10, 10, frozenset(specs))
        groups = [g for g in costs.matmul_groups if "mamba_heads" in g.module]
        assert sum(group.size for group in groups) == 3 * size_of_head
        (branch,) = [b for b in costs.branches if b.costs.state_elements]
        assert branch.costs.state_elements == 3 * 7 * 3
