"""Measures beside a task's own metric: the loss by position, and a smooth proxy of
accuracy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maxlm.inference.scoring import Scorer, Tokens
from maxlm.runtime.files import replace_file
from maxlm.runtime.json_types import JsonMapping

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOSS_AT = "eval_loss_at/"


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
    # A document's first token is context alone.
    pairs = [(document[:1], document[1:]) for document in documents]
    scores = scorer.score(pairs, on_progress)
    logprobs = np.array([score.token_logprobs for score in scores])
    losses = -logprobs.mean(axis=0)  # [length − 1]
    # Means over ranges that double: [0, 1), [1, 2), [2, 4), [4, 8), ...
    losses_by_position: dict[int, float] = {}
    start = 0
    end = 1
    while start < losses.size:
        last_position = min(end, losses.size)
        losses_by_position[last_position] = float(losses[start:end].mean())
        start = end
        end *= 2
    return losses_by_position


def compute_gold_probability(samples: Sequence[JsonMapping]) -> float | None:
    """Computes the mean probability that a model gives to the right choice among a
    question's, which changes smoothly where accuracy jumps (Schaeffer et al. 2023,
    arXiv 2304.15004). ``samples``: the harness's records of a multiple-choice task.
    Returns None for another kind of task."""
    probabilities = []
    for sample in samples:
        # Of multiple choice each response is (log-likelihood, is greedy).
        logprobs = [
            response[0]
            for response in sample["filtered_resps"]
            if isinstance(response, list | tuple)
        ]
        gold = sample["target"]
        if len(logprobs) < 2 or not isinstance(gold, int):
            return None
        if not 0 <= gold < len(logprobs):
            return None
        # A softmax over the choices.
        weights = np.exp(np.array(logprobs) - max(logprobs))
        probabilities.append(weights[gold] / weights.sum())
    return float(np.mean(probabilities)) if probabilities else None


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
    by_task = _group_metrics_by_task(records)
    by_position = _list_position_losses(records)
    num_panels = len(by_task) + int(bool(by_position))
    if not num_panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * num_panels, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # binds itself to the figure: no window is needed
    panels = [
        figure.add_subplot(1, num_panels, number + 1) for number in range(num_panels)
    ]
    for axes, (task, names) in zip(panels, by_task.items(), strict=False):
        for name in sorted(names):
            flops = [
                record["tokens"] * flops_per_token
                for record in records
                if name in record
            ]
            values = [record[name] for record in records if name in record]
            _draw_metric(axes, name, flops, values)
        axes.set_xlabel("training FLOPs")
        axes.set_title(task)
        axes.legend(frameon=False)
    if by_position:
        _draw_position_losses(panels[-1], by_position)
    for axes in panels:
        axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    with replace_file(image) as temporary:
        figure.savefig(temporary, format="png")


def _group_metrics_by_task(
    records: Sequence[Mapping[str, float]],
) -> dict[str, set[str]]:
    """Returns the names ``downstream/TASK/METRIC`` that any record has, by task."""
    by_task: dict[str, set[str]] = {}
    for record in records:
        for name in record:
            if name.startswith("downstream/"):
                task = name.split("/")[1]
                by_task.setdefault(task, set()).add(name)
    return by_task


def _list_position_losses(
    records: Sequence[Mapping[str, float]],
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Returns, of each record with losses by position, the step and (position, loss)
    of each."""
    by_position: list[tuple[float, list[tuple[int, float]]]] = []
    for record in records:
        points = []
        for name, value in record.items():
            if name.startswith(_LOSS_AT):
                points.append((int(name.removeprefix(_LOSS_AT)), value))
        if points:
            by_position.append((record["step"], points))
    return by_position


def _draw_metric(
    axes: "Axes", name: str, flops: Sequence[float], values: Sequence[float]
) -> None:
    """Draws one metric of a task; a perplexity on an axis of its own."""
    label = name.split("/")[2].replace("_", " ")
    if name.endswith("perplexity"):
        perplexity_axes = axes.twinx()
        perplexity_axes.plot(
            flops,
            values,
            color="#E45756",
            marker="o",
            markersize=4,
            label=label,
            linestyle="--",
        )
        perplexity_axes.set_yscale("log")
        perplexity_axes.spines[["top"]].set_visible(False)
        perplexity_axes.legend(frameon=False, loc="lower right")
        return
    is_proxy = name.endswith("gold_probability")
    axes.plot(
        flops,
        values,
        marker="o",
        markersize=4,
        label=label,
        linestyle="--" if is_proxy else "-",
    )


def _draw_position_losses(
    axes: "Axes", by_position: Sequence[tuple[float, Sequence[tuple[int, float]]]]
) -> None:
    """Draws the loss by position, later steps darker."""
    last = len(by_position) - 1
    for number, (step, points) in enumerate(by_position):
        positions = [position for position, _ in points]
        losses = [loss for _, loss in points]
        axes.plot(
            positions,
            losses,
            color="#4C78A8",
            alpha=0.2 + 0.8 * (number + 1) / len(by_position),
            label=f"step {step:,}" if number in (0, last) else None,
        )
    axes.set_xlabel("tokens of context")
    axes.set_title("held-out loss by position")
    axes.legend(frameon=False)
