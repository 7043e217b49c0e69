"""Experts split over TPUs, by their own compiler: what they exchange, and with which kernels."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from maxlm.models.layers.moe import MoeConfig
from maxlm.models.params import bind, param_specs
from maxlm.plan.topology import parse_topology
from maxlm.programs.compile import get_topology_devices, has_compiler
from maxlm.sharding import MeshConfig, ShardingConfig, make_mesh, resolve_placement
from tests.models import moe_building as building


@pytest.fixture(scope="module")
def tpu_mesh():
    if not has_compiler("tpu"):
        pytest.skip("the compiler is not installed")
    return make_mesh(
        MeshConfig(fsdp=2, expert=4), get_topology_devices(parse_topology("v5p:2x2x2"))
    )


def test_a_tpu_gets_ragged_exchanges_products_and_scattered_gradients(tpu_mesh):
    config = MoeConfig(num_experts=16, experts_per_token=2, d_ff=256)
    sizes = dict(tpu_mesh.shape)
    rules = building.compute_rules(tpu_mesh)
    model = building.Moe(config, 512, 2, 0.02, rules=rules, dtype=jnp.bfloat16)
    storage = ShardingConfig().storage.for_mesh(sizes)

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu_mesh, spec))

    params = jax.tree.map(
        lambda s: abstract(
            s.shape, s.dtype, resolve_placement("", s.shape, s.axes, storage, sizes).spec
        ),
        param_specs(model),
    )
    x = abstract((8, 64, 512), jnp.bfloat16, rules.spec("batch", "seq"))

    def loss(params, x):
        y, aux = bind(model, params)(x)
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + aux.loss

    with jax.set_mesh(tpu_mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile().as_text()
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) == 6
    assert not re.search(r" all-to-all(?:-start)?\(", text)
    assert len(re.findall(r"reduce-scatter", text)) >= 3
    # Two up and one down; backward the two again, all three transposed, and kernels' gradients.
    kernels = Counter(re.findall(r"%(grouped_\w+?)[.\d]* = \S+ custom-call", text))
    assert kernels == {"grouped_matmul": 8, "grouped_outer": 3}
