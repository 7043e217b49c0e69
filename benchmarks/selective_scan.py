"""Mamba's selective scan: on this machine, and cycles on a TPU that need not be here.

    python -m benchmarks.selective_scan [--tokens 4096] [--channels 768] [--rounds 3]
    python -m benchmarks.selective_scan --chip v5p --channels 5120

Without ``--chip`` it prints the largest errors beside one loop over all tokens in
float64, of packed documents beside separate ones, and of tokens one by one beside
chunks; then medians in ms, and temporary memory, of a forward pass and
of one with gradients: of this package's scan, and of a loop over all tokens that JAX
differentiates, which keeps the states of all tokens. With it, the final schedule's
cycles of each kernel's call, and the compiler's own estimate of XLA's loops, every run
of every loop counted.
"""

import argparse
import os
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.cases import time_alternately
from pallas_kernels.linear_recurrence import find_segment_starts
from pallas_kernels.selective_scan import (
    CHUNK_TOKENS,
    selective_scan,
    selective_scan_step,
)

NUM_STATES = 16
Arrays = dict[str, Any]


# T = 1, a chunk, a token beside it on both sides, and several chunks.
LENGTHS = (1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 300)
ScanFn = Callable[[Arrays], jax.Array]


def scan_chunks(
    arrays: Arrays, starts: np.ndarray | None = None, backend: str | None = None
) -> jax.Array:
    """Returns y of the package's scan."""
    y, _ = selective_scan(**arrays, starts=starts, backend=backend)
    return y


def scan_tokens(arrays: Arrays, starts: np.ndarray | None = None) -> jax.Array:
    """Returns y of one loop over all tokens."""
    A = arrays["A"]
    D = arrays["D"]

    def advance(
        state: jax.Array, inputs: tuple[Arrays, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        token, begins = inputs
        if begins is not None:
            state = jnp.where(begins[:, None, None], 0, state)
        y, state = selective_scan_step(state, **token, A=A, D=D)
        return state, y

    by_token = {name: arrays[name].swapaxes(0, 1) for name in ("x", "dt", "B", "C")}
    starts_by_token = None if starts is None else jnp.asarray(starts).swapaxes(0, 1)
    num_rows = len(arrays["x"])
    zeros = jnp.zeros((num_rows, *A.shape), A.dtype)
    _, y = lax.scan(advance, zeros, (by_token, starts_by_token))
    return y.swapaxes(0, 1)


def list_errors() -> Iterator[tuple[str, float]]:
    """Yields what is compared, and its largest error over ``LENGTHS``, relative to the
    largest value where that is above 1."""
    comparisons: dict[str, Callable[[int], float]] = {
        "outputs, float64's sequential scan": compare_outputs,
        "gradients, float64's sequential scan": compare_gradients,
        "packed documents, separate ones": compare_packed,
        "token by token, chunks": compare_steps,
    }
    for name, compare in comparisons.items():
        yield name, max(compare(tokens) for tokens in LENGTHS)


def get_error(result: Any, expected: Any) -> float:
    """Returns the largest error of an array, relative where values are above 1."""
    expected = np.asarray(expected, np.float64)
    size = max(1.0, np.abs(expected).max())
    return float(np.abs(np.asarray(result, np.float64) - expected).max() / size)


def compare_outputs(tokens: int) -> float:
    arrays, starts = draw_case(tokens)
    y = jax.jit(scan_chunks)(arrays, starts)
    with jax.enable_x64(True):
        expected = jax.jit(scan_tokens)(widen(arrays), starts)
    return get_error(y, expected)


def compare_gradients(tokens: int) -> float:
    arrays, starts = draw_case(tokens)

    def run(scan: Callable[..., jax.Array], arrays: Arrays) -> Arrays:
        compute = jax.jit(partial(differentiate, partial(scan, starts=starts)))
        _, gradients = compute(arrays)
        return gradients

    gradients = run(scan_chunks, arrays)
    with jax.enable_x64(True):
        expected = run(scan_tokens, widen(arrays))
    return max(get_error(gradients[name], expected[name]) for name in arrays)


def compare_packed(tokens: int) -> float:
    """Outputs of the second of two documents in a row, beside those of it alone."""
    arrays, _ = draw_case(tokens)
    split = tokens // 3
    ids = np.broadcast_to(np.arange(tokens) >= split, arrays["x"].shape[:2])
    starts = np.asarray(find_segment_starts(ids.astype(np.int32)))
    packed = jax.jit(scan_chunks)(arrays, starts)
    by_token = {name: arrays[name][:, split:] for name in ("x", "dt", "B", "C")}
    separate = jax.jit(scan_chunks)(arrays | by_token)
    return get_error(packed[:, split:], separate)


def compare_steps(tokens: int) -> float:
    arrays, starts = draw_case(tokens)
    steps = jax.jit(scan_tokens)(arrays, starts)
    return get_error(steps, jax.jit(scan_chunks)(arrays, starts))


def draw_case(tokens: int) -> tuple[Arrays, np.ndarray]:
    """Draws two rows of 11 channels, fp32, with decays from almost none to almost all of
    a state, and starts of documents of about 20 tokens."""
    rng = np.random.default_rng(0)
    shapes = declare_arrays(tokens, 11, jnp.float32, num_rows=2)
    arrays = {name: rng.standard_normal(shape.shape) for name, shape in shapes.items()}
    arrays["dt"] = np.exp(rng.uniform(np.log(1e-3), np.log(2), arrays["dt"].shape))
    arrays["A"] = -np.exp(rng.uniform(-2, 2.7, arrays["A"].shape))
    narrow = {name: array.astype(np.float32) for name, array in arrays.items()}
    return narrow, rng.random((2, tokens)) < 0.05


def widen(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def differentiate(scan: ScanFn, arrays: Arrays) -> tuple[jax.Array, Arrays]:
    """Returns y and the gradients of half its sum of squares."""
    y, pullback = jax.vjp(scan, arrays)
    return y, pullback(y)[0]


def declare_arrays(
    tokens: int, channels: int, dtype: Any, num_rows: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays' shapes."""

    def declare(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "x": declare(num_rows, tokens, channels),
        "dt": declare(num_rows, tokens, channels),
        "A": declare(channels, NUM_STATES, dtype=jnp.float32),
        "B": declare(num_rows, tokens, NUM_STATES),
        "C": declare(num_rows, tokens, NUM_STATES),
        "D": declare(channels, dtype=jnp.float32),
    }


def make_program(
    tokens: int, channels: int, backward: bool, backend: str = "tpu"
) -> tuple[Callable[..., Any], list[Any]]:
    """A scan and its arguments, for ``benchmarks.kernel_cycles.static``."""
    shapes = declare_arrays(tokens, channels, jnp.bfloat16)

    def run(*arrays: jax.Array) -> Any:
        by_name = dict(zip(shapes, arrays, strict=True))
        scan = partial(scan_chunks, backend=backend)
        return differentiate(scan, by_name) if backward else scan(by_name)

    return run, list(shapes.values())


def print_errors() -> None:
    for name, error in list_errors():
        print(f"{name:40} {error:.1e}")


def print_times(tokens: int, channels: int, rounds: int) -> None:
    for with_gradients in (False, True):
        programs = compile_scans(tokens, channels, with_gradients=with_gradients)
        arrays = draw_timed_arrays(tokens, channels)
        runs = [partial(program, arrays) for program in programs.values()]
        seconds = time_alternately(runs, rounds)
        content = "with gradients" if with_gradients else "forward"
        for (name, program), times in zip(programs.items(), seconds, strict=True):
            memory: Any = program.memory_analysis()
            megabytes = memory.temp_size_in_bytes / 1e6
            median = 1e3 * statistics.median(times)
            print(f"{name:9} {content:15} {median:8.1f} ms {megabytes:8.1f} MB")


def compile_scans(
    tokens: int, channels: int, *, with_gradients: bool
) -> dict[str, jax.stages.Compiled]:
    """Compiles the package's scan and the loop over all tokens, of one row, fp32."""
    shapes = declare_arrays(tokens, channels, jnp.float32)
    scans: dict[str, ScanFn] = {"chunks": scan_chunks, "one loop": scan_tokens}
    return {
        name: jax.jit(partial(differentiate, scan) if with_gradients else scan)
        .lower(shapes)
        .compile()
        for name, scan in scans.items()
    }


def draw_timed_arrays(tokens: int, channels: int) -> dict[str, jax.Array]:
    shapes = declare_arrays(tokens, channels, jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.uniform(key, shape.shape, shape.dtype, 0.01, 0.1)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return arrays | {"A": -100 * arrays["A"]}


def print_cycles(chip: str, tokens: int, channels: int) -> None:
    from benchmarks.kernel_cycles.static.measure import Spec, measure

    for backward in (False, True):
        kwargs = {"tokens": tokens, "channels": channels, "backward": backward}
        costs = measure(Spec("benchmarks.selective_scan:make_program", kwargs), chip)
        for kernel in costs.kernels:
            microseconds = kernel.cycles / costs.chip.clock_hz * 1e6
            use = {unit: round(share, 2) for unit, share in kernel.use.items()}
            print(
                f"{kernel.name}: {kernel.cycles} cycles on {kernel.cores} cores, "
                f"{kernel.cycles / tokens:.0f} a token, {microseconds:.0f} µs, {use}"
            )

        estimate = estimate_xla_cycles(chip, tokens, channels, backward)
        content = "forward and backward" if backward else "forward"
        print(f"XLA, {content}: {estimate} cycles, {estimate / tokens:.0f} a token")


def estimate_xla_cycles(chip: str, tokens: int, channels: int, backward: bool) -> int:
    """Returns the cycles of XLA's program on one core, by the compiler's estimate of
    each operation."""
    from jax.experimental import topologies

    from benchmarks.kernel_cycles.static import CHIPS

    topology = CHIPS[chip].topology
    machine = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    sharding = jax.sharding.SingleDeviceSharding(machine.devices[0])
    run, shapes = make_program(tokens, channels, backward, "xla")
    arguments = [
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        for shape in shapes
    ]
    text = jax.jit(run).lower(*arguments).compile().as_text() or ""
    return sum_estimated_cycles(text)


def sum_estimated_cycles(text: str) -> int:
    """Adds up the estimates in a compiled program's text, of a loop's body as often as
    the number that its condition compares with says."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        begin = re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$", line)
        if begin:
            name = "ENTRY" if begin[1] else begin[2]
            computations[name] = []
        elif name:
            computations[name].append(line)

    def count(computation: str) -> int:
        total = 0
        for line in computations[computation]:
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            if estimate:
                total += int(estimate[1])
            loop = re.search(
                r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line
            )
            if loop:
                condition = "\n".join(computations[loop[1]])
                (trips,) = re.findall(r"constant\((\d+)\)", condition)
                total += int(trips) * count(loop[2])
        return total

    return count("ENTRY")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chip", help="a TPU, such as v5p")
    options = parser.parse_args()
    if options.chip is None:
        print_errors()
        print_times(options.tokens, options.channels, options.rounds)
    else:
        # libtpu as a compiler alone, before it is loaded.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        jax.config.update("jax_platforms", "cpu")
        print_cycles(options.chip, options.tokens, options.channels)


if __name__ == "__main__":
    main()
