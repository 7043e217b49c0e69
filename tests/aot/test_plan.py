"""The plan beside each machine's own compiler, for a small model; real ones are in
benchmarks/plan_memory.py."""

from itertools import product

import pytest

from maxlm.plan.network import describe_torus_dimensions
from maxlm.plan.predict import Machine, plan_run
from maxlm.plan.topology import parse_topology
from maxlm.programs.compare import compare
from maxlm.programs.compile import get_topology_devices
from maxlm.sharding import MESH_AXES
from tests.aot.conftest import small_run

pytestmark = pytest.mark.timeout(1800)


def test_what_is_planned_is_compiled(machine, compiled):
    devices = parse_topology(machine).devices
    config = small_run(devices=devices, mesh={"fsdp": devices})
    found, step = Machine.from_name(machine), compiled(machine, {"fsdp": devices})
    # Of one row of 256 tokens: weights in flight outweigh all else, and a GPU's compiler has all of
    # a layer's at once, with their gradients (docs/performance.md).
    least = 0.3 if found.topology.platform == "gpu" else 0.5
    rows = compare(plan_run(config, found), step)
    for what, off in (
        ("resting: state and batch, GB", 0.02),
        ("matrix products, TFLOP", 1e-3),
        ("sent, GB", 0.05),
    ):
        planned, theirs = rows[what]
        assert planned == pytest.approx(theirs, rel=off), what
    planned, theirs = rows["peak, GB"]
    assert least * theirs < planned < 1.5 * theirs


def test_devices_that_a_compiler_describes_are_the_machine(machine):
    topology = parse_topology(machine)
    if topology.platform == "gpu":
        pytest.skip("described without their hosts")
    devices = get_topology_devices(topology)
    found = Machine.from_devices(devices)
    assert found is not None
    assert found.topology == topology
    # Places that are made up are those of the compiler's devices.
    sides = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    assert {tuple(d.coords) for d in devices} == set(product(*map(range, sides)))
    sizes = {axis: len(devices) if axis == "fsdp" else 1 for axis in MESH_AXES}
    assert describe_torus_dimensions(topology, sizes) == {
        "fsdp": "x·y·z"[: 2 * len(topology.shape) - 1]
    }
