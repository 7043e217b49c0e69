"""Meshes: six named axes, their product the number of devices, or a message that says
why not."""

from math import prod

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from maxlm.sharding import MESH_AXES, MeshConfig, make_mesh, mesh_sizes, parse_mesh
from tests.errors import message


@given(st.data())
def test_one_axis_takes_what_remains(data):
    sizes = {axis: data.draw(st.integers(1, 4), axis) for axis in MESH_AXES}
    free = data.draw(st.sampled_from(MESH_AXES))
    for config in (sizes, {**sizes, free: -1}):
        assert mesh_sizes(MeshConfig(**config), prod(sizes.values())) == sizes


@pytest.mark.parametrize(
    ("axes", "devices", "expected"),
    [
        (
            {"fsdp": 2, "tensor": 2},
            8,
            "mesh: fsdp=2, tensor=2 needs 4 devices, 8 here; "
            "set the axes so that their product is 8, or one of them to -1",
        ),
        (
            {"tensor": 3},
            8,
            "mesh: fsdp=-1, tensor=3 needs a multiple of 3 devices, 8 here; "
            "set the axes so that their product is 8, or one of them to -1",
        ),
        ({"data": -1}, 8, "mesh: data and fsdp are both -1; leave one of them at -1"),
        ({"data": 0}, 8, "mesh: mesh.data=0; use a size ≥ 1, or -1 for the rest"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(axes, devices, expected):
    assert message(mesh_sizes, MeshConfig(**axes), devices) == expected


def test_a_mesh_written_as_text():
    assert parse_mesh("fsdp=64,tensor=4") == MeshConfig(fsdp=64, tensor=4)
    assert parse_mesh(" data=2 , tensor=2, ") == MeshConfig(data=2, fsdp=1, tensor=2)
    assert parse_mesh("") == MeshConfig(fsdp=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "fspd=4",
            "--mesh: unknown mesh axis 'fspd'; use stage, data, fsdp, expert, context, "
            "tensor",
        ),
        ("fsdp", "--mesh: 'fsdp' is not AXIS=SIZE; write fsdp=8,tensor=2"),
        ("tensor=2,fsdp=0", "--mesh: 'fsdp=0' is not AXIS=SIZE; write fsdp=8,tensor=2"),
        ("fsdp=²", "--mesh: 'fsdp=²' is not AXIS=SIZE; write fsdp=8,tensor=2"),
        ("fsdp=2,fsdp=4", "--mesh: axis 'fsdp' is given twice; give each axis once"),
    ],
)
def test_malformed_text_is_refused(text, expected):
    assert message(parse_mesh, text) == expected


def test_meshes_are_explicit_and_keep_the_order_of_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]
    # Neighbours along `tensor`, the innermost axis, are neighbouring devices.
    ids = [d.id for d in mesh.devices.flat]
    assert all(abs(a - b) == 1 for a, b in zip(ids[::2], ids[1::2], strict=True))
