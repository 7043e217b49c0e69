"""A fingerprint is of the bits and their places, and the same for every layout."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.train.checkpoint.reading import compute_fingerprints

SHAPES = [(), (1,), (7,), (3, 5), (4, 6, 2), (0, 3)]
DTYPES = ["float32", "bfloat16", "int32", "uint32", "int8", "bool"]
M = 2**32


def by_hand(array):
    """The docstring's formula, in Python's integers."""
    factors = (2_654_435_761, 2_246_822_519, 3_266_489_917)
    total = 0
    for index in np.ndindex(array.shape):
        bits = int.from_bytes(np.asarray(array[index]).tobytes(), "little")
        place = sum(i * f for i, f in zip(index, factors, strict=False)) % M
        place = (place ^ (place >> 16)) * factors[1] % M
        total += bits * ((place ^ (place >> 13)) | 1)
    return total % M


def test_fingerprints_equal_their_formula():
    random = np.random.default_rng(3)
    arrays = {
        f"{shape} {dtype}": jnp.asarray(random.normal(scale=50, size=shape)).astype(dtype)
        for shape in SHAPES
        for dtype in DTYPES
    }
    want = {name: by_hand(np.asarray(array)) for name, array in arrays.items()}
    assert compute_fingerprints(arrays) == want


def test_fingerprints_are_the_same_for_every_layout(mesh):
    array = jax.random.normal(jax.random.key(0), (8, 4, 6))
    want = compute_fingerprints({"x": array})
    for axes, spec in (
        ({"data": 2, "tensor": 4}, ("data", "tensor")),
        ({"fsdp": 4, "tensor": 2}, (None, "fsdp", "tensor")),
        ({"data": 2}, ()),
    ):
        placed = jax.device_put(array, NamedSharding(mesh(**axes), PartitionSpec(*spec)))
        assert compute_fingerprints({"x": placed}) == want


@given(st.integers(0, 59), st.integers(0, 31))
def test_one_changed_bit_always_shows(place, bit):
    array = np.random.default_rng(1).normal(size=(4, 15)).astype(np.float32)
    changed = array.copy()
    changed.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
    before, after = (compute_fingerprints({"x": jnp.asarray(x)})["x"] for x in (array, changed))
    assert before != after


def test_elements_that_change_places_show():
    array = np.random.default_rng(2).normal(size=(6, 8)).astype(np.float32)
    want = compute_fingerprints({"x": jnp.asarray(array)})
    for other in (array[::-1], array[:, ::-1], np.roll(array, 1, 1), array.reshape(8, 6)):
        assert compute_fingerprints({"x": jnp.asarray(other)}) != want
