"""Grouped products compiled by the TPU's and the GPU's own compilers, and the VMEM they
take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from pallas_kernels.chips import find_chip
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_outer_product
from tests.aot.conftest import describe_device, read_kernels

MACHINES = (
    "v4:2x2x1",
    "v5e:2x2",
    "v5p:2x2x1",
    "v6e:2x2",
    "tpu7x:2x2x1",
    "h100x1",
    "a100x1",
)
# Rows, D, F and groups: several tiles of each, none a power of two.
R, D, F, G = 1100, 640, 896, 6
OPERANDS = [
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("int8", "int8"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("float8_e5m2", "float8_e4m3fn"),
    ("bfloat16", "int8"),
]


@pytest.fixture(scope="module", params=MACHINES)
def device(request):
    return describe_device(request.param)


def compiled_text(device, function, *arrays) -> str:
    """Of ``function`` on one device's shards."""
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Explicit,))
    whole = PartitionSpec()
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, whole))
        for shape, dtype in arrays
    ]
    with jax.set_mesh(mesh):
        on_shard = jax.shard_map(
            function, in_specs=(whole,) * len(arrays), out_specs=whole, check_vma=False
        )
        return jax.jit(on_shard).lower(*arguments).compile().as_text()


def check_kernel(device, text: str, name: str, flops: int = 2 * R * D * F) -> None:
    """One kernel, which tells the plan its FLOPs, in the VMEM that it asks for."""
    (call,) = (
        line for line in text.splitlines() if "custom-call(" in line and name in line
    )
    if device.platform == "gpu":
        assert "triton" in call
        return
    assert f'"flops":"{flops}"' in call
    assert read_kernels(find_chip(device).name, text) == [name]


@pytest.mark.parametrize(
    ("left", "right", "turned"),
    [*((*pair, False) for pair in OPERANDS), *((*pair, True) for pair in OPERANDS[:4])],
)
def test_a_matmul_is_one_kernel(device, left, right, turned):
    # Operands of eight bits have scales.
    scales = {}
    if jnp.dtype(left).itemsize == 1:
        scales["row_scales"] = (R,)
    if jnp.dtype(right).itemsize == 1:
        scales["column_scales"] = (G, F)

    def function(rows, kernels, sizes, *scale_arrays):
        named_scales = dict(zip(scales, scale_arrays, strict=True))
        return grouped_matmul(
            rows, kernels, sizes, transpose_kernels=turned, **named_scales
        )

    kernels = (G, F, D) if turned else (G, D, F)
    arrays = [((R, D), left), (kernels, right), ((G,), jnp.int32)]
    arrays += [(shape, jnp.float32) for shape in scales.values()]
    check_kernel(device, compiled_text(device, function, *arrays), "grouped_matmul")


@pytest.mark.parametrize(("left", "right"), OPERANDS)
def test_an_outer_product_is_one_kernel(device, left, right):
    arrays = [((R, D), left), ((R, F), right), ((G,), jnp.int32)]
    text = compiled_text(device, grouped_outer_product, *arrays)
    check_kernel(device, text, "grouped_outer")


def test_the_platform_decides_where_no_mesh_tells(device):
    """Ahead of time JAX's default backend is another; blocks are those that fit every
    chip."""
    if device.platform == "gpu":
        pytest.skip("Pallas asks a mesh which card it is")
    here = SingleDeviceSharding(device)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for shape, dtype in (
            ((R, D), jnp.bfloat16),
            ((G, D, F), jnp.bfloat16),
            ((G,), jnp.int32),
        )
    ]
    text = jax.jit(grouped_matmul).lower(*arguments).compile().as_text()
    check_kernel(device, text, "grouped_matmul")


def test_mixtrals_down_projection_fits(device):
    rows, inner, columns, groups = 8192, 14336, 4096, 8
    arrays = [((rows, inner), jnp.bfloat16), ((groups, inner, columns), jnp.bfloat16)]
    text = compiled_text(device, grouped_matmul, *arrays, ((groups,), jnp.int32))
    check_kernel(device, text, "grouped_matmul", 2 * rows * inner * columns)
