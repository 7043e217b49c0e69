"""A layer that shares an earlier layer's keys reads them from that layer's cache as it
reads them where there is none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.models.blocks import build_attention
from maxlm.models.build_context import BuildContext
from maxlm.models.caches.layout import allocate_cache_array
from maxlm.models.caches.paged import PagedCache
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.rope import compute_rotary
from maxlm.models.params import bind, param_specs
from maxlm.sharding import ShardingConfig
from tests.models.building import make_uniform_batch

D = 10
ROWS = 2
LENGTH = 9


def draw_params(layer: nnx.Module, seed: int):
    rng = np.random.default_rng(seed)
    draw = lambda spec: rng.normal(0, 0.5, spec.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, param_specs(layer))


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.parametrize("tensor", [1, pytest.param(4, marks=pytest.mark.more)])
def test_an_earlier_layer_s_cache_is_read_and_not_written(mesh, tensor):
    """In steps of 4 and 5 tokens; four devices have copies of two kv heads."""
    config = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True)
    sharing_config = config.model_copy(update={"shares_keys": True})
    devices = mesh(tensor=tensor)
    rules = ShardingConfig().compute.for_mesh(dict(devices.shape))
    if tensor > config.num_kv_heads:
        rules = rules.model_copy(update={"kv_heads": ()})
    context = BuildContext(rules, jnp.float32, D, num_layers=2, init_std=0.02)
    norm = NormConfig()
    source = build_attention(config, norm, context)
    sharing = build_attention(sharing_config, norm, context)
    source_params = draw_params(source, 1)
    sharing_params = draw_params(sharing, 2)
    assert {*sharing_params} == {"query", "query_norm", "out"}
    x = np.random.default_rng(3).standard_normal((2, ROWS, LENGTH, D))
    x = x.astype(np.float32)

    def run_whole(x):
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
        inputs = AttentionInputs(
            positions=positions,
            segment_ids=None,
            rotary=compute_rotary(positions, 6, 50.0),
            slopes=None,
            biases=None,
            scale=0.4,
            window=None,
            causal=True,
        )
        keys_values = bind(source, source_params)(x[0], inputs).keys_values
        shared = inputs._replace(shared=keys_values)
        output = bind(sharing, sharing_params)(x[1], shared)
        assert output.keys_values is keys_values
        return output.y

    def run_step(x, cache, batch):
        inputs = AttentionInputs(
            positions=batch.positions,
            segment_ids=None,
            rotary=compute_rotary(batch.positions, 6, 50.0),
            slopes=None,
            biases=None,
            scale=0.4,
            window=None,
            causal=True,
            batch=batch,
        )
        cache = bind(source, source_params)(x[0], inputs, cache).cache
        assert isinstance(cache, PagedCache)
        output = bind(sharing, sharing_params)(x[1], inputs, cache)
        for array, unchanged in zip(
            jax.tree.leaves(output.cache), jax.tree.leaves(cache), strict=True
        ):
            np.testing.assert_array_equal(array, unchanged)
        return output.y, cache

    with jax.set_mesh(devices):
        expected = jax.jit(run_whole)(x)
        _, layout = make_uniform_batch(0, 1, ROWS, LENGTH)
        layout = replace(layout, head_ways=tensor)
        assert sharing.cache_spec(layout, None) == ()
        cache = jax.tree.map(
            lambda spec: allocate_cache_array(spec, rules, jnp.float32),
            source.cache_spec(layout, None),
        )
        outputs = []
        for first, count in ((0, 4), (4, 5)):
            batch, _ = make_uniform_batch(first, count, ROWS, LENGTH)
            part = x[:, :, first : first + count].reshape(2, 1, ROWS * count, D)
            y, cache = run_step(jnp.asarray(part), cache, batch)
            outputs.append(np.asarray(y).reshape(ROWS, count, D))
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected, atol=1e-5)
