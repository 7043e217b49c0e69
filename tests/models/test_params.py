"""Parameters: declared once, initialised by name and layer."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.params import Params, bind, flatten_names, init_params, param_specs
from maxlm.sharding import AxisRules
from tests.models import building
from tests.models.building import LLAMA_GQA, QUICK

WIDE = DecoderConfig.model_validate(
    {
        "vocab_size": 301,
        "num_layers": 3,
        "d_model": 64,
        "max_seq_len": 77,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 24, "bias": True},
        "mlp": {"d_ff": 90},
        "norm": {"kind": "layernorm", "bias": True},
        "positions": {"kind": "learned"},
        "init_std": 0.05,
    }
)


def model(config: DecoderConfig) -> Decoder:
    return Decoder(config, rules=AxisRules(), dtype=jnp.float32)


@cache
def initialiser(settings: str) -> Callable[[jax.Array], Params]:
    specs = param_specs(model(DecoderConfig.model_validate_json(settings)))
    return jax.jit(lambda key: init_params(specs, key), compiler_options=QUICK)


def initial(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    params = initialiser(config.model_dump_json())(jax.random.key(seed))
    return {name: np.asarray(value) for name, value in flatten_names(params).items()}


def test_declarations_of_a_llama():
    specs = flatten_names(param_specs(model(LLAMA_GQA)))
    declared = {
        n: (s.shape, s.axes, s.role, s.contracting_dims) for n, s in specs.items()
    }
    queries = ("layers", "embed", "heads", "head_dim")
    keys = ("layers", "embed", "kv_heads", "head_dim")
    scale = ((3, 14), ("layers", None), "vector", ())
    wide = ((3, 14, 18), ("layers", "embed", "mlp"), "matrix", (1,))
    assert declared == {
        "embedding.table": ((41, 14), ("vocab", "embed"), "table", ()),
        "final_norm.scale": ((14,), (None,), "vector", ()),
        "head.kernel": ((14, 41), ("embed", "vocab"), "table", (0,)),
        "layers.attention.key.kernel": ((3, 14, 2, 6), keys, "matrix", (1,)),
        "layers.attention.out.kernel": (
            (3, 4, 6, 14),
            ("layers", "heads", "head_dim", "embed"),
            "matrix",
            (1, 2),
        ),
        "layers.attention.query.kernel": ((3, 14, 4, 6), queries, "matrix", (1,)),
        "layers.attention.value.kernel": ((3, 14, 2, 6), keys, "matrix", (1,)),
        "layers.attention_norm.scale": scale,
        "layers.mlp.down.kernel": (
            (3, 18, 14),
            ("layers", "mlp", "embed"),
            "matrix",
            (1,),
        ),
        "layers.mlp.gate.kernel": wide,
        "layers.mlp.up.kernel": wide,
        "layers.mlp_norm.scale": scale,
    }
    assert {s.dtype for s in specs.values()} == {jnp.float32}


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    return initial(WIDE)


def test_initial_values_have_the_configured_deviation(values):
    """Within five standard errors; maps into the residual stream are scaled by
    1/√(2L)."""
    tables = {"embedding.table", "positions.table", "head.kernel"}
    into_residual = {"layers.attention.out.kernel", "layers.mlp.down.kernel"}
    for name, x in values.items():
        if name.endswith("scale"):
            assert (x == 1).all(), name
        elif name.endswith("bias"):
            assert (x == 0).all(), name
        else:
            std = 0.05 / np.sqrt(6) if name in into_residual else 0.05
            assert abs(x.mean()) < 5 * std / np.sqrt(x.size), name
            assert abs(x.std() / std - 1) < 5 / np.sqrt(2 * x.size), name
            assert np.abs(x).max() < 2.3 * std, (
                name
            )  # cut at two deviations before the cut
    assert tables | into_residual <= set(values)


@pytest.mark.heavy
def test_values_depend_on_key_name_and_layer_alone(values):
    again, other = initial(WIDE), initial(WIDE, seed=1)
    deeper = initial(WIDE.model_copy(update={"num_layers": 5}))
    for name, x in values.items():
        np.testing.assert_array_equal(x, again[name])
        if name.startswith("layers") and not name.endswith(
            ("out.kernel", "down.kernel")
        ):
            np.testing.assert_array_equal(x, deeper[name][:3])
        if not name.endswith(("scale", "bias")):
            assert (x != other[name]).mean() > 0.99, name
        if name.endswith("kernel") and name.startswith("layers"):
            for i, j in ((0, 1), (0, 2), (1, 2)):
                assert (x[i] != x[j]).mean() > 0.99, name
    gate, up = values["layers.mlp.gate.kernel"], values["layers.mlp.up.kernel"]
    assert (gate != up).mean() > 0.99


def test_binding_leaves_the_module_as_it_was_and_takes_no_other_names(one_device_mesh):
    declared = model(LLAMA_GQA)
    params = building.random_params(LLAMA_GQA, one_device_mesh)
    bound = bind(declared, params)
    np.testing.assert_array_equal(
        bound.embedding.table[...], params["embedding"]["table"]
    )
    assert isinstance(declared.embedding.table.get_value(), jax.ShapeDtypeStruct)
    assert param_specs(bound) == param_specs(declared)
    with pytest.raises(AssertionError, match="the module has no parameter extra"):
        bind(declared, {**params, "extra": np.zeros(3)})
    with pytest.raises(KeyError, match="head"):
        bind(declared, {k: v for k, v in params.items() if k != "head"})
