"""Layers held in groups by a circular pipeline are on disk what they always are."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.train.grouped import flatten_groups, is_grouped, reshape_arrays

GROUPS = {"layers.mlp.up.kernel": (2, 4), "layers.scale": (2, 4)}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.mlp.up.kernel", (2, 4, 3, 5), True),
        ("params.layers.mlp.up.kernel", (2, 4, 3, 5), True),
        ("opt_state.0.mu.layers.mlp.up.kernel", (2, 4, 3, 5), True),
        ("opt_state.0.v_row.layers.mlp.up.kernel", (2, 4, 3), True),
        # A place-holder of a factored moment, a counter, another's name within a name.
        ("opt_state.0.v.layers.mlp.up.kernel", (1,), False),
        ("params.head.kernel", (2, 4), False),
        ("params.otherlayers.scale", (2, 4), False),
    ],
)
def test_what_is_grouped(name, shape, expected):
    assert is_grouped(name, shape, GROUPS) is expected


def test_there_and_back_on_a_mesh(mesh):
    """Layer g · 4 + i is element [g, i]; stages hold the second axis here, the first on disk."""
    on = mesh(stage=2, fsdp=2)
    flat = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    held_as = jax.ShapeDtypeStruct(
        (2, 4, 6), "float32", sharding=NamedSharding(on, P(None, "stage", "fsdp"))
    )
    written = flatten_groups(held_as)
    assert (written.shape, written.dtype) == ((8, 6), np.float32)
    assert written.sharding == NamedSharding(on, P("stage", "fsdp"))

    disk = jax.device_put(flat, written.sharding)
    held = reshape_arrays(
        {"a": disk, "b": disk + 1}, {"a": held_as, "b": held_as, "unused": held_as}
    )
    assert set(held) == {"a", "b"}
    for name, more in {"a": 0, "b": 1}.items():
        assert held[name].sharding == held_as.sharding
        np.testing.assert_array_equal(held[name], flat.reshape(2, 4, 6) + more)
    back = reshape_arrays(held, {"a": written, "b": written})
    assert back["a"].sharding == written.sharding
    np.testing.assert_array_equal(back["a"], flat)


def test_without_a_mesh():
    held = jax.ShapeDtypeStruct((2, 4), "float32")
    written = flatten_groups(held)
    assert written.shape == (8,)
    array = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(
        reshape_arrays({"a": jax.numpy.asarray(array)}, {"a": held})["a"], array.reshape(2, 4)
    )
    assert reshape_arrays({}, {"a": held}) == {}
