"""LoRA as an external package writes it: a leaf class and a function from specs to specs."""

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.params import (
    Leaf,
    ParamSpec,
    ParamUse,
    Weight,
    bind,
    declare_at_rest,
    flatten_names,
    init_params,
    param_specs,
    truncated_normal,
)
from maxlm.sharding import AxisRules

RANK, SCALE = 3, 0.7


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora(Leaf):
    """``x · base + scale · (x · A) · B`` (Hu et al. 2021, arXiv 2106.09685, §4.1)."""

    base: Any
    lora_a: Any
    lora_b: Any
    scale: float = field(metadata={"static": True})

    def read_kernel(self, use: ParamUse) -> Weight:
        return use.read(self.base)

    def finish_product(self, y: jax.Array, x: jax.Array, use: ParamUse) -> jax.Array:
        (h,) = use.multiply(x, use.read(self.lora_a, (*use.input_axes, None)))
        (added,) = use.multiply(h, use.read(self.lora_b, (None, *use.output_axes)))
        return y + self.scale * added


def adapt(tree: Any) -> Any:
    """Specs in, specs out: every hidden matrix outside experts gains A and B."""

    def one(spec: ParamSpec) -> Any:
        if spec.role != "matrix" or "expert" in spec.axes:
            return spec
        lead, inputs = spec.lead, spec.lead + len(spec.contract)
        a = replace(
            spec,
            shape=(*spec.shape[:inputs], RANK),
            axes=(*spec.axes[:inputs], None),
            init=truncated_normal(0.1),
        )
        b = replace(
            spec,
            shape=(*spec.shape[:lead], RANK, *spec.shape[inputs:]),
            axes=(*spec.axes[:lead], None, *spec.axes[inputs:]),
            contract=(lead,),
            init=jax.nn.initializers.zeros,
        )
        return Lora(spec, a, b, SCALE)

    return jax.tree.map(one, tree)


CONFIG = DecoderConfig.model_validate(
    {
        "vocab_size": 37,
        "num_layers": 3,
        "d_model": 14,
        "max_seq_len": 13,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "bias": True},
        "mlp": {"d_ff": 18},
        "remat": "matmuls",
    }
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 11)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (2, 11))


@pytest.fixture(scope="module")
def models():
    """The base model and the adapted one, with parameters that have the base's in common."""
    with jax.set_mesh(jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))):
        base = CONFIG.build(rules=AxisRules(), dtype=jnp.float32)
        specs = param_specs(base)
        adapted = declare_at_rest(base, adapt(specs))
        params = init_params(specs, jax.random.key(0))
        fresh = init_params(param_specs(adapted), jax.random.key(1))
        joined = jax.tree.map(
            lambda own, leaf: replace(leaf, base=own) if isinstance(leaf, Lora) else own,
            params,
            fresh,
        )
        yield base, adapted, params, joined


@jax.jit(static_argnums=0)
def hidden(model: Any, params: Any) -> jax.Array:
    return bind(model, params)(TOKENS, POSITIONS)[0]


def test_an_adapted_model_begins_as_the_base_bit_for_bit(models):
    base, adapted, params, joined = models
    np.testing.assert_array_equal(hidden(base, params), hidden(adapted, joined))


def test_arrays_have_canonical_names_and_specs_of_their_own(models):
    _, adapted, _, joined = models
    specs, values = flatten_names(param_specs(adapted)), flatten_names(joined)
    assert {name: spec.shape for name, spec in specs.items()} == {
        name: value.shape for name, value in values.items()
    }
    name = "layers.attention.query.kernel"
    assert [n for n in specs if n.startswith(name)] == [
        f"{name}.base",
        f"{name}.lora_a",
        f"{name}.lora_b",
    ]
    assert specs[f"{name}.lora_b"].axes == ("layers", None, "heads", "head_dim")


def test_the_forward_pass_is_that_of_merged_matrices(models):
    base, adapted, _, joined = models
    noisy = jax.tree.map(lambda x: x + 0.05, joined)

    def merge(held: Any) -> Any:
        if not isinstance(held, Lora):
            return held
        layers = held.base.shape[0]
        a, b = held.lora_a, held.lora_b
        product = jnp.einsum(
            "lir,lro->lio",
            a.reshape(layers, prod(a.shape[1:-1]), RANK),
            b.reshape(layers, RANK, prod(b.shape[2:])),
        )
        return held.base + SCALE * product.reshape(held.base.shape)

    merged = jax.tree.map(merge, noisy, is_leaf=lambda x: isinstance(x, Lora))
    np.testing.assert_allclose(hidden(adapted, noisy), hidden(base, merged), rtol=2e-5, atol=2e-5)


def test_gradients_reach_a_and_b_alone_when_the_base_is_fixed(models):
    _, adapted, _, joined = models
    noisy = jax.tree.map(lambda x: x + 0.05, joined)

    def fix(held: Any) -> Any:
        if isinstance(held, Lora):
            return replace(held, base=jax.lax.stop_gradient(held.base))
        return jax.lax.stop_gradient(held)

    def loss(params: Any) -> jax.Array:
        fixed = jax.tree.map(fix, params, is_leaf=lambda x: isinstance(x, Lora))
        return jnp.sum(hidden(adapted, fixed) ** 2)

    grads = flatten_names(jax.grad(loss)(noisy))
    for name, grad in grads.items():
        assert bool(jnp.any(grad != 0)) == (".lora_" in name), name
