"""Every strategy compiles for every machine, and what it sends goes over its own mesh
axes."""

from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import pytest

from benchmarks.program_traffic import read_program_traffic
from maxlm.plan.compiled.program import CompiledStep, compile_step
from maxlm.plan.topology import parse_topology
from tests.aot.conftest import SEQ, D, small_run

pytestmark = pytest.mark.timeout(1800)

# Kinds and axes alone are asked for here: half the width gives them in half the time,
# on 64 devices, whose shards still fill a TPU's tiles. On a v6e XLA all-reduces
# gradients so narrow.
FEWER = {"v5e:16x16": "v5e:8x8"}
WIDTHS = {"v5p:4x4x4": D // 2, "v5e:16x16": D // 2, "v6e:8x8": D, "h100:8x8": D // 2}
MICRO = 4
WHOLE = {"embed": None, "expert_embed": None}


@dataclass(frozen=True)
class Strategy:
    """A mesh (-1: the devices that are left, over fsdp or data), settings, and what
    large collectives (a matrix's or an activation's size) there must be and may be, by
    mesh axes."""

    mesh: dict[str, int]
    must: set[tuple[str, str]]
    may: set[tuple[str, str]] = field(default_factory=set)
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


FSDP = {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")}
# An embedding's rows and gradients; the exchange of halves that ends a scatter in two
# steps.
EXCHANGE = {("all-to-all", "fsdp"), ("collective-permute", "fsdp")}
MOE = {
    "mlp": None,
    "moe": {"num_experts": 8, "experts_per_token": 2, "d_ff": D, "balance_loss": 0.01},
}


def pipeline(schedule: str, groups: int = 1) -> Strategy:
    return Strategy(
        {"stage": 2, "fsdp": -1},
        FSDP | {("collective-permute", "stage")},
        EXCHANGE | {("all-reduce", "stage")},
        {
            "parallel": {"schedule": schedule, "layer_groups": groups},
            "train": {"micro_batches": MICRO},
        },
    )


def split_sequence(method: str, *kinds: str) -> Strategy:
    return Strategy(
        {"fsdp": -1, "context": 4},
        FSDP | {(kind, "context") for kind in kinds},
        EXCHANGE | {("all-reduce", "context"), ("collective-permute", "context")},
        {"parallel": {"context": method}},
    )


STRATEGIES = {
    "dp": Strategy({"data": -1}, {("all-reduce", "data")}),
    "fsdp": Strategy({"fsdp": -1}, FSDP, EXCHANGE),
    "hsdp": Strategy(
        {"data": 2, "fsdp": -1}, FSDP, EXCHANGE | {("all-reduce", "data")}
    ),
    "zero1": Strategy(
        {"fsdp": -1},
        {("all-reduce", "fsdp"), ("all-gather", "fsdp")},
        EXCHANGE,
        {"sharding": {"storage": WHOLE, "gradients": WHOLE, "optimizer": {}}},
    ),
    "zero2": Strategy(
        {"fsdp": -1}, FSDP, EXCHANGE, {"sharding": {"storage": WHOLE, "gradients": {}}}
    ),
    "tp+sp": Strategy(
        {"fsdp": -1, "tensor": 4},
        FSDP | {("all-gather", "tensor"), ("reduce-scatter", "tensor")},
        EXCHANGE | {("collective-permute", "tensor")},
        {"sharding": {"compute": {"residual": ["context", "tensor"]}}},
    ),
    "cp all-gather": split_sequence("all_gather", "all-gather", "reduce-scatter"),
    "cp ring": split_sequence("ring", "collective-permute"),
    "cp ulysses": split_sequence("ulysses", "all-to-all"),
    # All-reduces over stages are of the embedding's and the head's gradients alone.
    "pp gpipe": pipeline("gpipe"),
    "pp circular": pipeline("circular", 2),
    "pp 1f1b": pipeline("1f1b"),
    "ep": Strategy(
        {"fsdp": -1, "expert": 8},
        FSDP | {("ragged-all-to-all", "expert")},
        EXCHANGE
        | {("all-reduce", "expert"), ("all-to-all", "expert")}
        # Layers without experts rest on both axes, and are gathered in two steps, one
        # on each.
        | {
            (kind, axes)
            for kind in ("all-gather", "reduce-scatter", "all-to-all")
            for axes in ("fsdp+expert", "expert")
        },
        model=MOE,
    ),
}


@cache
def compile_strategy(machine: str, name: str) -> CompiledStep:
    strategy = STRATEGIES[name]
    width = WIDTHS[machine]
    machine = FEWER.get(machine, machine)
    devices = parse_topology(machine).devices
    rest = devices // prod(max(size, 1) for size in strategy.mesh.values())
    mesh = {"fsdp": 1} | {
        axis: rest if n == -1 else n for axis, n in strategy.mesh.items()
    }
    config = small_run(
        1, devices, strategy.model, width, mesh=mesh, **strategy.settings
    )
    return compile_step(config, machine)


def portable(kind: str, machine: str) -> str:
    """What stands in for a collective that a machine does not have."""
    return (
        "all-to-all" if (kind, machine) == ("ragged-all-to-all", "v5e:16x16") else kind
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_sends_over_its_own_axes(machine, name):
    strategy = STRATEGIES[name]
    matrix = 2 * WIDTHS[machine] ** 2
    step = compile_strategy(machine, name)
    # Smaller ones are sums of norms and metrics; integers are tokens.
    large = {
        (c.kind, c.axes)
        for c in step.read_cost().collectives
        if c.payload_bytes >= matrix // 32 and not c.shape.startswith("s32")
    }
    must = {(portable(kind, machine), axes) for kind, axes in strategy.must}
    assert must <= large, f"missing: {must - large}"
    allowed = must | strategy.may
    assert large <= allowed, f"unexpected: {large - allowed}"
    if name == "ep" and parse_topology(machine).platform == "tpu":
        calls = read_program_traffic(step.compiled.as_text()).custom_calls
        kernels = " ".join(call.op_name for call in calls)
        assert "grouped_matmul" in kernels
        assert "grouped_outer" in kernels


@pytest.mark.parametrize("name", ["pp gpipe", "pp circular", "pp 1f1b"])
def test_no_layer_crosses_stages(machine, name):
    """What is all-reduced over stages is at most the embedding and the head, once a
    step."""
    cost = compile_strategy(machine, name).read_cost()
    width = WIDTHS[machine]
    sums = [c for c in cost.collectives if c.kind == "all-reduce" and "stage" in c.axes]
    assert (
        sum(c.payload_bytes * c.count for c in sums) <= 1.1 * 4 * 2 * width * 2 * width
    )
    moved = cost.wire_bytes(kind="collective-permute", axes="stage")
    activation = SEQ * width * 2
    assert moved >= 2 * MICRO * activation
