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
from pallas_kernels.static.benchmarks import BENCHMARKS, Benchmark, Contender, Pass
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
    """A contender's best program of a pass."""

    contender: Contender
    of: Pass
    spec: Spec
    costs: CallCosts

    @property
    def kernels(self) -> list[KernelCosts]:
        return [k for k in self.costs.kernels if self.of.backward in (None, k.backward)]

    @property
    def microseconds(self) -> float:
        return self.costs.microseconds(backward=self.of.backward)

    @property
    def mxu_flops(self) -> float:
        return self.costs.mxu_flops(backward=self.of.backward)


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
        for of in benchmark.passes:
            try:
                rows.append(best(contender, of, options.chip))
            except (CompileError, CountError, ValueError) as error:
                print(f"bench: {contender.name} {of.name}: {error}", file=sys.stderr)
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
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also jax's splash and flash attention, tokamax's where it is installed; jax's "
        "megablox; of linear_cross_entropy there are none",
    )
    sizes = {
        "attention": [
            ("--batch", 1, ""),
            ("--heads", 8, "of queries and keys; "),
            ("--seq", 4096, "tokens a row; "),
            ("--head-dim", 128, ""),
        ],
        "grouped_matmul": [
            ("--rows", 8192, "of all groups; "),
            ("--groups", 8, "of sizes drawn at random, always alike; "),
            ("--f", 14336, "columns of a group's kernel; "),
        ],
        "linear_cross_entropy": [("--tokens", 8192, ""), ("--vocab", 128256, "")],
        "grouped_matmul and linear_cross_entropy": [("--d", 4096, "contracted; ")],
    }
    for title, arguments in sizes.items():
        group = parser.add_argument_group(title)
        for name, default, text in arguments:
            group.add_argument(
                name, type=_positive, default=default, metavar="N", help=f"{text}default {default}"
            )
        if title == "attention":
            group.add_argument(
                "--mask",
                default="causal",
                help="causal (default), window:TOKENS, segments:COUNT (packed)",
            )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def best(
    contender: Contender,
    of: Pass,
    chip: str,
    *,
    measure: Callable[[Spec, str], CallCosts] = measure,
) -> Row:
    """The contender's fastest program.

    Raises:
        CompileError: none compiles; the last reason.
        CountError: fewer matrix products counted than the problem needs.
    """
    rows: list[Row] = []
    reason: Exception = CompileError("no block sizes divide this problem")
    for spec in contender.programs[of.name]:
        try:
            rows.append(Row(contender, of, spec, measure(spec, chip)))
        except CompileError as error:
            reason = error
    if not rows:
        raise reason
    fastest = min(rows, key=lambda row: row.microseconds)
    if not fastest.kernels:
        raise CountError("no Pallas kernel in the program")
    if fastest.mxu_flops < 0.99 * of.flops:
        raise CountError(f"{fastest.mxu_flops:.3g} FLOPs counted where {of.flops:.3g} are needed")
    return fastest


def report(benchmark: Benchmark, rows: Sequence[Row], chip: Chip, name: str) -> str:
    """Two Markdown tables: whole calls, then inner loops."""
    bounds = {of.name: of.flops / chip.peak_flops * 1e6 for of in benchmark.passes}
    lines = [
        f"{benchmark.title}, on one {name}: {chip.clock / 1e9:.2f} GHz, "
        f"{chip.cores} core{'s' * (chip.cores > 1)}; matrix units' lower bound "
        f"{', '.join(f'{bound:.1f} µs {name}' for name, bound in bounds.items())}.",
        "",
        *_table(
            [*_CALL, *(f"{unit} %" for unit in _UNITS), "spills", "temp MB"],
            [_call_cells(row, rows, bounds[row.of.name]) for row in rows],
        ),
        "",
        *_table(
            [*_LOOP, *(f"{unit} %" for unit in _UNITS)],
            [cells for row in rows for cells in _loop_cells(row)],
        ),
        "",
        "Cycles: of the busiest core, all kernels of the pass. MXU work: products that the matrix "
        "units had time for, over those the problem needs. Spills: stores and loads in the inner "
        "loops, as scheduled. Unit use: of capacity, while the kernels (the loop) run. Temp: of "
        "the pass's program, the backward's with its forward.",
    ]
    return "\n".join(lines)


def _call_cells(row: Row, rows: Sequence[Row], bound: float) -> list[str]:
    peers = [r.microseconds for r in rows if r.contender.peer and r.of == row.of]
    cycles = sum(k.cycles for k in row.kernels)

    def use(units: Sequence[str]) -> str:
        spent = sum(k.cycles * k.use.get(unit, 0.0) for k in row.kernels for unit in units)
        return f"{100 * spent / cycles:.0f}"

    return [
        row.contender.name,
        row.of.name,
        _blocks(row.spec, row.of.blocks),
        "+".join(str(k.cores) for k in row.kernels),
        str(cycles),
        f"{row.microseconds:.1f}",
        f"{row.microseconds / bound:.2f}",
        f"{row.microseconds / min(peers):.2f}" if peers else "",
        f"{row.mxu_flops / row.of.flops:.2f}",
        *(use(units) for units in _UNITS.values()),
        str(sum(k.spills for k in row.kernels)),
        f"{row.costs.temp_bytes / 1e6:.1f}",
    ]


def _loop_cells(row: Row) -> list[list[str]]:
    return [
        [
            f"{row.contender.name} {kernel.name}",
            row.of.name,
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


def _blocks(spec: Spec, names: Sequence[str]) -> str:
    """Block sizes that the pass used, as the program was asked."""
    return " ".join("/".join(map(str, spec.kwargs[n])) for n in names if spec.kwargs.get(n))


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"

    return [line(header), line(["-" * w for w in widths]), *map(line, rows)]


if __name__ == "__main__":
    sys.exit(main())
