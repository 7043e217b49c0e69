"""Search for the block sizes with which attention is fastest, and keep them in a table.

``python -m benchmarks.kernel_cycles.tune --chip v5p --seq 4096 --mask causal --write``
compiles for a TPU that need not be here and counts the cycles of each candidate.
``--all --write`` searches for every shape that the table holds, from what it holds.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.kernel_cycles.static.measure import has_compiler
from benchmarks.kernel_cycles.static.problems import Shape, shapes
from benchmarks.kernel_cycles.tuning import (
    Cost,
    Problem,
    axes,
    descend,
    starts,
    static_cost,
    versions,
)
from pallas_kernels.attention import tuned
from pallas_kernels.attention.tpu_blocks import PASSES, TpuBlocks
from pallas_kernels.attention.tuned import TunedEntry
from pallas_kernels.chips import CHIPS

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ALL_CHIPS = ("v6e", "v5p")


def main(argv: Sequence[str] | None = None) -> int:
    """Search, print, and write where asked; 2 where the request is bad."""
    options = _parser().parse_args(argv)
    try:
        chips = _chips(options)
        for problem in _problems(options):
            for chip in chips:
                entry = _on_tpu(problem, chip, options.most)
                _keep(entry, options.write)
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_cycles.tune",
        description="Find attention's fastest block sizes: by static cycles of the "
        "TPU's own "
        "compiler (it needs no TPU, but libtpu).",
        epilog="A candidate takes the compiler from seconds to a minute.",
    )
    parser.add_argument(
        "--chip", action="append", choices=CHIPS, help="a TPU; may be repeated"
    )
    parser.add_argument("--head-dim", type=_positive, help="default 128")
    parser.add_argument(
        "--v-head-dim", type=_positive, help="of v; default as of q and k"
    )
    parser.add_argument("--seq", type=_positive, help="tokens a row; default 4096")
    parser.add_argument(
        "--mask",
        help="causal (default), full, window:TOKENS, segments:COUNT (packed, causal)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    parser.add_argument("--heads", type=_positive, default=8, help="default 8")
    parser.add_argument(
        "--pass", dest="direction", choices=PASSES, help="default: both"
    )
    parser.add_argument(
        "--most", type=_positive, default=12, help="compiles a search; default 12"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every shape of the committed table that the other options leave",
    )
    parser.add_argument(
        "--write", action="store_true", help="keep what is found in the table"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _chips(options: argparse.Namespace) -> list[str]:
    """The TPUs to compile for."""
    chips = options.chip or (ALL_CHIPS if options.all else [])
    if not chips:
        raise ValueError("name a TPU with --chip, or --all")
    if not has_compiler():
        raise ValueError("no TPU compiler here: pip install libtpu")
    return list(chips)


def _problems(options: argparse.Namespace) -> Iterator[Problem]:
    selected_shapes = [
        Shape(options.head_dim or 128, options.seq or 4096, options.mask or "causal")
    ]
    if options.all:
        selected_shapes = shapes(options.head_dim, options.seq, options.mask)
    for head_dim, seq, mask in selected_shapes:
        for direction in [options.direction] if options.direction else PASSES:
            problem = Problem(
                direction,
                head_dim,
                options.v_head_dim or head_dim,
                seq,
                mask,
                DTYPES[options.dtype],
                options.heads,
            )
            problem.segment_ids()  # refuses masks that are none
            yield problem


def _on_tpu(problem: Problem, name: str, most: int) -> TunedEntry:
    chip = CHIPS[name]
    print(f"{name} {problem}", flush=True)

    costs: dict[TpuBlocks, Cost] = {}

    def rank(blocks: TpuBlocks) -> float:
        cost = static_cost(problem, chip, blocks)
        costs[blocks] = cost
        micro = cost.cycles / chip.clock_hz * 1e6
        print(
            f"  {tuple(blocks)}: {cost.cycles} cycles, {micro:.1f} µs, {cost.spills} "
            f"spills"
        )
        sys.stdout.flush()
        return cost.rank

    blocks, _ = descend(starts(problem, chip), axes(problem, chip), rank, most)
    cycles, spills = costs[blocks]
    return problem.entry(name, blocks, cycles, versions("jax", "libtpu"), spills)


def _keep(entry: TunedEntry, write: bool) -> None:
    print(f"best: {entry.blocks}, {entry.cost}", flush=True)
    if write:
        table = Path(str(tuned.TABLE))
        table.write_text(
            tuned.format_table([*tuned.parse_table(table.read_text()), entry])
        )
        tuned.load_table.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
