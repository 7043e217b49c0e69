"""Linear recurrences in chunks: errors, backward memory on a TPU, time on this CPU.

    python -m benchmarks.linear_recurrence [errors] [memory] [time] [cycles]
        [--kinds KIND ...] [--lengths TOKENS ...]

`errors` compares all kinds with their definition in float64 (outputs and states), with
the sequential scan's gradients in float64, packed documents with separate ones, decoding with
chunks, runs of tokens that are combined with the whole, and with transformers' and
fla-core's torch functions where those are installed; errors are relative to the largest
value where that is above 1. `memory` compiles forward and backward for a v5p (extra
`tpu`), and prints temporary bytes by length, beside a scan's that keeps its states.
`time` runs chunks and the sequential scan alternately, with 4,096 tokens.
`cycles` counts those of the TPU's kernels in the compiler's final schedule, beside
XLA's own operations for the same, whose waits for memory are not counted either.
A row is printed as soon as it is known. `--kinds` and `--lengths` choose what `memory`,
`time` and `cycles` print, lengths only of `memory`.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.cases import time_alternately
from benchmarks.kernel_cycles.contests.linear_recurrence import RECURRENCE_KINDS
from benchmarks.kernel_cycles.static import CHIPS, Spec
from benchmarks.kernel_cycles.static.measure import measure_program
from maxlm.plan.compiled.hlo import Computation, HloModule, parse_hlo
from maxlm.plan.compiled.loops import count_trips
from maxlm.plan.compiled.program import get_topology_devices, has_compiler
from maxlm.plan.topology import Topology, parse_topology
from pallas_kernels.linear_recurrence import (
    apply_run,
    combine_runs,
    find_segment_starts,
    linear_recurrence,
    linear_recurrence_reference,
    linear_recurrence_step,
    summarize_run,
)
from pallas_kernels.linear_recurrence.params import RecurrenceOperands
from tests.pallas_kernels.recurrence_cases import (
    KINDS,
    SCALE,
    RecurrenceCase,
    define_recurrence,
    draw_case,
    draw_cotangents,
)

CHUNK = 64
# T = 1, a chunk, a token beside it on both sides, and more than one block.
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 700)
MB = 1e6


class Choice(NamedTuple):
    """Which measurements to make."""

    kinds: Sequence[str]
    """Of KINDS."""
    lengths: Sequence[int]
    """Tokens, of `memory`."""
    rounds: int
    """Of `time`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {
        "errors": print_errors,
        "memory": print_memory,
        "time": print_times,
        "cycles": print_cycles,
    }
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--rounds", type=int, default=3, help="of time; default 3")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        help="of memory, time and cycles; default all",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[4096, 8192, 16384],
        help="tokens, of memory; default %(default)s",
    )
    options = parser.parse_args()
    choice = Choice(options.kinds, options.lengths, options.rounds)
    for name in options.parts or parts:
        parts[name](choice)
        print()


def print_table(header: list[str], rows: Iterable[list[str]]) -> None:
    """Prints each row as it comes."""
    for line in chain([header, ["---"] * len(header)], rows):
        print(f"| {' | '.join(line)} |", flush=True)


def print_errors(choice: Choice) -> None:
    del choice
    rows = (
        [name, *(f"{error:.1e}" for error in errors)] for name, errors in list_errors()
    )
    print_table(["largest error over T = 1 … 700", *KINDS], rows)
    print()
    print_oracle_errors()


def list_errors() -> Iterator[tuple[str, list[float]]]:
    """Yields what is compared, and its largest error by kind."""
    comparisons: dict[str, Callable[[str, int], float]] = {
        "outputs and states, float64's definition": compare_definition,
        "gradients, float64's sequential scan": compare_gradients,
        "log decays to −20 a token, float64's definition": compare_strong_decays,
        "packed documents, separate ones": compare_packed,
        "token by token, chunks": compare_steps,
        "three runs combined, the whole": compare_runs,
    }
    for name, compare in comparisons.items():
        yield name, [max(compare(kind, T) for T in LENGTHS) for kind in KINDS]


def print_oracle_errors() -> None:
    try:
        from tests.parity.recurrence_oracles import ORACLES, measure_errors
    except ImportError as error:
        print(f"no torch functions to compare with: {error}", file=sys.stderr)
        return
    rows = []
    for name, make_oracle in ORACLES.items():
        try:
            errors = [measure_errors(make_oracle(T), CHUNK) for T in LENGTHS]
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        forward = max(error.forward for error in errors)
        backward = max(error.backward for error in errors)
        rows.append([name, f"{forward:.1e}", f"{backward:.1e}"])
    print_table(["beside", "outputs and states", "gradients"], rows)


def get_error(results: Any, expected: Any) -> float:
    """Returns the largest error of any array, relative where values are above 1."""

    def compare(result, expected) -> float:
        expected = np.asarray(expected, np.float64)
        if expected.size == 0:
            return 0.0
        size = max(1.0, np.abs(expected).max())
        return float(np.abs(np.asarray(result, np.float64) - expected).max() / size)

    return max(jax.tree.leaves(jax.tree.map(compare, results, expected)))


@partial(jax.jit, static_argnums=1)
def run_forward(case: RecurrenceCase, is_reference: bool = False):
    options = {
        "initial_state": case.initial_state,
        "starts": case.starts,
        "scale": SCALE,
    }
    if is_reference:
        return linear_recurrence_reference(*case.operands, **options)
    return linear_recurrence(*case.operands, chunk_size=CHUNK, **options)


@partial(jax.jit, static_argnums=1)
def run_backward(case: RecurrenceCase, is_reference: bool = False):
    def run(operands, state):
        changed = case._replace(operands=operands, initial_state=state)
        return run_forward(changed, is_reference)

    results, pull = jax.vjp(run, case.operands, case.initial_state)
    cotangents = draw_cotangents(case)
    return pull(
        tuple(
            cotangent.astype(result.dtype)
            for cotangent, result in zip(cotangents, results, strict=True)
        )
    )


def compare_definition(kind: str, tokens: int) -> float:
    case = draw_case(kind, tokens)
    return get_error(run_forward(case), define_recurrence(case))


def compare_strong_decays(kind: str, tokens: int) -> float:
    case = draw_case(kind, tokens, decay=0.01, strongest=20.0)
    return get_error(run_forward(case), define_recurrence(case))


def compare_gradients(kind: str, tokens: int) -> float:
    case = draw_case(kind, tokens)
    with jax.enable_x64(True):
        wide_operands, wide_state = jax.tree.map(
            lambda x: x.astype(np.float64), (case.operands, case.initial_state)
        )
        wide_case = RecurrenceCase(wide_operands, wide_state, case.starts)
        expected = run_backward(wide_case, True)
    return get_error(run_backward(case), expected)


def compare_packed(kind: str, tokens: int) -> float:
    """Outputs of two documents in a row, beside those of each one."""
    case = draw_case(kind, tokens, rows=1)
    split = tokens // 3
    ids = (np.arange(tokens) >= split)[None].astype(np.int32)
    case = case._replace(starts=np.asarray(find_segment_starts(ids)))
    packed, _ = run_forward(case)
    operands = jax.tree.map(lambda x: x[:, split:], case.operands)
    state = case.initial_state if split == 0 else np.zeros_like(case.initial_state)
    second = RecurrenceCase(operands, state, np.zeros_like(case.starts[:, split:]))
    separate, _ = run_forward(second)
    return get_error(packed[:, split:], separate)


def compare_steps(kind: str, tokens: int) -> float:
    case = draw_case(kind, tokens)
    step = jax.jit(partial(linear_recurrence_step, scale=SCALE))
    state = jnp.asarray(case.initial_state)
    outputs = []
    for token in range(tokens):
        inputs = jax.tree.map(lambda x, token=token: x[:, token], case.operands)
        output, state = step(*inputs, state=state, starts=case.starts[:, token])
        outputs.append(output)
    return get_error((np.stack(outputs, axis=1), state), run_forward(case))


def compare_runs(kind: str, tokens: int) -> float:
    case = draw_case(kind, max(tokens, 3))
    cuts = np.linspace(0, case.starts.shape[1], 4).astype(int)
    runs = []
    for first, end in pairwise(cuts):
        _, *operands = jax.tree.map(
            lambda x, s=slice(first, end): x[:, s], case.operands
        )
        starts = case.starts[:, first:end]
        runs.append(jax.jit(summarize_run)(*operands, starts=starts))
    whole = combine_runs(runs[0], combine_runs(runs[1], runs[2]))
    _, expected = run_forward(case)
    return get_error(apply_run(whole, case.initial_state), expected)


def make_operands(
    kind: str, tokens: int, heads: int, width: int, dtype: Any
) -> RecurrenceOperands:
    """Operands of one row, as shapes."""
    by_channel, delta = KINDS[kind]
    wide = jax.ShapeDtypeStruct((1, tokens, heads, width), dtype)
    by_head = jax.ShapeDtypeStruct((1, tokens, heads), jnp.float32)
    channels = jax.ShapeDtypeStruct(wide.shape, jnp.float32)
    log_decay = channels if by_channel else by_head
    return RecurrenceOperands(wide, wide, wide, log_decay, by_head if delta else None)


def print_memory(choice: Choice) -> None:
    """A v5p's temporary memory of forward and backward, 16 heads of 128, bf16."""
    machine = parse_topology("v5p:2x2x1")
    if not has_compiler(machine.platform):
        print("memory: no TPU compiler here: pip install libtpu", file=sys.stderr)
        return
    header = ["MB of a v5p, 16 heads of 128", *(f"{T:,}" for T in choice.lengths)]
    header[1] = f"T = {header[1]}"
    print_table(header, list_memory(machine, choice))


def list_memory(machine: Topology, choice: Choice) -> Iterator[list[str]]:
    """Yields a row a kind of chunks, and of the scan, which keeps a state a token, at
    the first length alone."""
    sharding = SingleDeviceSharding(get_topology_devices(machine)[0])
    for kind in choice.kinds:
        for name, function, lengths in (
            ("chunks", linear_recurrence, choice.lengths),
            ("scan", linear_recurrence_reference, choice.lengths[:1]),
        ):
            cells = []
            for tokens in lengths:
                operands = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                    make_operands(kind, tokens, 16, 128, jnp.bfloat16),
                )
                compiled = jax.jit(partial(take_gradients, function)).lower(operands)
                memory = compiled.compile().memory_analysis()
                cells.append(f"{memory.temp_size_in_bytes / MB:,.0f}")
            missing = len(choice.lengths) - len(cells)
            yield [f"{kind}, {name}", *cells, *[""] * missing]


def take_gradients(function: Callable[..., Any], operands: RecurrenceOperands):
    def loss(operands):
        output, state = function(*operands)
        return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    return jax.grad(loss)(operands)


def print_times(choice: Choice) -> None:
    """Medians of 4,096 tokens, 2 heads of 128, fp32."""
    header = ["4,096 tokens, 2 heads of 128", "chunks, ms", "scan, ms", "ratio"]
    header += ["with gradients: chunks", "scan", "ratio"]
    print_table(header, list_times(choice))


def list_times(choice: Choice) -> Iterator[list[str]]:
    for kind in choice.kinds:
        cells = []
        for with_gradients in (False, True):
            chunks, scan = measure_times(
                kind, choice.rounds, with_gradients=with_gradients
            )
            chunks_median = statistics.median(chunks)
            scan_median = statistics.median(scan)
            cells += [
                f"{1e3 * chunks_median:.0f}",
                f"{1e3 * scan_median:.0f}",
                f"{scan_median / chunks_median:.1f}",
            ]
        yield [kind, *cells]


def measure_times(
    kind: str, rounds: int, *, with_gradients: bool
) -> tuple[list[float], list[float]]:
    """Returns the seconds of chunks and of the sequential scan in each round, of 4,096
    tokens with 2 heads of 128, fp32."""
    shapes = make_operands(kind, 4096, 2, 128, jnp.float32)
    rng = np.random.default_rng(0)
    operands = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes
    )
    unit = operands.k / np.linalg.norm(operands.k, axis=-1, keepdims=True)
    beta = None if operands.beta is None else 0.5 * np.ones_like(operands.beta)
    decays = -0.1 * np.abs(operands.log_decay)
    operands = RecurrenceOperands(operands.q, unit, operands.v, decays, beta)
    wrap = take_gradients if with_gradients else run_plain
    programs = [
        partial(jax.jit(partial(wrap, function)), operands)
        for function in (linear_recurrence, linear_recurrence_reference)
    ]
    chunks, scan = time_alternately(programs, rounds)
    return chunks, scan


def run_plain(function: Callable[..., Any], operands: RecurrenceOperands):
    return function(*operands)


def print_cycles(choice: Choice) -> None:
    """Microseconds of 4,096 tokens, 8 key heads and 16 value heads of 128, bf16."""
    if not has_compiler("tpu"):
        print("cycles: no TPU compiler here: pip install libtpu", file=sys.stderr)
        return
    header = ["4,096 tokens, 16 heads of 128", "kernel, µs", "XLA, µs", "ratio"]
    header += ["both passes: kernels", "XLA", "ratio"]
    print_table(header, list_cycles(choice))


def list_cycles(choice: Choice) -> Iterator[list[str]]:
    names = {flags: name for name, flags in RECURRENCE_KINDS.items()}
    for kind in choice.kinds:
        name = names[KINDS[kind]]
        for chip in ("v5p", "v6e"):
            cells = []
            for is_backward in (False, True):
                kernel = count_microseconds(name, chip, is_backward, "tpu")
                xla = count_microseconds(name, chip, is_backward, "xla")
                cells += [f"{kernel:,.0f}", f"{xla:,.0f}", f"{xla / kernel:.2f}"]
            yield [f"{kind}, {chip}", *cells]


def count_microseconds(kind: str, chip: str, is_backward: bool, backend: str) -> float:
    """Counts a program's cycles, loops' trips included, at the chip's clock."""
    sizes = {"tokens": 4096, "key_heads": 8, "value_heads": 16, "features": 128}
    options = {"kind": kind, "is_backward": is_backward, "backend": backend}
    spec = Spec(
        "benchmarks.kernel_cycles.contests.linear_recurrence:own",
        {**sizes, **options, "chunk_size": CHUNK},
    )
    costs, text = measure_program(spec, chip)
    runs = count_runs(parse_hlo(text))
    cycles = costs.cycles()
    cycles += sum(runs.get(item.name, 0) * item.cycles for item in costs.others)
    return cycles / CHIPS[chip].clock_hz * 1e6


def count_runs(module: HloModule) -> dict[str, int]:
    """Counts how often each instruction of a program runs."""
    runs: dict[str, int] = {}

    def walk(computation: Computation, times: int) -> None:
        for item in computation.instructions.values():
            runs[item.name] = runs.get(item.name, 0) + times
            if item.opcode == "while":
                (body,) = item.called_computations("body")
                trips = count_trips(item, computation, module) or 1
                walk(module.computations[body], times * trips)

    walk(module.entry, 1)
    return runs


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    main()
