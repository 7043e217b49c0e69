"""The TPU's own compiler takes the kernels, on every chip, and keeps the logits out of memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from maxlm.plan.topology import parse_topology
from maxlm.programs.compile import get_topology_devices, has_compiler
from pallas_kernels.chips import CHIPS, find_chip
from pallas_kernels.linear_cross_entropy import loss_and_gradients
from tests.aot.conftest import read_vmem

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(params=[chip.topology for chip in CHIPS.values()], ids=CHIPS)
def device(request):
    if not has_compiler("tpu"):
        pytest.skip("the compiler is not installed")
    return get_topology_devices(parse_topology(request.param))[0]


def compiled(device, T, D, V, dtype=jnp.bfloat16, **options):
    """Of the sums and gradients for a table [V, D], as embeddings are."""
    on = SingleDeviceSharding(device)

    def run(hidden, table, targets, weights):
        sums, gradients = loss_and_gradients(hidden, table.T, targets, weights, **options)
        return sums, gradients and (gradients[0], gradients[1].T)

    mesh = Mesh(np.array([device]), ("all",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        arrays = ((T, D), dtype), ((V, D), dtype), ((T,), jnp.int32), ((T,), jnp.float32)
        arguments = (jax.ShapeDtypeStruct(*array, sharding=on) for array in arrays)
        return jax.jit(run).lower(*arguments).compile()


def names(device, step) -> list[str]:
    """Of a program's kernels, without what all begin with."""
    found = read_vmem(find_chip(device).name, step.as_text())
    return [kernel.name.removeprefix("linear_cross_entropy_") for kernel in found]


def test_a_tpu_gets_the_kernels_and_holds_no_logits(device):
    T, D, V = 2048, 2048, 32000
    step = compiled(device, T, D, V, z_loss=1e-4)
    assert set(names(device, step)) == {"forward", "head_gradient"}
    temp = step.memory_analysis().temp_size_in_bytes
    # The mean and the targets' rows in fp32, and change; a chunk's logits would be twice that, and
    # the head's gradient in fp32 ten times.
    assert temp < 3 * T * D * 4


@pytest.mark.parametrize(
    ("T", "D", "V", "dtype", "options"),
    [
        (300, 576, 50257, jnp.bfloat16, {"soft_cap": 30.0}),
        (100, 100, 1000, jnp.float32, {}),
        (500, 1024, 32000, jnp.bfloat16, {"gradient": False}),
    ],
)
def test_the_kernels_take_odd_sizes_caps_and_fp32(device, T, D, V, dtype, options):
    step = compiled(device, T, D, V, dtype, implementation="tpu", **options)
    assert "forward" in names(device, step)


def test_wide_models_get_the_kernels_where_vmem_holds_their_blocks(device):
    step = compiled(device, 256, 16384, 1024)
    assert ("forward" in names(device, step)) == (device.device_kind != "TPU v4")
