"""What a program costs, read from the text of the TPU's own compiler; that of a CPU's is in
tests/plan/test_compiled.py."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.plan.compiled.cost import read_compiled_cost
from maxlm.plan.topology import parse_topology
from maxlm.programs.compile import get_topology_devices, has_compiler
from maxlm.sharding import MeshConfig, make_mesh


def test_the_tpu_compilers_text_is_read_too():
    if not has_compiler("tpu"):
        pytest.skip("the compiler is not installed")
    axes = make_mesh(MeshConfig(data=2, fsdp=4), get_topology_devices(parse_topology("v5p:2x2x2")))
    B, D, F, L = 16, 256, 512, 6

    def local(x, up, down):
        def body(x, own):
            a, b = (lax.all_gather(w, "fsdp", axis=0, tiled=True) for w in own)
            return jnp.sin(jnp.cos(x @ a) @ b), None

        x = lax.scan(body, x, (up, down))[0]
        return lax.psum(x, "data")

    specs = P(("data", "fsdp")), P(None, "fsdp"), P(None, "fsdp")
    shapes = (8 * B, D), (L, D, F), (L, F, D)
    step = jax.shard_map(local, mesh=axes, in_specs=specs, out_specs=P("fsdp"), check_vma=False)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(axes, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    text = jax.jit(step).lower(*arguments).compile().as_text()
    cost = read_compiled_cost(text, dict(axes.shape), on_chip=(1,))
    assert cost.matmul_flops == L * 2 * 2 * B * D * F
    gathered = L * 2 * prod((D, F)) * 2 * 3 // 4
    assert cost.wire_bytes(kind="all-gather", axes="fsdp") == gathered
    assert cost.wire_bytes(axes="data") > 0
    assert {c.axes for c in cost.collectives} == {"fsdp", "data"}
    assert np.isfinite(cost.memory_bytes)
