"""The plan's prediction beside published training runs.

    python benchmarks/plan_mfu.py [--plot FILE] [--fit]

Each row is a model, a machine, a mesh, a batch and a recomputation as published,
predicted by maxlm/plan/timing.py with its three constants a family of chips; none is a
row's own. MFU is counted as the source counts it: causal attention in full or at half.
Prints every row and the mean absolute percentage error. --fit looks for the constants
anew, over all rows but the mixtures of experts, whose products are slower than the
dense ones that the constants stand for. Sources: AI-Hypercomputer/maxtext README and
configs at 76bd53b (v5p), 5ebcd67, 9bc243c and e47fa1b (v5e), docs/reference/tiering.md
at f588ed5 (v6e, Llama 2 70B); tpu-recipes training/trillium; pytorch/torchtitan
benchmarks/llama3_h100_202412_torchtitan.md.
"""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config.load import load_config
from maxlm.plan.communication import list_collectives
from maxlm.plan.hardware import CHIPS
from maxlm.plan.layout import count_training_flops_per_token
from maxlm.plan.network import Network
from maxlm.plan.timing import Efficiency, estimate_time
from maxlm.plan.topology import parse_topology
from maxlm.plan.workload import RunWorkload, StepShape
from maxlm.run.config import RunConfig
from maxlm.sharding import MESH_AXES, MeshConfig, mesh_sizes


@dataclass(frozen=True)
class PublishedRun:
    name: str
    machine: str
    model: dict[str, Any] | str
    """Settings of a decoder, or a shipped model."""
    rows: float
    """Sequences a device."""
    seq_len: int
    mesh: dict[str, int]
    remat: str
    published: float
    """MFU in per cent, or tokens a second and device."""
    causal: str = "full"
    """How attention is counted in the published MFU; "rate": it is tokens a second and
    device."""
    dtype: str = "bf16"
    micro: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


def gpt(layers: int, d_model: int, heads: int, d_ff: int) -> dict[str, Any]:
    """The models of MaxText's tables: plain MLP, heads of 256, one table for both
    ends."""
    return {
        "num_layers": layers,
        "d_model": d_model,
        "vocab_size": 32768,
        "max_seq_len": 2048,
        "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": 256},
        "mlp": {"d_ff": d_ff, "gated": False, "activation": "relu"},
        "tie_embeddings": True,
    }


S16, S32, S64 = (
    gpt(32, 5120, 32, 32768),
    gpt(32, 10240, 32, 32768),
    gpt(64, 10240, 32, 32768),
)
S128, S256 = gpt(64, 10240, 64, 65536), gpt(64, 20480, 64, 65536)
S512 = gpt(128, 20480, 64, 65536)

ROWS = (
    PublishedRun(
        "v5p 32B",
        "v5p-128",
        S32,
        8,
        2048,
        {"fsdp": 16, "tensor": 4},
        "matmuls",
        71.47,
        "half",
    ),
    PublishedRun(
        "v5p 64B",
        "v5p-128",
        S64,
        4,
        2048,
        {"fsdp": 16, "tensor": 4},
        "matmuls",
        70.31,
        "half",
    ),
    PublishedRun(
        "v5p 128B",
        "v5p-256",
        S128,
        2,
        2048,
        {"fsdp": 16, "tensor": 8},
        "matmuls",
        68.68,
        "half",
    ),
    PublishedRun(
        "v5p 256B",
        "v5p-1024",
        S256,
        2,
        2048,
        {"fsdp": 64, "tensor": 8},
        "matmuls",
        67.09,
        "half",
    ),
    PublishedRun(
        "v5p 512B",
        "v5p-1024",
        S512,
        2,
        2048,
        {"fsdp": 32, "tensor": 16},
        "full",
        63.99,
        "half",
    ),
    PublishedRun("v5e 16B", "v5e-256", S16, 6, 2048, {"fsdp": 256}, "full", 61.10),
    PublishedRun("v5e 32B", "v5e-256", S32, 4, 2048, {"fsdp": 256}, "full", 66.86),
    PublishedRun("v5e 64B", "v5e-256", S64, 2, 2048, {"fsdp": 256}, "full", 59.90),
    PublishedRun(
        "v5e 128B", "v5e-256", S128, 1, 2048, {"fsdp": 16, "tensor": 16}, "full", 56.06
    ),
    PublishedRun(
        "v5e 16B, 32 slices",
        "32xv5e-256",
        S16,
        6,
        2048,
        {"data": 32, "fsdp": 256},
        "full",
        54.65,
    ),
    PublishedRun(
        "v5e 32B, 32 slices",
        "32xv5e-256",
        S32,
        4,
        2048,
        {"data": 32, "fsdp": 256},
        "full",
        60.40,
    ),
    PublishedRun(
        "v5e 64B, 32 slices",
        "32xv5e-256",
        S64,
        2,
        2048,
        {"data": 32, "fsdp": 256},
        "full",
        50.18,
    ),
    PublishedRun(
        *("v5e 128B, 32 slices", "32xv5e-256", S128, 1, 2048),
        *({"data": 32, "fsdp": 16, "tensor": 16}, "full", 46.25),
    ),
    # Activations kept in host memory there; of what is computed again, `full` is
    # nearest.
    PublishedRun(
        "v6e Llama 3.1 8B",
        "v6e-256",
        "llama3_8b",
        4,
        8192,
        {"fsdp": 256},
        "full",
        45.46,
    ),
    PublishedRun(
        "v6e Llama 3.1 70B",
        "v6e-256",
        "llama3_70b",
        5,
        8192,
        {"fsdp": 256},
        "full",
        50.33,
    ),
    PublishedRun(
        *("v6e Llama 3.1 405B", "2xv6e-256", "llama3_405b", 1, 8192),
        *({"data": 2, "fsdp": 64, "tensor": 4}, "full", 38.55),
    ),
    PublishedRun(
        "v5p Llama 2 70B",
        "v5p-512",
        "llama2_70b",
        4,
        4096,
        {"fsdp": 256},
        "full",
        65.4,
        "half",
    ),
    PublishedRun(
        "h100 Llama 3 8B",
        "h100x8",
        "llama3_8b",
        2,
        8192,
        {"fsdp": 8},
        "attention",
        6667,
        "rate",
    ),
    # fp8 products; interleaved 1F1B, whose stages are computed twice: as a circular
    # pipeline's are.
    PublishedRun(
        *("h100 Llama 3 405B", "h100x512", "llama3_405b", 0.5, 8192),
        *({"stage": 8, "fsdp": 8, "tensor": 8}, "none", 128, "rate", "fp8", 8),
        {"parallel": {"schedule": "circular", "layer_groups": 2}},
    ),
)
# Beside them, for what the first rows do not have: more GPUs, experts.
MORE = (
    # MaxText's "minimal_flash" (configs/a3/llama_2_7b at efb6d9e), TFLOP/s over 989.
    *(
        PublishedRun(
            *(
                f"h100 Llama 2 7B, {hosts} hosts",
                f"h100x{8 * hosts}",
                "llama2_7b",
                4,
                4096,
            ),
            *({"data": hosts, "fsdp": 8}, "matmuls", mfu, "half"),
        )
        for hosts, mfu in ((1, 49.7), (2, 42.7), (4, 41.2), (8, 41.4), (16, 37.9))
    ),
    PublishedRun(
        *("h100 Llama 3 405B bf16", "h100x128", "llama3_405b", 0.25, 8192),
        *({"fsdp": 16, "tensor": 8}, "full", 109, "rate"),
    ),
    PublishedRun(
        *("h100 Llama 3 70B", "h100x256", "llama3_70b", 2, 8192),
        *({"fsdp": 32, "tensor": 8}, "full", 829, "rate", "fp8"),
    ),
    PublishedRun(
        *(
            "v6e Mixtral 8x7B",
            "v6e-256",
            "mixtral_8x7b",
            8,
            4096,
            {"fsdp": 256},
            "full",
            35.23,
        ),
        settings={"model": {"moe": {"dispatch": "capacity"}}},
    ),
    PublishedRun(
        "v5p Mixtral 8x7B",
        "v5p-256",
        "mixtral_8x7b",
        36,
        4096,
        {"fsdp": 128},
        "full",
        52.56,
    ),
)


def predict(
    row: PublishedRun, efficiency: Efficiency | None = None
) -> tuple[float, Any]:
    """In the row's own measure; and the parts of the time."""
    machine = parse_topology(row.machine)
    shape, network, full, half = _prepared(row)
    time = estimate_time(
        shape,
        network,
        list_collectives(shape),
        efficiency=efficiency,
        dtype=row.dtype,
    )
    rate = row.rows * row.seq_len / float(time.total)
    if row.causal == "rate":
        return rate, time
    flops = full if row.causal == "full" else half
    return 100 * rate * flops / CHIPS[machine.kind].peak_flops["bf16"], time


_CACHE: dict[str, Any] = {}


def _prepared(row: PublishedRun) -> Any:
    import jax.numpy as jnp

    if row.name in _CACHE:
        return _CACHE[row.name]
    machine = parse_topology(row.machine)
    mesh = {"fsdp": 1, **row.mesh}
    sizes = mesh_sizes(MeshConfig(**mesh), machine.devices)
    model = row.model
    if isinstance(model, str):
        model = load_config(RunConfig, f"runs/{model}").value.model.model_dump()
    more = {
        part: {**model[part], **values}
        for part, values in row.settings.get("model", {}).items()
    }
    config = RunConfig.model_validate(
        {
            "model": {**model, "remat": row.remat, **more},
            "data": {
                "seq_len": row.seq_len,
                "batch_size": round(row.rows * machine.devices),
            },
            "train": {"micro_batches": row.micro},
            "sharding": {"compute": {"residual": ["context", "tensor"]}},
            **{part: v for part, v in row.settings.items() if part != "model"},
        }
    )
    work = RunWorkload(config, jnp.bfloat16)
    counted = count_training_flops_per_token(work)
    shape = StepShape(
        work, {a: sizes[a] for a in MESH_AXES}, row.micro, row.remat, machine
    )
    network = Network(machine, CHIPS[machine.kind])
    _CACHE[row.name] = shape, network, counted.full, counted.causal
    return _CACHE[row.name]


def errors(
    rows: tuple[PublishedRun, ...], efficiency: Efficiency | None = None
) -> list[float]:
    return [predict(row, efficiency)[0] / row.published - 1 for row in rows]


def fit() -> None:
    """Constants that minimise each family's mean absolute error, from several
    starts."""
    from scipy.optimize import minimize

    for family in ("tpu", "nvidia"):
        rows = tuple(
            row
            for row in (*ROWS, *MORE)
            if CHIPS[parse_topology(row.machine).kind].family == family
            and "Mixtral" not in row.name
        )

        def error(x: Any, rows: tuple[PublishedRun, ...] = rows) -> float:
            return float(
                np.mean(np.abs(errors(rows, Efficiency(*np.clip(x, 0.01, 1.0)))))
            )

        starts = [(0.8, 0.7, 0.3), (0.9, 0.5, 0.5), (0.95, 0.3, 0.7)]
        best_fit = min(
            (minimize(error, start, method="Nelder-Mead") for start in starts),
            key=lambda f: f.fun,
        )
        print(
            family,
            np.clip(best_fit.x, 0.01, 1.0).round(3),
            f"mean error {best_fit.fun:.1%}",
        )


def plot(path: Path, points: list[tuple[PublishedRun, float]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), dpi=150, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    colours = {"v5p": "#4C78A8", "v5e": "#F58518", "v6e": "#54A24B", "h100": "#B279A2"}
    for kind, colour in colours.items():
        family_points = [
            (r.published, p)
            for r, p in points
            if r.name.startswith(kind) and r.causal != "rate"
        ]
        if family_points:
            axes.scatter(*zip(*family_points, strict=True), color=colour, label=kind)
    axes.plot([30, 80], [30, 80], color="#888", linewidth=1)
    axes.fill_between(
        [30, 80], [27, 72], [33, 88], color="#888", alpha=0.12, label="±10%"
    )
    axes.set(
        xlabel="published MFU, %",
        ylabel="predicted MFU, %",
        xlim=(35, 78),
        ylim=(35, 78),
    )
    axes.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a scatter plot there"
    )
    parser.add_argument(
        "--fit", action="store_true", help="look for the constants anew"
    )
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if args.fit:
        fit()
        return
    print(
        f"{'':<26}{'published':>10}{'predicted':>10}{'error':>8}   of the step: "
        f"products, "
    )
    print(f"{'':<54}   attention, traffic, exposed communication, idle")
    points, all_wrong = [], []
    for rows in (ROWS, MORE):
        wrong = []
        for row in rows:
            value, time = predict(row)
            points.append((row, value))
            wrong.append(abs(value / row.published - 1))
            parts = (
                time.products,
                time.attention,
                time.traffic,
                time.exposed,
                time.idle,
            )
            shares = " ".join(f"{float(part / time.total):6.1%}" for part in parts)
            unit = "tok/s" if row.causal == "rate" else "%"
            print(
                f"{row.name:<26}{row.published:>10.2f}{value:>10.2f}"
                f"{value / row.published - 1:>+8.1%}   {shares}  {unit}"
            )
        print(
            f"mean absolute percentage error: {np.mean(wrong):.1%} over {len(wrong)} "
            f"rows, "
            f"worst {max(wrong):.1%}\n"
        )
        all_wrong += wrong
    print(f"over all {len(all_wrong)} rows: {np.mean(all_wrong):.1%}")
    if args.plot:
        plot(args.plot, points)


if __name__ == "__main__":
    main()
