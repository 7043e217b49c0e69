"""Each parallelism communicates on its own mesh axes and as it should, by the compilers' word."""

import pytest

from maxlm.plan.compiled.cost import CompiledCollective, CompiledCost
from maxlm.plan.topology import parse_topology
from maxlm.programs.compile import compile_step, has_compiler
from tests.aot.conftest import FF, LAYERS, MATRIX_BYTES, SEQ, VOCAB, D, small_run

# The first to need a step waits for its compiler.
pytestmark = pytest.mark.timeout(1800)

# Elements of the weights: a layer's matrices, and the table and the head.
LAYER = LAYERS * (4 * D * D + 3 * D * FF)
TABLES = 2 * D * VOCAB
# Devices along `tensor`, such that both axes follow the links.
TENSOR = {"v5p:4x4x4": 4, "v5e:16x16": 16, "v6e:8x8": 8, "h100:8x8": 8}


def devices(machine: str) -> int:
    return parse_topology(machine).devices


def large_sums(cost: CompiledCost) -> list[CompiledCollective]:
    """All-reduces of a matrix or more."""
    sums = (c for c in cost.collectives if c.kind == "all-reduce")
    return [c for c in sums if c.payload_bytes >= MATRIX_BYTES]


def test_data_parallelism_sums_gradients_and_nothing_else(machine, compiled):
    n = devices(machine)
    cost = compiled(machine, {"data": n}).cost
    assert {(c.kind, c.axes) for c in cost.collectives} == {("all-reduce", "data")}
    # bf16 or fp32, once each.
    gradients = 2 * (n - 1) / n * (LAYER + TABLES)
    assert 2 * gradients <= cost.wire_bytes() <= 4.1 * gradients


def test_fsdp_gathers_weights_over_its_axis(machine, compiled):
    n = devices(machine)
    cost = compiled(machine, {"fsdp": n}).cost
    assert {c.axes for c in cost.collectives} == {"fsdp"}
    # An embedding's rows and gradients; the exchange of halves that ends a scatter in two steps.
    kinds = {"all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
    assert {c.kind for c in cost.collectives if c.payload_bytes >= MATRIX_BYTES // 32} <= kinds
    # Forward and again backward, in bf16, as all-gathers or in parts under the products.
    weights = (n - 1) / n * 2 * (2 * LAYER + TABLES)
    gathered = cost.wire_bytes(kind="all-gather") + cost.wire_bytes(kind="collective-permute")
    assert 0.6 * weights <= gathered <= 1.2 * weights


def test_fsdp_scatters_gradients_and_all_reduces_no_matrix(machine, compiled):
    n = devices(machine)
    cost = compiled(machine, {"fsdp": n}).cost
    assert not large_sums(cost)
    scattered = cost.wire_bytes(kind="reduce-scatter")
    # In bf16 or fp32; the embedding's may go to their owners by an all-to-all of activations, and
    # XLA:TPU pads what it scatters.
    share = (n - 1) / n
    least, most = 2 * share * (LAYER + TABLES / 2), 4 * share * (LAYER + TABLES)
    assert least <= scattered <= 1.5 * most


def test_tensor_parallelism_keeps_weights_on_fsdp_and_activations_on_tensor(machine, compiled):
    n, tensor = devices(machine), TENSOR[machine]
    cost = compiled(machine, {"fsdp": n // tensor, "tensor": tensor}).cost
    axes = {c.axes for c in cost.collectives}
    assert {"fsdp", "tensor"} <= axes <= {"fsdp", "tensor", "fsdp+tensor"}
    # What crosses both is norms and sums, not matrices.
    both = [c for c in cost.collectives if c.axes == "fsdp+tensor"]
    assert sum(c.payload_bytes * c.count for c in both) < MATRIX_BYTES
    # A layer hands its activations [rows, S, D] over twice forward and twice backward, and once or
    # twice more for what is computed again; an all-reduce is 2 of them, halves of it 1.
    activations = tensor * SEQ * D * 2 * (tensor - 1) / tensor
    handed = cost.wire_bytes(axes="tensor") / (LAYERS * activations)
    assert 4 <= handed <= 24


@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_products_are_those_of_full_remat(machine, compiled, mesh):
    """Forward, again, and backward twice; a layer's last product and the head run once less."""
    n = devices(machine)
    cost = compiled(machine, {mesh: n}).cost
    tokens = SEQ
    expected = 2 * tokens * (4 * LAYER - LAYERS * D * FF + 3 * D * VOCAB)
    assert cost.matmul_flops == pytest.approx(expected, rel=1e-6)
    assert len(cost.unknown_loops) == 1  # the update, left out where numbers are bad


def test_a_layer_more_takes_its_input_and_its_gradients_in_bf16():
    """Of temporary memory under full remat: no copies of all layers' parameters in another dtype or
    layout, and gradients in fp32 for none but the layer at hand."""
    machine, rows = "v5p:4x4x4", 8  # enough rows for the layers' backward pass to be the peak
    if not has_compiler("tpu"):
        pytest.skip("the compiler is not installed")
    n = devices(machine)
    few, more = (
        compile_step(
            small_run(rows, n, {"num_layers": layers}, mesh={"fsdp": n}), machine
        ).memory.temp
        for layers in (4, 8)
    )
    layer_input, gradients = 2 * rows * SEQ * D, 2 * LAYER / LAYERS / n
    assert (more - few) / 4 <= 1.12 * (layer_input + gradients)
