"""Products on a CPU equal float64's, row by row; without a compiler XLA makes them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxlm.inference.cpu.matmul import cpu_matmul, multiply_few_rows
from maxlm.parallel.linear import multiply_by_xla

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def draw(*shape):
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def multiply_columns(x, table):
    return cpu_matmul(x, table.T, column_major=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 13, 24, 48, 65])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (5, 3), (37, 51), (1130, 97), (64, 304)]
)
def test_products_are_exact(rows, inputs, outputs):
    x = draw(rows, inputs)
    kernel = draw(inputs, outputs)
    exact = x.astype(np.float64) @ kernel
    size_x = np.abs(x)
    size_kernel = np.abs(kernel)
    bound = size_x.max(1, keepdims=True) * size_kernel.sum(0)
    bound += size_x.sum(1, keepdims=True) * size_kernel.max(0)
    for y in (cpu_matmul(x, kernel), jax.jit(multiply_columns)(x, kernel.T.copy())):
        error = np.asarray(y) - exact
        assert (np.abs(error) <= 2e-7 * bound).all()
        assert np.linalg.norm(error) <= 5e-7 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("multiply", "rows", "parts"),
    [
        (cpu_matmul, 48, [(0, 1), (3, 2), (9, 7), (20, 28)]),
        (multiply_columns, 99, [(0, 1), (3, 2), (20, 70)]),
    ],
)
def test_a_row_does_not_depend_on_others(multiply, rows, parts):
    """Bit for bit: neither on how many there are nor on its place."""
    x = draw(rows, 1171)
    kernel = draw(1171, 1171)
    y = np.asarray(multiply(x, kernel))
    for first, size in parts:
        part = np.asarray(multiply(x[first : first + size], kernel))
        np.testing.assert_array_equal(part, y[first : first + size])


def test_a_table_is_read_as_it_lies():
    """Its transpose is no copy."""
    x = jnp.ones((3, 600))
    table = jnp.ones((700, 600))
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


@pytest.mark.parametrize(
    ("shape", "dtype", "column_major", "is_faster"),
    [
        ((6, 8, 4, 5), "float32", False, True),
        ((7, 7, 4, 5), "float32", False, False),
        ((2, 8, 4, 5), "float32", True, True),
        ((1, 17, 4, 5), "float32", True, False),
        ((1, 8, 4, 5), "bfloat16", False, False),
    ],
)
def test_a_step_multiplies_few_rows_of_fp32_by_it(
    shape, dtype, column_major, is_faster
):
    """And all else by XLA, to the same result."""
    x = draw(*shape).astype(dtype)
    kernel = draw(4, 5, 7).astype(dtype)

    def run(multiply):
        return jax.jit(lambda x, k: multiply(x, k, 2, column_major=column_major))

    lowered = run(multiply_few_rows).lower(x, kernel)
    assert ("maxlm.CpuMatmul" in lowered.as_text()) == is_faster
    y = run(multiply_few_rows)(x, kernel)
    expected = run(multiply_by_xla)(x, kernel)
    assert y.shape == (*shape[:2], 7)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("compiler", "warns"), [("/no/compiler", False), ("false", True)]
)
def test_without_a_compiler_xla_multiplies(compiler, warns, tmp_path):
    """A compiler that fails is warned of, none is not."""
    program = "from maxlm.inference.cpu.library import load_library; assert not load_library()"
    env = os.environ | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert ("XLA does what kernels for CPUs" in process.stderr) == warns
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
