"""The plan beside each machine's own compiler, for a small model; real ones are in
benchmarks/plan_memory.py."""

from itertools import product

import pytest

from maxlm.plan.compiled.program import (
    compare_with_compiled_step,
    compile_step,
    get_topology_devices,
    has_compiler,
)
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.plan.topology import parse_topology
from tests.aot.conftest import FF, MATRIX_BYTES, SEQ, D, small_run

pytestmark = pytest.mark.timeout(1800)


def test_what_is_planned_is_compiled(machine):
    """The products are those of full remat: forward, again, and backward twice; a
    layer's last product and the head run once less."""
    devices = parse_topology(machine).devices
    config = small_run(devices=devices, mesh={"fsdp": devices})
    planned_machine = Machine.from_name(machine)
    step = compile_step(config, machine)
    cost = step.read_cost()
    assert len(cost.unknown_loops) == 1  # the update, left out where numbers are bad
    large = [c for c in cost.collectives if c.payload_bytes >= MATRIX_BYTES]
    assert not any(c.kind == "all-reduce" for c in large)
    # Of one row of 256 tokens: weights in flight outweigh all else, and a GPU's
    # compiler has all of a layer's at once, with their gradients (docs/performance.md).
    least = 0.3 if planned_machine.topology.platform == "gpu" else 0.5
    plan = plan_run(config, planned_machine)
    verdict = compare_with_compiled_step(plan, step, planned_machine.chip.memory_bytes)
    state = verdict.figures["arguments: state and batch"]
    assert state.plan == pytest.approx(state.compiler, rel=0.02)
    products = verdict.products["matrix products but attention's"]
    assert products.plan == pytest.approx(products.compiler, rel=1e-3)
    sent = sum(collective.sent_bytes for collective in plan.collectives)
    assert sent == pytest.approx(cost.wire_bytes(), rel=0.05)
    peak = verdict.figures["peak"]
    assert least * peak.compiler < peak.plan < 1.5 * peak.compiler


def test_devices_that_a_compiler_describes_are_the_machine(machine):
    topology = parse_topology(machine)
    if topology.platform == "gpu":
        pytest.skip("described without their hosts")
    devices = get_topology_devices(topology)
    described = Machine.from_devices(devices)
    assert described is not None
    assert described.topology == topology
    # Places that the plan makes up are those of the compiler's devices.
    sides = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    assert {tuple(d.coords) for d in devices} == set(product(*map(range, sides)))


def test_a_layer_more_takes_its_input_and_its_gradients_in_bf16():
    """Of temporary memory under full remat: no copies of all layers' parameters in
    another dtype or layout, and gradients in fp32 for none but the layer at hand."""
    machine = "v5p:4x4x4"
    rows = 8  # Enough for the layers' backward pass to be the peak.
    if not has_compiler("tpu"):
        pytest.skip("the compiler is not installed")
    num_devices = parse_topology(machine).devices

    def compute_temp_bytes(num_layers: int) -> int:
        config = small_run(
            rows, num_devices, {"num_layers": num_layers}, mesh={"fsdp": num_devices}
        )
        memory = compile_step(config, machine).compiled.memory_analysis()
        return memory.temp_size_in_bytes

    bytes_per_layer = (compute_temp_bytes(8) - compute_temp_bytes(4)) / 4
    bf16_bytes = 2
    layer_input = bf16_bytes * rows * SEQ * D
    # Of attention's four matrices and the feed-forward's three, sharded.
    gradients = bf16_bytes * (4 * D * D + 3 * D * FF) / num_devices
    assert bytes_per_layer <= 1.12 * (layer_input + gradients)
