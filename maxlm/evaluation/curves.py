"""Measures beside a task's own metric: the loss by position, and a smooth proxy of
accuracy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.inference.scoring import Scorer, Tokens
from maxlm.runtime.files import replace_file


def compute_position_losses(
    scorer: Scorer,
    documents: Sequence[Tokens],
    on_progress: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """Computes the mean loss by position (Kaplan et al. 2020, arXiv 2001.08361, §D.5).

    Args:
        documents: token ids, of equal length: each position has the same documents.
        on_progress: is told how many documents are done.

    Returns:
        Nats per token, by the last position of a range that begins behind the one
        before: 1, 2, 4, 8, ... tokens of context.
    """
    scores = scorer.score(
        [(document[:1], document[1:]) for document in documents], on_progress
    )
    losses = -np.array([score.token_logprobs for score in scores]).mean(axis=0)
    ends = [1 << k for k in range((losses.size - 1).bit_length() + 1)]
    return {
        min(end, losses.size): float(losses[start:end].mean())
        for start, end in zip([0, *ends], ends, strict=False)
        if start < losses.size
    }


def compute_gold_probability(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Computes the mean probability that a model gives to the right choice among a
    question's, which changes smoothly where accuracy jumps (Schaeffer et al. 2023,
    arXiv 2304.15004). ``samples``: the harness's records of a multiple-choice task.
    Returns None for another kind of task."""
    found = []
    for sample in samples:
        logprobs = [
            each[0]
            for each in sample["filtered_resps"]
            if isinstance(each, list | tuple)
        ]
        gold = sample["target"]
        if (
            len(logprobs) < 2
            or not isinstance(gold, int)
            or not 0 <= gold < len(logprobs)
        ):
            return None
        weights = np.exp(np.array(logprobs) - max(logprobs))
        found.append(weights[gold] / weights.sum())
    return float(np.mean(found)) if found else None


def draw_downstream(
    records: Sequence[Mapping[str, float]], flops_per_token: float, image: Path
) -> None:
    """Draws, as a PNG, each task's metric and its smooth proxy over the compute of
    training, and the loss by position as it falls; nothing where no record has any.

    Args:
        records: of a ``metrics.jsonl``: ``tokens``, ``downstream/TASK/METRIC``,
            ``eval_loss_at/N``.
        flops_per_token: of training.
    """
    by_task: dict[str, set[str]] = {}
    for name in (
        n for record in records for n in record if n.startswith("downstream/")
    ):
        by_task.setdefault(name.split("/")[1], set()).add(name)
    by_position = [
        (
            record["step"],
            [(int(n.partition("/")[2]), v) for n, v in record.items() if _is_at(n)],
        )
        for record in records
        if any(map(_is_at, record))
    ]
    count = len(by_task) + bool(by_position)
    if not count:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.6), dpi=150, layout="constrained")
    panels = [
        FigureCanvasAgg(figure).figure.add_subplot(1, count, n + 1)
        for n in range(count)
    ]
    for axes, (task, names) in zip(panels, by_task.items(), strict=False):
        for name in sorted(names):
            points = [
                (r["tokens"] * flops_per_token, r[name]) for r in records if name in r
            ]
            label = name.split("/")[2].replace("_", " ")
            style: Any = {"marker": "o", "markersize": 4, "label": label}
            if name.endswith("gold_probability"):
                style["linestyle"] = "--"
            if not name.endswith("perplexity"):
                axes.plot(*zip(*points, strict=True), **style)
                continue
            other = axes.twinx()
            other.plot(
                *zip(*points, strict=True),
                color="#E45756",
                **{**style, "linestyle": "--"},
            )
            other.set_yscale("log")
            other.spines[["top"]].set_visible(False)
            other.legend(frameon=False, loc="lower right")
        axes.set_xlabel("training FLOPs")
        axes.set_title(task)
        axes.legend(frameon=False)
    for number, (step, points) in enumerate(by_position):
        shade = 0.2 + 0.8 * (number + 1) / len(by_position)
        label = f"step {step:,}" if number in (0, len(by_position) - 1) else None
        panels[-1].plot(
            *zip(*points, strict=True), color="#4C78A8", alpha=shade, label=label
        )
        panels[-1].set_xlabel("tokens of context")
        panels[-1].set_title("held-out loss by position")
        panels[-1].legend(frameon=False)
    for axes in panels:
        axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    with replace_file(image) as temporary:
        figure.savefig(temporary, format="png")


def _is_at(name: str) -> bool:
    return name.startswith("eval_loss_at/")
