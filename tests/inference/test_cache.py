"""Promise: the cache has the shape, size and layout that the rules give it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxlm.config import MaxlmError
from maxlm.inference.decode import init_cache
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.caches import kv_cache_spec
from maxlm.parallel.attention import sharded_attention
from maxlm.sharding import AxisRules, ShardingConfig

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
    with jax.set_mesh(one_device_mesh):
        specs = [kv_cache_spec(2, 30, w, (2, 4), (2, 4), "kv_heads") for w in (window, None)]
        ring, whole = (jax.tree.map(lambda a: jnp.zeros(a.shape), spec) for spec in specs)
        assert ring.key.shape == (2, window, 2, 4)
        assert whole.key.shape == (2, 30, 2, 4)
        first = jnp.zeros(2, jnp.int32)
        for count, real in ((12, lengths), (3, None), (1, None), (1, None), (7, None)):
            positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)
            own = [jnp.take_along_axis(x, positions[..., None, None], axis=1) for x in (q, k, v)]
            answers = []
            for cache in (ring, whole):
                cache, keys = cache.append(own[1], own[2], positions, real, rules)
                answers.append(
                    sharded_attention(
                        own[0], keys.key, keys.value, rules=rules, window=window, **keys.mask
                    )
                )
                ring, whole = (cache, whole) if len(answers) == 1 else (ring, cache)
            ends = first + count if real is None else real
            live = (positions < ends[:, None])[..., None, None]
            np.testing.assert_allclose(
                jnp.where(live, answers[0], 0), jnp.where(live, answers[1], 0), atol=1e-6
            )
            first = ends
