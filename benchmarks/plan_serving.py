"""The plan's serving figures beside published ones.

    python benchmarks/plan_serving.py [--fit] [--cpu FILE]

Each row is a model, a machine, a split and a load as published, predicted by
maxlm/plan/serving.py with its two constants a family of chips (``DECODE_EFFICIENCY``);
none is a row's own. --fit looks for these two anew. The plan's peaks, links and other
shares are those of training.

Measures: ``tok/s``, new tokens a second on all devices; ``tpot``, milliseconds between
tokens; ``prompt``, milliseconds of one prompt: the first token of one alone, or the
mean first token of n at once over n. ``fp8``: matrices in 8 bits, and an 8-bit cache,
for which int8 with its scales stands here. Without a published number of sequences the
row has as many as the plan says fit.

--cpu reads rows of one's own, from a JSON list of objects with the fields of
``PublishedServing``
("cpux1" is this machine, which is measured then).

Sources: [sgl] sgl-project/sglang-jax at cddbf6f, docs/cookbook/autoregressive/Llama
(8B: random lengths up to 512, 265 and 258 on average), and its comparison with vLLM of
12 September 2025; [jetstream] google/jetstream-pytorch, benchmarks/summary.md
(ShareGPT; its lengths, on average, from vllm-project/vllm issue 7567); [vllm]
buildkite.com/vllm/performance-benchmark/builds/9515, latency over 128 tokens; [trt]
NVIDIA/TensorRT-LLM docs/source/performance/perf-overview.md at 00f3768; [trt06]
docs/source/performance.md at 138f96d; [nim] docs.nvidia.com/nim/benchmarking/llm/1.0.0,
version 1.8.0.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.config.load import load_config
from maxlm.plan.hardware import CHIPS
from maxlm.plan.machine import Machine
from maxlm.plan.served_model import ServingOptions
from maxlm.plan.serving import search_serving
from maxlm.plan.serving_cache import CacheFormat
from maxlm.plan.timing import DECODE_EFFICIENCY, DecodeEfficiency
from maxlm.plan.topology import parse_topology
from maxlm.run.config import RunConfig


class PublishedServing(NamedTuple):
    source: str
    model: str
    machine: str
    tensor: int
    prompt: int
    new: int
    batch: int | None
    """Sequences at once; None: as many as fit."""
    measure: str
    published: float
    weights: str = "auto"
    cache: CacheFormat = "auto"


def repeat(
    source: str, model: str, on: str, tensor: int, lengths: tuple[int, int], *rows: Any
):
    """Rows of one published table: (batch, measure, published) each."""
    return tuple(
        PublishedServing(source, model, on, tensor, *lengths, *row) for row in rows
    )


def fp8(
    source: str, model: str, on: str, tensor: int, lengths: tuple[int, int], *rows: Any
):
    rows_16_bit = repeat(source, model, on, tensor, lengths, *rows)
    return tuple(row._replace(weights="w8a8-fp8", cache="int8") for row in rows_16_bit)


L8, L70, L33, Q8, Q32 = (
    "llama3_1_8b",
    "llama3_1_70b",
    "llama3_3_70b",
    "qwen3_8b",
    "qwen3_32b",
)
ROWS: tuple[PublishedServing, ...] = (
    *repeat(
        "sgl", L8, "v6e-4", 4, (265, 258), (16, "tok/s", 1448.91), (16, "tpot", 9.94)
    ),
    *repeat(
        "sgl",
        L33,
        "7x-8",
        8,
        (1024, 1024),
        (128, "tok/s", 3609.65),
        (128, "tpot", 30.78),
    ),
    *repeat(
        *(
            "sgl",
            Q8,
            "v6e-4",
            4,
            (1024, 1024),
            (8, "tok/s", 1311.49),
            (32, "tok/s", 3682.22),
        ),
        *((128, "tok/s", 6731.67), (256, "tok/s", 7571.84), (1, "prompt", 117.55 / 8)),
    ),
    *repeat(
        *(
            "sgl",
            Q8,
            "v6e-4",
            4,
            (4096, 1024),
            (8, "tok/s", 1119.33),
            (32, "tok/s", 2051.63),
        ),
        *((64, "tok/s", 2528.79), (1, "prompt", 523.78 / 8)),
    ),
    *repeat(
        *(
            "sgl",
            Q32,
            "v6e-4",
            4,
            (1024, 1024),
            (8, "tok/s", 427.69),
            (32, "tok/s", 1355.93),
        ),
        *((64, "tok/s", 1977.45), (1, "prompt", 356.59 / 8)),
    ),
    *repeat("jetstream", "llama3_8b", "v5e-8", 8, (215, 179), (128, "tok/s", 8249)),
    *repeat("jetstream", "llama2_7b", "v5e-8", 8, (215, 179), (96, "tok/s", 3663)),
    *repeat("jetstream", "llama2_13b", "v5e-8", 8, (215, 179), (48, "tok/s", 2056)),
    *repeat("vllm", L8, "h200x1", 1, (32, 128), (8, "tpot", 833.42 / 128)),
    *repeat("vllm", L70, "h200x4", 4, (32, 128), (8, "tpot", 2077.53 / 128)),
    *fp8("trt", L8, "h100x1", 1, (128, 128), (None, "tok/s", 28312)),
    *fp8("trt", L8, "h100x1", 1, (1000, 1000), (None, "tok/s", 15220)),
    *fp8("trt", L8, "h100x1", 1, (128, 2048), (None, "tok/s", 22714)),
    *fp8("trt", L8, "h100x1", 1, (2048, 128), (None, "tok/s", 3450)),
    *fp8("trt", L33, "h100x2", 2, (128, 128), (None, "tok/s", 6378)),
    *fp8("trt", L33, "h100x2", 2, (1000, 1000), (None, "tok/s", 4205)),
    *fp8("trt", L33, "h100x2", 2, (128, 2048), (None, "tok/s", 6651)),
    *fp8("trt", L33, "h100x2", 2, (2048, 128), (None, "tok/s", 762)),
    *fp8(
        *(
            "nim",
            L33,
            "h100x2",
            2,
            (5000, 500),
            (1, "prompt", 406.77),
            (1, "tpot", 18.58),
        ),
        *((5, "tok/s", 218.48), (25, "tok/s", 623.4), (50, "tok/s", 814.37)),
    ),
    *repeat("trt06", "llama2_7b", "a100x1", 1, (128, 128), (384, "tok/s", 5586)),
    *repeat("trt06", "llama2_7b", "a100x1", 1, (128, 2048), (60, "tok/s", 1928)),
    *repeat("trt06", "llama2_7b", "a100x1", 1, (2048, 128), (52, "tok/s", 591)),
    *repeat("trt06", "llama2_7b", "a100x1", 1, (2048, 1), (1, "prompt", 133)),
    *repeat("trt06", "llama2_70b", "a100x4", 4, (128, 2048), (240, "tok/s", 4 * 525)),
    *repeat("trt06", "llama2_70b", "a100x4", 4, (2048, 128), (120, "tok/s", 4 * 79)),
    *repeat("trt06", "llama2_70b", "a100x4", 4, (2048, 1), (1, "prompt", 377)),
)


def predict(row: PublishedServing) -> float:
    """Predicts a row in its own measure."""
    machine = Machine.from_name(row.machine)
    config = load_config(RunConfig, f"models/{row.model}").value
    options = ServingOptions(row.prompt, row.new, row.weights, row.batch)
    search_options: Any = {"tensor": row.tensor, "caches": (row.cache,)}
    (plan,), _ = search_serving(config, machine, options, **search_options)
    point = plan.point
    return {
        "tok/s": point.tokens_per_second,
        "tpot": 1e3 * point.tpot_seconds,
        "prompt": 1e3 * plan.ttft_seconds,
    }[row.measure]


def fit() -> None:
    """Prints the constants with the least mean absolute logarithmic error of each
    family: no more of the bandwidth than copies reach, and no more milliseconds than
    the quickest rows leave."""
    from scipy.optimize import minimize

    for family in ("tpu", "nvidia"):
        rows = [
            r for r in ROWS if CHIPS[parse_topology(r.machine).kind].family == family
        ]

        def error(
            x: Any, rows: list[PublishedServing] = rows, family: str = family
        ) -> float:
            efficiency = DecodeEfficiency(
                *(np.clip(x, 0.1, (0.85, 2.0)) * (1, 1e-3)).tolist()
            )
            DECODE_EFFICIENCY[family] = efficiency
            return float(np.mean([abs(np.log(predict(r) / r.published)) for r in rows]))

        best_fit = minimize(
            error, (0.75, 1.0), method="Nelder-Mead", options={"maxfev": 40}
        )
        print(
            family,
            np.clip(best_fit.x, 0.1, (0.85, 2.0)).round(2),
            f"mean error {best_fit.fun:.1%}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The plan's serving figures beside published ones."
    )
    parser.add_argument(
        "--fit", action="store_true", help="look for the constants anew"
    )
    parser.add_argument(
        "--cpu", type=Path, metavar="FILE", help="rows of this machine, in JSON"
    )
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if args.fit:
        fit()
        return
    rows = (
        tuple(PublishedServing(**row) for row in json.loads(args.cpu.read_text()))
        if args.cpu
        else ROWS
    )
    print(
        f"{'source':<11}{'model':<13}{'machine':<9}{'prompt/new':<12}{'batch':>5}  "
        f"{'measure':<8}"
    )
    wrong: dict[str, list[float]] = {}
    for row in rows:
        value = predict(row)
        ratio = value / row.published
        wrong.setdefault(parse_topology(row.machine).platform, []).append(
            max(ratio, 1 / ratio) - 1
        )
        print(
            f"{row.source:<11}{row.model:<13}{row.machine:<9}{f'{row.prompt}/{row.new}':<12}"
            f"{row.batch or 'max':>5}  "
            f"{row.measure:<8}{row.published:>10,.1f}{value:>10,.1f}"
            f"{ratio:>7.2f}{'  fp8' if row.weights == 'w8a8-fp8' else ''}",
            flush=True,
        )
    for platform, errors in wrong.items():
        print(
            f"{platform}: off by a factor of {1 + np.mean(errors):.2f} in the mean, "
            f"{1 + np.median(errors):.2f} in the median, {1 + max(errors):.2f} at "
            f"worst, "
            f"over {len(errors)} rows"
        )


if __name__ == "__main__":
    main()
