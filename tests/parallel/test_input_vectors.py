"""Vectors in place of tokens' embeddings, on shards: values and gradients in every
layout are NumPy's, and a number past the last vector is NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.parallel.input_vectors import place_vectors
from tests.models.building import QUICK

pytestmark = pytest.mark.heavy

ROWS, LENGTH, VECTORS, WIDTH = 4, 6, 5, 10


@pytest.mark.parametrize(
    ("axes", "layout"),
    [
        ({}, ((), (), ())),
        pytest.param(
            {"data": 2, "context": 3},
            (("data",), ("context",), ()),
            marks=pytest.mark.more,
        ),
        ({"data": 2, "tensor": 2}, (("data",), ("tensor",), ())),
        pytest.param(
            {"fsdp": 2, "tensor": 2},
            (("fsdp",), (), ("tensor",)),
            marks=pytest.mark.more,
        ),
    ],
)
def test_values_and_gradients_are_numpys(axes, layout, mesh):
    random = np.random.default_rng(0)
    x, d_y = random.normal(size=(2, ROWS, LENGTH, WIDTH)).astype(np.float32)
    vectors = random.normal(size=(ROWS, VECTORS, WIDTH)).astype(np.float32)
    # Some vectors stand twice, or nowhere.
    numbers = random.integers(0, VECTORS + 1, (ROWS, LENGTH)).astype(np.int32)
    numbers[0] = 0
    expected = x.copy()
    d_x = d_y.copy()
    d_vectors = np.zeros_like(vectors)
    for row, place in zip(*np.nonzero(numbers), strict=True):
        index = numbers[row, place] - 1
        expected[row, place] = vectors[row, index]
        d_x[row, place] = 0
        d_vectors[row, index] += d_y[row, place]

    where = mesh(**axes)
    spec = PartitionSpec(*(names or None for names in layout))
    sharding = NamedSharding(where, spec)

    def run(x: Any, vectors: Any, d_y: Any, numbers: Any) -> Any:
        y, pull_back = jax.vjp(lambda x, v: place_vectors(x, v, numbers), x, vectors)
        return y, *pull_back(d_y)

    with jax.set_mesh(where):
        y, x_gradient, vectors_gradient = jax.jit(run, compiler_options=QUICK)(
            jax.device_put(x, sharding), vectors, jax.device_put(d_y, sharding), numbers
        )
    assert y.sharding.spec == spec
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(x_gradient, d_x)
    np.testing.assert_allclose(vectors_gradient, d_vectors, rtol=1e-6, atol=1e-6)


def test_a_number_past_the_last_vector_is_nan(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        y = jax.jit(place_vectors)(
            jnp.zeros((1, 3, 2)), jnp.ones((1, 1, 2)), jnp.asarray([[0, 1, 2]])
        )
    np.testing.assert_array_equal(y[0, :, 0], [0, 1, np.nan])
