"""Figures of hybrids and state spaces: a row each, beside what it should be.

    python -m benchmarks.architectures [errors] [context] [time] [counts] [runs]

`errors` are those of the cores (benchmarks.linear_recurrence and selective_scan): beside
float64, of packed documents beside separate ones, of tokens one by one beside chunks,
over T = 1, a chunk, one token less and more, and several chunks with ragged documents.
`context` splits rows over two and four devices, and compares outputs and gradients with
those of one. `time` is that of the sequential scan over that of chunks, 4,096 tokens, in
each of ``--rounds`` rounds. `counts` are parameters of presets with these mixers, beside
published ones. `runs` reads held-out bits per byte of the demo and the hybrid of as many
parameters, where ``maxlm train demo`` and ``maxlm train demo_hybrid`` have been run in
``--folder``.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from benchmarks import linear_recurrence, parameter_counts, selective_scan
from benchmarks.cases import time_alternately
from maxlm.parallel.context import sequence_order_indices
from maxlm.parallel.linear_recurrence import sharded_linear_recurrence
from maxlm.parallel.selective_scan import (
    SelectiveScanInputs,
    sharded_selective_scan,
)
from maxlm.sharding import MeshConfig, make_mesh
from maxlm.sharding.rules import AxisRules, ComputeRules
from tests.pallas_kernels.recurrence_cases import KINDS, SCALE, draw_case

# By the comparisons of benchmarks.linear_recurrence and benchmarks.selective_scan.
BARS = {
    "outputs and states, float64's definition": 1e-5,
    "outputs, float64's sequential scan": 1e-5,
    "gradients, float64's sequential scan": 1e-4,
    "log decays to −20 a token, float64's definition": 1e-5,
    "packed documents, separate ones": 1e-6,
    "token by token, chunks": 1e-5,
    "three runs combined, the whole": 1e-5,
}
CONTEXT_BAR = 1e-6
# A run of it, on the most devices in balanced order, is no multiple of a chunk.
CONTEXT_TOKENS = 8 * 39
# With mixers beside attention; docs/families.md has all presets.
PRESETS = (
    *("mamba_130m", "mamba2_2_7b", "falcon_mamba_7b", "jamba_v0_1", "bamba_9b"),
    *("granite4_h_small", "nemotron_h_8b", "nemotron3_nano_30b_a3b"),
    *("falcon_h1_0_5b", "lfm2_1_2b", "minimax_text_01"),
    *("qwen3_next_80b_a3b", "kimi_linear_48b_a3b"),
)
# Of our own sizes, each beside a transformer.
HYBRIDS = {"demo_hybrid": "demo", "hybrid_135m": "smollm2_135m"}


class Figure(NamedTuple):
    subject: str
    content: str
    value: str
    bar: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
        "errors": lambda options: list_errors(),
        "context": lambda options: list_context_errors(),
        "time": lambda options: list_times(options.rounds),
        "counts": lambda options: list_counts(),
        "runs": lambda options: list_runs(options.folder),
    }
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--rounds", type=int, default=5, help="of time; default 5")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    options = parser.parse_args()
    # Before JAX looks for devices: a host with four, for rows that are split.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    print("| subject | figure | value | bar |\n|---|---|---|---|")
    names = options.parts or list(parts)
    for figure in chain.from_iterable(parts[name](options) for name in names):
        print(f"| {' | '.join(figure)} |", flush=True)


def list_errors() -> Iterator[Figure]:
    for content, errors in linear_recurrence.list_errors():
        for kind, error in zip(KINDS, errors, strict=True):
            yield Figure(kind, content, f"{error:.1e}", f"{BARS[content]:.0e}")
    for content, error in selective_scan.list_errors():
        yield Figure("selective scan", content, f"{error:.1e}", f"{BARS[content]:.0e}")


def list_context_errors() -> Iterator[Figure]:
    runs: dict[str, ShardedRun] = {
        kind: partial(run_recurrence, kind) for kind in KINDS
    }
    runs["selective scan"] = run_selective_scan
    for subject, run in runs.items():
        expected = run(1)
        for num_devices in (2, 4):
            error = linear_recurrence.get_error(run(num_devices), expected)
            content = f"rows over {num_devices} devices, one device"
            yield Figure(subject, content, f"{error:.1e}", f"{CONTEXT_BAR:.0e}")


ShardedRun = Callable[[int], list[np.ndarray]]
"""Number of devices -> outputs and gradients, tokens in the sequence's order."""


def run_recurrence(kind: str, num_devices: int) -> list[np.ndarray]:
    q, k, v, log_decay, beta = draw_case(kind, CONTEXT_TOKENS).operands
    operands = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    axes = dict.fromkeys(operands, ("batch", "seq", "heads"))
    if beta is not None:
        operands["beta"] = beta
        axes["beta"] = ("batch", "seq", "heads")

    def run(
        rules: AxisRules, segment_ids: jax.Array, operands: dict[str, jax.Array]
    ) -> jax.Array:
        return sharded_linear_recurrence(
            operands["q"],
            operands["k"],
            operands["v"],
            operands["log_decay"],
            operands.get("beta"),
            scale=SCALE,
            rules=rules,
            segment_ids=segment_ids,
            balanced=num_devices > 1,
        )

    return run_sharded(run, operands, axes, num_devices)


def run_selective_scan(num_devices: int) -> list[np.ndarray]:
    arrays, _ = selective_scan.draw_case(CONTEXT_TOKENS)
    A = arrays.pop("A")
    operands = {**arrays, "A_log": np.log(-A), "dt_bias": np.zeros_like(arrays["D"])}
    by_channel = ("batch", "seq", "mlp")
    by_state = ("batch", "seq", None)
    axes = {"x": by_channel, "dt": by_channel, "B": by_state, "C": by_state}
    axes |= {"A_log": ("mlp", None), "D": ("mlp",), "dt_bias": ("mlp",)}

    def run(
        rules: AxisRules, segment_ids: jax.Array, operands: dict[str, jax.Array]
    ) -> jax.Array:
        return sharded_selective_scan(
            SelectiveScanInputs(**operands),
            rules=rules,
            feature_axis="mlp",
            segment_ids=segment_ids,
            balanced=num_devices > 1,
        )

    return run_sharded(run, operands, axes, num_devices)


def run_sharded(
    function: Callable[[AxisRules, jax.Array, dict[str, jax.Array]], jax.Array],
    operands: dict[str, np.ndarray],
    axes: Mapping[str, tuple[str | None, ...]],
    num_devices: int,
) -> list[np.ndarray]:
    """Returns the output, and the gradients of half its sum of squares; two rows of
    ragged documents, split over devices in balanced order.

    Args:
        axes: logical axes of the operands; ``seq`` is second where there is one.
    """
    mesh = make_mesh(
        MeshConfig(fsdp=1, context=num_devices), jax.devices()[:num_devices]
    )
    rules = ComputeRules().for_mesh(dict(mesh.shape))
    order = sequence_order_indices(CONTEXT_TOKENS, num_devices, num_devices > 1)
    starts = np.random.default_rng(1).random((2, CONTEXT_TOKENS)) < 0.05
    segment_ids = np.cumsum(starts, axis=1, dtype=np.int32) + 1

    def place(array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        ordered = array[:, order] if "seq" in axes else array
        return jax.device_put(ordered, NamedSharding(mesh, rules.spec(*axes)))

    def restore(array: jax.Array, axes: tuple[str | None, ...]) -> np.ndarray:
        values = np.asarray(array)
        return values[:, np.argsort(order)] if "seq" in axes else values

    @jax.jit
    def compute(
        segment_ids: jax.Array, operands: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, backward = jax.vjp(partial(function, rules, segment_ids), operands)
        return y, backward(y)[0]

    with jax.set_mesh(mesh):
        placed = {name: place(array, axes[name]) for name, array in operands.items()}
        placed_ids = place(segment_ids, ("batch", "seq"))
        y, gradients = compute(placed_ids, placed)
    outputs = [restore(y, ("batch", "seq"))]
    return outputs + [restore(gradients[name], axes[name]) for name in operands]


def list_times(rounds: int) -> Iterator[Figure]:
    for with_gradients in (False, True):
        content = "sequential scan ÷ chunks, 4,096 tokens"
        content += ", with gradients" if with_gradients else ", forward"
        for kind in KINDS:
            chunks, scan = linear_recurrence.measure_times(
                kind, rounds, with_gradients=with_gradients
            )
            yield Figure(kind, content, describe_ratio(scan, chunks), "10×")
        programs = selective_scan.compile_scans(
            4096, 768, with_gradients=with_gradients
        )
        arrays = selective_scan.draw_timed_arrays(4096, 768)
        runs = [partial(program, arrays) for program in programs.values()]
        chunks, scan = time_alternately(runs, rounds)
        yield Figure("selective scan", content, describe_ratio(scan, chunks))


def describe_ratio(numerators: list[float], denominators: list[float]) -> str:
    """Writes the median of the rounds' ratios, and the least and the largest."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    spread = f"{min(ratios):.1f}–{max(ratios):.1f}"
    return f"{statistics.median(ratios):.1f}× ({spread})"


def list_counts() -> Iterator[Figure]:
    for name in PRESETS:
        total, _ = parameter_counts.counts(parameter_counts.preset(name))
        published, *_ = parameter_counts.PUBLISHED[name]
        yield Figure(name, "parameters", f"{total:,}", f"published: {published}")
    for name, transformer in HYBRIDS.items():
        total, _ = parameter_counts.counts(parameter_counts.preset(name))
        beside, _ = parameter_counts.counts(parameter_counts.preset(transformer))
        yield Figure(name, "parameters", f"{total:,}", f"{transformer}: {beside:,}")


def list_runs(folder: Path) -> Iterator[Figure]:
    """Yields the last evaluation of the demo's runs that are there."""
    for name in ("demo", "demo_hybrid"):
        path = folder / name / "metrics.jsonl"
        if not path.exists():
            bar = f"maxlm train {name}"
            yield Figure(name, "held-out bits per byte", "no run here", bar)
            continue
        last = [record for record in read_records(path) if BITS in record][-1]
        content = f"held-out bits per byte after {last['tokens']:,} tokens"
        yield Figure(name, content, f"{last[BITS]:.3f}")


BITS = "eval_bits_per_byte/text"


def read_records(path: Path) -> Iterator[dict[str, float]]:
    for line in path.read_text().splitlines():
        yield json.loads(line)


if __name__ == "__main__":
    main()
