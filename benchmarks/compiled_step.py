"""The training step as the TPU compiler compiles it, beside a peer's; needs no
accelerator.

    python benchmarks/compiled_step.py [CASE ...] [--list] [--dump DIR] [--overrides
    key=value ...] python benchmarks/compiled_step.py CASE --depths 32 80 --rounds 3

Needs the `tpu` extra. A case is the model, batch, sequence, optimizer (AdamW, fp32
master, bf16 compute), remat and mesh of a row of MaxText 0.2.5's, measured with its own
ahead-of-time tool (jax 0.11.1, libtpu 0.0.46, splash attention, default XLA flags). All
figures are one device's: memory in GB (1e9), matrix products in TFLOP and bytes sent in
GB a step, every loop's trips counted (maxlm/plan/compiled/cost.py), beside the peer's
and beside what `maxlm plan` says. The peer's attention is in kernels whose products are
not counted, so ours stands apart. One case takes a minute or three. With --depths:
seconds to trace and to compile the same step with as many layers, alternately, and
their ratio to the first depth's.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cases import add_cases, chosen
from program_traffic import read_program_traffic
from rich.console import Console

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.plan.compiled.tables import render_compiler_tables
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.plan.topology import parse_topology
from maxlm.run.config import RunConfig

MB, GB, TERA = 1e6, 1e9, 1e12


@dataclass(frozen=True)
class Peer:
    """A row of the peer's, in GB and TFLOP; None: not measured."""

    arguments: float
    temp: float
    wire: float
    parts: dict[str, float]
    matmul: float | None = None


@dataclass(frozen=True)
class StepCase:
    run: str
    """A shipped recipe."""
    topology: str
    rows: int
    """Sequences a device."""
    seq_len: int
    mesh: dict[str, int]
    peer: Peer
    settings: tuple[str, ...] = ("model.remat=full",)
    others: dict[str, Peer] = field(default_factory=dict)
    """The peer's other rows for the same case."""

    def overrides(self) -> list[str]:
        devices = parse_topology(self.topology).devices
        return [
            f"data.batch_size={self.rows * devices}",
            f"data.seq_len={self.seq_len}",
            *(f"mesh.{axis}={size}" for axis, size in self.mesh.items()),
            *self.settings,
        ]


SEQUENCE_PARALLEL = ("model.remat=full", "sharding.compute.residual=[context,tensor]")
LLAMA2, LLAMA3 = "runs/llama2_7b", "runs/llama3_8b"
CASES = {
    "llama2-7b-fsdp32": StepCase(
        LLAMA2,
        "v5p-64",
        *(4, 4096, {"fsdp": 32}),
        Peer(2.53, 16.04, 40.3, {"all-gather": 10.0, "collective-permute": 30.0}, 814),
        others={
            "windowed einsums off": Peer(
                2.53, 13.92, 51.3, {"all-gather": 25.4, "all-reduce": 25.6}, 814
            )
        },
    ),
    # The peer offers "full" above, or "minimal": 650 TFLOP and 58 GB.
    "llama2-7b-fsdp32-mlp": StepCase(
        LLAMA2,
        "v5p-64",
        *(4, 4096, {"fsdp": 32}),
        Peer(2.53, 55.66, 40.9, {"collective-permute": 40.3}, 650),
        ("model.remat=mlp",),
    ),
    "llama2-7b-fsdp8-tensor4": StepCase(
        LLAMA2,
        "v5p-64",
        *(4, 4096, {"fsdp": 8, "tensor": 4}),
        Peer(
            *(2.53, 17.27, 183.7),
            {"all-gather": 71.0, "reduce-scatter": 40.0, "collective-permute": 72.5},
            814,
        ),
        SEQUENCE_PARALLEL,
    ),
    "llama2-7b-v5e-fsdp256": StepCase(
        LLAMA2,
        "v5e-256",
        *(4, 4096, {"fsdp": 256}),
        Peer(0.32, 9.68, 103.0, {"all-gather": 76.3, "all-reduce": 26.4}, 814),
    ),
    "llama3-8b-fsdp32": StepCase(
        LLAMA3,
        "v5p-64",
        *(2, 8192, {"fsdp": 32}),
        Peer(3.01, 18.76, 44.9, {"all-gather": 10.9, "collective-permute": 33.7}, 905),
    ),
    "llama3-8b-fsdp8-tensor4": StepCase(
        LLAMA3,
        "v5p-64",
        *(2, 8192, {"fsdp": 8, "tensor": 4}),
        Peer(
            *(3.01, 19.78, 184.9),
            {"all-gather": 71.6, "reduce-scatter": 40.3, "collective-permute": 72.8},
            905,
        ),
        SEQUENCE_PARALLEL,
    ),
    "mixtral-8x7b-fsdp32": StepCase(
        "runs/mixtral_8x7b",
        "v5p-64",
        *(4, 4096, {"fsdp": 32}),
        Peer(17.52, 32.69, 361.1, {"all-gather": 180.2, "all-reduce": 174.8}),
    ),
    "mixtral-8x7b-fsdp4-expert8": StepCase(
        "runs/mixtral_8x7b",
        "v5p-64",
        *(4, 4096, {"fsdp": 4, "expert": 8}),
        Peer(17.52, 41.55, 268.1, {"ragged-all-to-all": 225.5, "all-gather": 22.4}),
    ),
}


def measure(name: str, case: StepCase, extra: list[str], dump: Path | None) -> None:
    """Compile one case and print it."""
    from maxlm.plan.compiled.program import (
        compare_with_compiled_step,
        compile_step,
        compute_peak_bytes,
    )

    config = load_config(RunConfig, case.run, [*case.overrides(), *extra]).value
    mesh = " × ".join(f"{axis} {size}" for axis, size in case.mesh.items())
    print(
        f"\n{name}: {case.rows}×{case.seq_len} a device, {case.topology}, {mesh}",
        flush=True,
    )
    if extra:
        print(f"  with {' '.join(extra)}")
    step = compile_step(config, case.topology)
    print(f"  traced and compiled in {step.seconds:.1f} s")
    hlo_text = step.compiled.as_text()
    cost = step.read_cost()
    memory = step.compiled.memory_analysis()
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{name}.hlo").write_text(hlo_text)
    traffic = read_program_traffic(hlo_text)
    kinds = sorted(
        {kind for kind, _ in cost.wire_by_kind_and_axes()} | set(case.peer.parts)
    )
    ours: dict[str, float] = {
        "arguments, GB": memory.argument_size_in_bytes / GB,
        "temp, GB": memory.temp_size_in_bytes / GB,
        "arguments + temp, GB": (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes
        )
        / GB,
        "peak, GB": compute_peak_bytes(memory) / GB,
        "matmul, TFLOP": cost.matmul_flops / TERA,
        "attention matmul, TFLOP": cost.attention_flops / TERA,
        "main memory traffic, GB": traffic.memory_bytes / GB,
        "wire, GB": cost.wire_bytes() / GB,
        **{f"  {kind}": cost.wire_bytes(kind=kind) / GB for kind in kinds},
    }
    peers = {"MaxText": case.peer, **case.others}
    header = "".join(f"{peer:>{max(len(peer), 8)}} {'ratio':>6}  " for peer in peers)
    print(f"  {'':<26}{'maxlm':>9}  {header}".rstrip())
    for label, value in ours.items():
        cells = ""
        for peer, row in peers.items():
            theirs = _theirs(row).get(label)
            ratio = value / theirs if theirs else None
            cells += f"{_figure(theirs):>{max(len(peer), 8)}} {_figure(ratio):>6}  "
        print(f"  {label:<26}{value:>9.2f}  {cells}".rstrip())
    _print_wire(cost, traffic)
    machine = Machine.from_name(case.topology)
    plan = plan_run(config, machine)
    verdict = compare_with_compiled_step(plan, step, machine.chip.memory_bytes)
    Console(width=120).print(render_compiler_tables(verdict))


def measure_depths(
    name: str, case: StepCase, extra: list[str], depths: list[int], rounds: int
) -> None:
    """Seconds to trace and compile one case with so many layers: medians, after a round
    that is not counted (the first compilation also loads the compiler)."""
    from maxlm.plan.compiled.program import compile_step

    taken: dict[int, list[float]] = {depth: [] for depth in depths}
    for number in range(rounds + 1):
        for depth in depths:
            overrides = [*case.overrides(), f"model.num_layers={depth}", *extra]
            config = load_config(RunConfig, case.run, overrides).value
            seconds = compile_step(config, case.topology).seconds
            print(
                f"{name}, {depth} layers, round {number}: {seconds:.1f} s", flush=True
            )
            if number:
                taken[depth].append(seconds)
    first = median(taken[depths[0]])
    for depth, seconds in taken.items():
        print(
            f"{depth:>4} layers: median {median(seconds):.1f} s, "
            f"{median(seconds) / first:.2f}"
        )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _theirs(row: Peer) -> dict[str, float | None]:
    return {
        "arguments, GB": row.arguments,
        "temp, GB": row.temp,
        "arguments + temp, GB": row.arguments + row.temp,
        "matmul, TFLOP": row.matmul,
        "wire, GB": row.wire,
        **{f"  {kind}": value for kind, value in row.parts.items()},
    }


def _print_wire(cost: Any, traffic: Any) -> None:
    print("  on the wire, by kind and mesh axes, GB:")
    for (kind, axes), size in cost.wire_by_kind_and_axes().items():
        print(f"    {kind:<20}{axes:<14}{size / GB:>9.3f}")
    large = [
        c for c in cost.collectives if c.kind == "all-reduce" and c.payload_bytes > MB
    ]
    print(f"  all-reduces over 1 MB: {len(large) or 'none'}")
    for c in large:
        size = f"{c.payload_bytes / MB:8.1f} MB"
        print(f"    {c.count:>4} × {size} over {c.axes}: {c.shape} {c.op_name}")
    for c in traffic.custom_calls:
        flops = (
            ""
            if c.flops is None
            else f", {c.flops / TERA:.1f} TFLOP by its own account"
        )
        print(f"  not seen by the compiler: {c.count} × {c.target} {c.op_name}{flops}")
    for loop in cost.unknown_loops:
        print(f"  counted once, trips unknown: {loop}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_cases(parser)
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="write the compiled HLO there"
    )
    parser.add_argument(
        "--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="change the run"
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=int,
        metavar="LAYERS",
        help="time compilation at these depths",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of --depths; default 3")
    args = parser.parse_args()
    names = chosen(parser, args, CASES)
    # This process only compiles: whatever accelerator is here stays untouched.
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        for name in names:
            if args.depths:
                measure_depths(
                    name, CASES[name], args.overrides, args.depths, args.rounds
                )
                continue
            measure(name, CASES[name], args.overrides, args.dump)
    except MaxlmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
