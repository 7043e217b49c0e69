"""Adapters against their equations, on one device and on meshes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.adapters.bottleneck import BottleneckAdapter
from maxlm.adapters.ia3 import Ia3Adapter
from maxlm.adapters.lora import LoraAdapter
from maxlm.config import MaxlmError
from maxlm.inference.params import prepare_params
from maxlm.models.adapters import Adapter, merge_adapter
from maxlm.models.params import (
    Leaf,
    ParamReader,
    bind,
    bind_specs,
    flatten_names,
    init_params,
    param_specs,
    replace_base_params,
    seed_dropout,
    seed_micro_batch,
)
from maxlm.models.transforms import build_transformed_model
from maxlm.sharding import AxisRules
from tests.models.building import LLAMA_GQA

BIASED = LLAMA_GQA.attention.model_copy(update={"bias": True})
CONFIG = LLAMA_GQA.model_copy(update={"attention": BIASED})
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 11)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (2, 11))
EVERYWHERE = ("query", "out", "mlp.*", "embedding", "head")
ADAPTERS: dict[str, Adapter] = {
    "lora": LoraAdapter(rank=4),
    "rslora": LoraAdapter(rank=4, rank_stabilized=True),
    "dora": LoraAdapter(rank=3, dora=True),
    "everywhere": LoraAdapter(rank=4, targets=EVERYWHERE),
    "dora_everywhere": LoraAdapter(rank=4, dora=True, targets=EVERYWHERE),
    "ia3": Ia3Adapter(),
    "ia3_queries": Ia3Adapter(targets=("query", "up"), input_targets=("out",)),
    "houlsby": BottleneckAdapter(reduction_factor=4),
    "pfeiffer": BottleneckAdapter(placement="pfeiffer", reduction_factor=4),
}
# One of each kind of arrays; the others differ by a setting.
FEW = ("lora", "dora_everywhere", "ia3", "houlsby")


@pytest.fixture
def on_one_device(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        yield


def build(adapter: Adapter, config: Any = CONFIG) -> tuple[Any, Any, Any, Any]:
    """The base and its random parameters; the adapted model, with the base's parameters
    in its own."""
    base = config.build(rules=AxisRules(), dtype=jnp.float32)
    model = build_transformed_model(
        config,
        [] if adapter is None else [adapter],
        rules=AxisRules(),
        dtype=jnp.float32,
    )
    params = randomize(init_params(param_specs(base), jax.random.key(0)))
    fresh = init_params(param_specs(model), jax.random.key(1))
    return base, params, model, replace_base_params(fresh, params)


def randomize(params: Any, seed: int = 2) -> Any:
    rng = np.random.default_rng(seed)
    noise = lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(noise, params)


@jax.jit(static_argnums=0)
def run(model: Any, params: Any) -> jax.Array:
    bound = bind(model, params)
    return bound.logits(bound(TOKENS, POSITIONS)[0])


@pytest.mark.heavy
@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else pytest.mark.more)
        for name in ADAPTERS
    ],
)
def test_a_fresh_adapter_changes_no_bit_and_a_merged_one_computes_the_same(name):
    base, params, model, fresh = build(ADAPTERS[name])
    np.testing.assert_array_equal(run(base, params), run(model, fresh))
    noisy = replace_base_params(randomize(fresh), params)
    want = run(model, noisy)
    assert np.abs(want - run(base, params)).max() > 0.1
    specs, merged = merge_adapter(param_specs(model), noisy)
    got = run(bind_specs(model, specs), merged)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.heavy
@pytest.mark.usefixtures("on_one_device")
def test_merging_dora_is_its_equation_and_taking_the_product_away_gives_the_base():
    *_, fresh = build(ADAPTERS["dora"])
    noisy = flatten_names(randomize(fresh), lambda param: isinstance(param, Leaf))
    leaf = noisy["layers.attention.key.kernel"]
    w, a, b, m = (np.asarray(x, np.float64) for x in jax.tree.leaves(leaf))
    product = leaf.scale * np.einsum("lir,lrkh->likh", a, b)
    want = w + product
    norms = np.sqrt(np.square(w).sum(1)), np.sqrt(np.square(want).sum(1))
    factors = ((norms[0] + m) / norms[1])[:, None]
    merged = leaf.merge()
    np.testing.assert_allclose(merged, want * factors, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(merged / factors - product, w, atol=1e-6)


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("name", ["houlsby", "pfeiffer"])
def test_bottlenecks_are_their_equations(name):
    *_, model, fresh = build(ADAPTERS[name])
    noisy = randomize(fresh)
    block = model.stacks["layers"]
    one = jax.tree.map(lambda x: x[0], noisy["layers"])
    x = np.random.default_rng(0).standard_normal((2, 5, 18)).astype(np.float32)
    got = bind(block.mlp.down, one["mlp"]["down"])(x)
    leaf = one["mlp"]["down"]["kernel"]
    base, down, down_bias, up, up_bias = (
        np.asarray(p, np.float64) for p in jax.tree.leaves(leaf)
    )
    y = x @ base
    h = y @ down + down_bias
    h = h / (1 + np.exp(-h)) if name == "houlsby" else np.maximum(h, 0)
    np.testing.assert_allclose(got, y + h @ up + up_bias, rtol=2e-5, atol=2e-5)
    assert down.shape == (14, 3)
    adapted = [n for n in flatten_names(fresh) if n.endswith("adapter_down")]
    assert len(adapted) == (2 if name == "houlsby" else 1)


@pytest.mark.heavy
@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("dora", [False, True])
def test_pissa_moves_the_principal_part_of_the_base_into_a_and_b(dora):
    adapter = LoraAdapter(rank=3, init="pissa", dora=dora)
    base, params, model, fresh = build(adapter)
    split_params = adapter.init_from_base(fresh)
    np.testing.assert_allclose(
        run(model, split_params), run(base, params), rtol=1e-4, atol=2e-5
    )
    w = params["layers"]["attention"]["out"]["kernel"].reshape(3, 24, 14)
    kernel = split_params["layers"]["attention"]["out"]["kernel"]
    values = np.linalg.svd(w, compute_uv=False)
    rest = np.linalg.svd(kernel.base.reshape(3, 24, 14), compute_uv=False)
    np.testing.assert_allclose(rest[:, :11], values[:, 3:], rtol=1e-4, atol=1e-5)
    a = kernel.lora_a.reshape(3, 24, 3)
    spread = np.einsum("lir,liq->lrq", a, a) * kernel.scale
    np.testing.assert_allclose(
        spread, values[:, :3, None] * np.eye(3), rtol=1e-4, atol=1e-4
    )


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.usefixtures("on_one_device")
def test_experts_have_a_pair_of_maps_each():
    settings = {
        "num_experts": 4,
        "experts_per_token": 2,
        "d_ff": 10,
        "shared_experts": 1,
    }
    config = CONFIG.model_copy(update={"moe": None, "mlp": None}).model_dump()
    config = type(CONFIG).model_validate(config | {"moe": settings})
    base, params, model, fresh = build(
        LoraAdapter(rank=2, targets=("experts", "query")), config
    )
    np.testing.assert_array_equal(run(base, params), run(model, fresh))
    specs = flatten_names(param_specs(model))
    assert specs["layers.moe.up.lora_a"].shape == (3, 4, 14, 2)
    assert specs["layers.moe.up.lora_b"].axes == ("layers", "expert", None, "mlp")
    assert not any("shared" in name and "lora" in name for name in specs)
    noisy = replace_base_params(randomize(fresh), params)
    leaf = noisy["layers"]["moe"]["down"]
    product = jnp.einsum("lefr,lerd->lefd", leaf.lora_a, leaf.lora_b)
    np.testing.assert_allclose(
        leaf.merge(), leaf.base + 8 * product, rtol=1e-5, atol=1e-5
    )
    want = run(model, noisy)
    _, plain = merge_adapter(param_specs(model), noisy)
    np.testing.assert_allclose(run(base, plain), want, rtol=1e-4, atol=2e-5)
    with pytest.raises(MaxlmError, match="DoRA of the experts"):
        build(LoraAdapter(dora=True, targets=("experts",)), config)
    with pytest.raises(MaxlmError, match="behind routed experts"):
        build(BottleneckAdapter(), config)


@pytest.mark.heavy
@pytest.mark.usefixtures("on_one_device")
def test_a_tied_head_reads_the_base_table_and_the_engine_reads_leaves():
    config = CONFIG.model_copy(update={"tie_embeddings": True})
    adapter = LoraAdapter(rank=2, targets=("embedding", "key"))
    base, params, model, fresh = build(adapter, config)
    noisy = replace_base_params(randomize(fresh), params)
    hidden = jnp.ones((1, 1, 14))
    logits = [bind(m, p).logits(hidden) for m, p in ((base, params), (model, noisy))]
    np.testing.assert_array_equal(*logits)
    prepared = prepare_params(model, noisy)
    np.testing.assert_allclose(
        run(model, noisy), run(model, prepared), rtol=1e-5, atol=1e-5
    )
    _, merged = merge_adapter(param_specs(model), noisy)
    assert isinstance(merged["embedding"]["table"], Leaf)


@pytest.mark.parametrize(
    ("target", "near"), [("qery", "query"), ("mlp.dwn", "down"), ("experts", "such as")]
)
def test_an_unknown_target_is_refused_with_near_names(target, near):
    with pytest.raises(MaxlmError, match=rf"{target}.*no linear map.*\n?.*") as caught:
        build(LoraAdapter(targets=(target,)))
    assert near in str(caught.value)


@pytest.mark.heavy
@pytest.mark.usefixtures("on_one_device")
def test_dropout_zeroes_a_share_of_inputs_and_keeps_their_mean():
    """Seen through A and B that are identities: what is added is what is left of x."""
    adapter = LoraAdapter(rank=14, alpha=14, dropout=0.25, targets=("gate",))
    *_, model, fresh = build(adapter)
    specs = param_specs(model)
    key = jax.random.key(0)
    seeded = seed_dropout(fresh, specs, key)
    x = jnp.ones((8, 50, 14))
    base = specs["layers"]["mlp"]["gate"]["kernel"].base
    reader = ParamReader(base, AxisRules(), jnp.float32, ((), ()))

    def read_inputs(params: Any, layer: int) -> np.ndarray:
        leaf = jax.tree.map(
            lambda array: array[layer], params["layers"]["mlp"]["gate"]["kernel"]
        )
        outputs = leaf.lora_b.shape[-1]
        leaf = replace(leaf, lora_a=jnp.eye(14), lora_b=jnp.eye(14, outputs))
        return np.asarray(leaf.finish_product(jnp.zeros((8, 50, outputs)), x, reader))[
            ..., :14
        ]

    masks = [read_inputs(seeded, layer) for layer in range(2)]
    masks.append(read_inputs(seed_micro_batch(seeded, jnp.uint32(1)), 0))
    masks.append(read_inputs(seed_dropout(fresh, specs, jax.random.key(1)), 0))
    for number, mask in enumerate(masks):
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.75)}
        assert abs((mask == 0).mean() - 0.25) < 0.02
        assert all((mask != other).any() for other in masks[:number])
    np.testing.assert_array_equal(read_inputs(seeded, 0), masks[0])
    np.testing.assert_array_equal(read_inputs(fresh, 0), 1)
    settings = {"num_experts": 4, "experts_per_token": 2, "d_ff": 10}
    routed = type(CONFIG).model_validate(
        CONFIG.model_dump() | {"mlp": None, "moe": settings}
    )
    with pytest.raises(MaxlmError, match="dropout of the inputs of the experts"):
        build(LoraAdapter(dropout=0.1, targets=("experts",)), routed)


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens_stand_in_the_table_and_in_the_head(tied):
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    adapter = LoraAdapter(rank=2, targets=("query",), token_ids=(9, 3), token_head=True)
    base, params, model, fresh = build(adapter, config)
    begun = adapter.init_from_base(fresh)
    # XLA multiplies a head that rows have been put in as it lies then, which may round
    # otherwise.
    np.testing.assert_allclose(
        run(base, params), run(model, begun), rtol=1e-5, atol=2e-6
    )
    noisy = replace_base_params(randomize(begun), params)
    want = run(model, noisy)
    flat = flatten_names(noisy)
    specs, merged = merge_adapter(param_specs(model), noisy)
    np.testing.assert_allclose(
        run(bind_specs(model, specs), merged), want, rtol=1e-4, atol=2e-5
    )
    tables = [("embedding", "table", 0)] + [("head", "kernel", 1)] * (not tied)
    for layer, name, axis in tables:
        before, after = (
            np.moveaxis(np.asarray(p[layer][name]), axis, 0) for p in (params, merged)
        )
        changed = np.flatnonzero((before != after).any(axis=1))
        assert [*changed] == [3, 9]
        np.testing.assert_array_equal(after[[9, 3]], flat[f"{layer}.{name}.token_rows"])
    refusal = "no row of the model's table, or named twice"
    for wrong in ((config.vocab_size,), (2, 2)):
        with pytest.raises(MaxlmError, match=refusal):
            build(LoraAdapter(token_ids=wrong), config)
    with pytest.raises(MaxlmError, match="has LoRA, and rows of its own"):
        build(LoraAdapter(token_ids=(1,), targets=("embedding",)), config)
