"""Mesh axes lie along the dimensions of a torus that JAX's own layout gives them."""

from math import prod

import pytest

from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.plan.topology import parse_topology
from maxlm.plan.torus import find_torus_dimensions
from maxlm.sharding import MESH_AXES
from tests.plan.test_predict import run


def find(machine: str, **sizes: int) -> dict[str, str]:
    return find_torus_dimensions(
        parse_topology(machine), dict.fromkeys(MESH_AXES, 1) | sizes
    )


@pytest.mark.parametrize("machine", ["v5p-256", "v5e-128", "v4-64", "2xv5p-128"])
def test_one_axis_of_all_chips_of_a_slice_lies_along_all_dimensions(machine):
    topology = parse_topology(machine)
    dimensions = "·".join("xyz"[: len(topology.shape)])
    slices = {"data": 2} if topology.slices == 2 else {}
    lies_along = find(machine, fsdp=prod(topology.shape), **slices)
    assert lies_along == {"fsdp": dimensions} | dict.fromkeys(slices, "")


def test_axes_as_large_as_the_sides_lie_along_one_dimension_each():
    lies_along = find("v5p:4x4x8", data=8, fsdp=4, tensor=4)
    assert lies_along["data"] == "z"
    assert sorted(lies_along.values()) == ["x", "y", "z"]


def test_two_chiplets_of_a_chip_are_no_step_on_the_torus():
    assert find("7x-128", fsdp=64, tensor=2) == {"fsdp": "x·y·z", "tensor": ""}


def test_the_plan_says_so():
    (note, *_) = plan_run(
        run("llama3_8b", "mesh.tensor=8"), Machine.from_name("v5p-256")
    ).layout.notes
    assert "tensor=8 (ICI along " in note
    (note, *_) = plan_run(run("llama3_8b"), Machine.from_name("h100x64")).layout.notes
    assert "along" not in note
