"""Static benchmark of the kernels for a TPU that need not be here.

``python -m pallas_kernels.bench --chip v5p --kernel attention --head-dim 128 --seq 4096 --peers``
compiles each contender with the TPU's compiler (``pip install libtpu``), reads its final schedule
and counts the cycles that one call takes. Waits for memory are not in a schedule.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pallas_kernels.static import CHIPS, CallCosts, Chip, CompileError, KernelCosts, Spec, measure
from pallas_kernels.static.benchmarks import BENCHMARKS, Benchmark, Contender
from pallas_kernels.static.measure import has_compiler

# Columns of unit use: what a schedule's units are called there.
_UNITS = {
    "MXU": ("MATMUL", "MXU"),
    "VPU": ("VALU",),
    "XLU": ("XLU",),
    "EUP": ("EUP",),
    "load": ("VLOAD",),
    "store": ("VSTORE",),
}
_CALL = ("kernel", "pass", "blocks", "cores", "cycles", "µs", "× bound", "× best peer", "MXU work")
_LOOP = ("inner loop of", "pass", "runs", "cycles a run", "spill stores", "spill loads")


class CountError(Exception):
    """A count that cannot be right."""


@dataclass(frozen=True)
class Row:
    """A contender's best program in one direction."""

    contender: Contender
    backward: bool
    spec: Spec
    costs: CallCosts

    @property
    def kernels(self) -> list[KernelCosts]:
        return [k for k in self.costs.kernels if k.backward == self.backward]

    @property
    def microseconds(self) -> float:
        return self.costs.microseconds(backward=self.backward)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 2 where the request is bad or nothing could be measured."""
    options = _parser().parse_args(argv)
    try:
        benchmark = BENCHMARKS[options.kernel](options)
        if not has_compiler():
            raise ValueError("no TPU compiler here: pip install libtpu")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows = []
    for contender in benchmark.contenders:
        for backward in (False, True):
            try:
                rows.append(best(contender, benchmark, options.chip, backward=backward))
            except (CompileError, CountError, ValueError) as error:
                which = f"{contender.name} {'backward' if backward else 'forward'}"
                print(f"bench: {which}: {error}", file=sys.stderr)
    if not rows:
        return 2
    print(report(benchmark, rows, CHIPS[options.chip], options.chip))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description="Static cycles of kernels by the TPU's own compiler; needs no TPU, but libtpu.",
        epilog="Each program takes the compiler from seconds to a minute.",
    )
    parser.add_argument("--chip", choices=CHIPS, default="v5p", help="default v5p")
    parser.add_argument("--kernel", choices=BENCHMARKS, default="attention")
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--heads", type=_positive, default=8, help="of queries and keys; default 8")
    parser.add_argument("--seq", type=_positive, default=4096, help="tokens a row; default 4096")
    parser.add_argument("--head-dim", type=_positive, default=128, help="default 128")
    parser.add_argument(
        "--mask", default="causal", help="causal (default), window:TOKENS, segments:COUNT (packed)"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also jax's splash and flash attention, and tokamax's where it is installed",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def best(
    contender: Contender,
    benchmark: Benchmark,
    chip: str,
    *,
    backward: bool,
    measure: Callable[[Spec, str], CallCosts] = measure,
) -> Row:
    """The contender's fastest program.

    Raises:
        CompileError: none compiles; the last reason.
        CountError: fewer matrix products counted than the problem needs.
    """
    rows: list[Row] = []
    reason: Exception = CompileError("no block sizes divide this sequence")
    for spec in contender.gradient if backward else contender.forward:
        try:
            rows.append(Row(contender, backward, spec, measure(spec, chip)))
        except CompileError as error:
            reason = error
    if not rows:
        raise reason
    fastest = min(rows, key=lambda row: row.microseconds)
    needed = benchmark.backward_flops if backward else benchmark.forward_flops
    counted = fastest.costs.mxu_flops(backward=backward)
    if not fastest.kernels:
        raise CountError("no Pallas kernel in the program")
    if counted < 0.99 * needed:
        raise CountError(f"{counted:.3g} FLOPs counted where {needed:.3g} are needed")
    return fastest


def report(benchmark: Benchmark, rows: Sequence[Row], chip: Chip, name: str) -> str:
    """Two Markdown tables: whole calls, then inner loops."""
    bounds = {
        False: benchmark.forward_flops / chip.peak_flops * 1e6,
        True: benchmark.backward_flops / chip.peak_flops * 1e6,
    }
    lines = [
        f"{benchmark.title}, on one {name}: {chip.clock / 1e9:.2f} GHz, "
        f"{chip.cores} core{'s' * (chip.cores > 1)}; matrix units' lower bound "
        f"{bounds[False]:.1f} µs forward, {bounds[True]:.1f} µs backward.",
        "",
        *_table(
            [*_CALL, *(f"{unit} %" for unit in _UNITS), "spills", "temp MB"],
            [_call_cells(row, rows, bounds, benchmark) for row in rows],
        ),
        "",
        *_table(
            [*_LOOP, *(f"{unit} %" for unit in _UNITS)],
            [cells for row in rows for cells in _loop_cells(row)],
        ),
        "",
        "Cycles: of the busiest core, all kernels of the pass. MXU work: products that the matrix "
        "units had time for, over those the mask needs. Spills: stores and loads in the inner "
        "loops, as scheduled. Unit use: of capacity, while the kernels (the loop) run. Temp: of "
        "the pass's program, the backward's with its forward.",
    ]
    return "\n".join(lines)


def _call_cells(
    row: Row, rows: Sequence[Row], bounds: dict[bool, float], benchmark: Benchmark
) -> list[str]:
    peers = [r.microseconds for r in rows if r.contender.peer and r.backward == row.backward]
    needed = benchmark.backward_flops if row.backward else benchmark.forward_flops
    cycles = sum(k.cycles for k in row.kernels)

    def use(units: Sequence[str]) -> str:
        spent = sum(k.cycles * k.use.get(unit, 0.0) for k in row.kernels for unit in units)
        return f"{100 * spent / cycles:.0f}"

    return [
        row.contender.name,
        "backward" if row.backward else "forward",
        _blocks(row.spec, row.backward),
        "+".join(str(k.cores) for k in row.kernels),
        str(cycles),
        f"{row.microseconds:.1f}",
        f"{row.microseconds / bounds[row.backward]:.2f}",
        f"{row.microseconds / min(peers):.2f}" if peers else "",
        f"{row.costs.mxu_flops(backward=row.backward) / needed:.2f}",
        *(use(units) for units in _UNITS.values()),
        str(sum(k.spills for k in row.kernels)),
        f"{row.costs.temp_bytes / 1e6:.1f}",
    ]


def _loop_cells(row: Row) -> list[list[str]]:
    return [
        [
            f"{row.contender.name} {kernel.name}",
            "backward" if row.backward else "forward",
            str(loop.runs),
            f"{loop.cycles_per_run:.0f}",
            str(loop.spill_stores),
            str(loop.spill_loads),
            *(
                f"{100 * sum(loop.use.get(unit, 0.0) for unit in units):.0f}"
                for units in _UNITS.values()
            ),
        ]
        for kernel in row.kernels
        for loop in kernel.inner_loops
    ]


def _blocks(spec: Spec, backward: bool) -> str:
    """Block sizes that the pass used, as the program was asked."""
    names = ("backward", "backward_dq") if backward else ("forward",)
    return " ".join("/".join(map(str, spec.kwargs[n])) for n in names if spec.kwargs.get(n))


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"

    return [line(header), line(["-" * w for w in widths]), *map(line, rows)]


if __name__ == "__main__":
    sys.exit(main())
