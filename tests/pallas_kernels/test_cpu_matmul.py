"""Products on a CPU equal float64's, row by row; without a compiler XLA makes them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.cpu_matmul import can_multiply_rows, cpu_matmul

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def draw(*shape):
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def multiply_columns(x, table):
    return cpu_matmul(x, table.T, column_major=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 13, 24, 64, 65, 150])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (5, 3), (37, 51), (1130, 97), (64, 304)]
)
def test_products_are_exact(rows, inputs, outputs):
    x, kernel = draw(rows, inputs), draw(inputs, outputs)
    exact = x.astype(np.float64) @ kernel
    size_x, size_kernel = np.abs(x), np.abs(kernel)
    bound = size_x.max(1, keepdims=True) * size_kernel.sum(0)
    bound += size_x.sum(1, keepdims=True) * size_kernel.max(0)
    for y in (cpu_matmul(x, kernel), jax.jit(multiply_columns)(x, kernel.T.copy())):
        assert (np.abs(np.asarray(y) - exact) <= 2e-7 * bound).all()
        assert np.linalg.norm(np.asarray(y) - exact) <= 5e-7 * np.linalg.norm(exact)


def test_a_large_input_costs_its_own_row_digits():
    """In proportion to how large it is beside the row's others."""
    x, kernel = draw(150, 1171), draw(1171, 304)
    if not can_multiply_rows(x, kernel):
        pytest.skip("a processor without matrix units")
    x[::2, 3] *= 40
    exact = x.astype(np.float64) @ kernel
    error = np.linalg.norm(np.asarray(cpu_matmul(x, kernel)) - exact, axis=1)
    largest = np.abs(x).max(1) / np.sqrt(np.mean(x**2, 1))
    bound = 1.3 * np.hypot(3.4e-8 * largest, 3.4e-8 * 4)
    assert (error <= bound * np.linalg.norm(exact, axis=1)).all()


@pytest.mark.parametrize(
    ("multiply", "rows", "parts"),
    [
        (cpu_matmul, 48, [(0, 1), (3, 2), (9, 7), (20, 28)]),
        (cpu_matmul, 130, [(0, 49), (20, 70)]),
        (multiply_columns, 99, [(0, 1), (3, 2), (20, 70)]),
    ],
)
def test_a_row_does_not_depend_on_others(multiply, rows, parts):
    """Bit for bit: neither on how many there are nor on its place; of many, on matrix
    units."""
    x, kernel = draw(rows, 1171), draw(1171, 1171)
    if not can_multiply_rows(x, kernel):
        pytest.skip("a processor without matrix units")
    y = np.asarray(multiply(x, kernel))
    for first, size in parts:
        part = np.asarray(multiply(x[first : first + size], kernel))
        np.testing.assert_array_equal(part, y[first : first + size])


def test_a_table_is_read_as_it_lies():
    """Its transpose is no copy."""
    x, table = jnp.ones((3, 600)), jnp.ones((700, 600))
    memory = jax.jit(multiply_columns).lower(x, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < table.nbytes / 10


def test_devices_multiply_at_the_same_time():
    """More calls than threads end: none waits for a thread that waits."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = draw(256, 256) / 16

    def local(x):
        return jax.lax.fori_loop(0, 50, lambda _, x: cpu_matmul(x, kernel), x)

    split = PartitionSpec("x")
    run = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
        )
    )
    assert np.isfinite(run(draw(16, 256))).all()


def test_which_products_it_takes():
    """Many rows where there are matrix units."""
    x, kernel = jnp.ones((17, 8)), jnp.ones((8, 8))
    cpu = Path("/proc/cpuinfo")
    amx = cpu.exists() and "amx_int8" in cpu.read_text()
    assert can_multiply_rows(jnp.ones((49, 8)), kernel) == amx
    assert can_multiply_rows(x, kernel)
    assert not can_multiply_rows(x, kernel, column_major=True)
    assert not can_multiply_rows(x.astype(jnp.bfloat16), kernel)


@pytest.mark.parametrize(
    ("compiler", "warns"), [("/no/compiler", False), ("false", True)]
)
def test_without_a_compiler_xla_multiplies(compiler, warns, tmp_path):
    """A compiler that fails is warned of, none is not."""
    program = "from pallas_kernels.cpu import load_kernels; assert not load_kernels()"
    env = os.environ | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    said = subprocess.run(
        command, env=env, check=True, capture_output=True, text=True
    ).stderr
    assert ("XLA does what kernels for CPUs" in said) == warns
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
