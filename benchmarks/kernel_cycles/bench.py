"""Static benchmark of the kernels for a TPU that need not be here.

``python -m benchmarks.kernel_cycles.bench --kernel attention --chip v5p --seq 4096
--peers`` compiles each contender with the TPU's compiler (``pip install libtpu``),
reads its final schedule and counts the cycles that one call takes. Waits for memory are
not in a schedule. ``--all --peers`` does so for every shape of attention on v5p and
v6e, and prints one table; it keeps what it measured and goes on from there when it is
run again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernel_cycles.contests import BENCHMARKS, Benchmark
from benchmarks.kernel_cycles.contests.cache import Cache
from benchmarks.kernel_cycles.contests.contest import Row, contest
from benchmarks.kernel_cycles.contests.linear_recurrence import RECURRENCE_KINDS
from benchmarks.kernel_cycles.contests.survey import survey
from benchmarks.kernel_cycles.contests.table import table
from benchmarks.kernel_cycles.static import CHIPS, TpuChip, measure
from benchmarks.kernel_cycles.static.measure import Spec, has_compiler
from benchmarks.kernel_cycles.static.problems import Shape, shapes
from benchmarks.kernel_cycles.tuning import versions

ALL_CHIPS = ("v5p", "v6e")
_CACHE = Path("~/.cache/pallas_kernels/bench")
# Columns of unit use: what a schedule's units are called there.
_UNITS = {
    "MXU": ("MATMUL", "MXU"),
    "VPU": ("VALU",),
    "XLU": ("XLU",),
    "EUP": ("EUP",),
    "load": ("VLOAD",),
    "store": ("VSTORE",),
}
_CALL = (
    "kernel",
    "pass",
    "blocks",
    "cores",
    "cycles",
    "µs",
    "× bound",
    "× best peer",
    "MXU work",
)
_LOOP = ("inner loop of", "pass", "runs", "cycles a run", "spill stores", "spill loads")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 2 where the request is bad or nothing could be measured."""
    options = _parser().parse_args(argv)
    try:
        return _every_shape(options) if options.all else _one_problem(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
    except OSError as error:
        print(f"bench: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


def _one_problem(options: argparse.Namespace) -> int:
    shape = Shape(
        options.head_dim or 128, options.seq or 4096, options.mask or "causal"
    )
    benchmark = _benchmark(options, shape)
    _need_compiler()
    costs = Cache(options.cache.expanduser()).measure if options.cache else measure
    printed = False
    for chip in options.chip or ["v5p"]:
        rows: list[Row] = []
        for of in benchmark.passes:
            for name, outcome in contest(benchmark.contenders, of, chip, costs).items():
                if isinstance(outcome, Row):
                    rows.append(outcome)
                else:
                    print(f"bench: {chip} {name} {of.name}: {outcome}", file=sys.stderr)
        if rows:
            rows.sort(key=lambda row: benchmark.contenders.index(row.contender))
            print(report(benchmark, rows, CHIPS[chip], chip))
            printed = True
    return 0 if printed else 2


def _every_shape(options: argparse.Namespace) -> int:
    if options.kernel != "attention":
        raise ValueError(f"--all has shapes of attention, none of {options.kernel}")
    selected_shapes = shapes(options.head_dim, options.seq, options.mask)
    problems = {shape: _benchmark(options, shape) for shape in selected_shapes}
    _need_compiler()
    cache = Cache((options.cache or _CACHE).expanduser())
    results = survey(
        problems, options.chip or ALL_CHIPS, cache.measure, cache.has, _say
    )
    print(
        f"attention, batch {options.batch}, heads {options.heads}, bf16; "
        f"{versions('jax', 'libtpu', 'tokamax')}\n"
    )
    print(table(results))
    measured = (outcome for outcome in results.values() for outcome in outcome.values())
    return 0 if any(isinstance(outcome, Row) for outcome in measured) else 2


def _benchmark(options: argparse.Namespace, shape: Shape) -> Benchmark:
    """
    Raises:
        ValueError: a mask that is none, or does not go with the sequence.
    """
    return BENCHMARKS[options.kernel](
        argparse.Namespace(**vars(options) | shape._asdict())
    )


def _need_compiler() -> None:
    if not has_compiler():
        raise ValueError("no TPU compiler here: pip install libtpu")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_cycles.bench",
        description="Static cycles of kernels by the TPU's own compiler; needs no TPU, "
        "but libtpu.",
        epilog="Each program takes the compiler from seconds to a minute.",
    )
    parser.add_argument(
        "--chip",
        action="append",
        choices=CHIPS,
        help="may be repeated; default v5p, with --all v5p and v6e",
    )
    parser.add_argument("--kernel", choices=BENCHMARKS, default="attention")
    parser.add_argument(
        "--all",
        action="store_true",
        help="one table of every shape of attention that --seq, --head-dim and --mask "
        "leave",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keep what is measured there, and measure only what is not there; default "
        "with --all "
        f"{_CACHE}",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also jax's splash and flash attention, tokamax's where it is installed; "
        "jax's "
        "megablox; jax's paged and ragged paged attention",
    )
    sizes = {
        "attention": [
            ("--batch", 1, ""),
            ("--heads", 8, "of queries and keys; "),
        ],
        "grouped_matmul": [
            ("--rows", 8192, "of all groups; "),
            ("--groups", 8, "of sizes drawn at random, always alike; "),
            ("--d", 4096, "contracted; "),
            ("--f", 14336, "columns of a group's kernel; "),
        ],
        "linear_recurrence": [
            ("--tokens", 4096, "of one row; "),
            ("--key-heads", 8, "of queries and keys; "),
            ("--value-heads", 16, "a multiple of these; "),
            ("--features", 128, "of keys and of values; "),
            ("--chunk-size", 64, "tokens of a chunk, a power of two; "),
        ],
        "paged_attention": [
            (
                "--sequences",
                8,
                "that decode a token each; --seq is the tokens they have; ",
            ),
            ("--chunk", 512, "last tokens of one sequence, prefilled; "),
            ("--page", 16, "tokens of a page; "),
        ],
    }
    for title, arguments in sizes.items():
        group = parser.add_argument_group(title)
        for name, default, text in arguments:
            group.add_argument(
                name,
                type=_positive,
                default=default,
                metavar="N",
                help=f"{text}default {default}",
            )
        if title == "linear_recurrence":
            group.add_argument(
                "--kind",
                choices=RECURRENCE_KINDS,
                default="gated_delta",
                help="default gated_delta",
            )
        if title == "attention":
            group.add_argument(
                "--seq", type=_positive, metavar="N", help="tokens a row; default 4096"
            )
            group.add_argument(
                "--head-dim", type=_positive, metavar="N", help="default 128"
            )
            group.add_argument(
                "--mask",
                help="causal (default), window:TOKENS, segments:COUNT (packed)",
            )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def report(benchmark: Benchmark, rows: Sequence[Row], chip: TpuChip, name: str) -> str:
    """Two Markdown tables: whole calls, then inner loops."""
    bounds = {of.name: of.flops / chip.peak_flops * 1e6 for of in benchmark.passes}
    lines = [
        f"{benchmark.title}, on one {name}: {chip.clock_hz / 1e9:.2f} GHz, "
        f"{chip.num_cores} core{'s' * (chip.num_cores > 1)}; matrix units' lower bound "
        f"{', '.join(f'{bound:.1f} µs {name}' for name, bound in bounds.items())}.",
        "",
        *_table(
            [*_CALL, *(f"{unit} %" for unit in _UNITS), "spills", "read MB", "temp MB"],
            [_call_cells(row, rows, bounds[row.of.name]) for row in rows],
        ),
        "",
        *_table(
            [*_LOOP, *(f"{unit} %" for unit in _UNITS)],
            [cells for row in rows for cells in _loop_cells(row)],
        ),
        "",
        "Cycles: of the busiest core, all kernels of the pass. MXU work: products that "
        "the matrix "
        "units had time for, over those the problem needs. Spills: stores and loads in "
        "the inner "
        "loops, as scheduled. Unit use: of capacity, while the kernels (the loop) run. "
        "Read: from "
        "HBM, where a copy that hangs on a condition counts as done. Temp: of the "
        "pass's program, "
        "the backward's with its forward.",
    ]
    return "\n".join(lines)


def _call_cells(row: Row, rows: Sequence[Row], bound: float) -> list[str]:
    peers = [r.microseconds for r in rows if r.contender.peer and r.of == row.of]
    cycles = sum(k.cycles for k in row.kernels)

    def use(units: Sequence[str]) -> str:
        spent = sum(
            k.cycles * k.use.get(unit, 0.0) for k in row.kernels for unit in units
        )
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
        f"{sum(k.hbm_read_bytes for k in row.kernels) / 1e6:.1f}",
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
    return " ".join(
        "/".join(map(str, spec.kwargs[n])) for n in names if spec.kwargs.get(n)
    )


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return (
            f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"
        )

    return [line(header), line(["-" * w for w in widths]), *map(line, rows)]


if __name__ == "__main__":
    sys.exit(main())
