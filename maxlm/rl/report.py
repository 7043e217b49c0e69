"""A run of ``maxlm rl`` as a page: its curves, what its time went to, and samples with
their rewards."""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from maxlm.config import MaxlmError
from maxlm.rl.rollouts.records import read_sample_log
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.runtime.report_page import write_report_page
from maxlm.train.records import read_records

MAX_POINTS = 400
"""Points of a curve at most: more are means of neighbours."""
# What is drawn, in this order: a metric or all that begin so, and what it is.
_CURVES = {
    "reward": "mean reward of samples",
    "eval_reward": "mean reward of validation prompts",
    "reward/": "mean score",
    "eval_reward/": "mean score of validation prompts",
    "eval_best_of_": "best of a validation prompt's answers",
    "reward_std": "standard deviation of rewards",
    "zero_variance_groups": "share of prompts whose samples score the same",
    "response_length": "tokens of a sample that the policy drew",
    "max_response_length": "tokens of the longest",
    "complete": "share of samples that the policy ended",
    "environment_errors": "samples of a rollout that the environment failed with",
    "reward_timeouts/": "samples of a rollout whose score took too long",
    "reward_failures/": "samples of a rollout whose score failed",
    "entropy": "nats a token",
    "kl": "to the reference, nats a token",
    "sequence_kl": "to the reference, nats a sample",
    "teacher_kl": "to the teacher, nats a token",
    "divergence": "from the teacher, nats a token",
    "loss": "loss",
    "grad_norm": "norm of gradients",
    "clip_share": "share of tokens whose gradient a limit takes away",
    "policy_ratio": "mean ratio to the policy of the rollout",
    "engine_difference": "engine and trainer apart, nats a token",
    "engine_k3": "KL of engine to trainer, nats a token",
    "engine_ratio": "mean ratio of trainer to engine",
    "corrected_share": "share of tokens out of the correction's limits",
    "value_loss": "half the squared error of values",
    "value_mean": "mean of what is expected",
    "return_mean": "mean of what came",
    "staleness": "mean age of tokens, in rollouts",
    "expert_rerouted": "share of assignments to other experts",
    "generated_tokens_per_second": "tokens drawn a second",
    "tokens_per_second": "tokens trained on a second, padding included",
}
# Where there were none, there is nothing to see.
_FAILURES = ("environment_errors", "reward_timeouts/", "reward_failures/")
_SECONDS = "_seconds"
# Not phases of a step: the sum of the others, and a prediction.
_NOT_PHASES = frozenset({"rollout_seconds", "planned_seconds"})


def write_run_report(run: str | Path, path: str | Path, num_samples: int = 20) -> None:
    """Writes the report of a run's folder as one page of HTML, which needs no network.

    Args:
        num_samples: the newest so many samples, of the highest reward, and of the
            lowest.

    Raises:
        MaxlmError: the folder holds no rollouts.
    """
    folder = Path(run)
    report = build_run_report(folder, num_samples)
    write_report_page(Path(path), "maxlm.rl", report["name"], report)


def build_run_report(folder: Path, num_samples: int = 20) -> JsonObject:
    """Builds what the page shows as plain data; see :func:`write_run_report`."""
    # Steps that were made again have several records: the last counts.
    records: dict[int, JsonObject] = {}
    for record in read_records(folder / "metrics.jsonl"):
        records.setdefault(record["step"], {}).update(record)
    curves = read_curves(records)
    if "reward" not in curves and "response_length" not in curves:
        fix = "name the folder of a run of `maxlm rl`, once it has made a step"
        raise MaxlmError("no rollouts are recorded", where=str(folder), fix=fix)
    samples, num_seen = choose_samples(read_sample_log(folder), num_samples)
    return {
        "name": folder.resolve().name,
        "steps": max(records),
        "samples_seen": num_seen,
        "curves": [
            {
                "name": name,
                "about": _describe_curve(name),
                "first": points[0][1],
                "last": _average_end(points),
                "points": thin_out(points),
            }
            for name, points in curves.items()
        ],
        "phases": _list_phases(records.values()),
        "notes": find_notes(curves),
        "samples": samples,
    }


def read_curves(
    records: Mapping[int, JsonMapping],
) -> dict[str, list[tuple[int, float]]]:
    """Returns the metrics that are drawn: step and value of each that is finite."""
    names = {name for record in records.values() for name in record}
    curves = {}
    for key in _CURVES:
        is_group = key.endswith(("/", "_of_"))
        members = [name for name in names if is_group and name.startswith(key)]
        for name in sorted(members) if is_group else [key]:
            points = [
                (step, float(record[name]))
                for step, record in sorted(records.items())
                if _read_number(record.get(name)) is not None
            ]
            is_empty = key in _FAILURES and not any(value for _, value in points)
            if points and not is_empty:
                curves[name] = points
    # One reward is the whole.
    parts = [name for name in curves if name.startswith("reward/")]
    if len(parts) == 1 and curves[parts[0]] == curves.get("reward"):
        del curves[parts[0]]
    return curves


def _read_number(value: object) -> float | None:
    """A finite number; None: something else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _describe_curve(name: str) -> str:
    if name in _CURVES:
        return _CURVES[name]
    return next(about for key, about in _CURVES.items() if name.startswith(key))


def thin_out(
    points: Sequence[tuple[int, float]], max_points: int = MAX_POINTS
) -> list[tuple[float, float]]:
    """Returns points of a curve, or where there are more means of neighbours,
    ``max_points`` at most."""
    size = math.ceil(len(points) / max_points)
    thinned = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        step = sum(step for step, _ in group) / len(group)
        value = sum(value for _, value in group) / len(group)
        thinned.append((step, value))
    return thinned


def _average_end(points: Sequence[tuple[int, float]]) -> float:
    """Averages the last tenth of a curve."""
    end = points[-max(1, len(points) // 10) :]
    return sum(value for _, value in end) / len(end)


def _list_phases(records: Iterable[JsonMapping]) -> list[JsonObject]:
    """Lists the phases of rollouts and steps with the median and the sum of their
    seconds, the longest first."""
    seconds: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            is_phase = name.endswith(_SECONDS) and name not in _NOT_PHASES
            if is_phase and _read_number(value) is not None:
                seconds.setdefault(name.removesuffix(_SECONDS), []).append(value)
        if _read_number(record.get("seconds")) is not None:
            seconds.setdefault("training step", []).append(record["seconds"])
    phases: list[JsonObject] = [
        {
            "name": name,
            "times": len(values),
            "median": median(values),
            "total": sum(values),
        }
        for name, values in seconds.items()
    ]
    return sorted(phases, key=lambda phase: phase["total"], reverse=True)


def choose_samples(
    records: Iterable[JsonMapping], num_samples: int
) -> tuple[dict[str, list[JsonMapping]], int]:
    """Returns the samples of the highest reward, ``best``, of the lowest, ``worst``,
    and the ``newest``, ``num_samples`` of each at most, of equal ones the newer; and
    how many there are. Holds no more of them in memory."""
    newest: deque[JsonMapping] = deque(maxlen=num_samples)
    # Heaps whose first is the next to leave; numbers are unique, so that no two
    # records are compared.
    best: list[tuple[float, int, JsonMapping]] = []
    worst: list[tuple[float, int, JsonMapping]] = []
    num_seen = 0
    for number, record in enumerate(records):
        num_seen += 1
        newest.append(record)
        reward = _read_number(record.get("reward"))
        if reward is None:
            continue
        for heap, rank in ((best, reward), (worst, -reward)):
            heapq.heappush(heap, (rank, number, record))
            if len(heap) > num_samples:
                heapq.heappop(heap)
    chosen = {
        "best": [record for _, _, record in sorted(best, key=_rank, reverse=True)],
        "worst": [record for _, _, record in sorted(worst, key=_rank, reverse=True)],
        "newest": [*reversed(newest)],
    }
    return chosen, num_seen


def _rank(entry: tuple[float, int, JsonMapping]) -> tuple[float, int]:
    return entry[:2]


def find_notes(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    """Returns lines on what looks wrong at the end of the curves; docs/rl.md says what
    to do."""
    ends = {name: _average_end(points) for name, points in curves.items()}
    starts = {name: points[0][1] for name, points in curves.items()}
    notes = []
    for name, points in curves.items():
        if name.startswith("reward/") and not any(value for _, value in points):
            notes.append(f"{name} is 0 in every rollout: is the answer found at all?")
    reward = curves.get("reward", ())
    if reward and not any(value for _, value in reward):
        notes.append("the reward is 0 in every rollout: nothing is learnt")
    constant = ends.get("zero_variance_groups", 0.0)
    if constant > 0.8:
        notes.append(
            f"{constant:.0%} of the prompts have samples that all score the same: they "
            "are too easy or too hard"
        )
    complete = ends.get("complete", 1.0)
    if complete < 0.5:
        notes.append(f"{1 - complete:.0%} of the samples run out of room")
    entropy = ends.get("entropy", math.inf)
    if entropy < 0.1 * starts.get("entropy", 0.0):
        notes.append(
            f"entropy fell from {starts['entropy']:.3g} to {entropy:.3g} nats: little "
            "is tried any more"
        )
    apart = ends.get("engine_difference", 0.0)
    is_synchronous = not ends.get("staleness")
    if apart > 0.05 and is_synchronous:
        notes.append(
            f"engine and trainer differ by {apart:.2g} nats a token: the engine may not "
            "be in step"
        )
    for name, points in curves.items():
        kind, _, reward_name = name.partition("/")
        if kind == "reward_timeouts" and points[-1][1]:
            notes.append(
                f"{points[-1][1]:g} samples of the last rollout took longer than the "
                f"time limit of {reward_name}, and count as on_timeout"
            )
    corrected = ends.get("corrected_share", 0.0)
    if corrected > 0.1:
        notes.append(
            f"{corrected:.0%} of the tokens are out of the correction's limits"
        )
    return notes
