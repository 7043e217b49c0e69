"""Promise: the cache has the shape, size and layout that the rules give it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxlm.config import MaxlmError
from maxlm.inference.decode import cast_params, init_cache, prefill
from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.caches import kv_cache_spec
from maxlm.models.params import flatten_names
from maxlm.parallel.attention import sharded_attention
from maxlm.sharding import AxisRules, ShardingConfig
from tests.models.building import QUICK

CONFIG = DecoderConfig(
    vocab_size=11,
    num_layers=5,
    d_model=12,
    max_seq_len=9,
    attention={"num_heads": 6, "num_kv_heads": 2, "head_dim": 4},  # pyright: ignore
    mlp={"d_ff": 8},  # pyright: ignore
)


@pytest.fixture
def eight(mesh):
    return mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_shape_dtype_and_layout_on_a_mesh(eight, jit, dtype):
    rules = ShardingConfig().compute.for_mesh(dict(eight.shape))

    def make():
        return init_cache(CONFIG.build(rules=rules, dtype=dtype), 4, 7)

    with jax.set_mesh(eight):
        cache = (jax.jit(make) if jit else make)()["layers"][0]
    assert cache.key.shape == cache.value.shape == (5, 4, 7, 2, 4)
    assert cache.key.dtype == dtype
    expected = PartitionSpec(None, ("data", "fsdp"), None, "tensor", None)
    assert cache.key.sharding.spec == expected
    assert {shard.data.shape for shard in cache.value.addressable_shards} == {(5, 1, 7, 1, 4)}


def test_what_does_not_divide_is_refused(eight):
    rules = ShardingConfig().compute.for_mesh(dict(eight.shape))
    with jax.set_mesh(eight), pytest.raises(MaxlmError) as refused:
        init_cache(CONFIG.build(rules=rules, dtype=jnp.float32), 3, 7)
    assert str(refused.value).startswith("cache: batch=3 does not divide over data=2·fsdp=2; ")


def test_a_ring_is_as_long_as_its_window_and_answers_as_a_whole_cache(one_device_mesh):
    """Rows of unequal length, padded on the right, then more tokens, several at once and singly."""
    window, rules = 5, AxisRules()
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 30, 2, 4)), jnp.float32) for _ in range(3))
    lengths = jnp.asarray([9, 3], jnp.int32)

    @partial(jax.jit, compiler_options=QUICK)
    def answer(cache, positions, real):
        q_, k_, v_ = (jnp.take_along_axis(x, positions[..., None, None], axis=1) for x in (q, k, v))
        cache, keys = cache.append(k_, v_, positions, real, rules)
        how = {"rules": rules, "window": window, **keys.mask}
        y = sharded_attention(q_, keys.key, keys.value, **how)
        live = positions < (positions[:, -1:] + 1 if real is None else real[:, None])
        return jnp.where(live[..., None, None], y, 0), cache

    with jax.set_mesh(one_device_mesh):
        specs = [kv_cache_spec(2, 30, w, (2, 4), (2, 4), "kv_heads") for w in (window, None)]
        ring, whole = (jax.tree.map(lambda a: jnp.zeros(a.shape), spec) for spec in specs)
        assert ring.key.shape == (2, window, 2, 4)
        assert whole.key.shape == (2, 30, 2, 4)
        first = jnp.zeros(2, jnp.int32)
        for count, real in ((12, lengths), (3, None), (1, None), (1, None), (7, None)):
            positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)
            found, ring = answer(ring, positions, real)
            wanted, whole = answer(whole, positions, real)
            np.testing.assert_allclose(found, wanted, atol=1e-6)
            first = first + count if real is None else real


def test_cast_once_equals_cast_at_every_use_and_copies_nothing_in_vain(llama):
    model = Decoder(llama.model.config, rules=llama.model.rules, dtype=jnp.bfloat16)
    once = cast_params(model, llama.params)
    assert {str(v.dtype) for v in flatten_names(once).values()} == {"bfloat16", "float32"}
    tokens, lengths = np.array([[1, 2, 3, 4, 5]], np.int32), np.array([5], np.int32)
    run = jax.jit(lambda p: prefill(model, p, tokens, lengths, cache_length=8))
    (a, cache), (b, _) = run(llama.params), run(once)
    assert cache["layers"][0].key.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b)
    cast, own = flatten_names(cast_params(llama.model, llama.params)), flatten_names(llama.params)
    for name, value in cast.items():
        assert value.unsafe_buffer_pointer() == own[name].unsafe_buffer_pointer()
