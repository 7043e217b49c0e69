"""The selective scan compiled by the TPUs' own compilers, and the VMEM it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.chips import find_chip
from pallas_kernels.selective_scan import selective_scan
from tests.aot.conftest import describe_device, read_kernels

MACHINES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Several chunks and blocks of channels of each, neither a power of two.
R, T, F, N = 2, 300, 640, 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("machine", MACHINES)
def test_forward_and_backward_compile_and_keep_states_of_chunks(machine, dtype):
    device = describe_device(machine)
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())

    def declare(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    arguments = {
        "x": declare(R, T, F),
        "dt": declare(R, T, F),
        "A": declare(F, N, dtype="float32"),
        "B": declare(R, T, N),
        "C": declare(R, T, N),
        "D": declare(F, dtype="float32"),
        "dt_bias": declare(F, dtype="float32"),
    }
    starts = declare(R, T, dtype="bool")

    def loss(arguments, starts):
        y, state = selective_scan(**arguments, starts=starts)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(arguments, starts).compile()
    kernels = read_kernels(find_chip(device).name, compiled.as_text())
    assert sorted(kernels) == ["selective_scan", "selective_scan_backward"]
    memory = compiled.memory_analysis()
    all_states = R * T * F * N * 4
    assert memory.temp_size_in_bytes < all_states
