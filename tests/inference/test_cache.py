"""Promise: the cache has the shape, size and layout that the rules give it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from maxlm.config import MaxlmError
from maxlm.inference.cache import init_cache
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.sharding import ShardingConfig

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


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_shape_dtype_and_bytes(one_device_mesh, dtype, size):
    rules = ShardingConfig().compute.for_mesh(dict(one_device_mesh.shape))
    with jax.set_mesh(one_device_mesh):
        cache = init_cache(CONFIG, 3, 7, dtype, rules)["layers"]
    assert cache.key.shape == cache.value.shape == (5, 3, 7, 2, 4)
    assert cache.key.dtype == dtype
    assert cache.key.nbytes == 5 * 3 * 7 * 2 * 4 * size


@pytest.mark.parametrize("jit", [False, True])
def test_layout_on_a_mesh(eight, jit):
    rules = ShardingConfig().compute.for_mesh(dict(eight.shape))

    def make():
        return init_cache(CONFIG, 4, 7, jnp.float32, rules)

    with jax.set_mesh(eight):
        cache = (jax.jit(make) if jit else make)()["layers"]
    expected = PartitionSpec(None, ("data", "fsdp"), None, "tensor", None)
    assert cache.key.sharding.spec == expected
    assert {shard.data.shape for shard in cache.value.addressable_shards} == {(5, 1, 7, 1, 4)}


def test_what_does_not_divide_is_refused(eight):
    rules = ShardingConfig().compute.for_mesh(dict(eight.shape))
    with jax.set_mesh(eight), pytest.raises(MaxlmError) as refused:
        init_cache(CONFIG, 3, 7, jnp.float32, rules)
    assert str(refused.value).startswith("cache: batch=3 does not divide over data=2·fsdp=2; ")
