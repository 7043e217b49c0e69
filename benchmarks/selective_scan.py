"""Mamba's selective scan: on this machine, and cycles on a TPU that need not be here.

    python -m benchmarks.selective_scan [--tokens 4096] [--channels 768] [--rounds 3]
    python -m benchmarks.selective_scan --chip v5p --channels 5120

Without ``--chip`` it prints medians in ms, and temporary memory, of a forward pass and
of one with gradients: of this package's scan, and of a loop over all tokens that JAX
differentiates, which keeps the states of all tokens. With it, the final schedule's
cycles of each kernel's call, and the compiler's own estimate of XLA's loops, every run
of every loop counted.
"""

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.selective_scan import selective_scan, selective_scan_step

NUM_STATES = 16
Arrays = dict[str, Any]


def scan_chunks(arrays: Arrays, backend: str | None = None) -> jax.Array:
    """Returns y of the package's scan."""
    y, _ = selective_scan(**arrays, backend=backend)
    return y


def scan_tokens(arrays: Arrays) -> jax.Array:
    """Returns y of one loop over all tokens."""
    A = arrays["A"]
    D = arrays["D"]

    def advance(state: jax.Array, token: Arrays) -> tuple[jax.Array, jax.Array]:
        y, state = selective_scan_step(state, **token, A=A, D=D)
        return state, y

    by_token = {name: arrays[name].swapaxes(0, 1) for name in ("x", "dt", "B", "C")}
    num_rows = len(arrays["x"])
    _, y = lax.scan(advance, jnp.zeros((num_rows, *A.shape)), by_token)
    return y.swapaxes(0, 1)


def differentiate(
    scan: Callable[[Arrays], jax.Array], arrays: Arrays
) -> tuple[jax.Array, Arrays]:
    """Returns y and the gradients of half its sum of squares."""
    y, pullback = jax.vjp(scan, arrays)
    return y, pullback(y)[0]


def declare_arrays(tokens: int, channels: int, dtype: Any) -> Arrays:
    """Returns shapes of one row."""

    def declare(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "x": declare(1, tokens, channels),
        "dt": declare(1, tokens, channels),
        "A": declare(channels, NUM_STATES, dtype=jnp.float32),
        "B": declare(1, tokens, NUM_STATES),
        "C": declare(1, tokens, NUM_STATES),
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


def print_times(tokens: int, channels: int, rounds: int) -> None:
    shapes = declare_arrays(tokens, channels, jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.uniform(key, shape.shape, shape.dtype, 0.01, 0.1)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    arrays["A"] = -100 * arrays["A"]
    for name, scan in (("chunks", scan_chunks), ("one loop", scan_tokens)):
        for content, function in (
            ("forward", scan),
            ("with gradients", partial(differentiate, scan)),
        ):
            compiled = jax.jit(function).lower(arrays).compile()
            times = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                jax.block_until_ready(compiled(arrays))
                times.append(1e3 * (time.perf_counter() - start))
            memory: Any = compiled.memory_analysis()
            megabytes = memory.temp_size_in_bytes / 1e6
            median = statistics.median(times[1:])
            print(f"{name:9} {content:15} {median:8.1f} ms {megabytes:8.1f} MB")


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
        print_times(options.tokens, options.channels, options.rounds)
    else:
        # libtpu as a compiler alone, before it is loaded.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        jax.config.update("jax_platforms", "cpu")
        print_cycles(options.chip, options.tokens, options.channels)


if __name__ == "__main__":
    main()
