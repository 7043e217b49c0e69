"""Parameters are made in their shards: the values of one device, and none ever
whole."""

import re

import jax
import numpy as np
import pytest

from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import flatten_names, init_params, param_specs
from maxlm.sharding import jit_sharded
from tests.models import building
from tests.models.building import QUICK

pytestmark = pytest.mark.heavy

CONFIG = DecoderConfig.model_validate(
    {
        "vocab_size": 46,
        "num_layers": 3,
        "d_model": 24,
        "max_seq_len": 16,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "bias": True},
        "mlp": {"d_ff": 34},
        "norm": {"kind": "layernorm", "bias": True},
    }
)


def test_parameters_are_born_in_their_shards_with_the_values_of_one_device(
    mesh, one_device_mesh
):
    """No instruction of the program that makes them has a whole sharded parameter's
    size."""
    axes = mesh(fsdp=4, tensor=2)
    with jax.set_mesh(axes):
        specs = param_specs(building.decoder(CONFIG, axes))
        stored = building.storage(CONFIG, axes)
        start = jit_sharded(lambda key: init_params(specs, key), stored)
        compiled = start.lower(jax.random.key(3)).compile(compiler_options=QUICK)
        params, shardings = (
            flatten_names(compiled(jax.random.key(3))),
            flatten_names(stored),
        )
    with jax.set_mesh(one_device_mesh):
        alone = jax.jit(lambda key: init_params(specs, key), compiler_options=QUICK)(
            jax.random.key(3)
        )
    for name, value in flatten_names(alone).items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-7)
    split = {}
    for name, value in params.items():
        assert value.sharding == shardings[name], name
        shard = value.addressable_shards[0].data
        if any(shardings[name].spec):
            assert shard.size < value.size, name
            split[name] = value
    layers = CONFIG.num_layers
    assert {"layers.mlp.up.kernel", "embedding.table", "head.kernel"} <= set(split)
    sizes = {
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", compiled.as_text())
    }
    for name, value in split.items():
        if name.endswith(("kernel", "table")):
            assert not {value.size, value.size // layers} & sizes, name

    memory = compiled.memory_analysis()
    whole = sum(spec.nbytes for spec in flatten_names(specs).values())
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 2
