"""Reads evaluations in lm-evaluation-harness's form: ``results_TIME.json``, and for
each task ``samples_TASK_TIME.jsonl``."""

import os.path
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import exp, isfinite
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import MaxlmError
from maxlm.runtime.json_files import check_regular_file, parse_json


class MetricResult(NamedTuple):
    """A figure with its 95% interval."""

    value: float
    low: float | None
    high: float | None
    interval: (
        str | None
    )  # Wilson's of zeros and ones; else normal, by the standard error.
    n: int
    shots: int | None
    higher_is_better: bool


class EvalDoc(NamedTuple):
    """A document's scores, and what a page shows of it."""

    key: tuple[
        Any, ...
    ]  # Task, document's number, filter and hash: the same in two evaluations.
    values: dict[
        str, tuple[float, float]
    ]  # Sum and weight; of perplexities nats, and words.
    prompt_hash: str | None
    prompt: str
    target: str
    options: list[str]
    answer: dict[
        str, Any
    ]  # Log-likelihoods in nats and the option chosen, or generated text.


class TaskResult(NamedTuple):
    """Results of a task, or of a group of tasks over all their documents."""

    metrics: dict[str, MetricResult]
    sample_files: dict[str, Path]  # By task, several in a group; a file may be missing.

    def read_samples(self) -> list[EvalDoc]:
        """Raises MaxlmError for a file that is missing, or that has a damaged line."""
        pairs = self.sample_files.items()
        return [
            s
            for task, path in pairs
            for s in _parse_file(path, partial(_parse_sample, task))
        ]


class EvaluationResult(NamedTuple):
    """One evaluation of one model."""

    path: Path
    model: str
    step: int | None
    tasks: dict[str, TaskResult]  # Tasks and groups that have figures.
    units: list[str]  # The outermost of them: groups, and tasks outside groups.
    costs: dict[
        str, Any
    ]  # seconds, prompt_tokens, generated_tokens; 0 or None: not known.


def choose_main_metric(metrics: Iterable[str]) -> str:
    """Chooses ``acc_norm``, else ``acc``, else the first, as published tables do; "" of
    none."""
    names = [*metrics]
    return next((name for name in ("acc_norm", "acc", *names) if name in names), "")


def find_evaluations(source: Path) -> list[EvaluationResult]:
    """Reads the evaluations of each folder under a run or folder, each task's newest,
    by model and step; or one results file. Raises MaxlmError where there is none, and
    for one that is damaged."""
    paths = [source] if source.is_file() else sorted(source.rglob("results_*.json"))
    if not paths:
        fix = "name a run, or a folder that maxlm eval or lm_eval --output_path wrote"
        raise MaxlmError(
            "no evaluation here (results_*.json)", where=str(source), fix=fix
        )
    merged: dict[Any, EvaluationResult] = {}
    for path in reversed(paths):  # names end in the time
        (found,) = _parse_file(path, partial(_parse_results, path))
        place = path.parent, found.model, found.step
        newer = merged.get(place)
        merged[place] = found if newer is None else _merge_evaluations(newer, found)
    return sorted(merged.values(), key=lambda each: (each.model, each.step or 0))


def _merge_evaluations(
    newer: EvaluationResult, older: EvaluationResult
) -> EvaluationResult:
    """Adds the tasks that only an older evaluation has, and what that one cost."""
    if older.tasks.keys() <= newer.tasks.keys():
        return newer
    units = [*newer.units, *(name for name in older.units if name not in newer.tasks)]
    costs = {
        name: (newer.costs[name] or 0) + (older.costs[name] or 0)
        for name in newer.costs
    }
    return newer._replace(tasks=older.tasks | newer.tasks, units=units, costs=costs)


def list_metrics(
    results: dict[str, Any],
) -> Iterator[tuple[str, str, float, float | None, int]]:
    """Yields task, metric, value, standard error (None: there is none) and number of
    documents."""
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if (
                kind
                and not metric.endswith("_stderr")
                and isinstance(value, int | float)
            ):
                error = found.get(f"{metric}_stderr,{kind}")
                error = error if isinstance(error, float) and isfinite(error) else None
                count = found.get("sample_count", {}).get(
                    key, found.get("sample_len", 0)
                )
                yield (
                    task,
                    metric if kind == "none" else f"{metric} ({kind})",
                    value,
                    error,
                    count,
                )


def _parse_file(path: Path, parse: Callable[[Any], Any]) -> list[Any]:
    """Parses a JSON file, or each line of a JSON Lines file."""
    found = []
    fix = "evaluate again (lm_eval: with --log_samples)"
    check_regular_file(path, fix)
    try:
        data = path.read_bytes()
        for text in data.splitlines() if path.suffix == ".jsonl" else [data]:
            found.append(parse(parse_json(text, f"{path}:{len(found) + 1}", fix)))
    except (
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        MaxlmError,
    ) as error:
        is_ours = isinstance(error, MaxlmError)
        fault = error.what if is_ours else f"{type(error).__name__}: {error}"
        what = f"missing, damaged, or not an evaluation's ({fault})"
        raise MaxlmError(what, where=f"{path}:{len(found) + 1}", fix=fix) from error
    return found


def _parse_results(path: Path, data: dict[str, Any]) -> EvaluationResult:
    ours, groups = data.get("maxlm") or {}, data.get("group_subtasks") or {}
    tasks = {}
    inner = set()
    stamp = path.stem.removeprefix("results_")
    for name, metric, value, stderr, n in (
        m for m in list_metrics(data) if isfinite(m[2])
    ):
        if name not in tasks:
            members = _list_members(name, groups)
            inner.update(members)
            leaves = [each for each in members if not groups.get(each)] or [name]
            files = {
                leaf: path.with_name(f"samples_{leaf}_{stamp}.jsonl") for leaf in leaves
            }
            tasks[name] = TaskResult({}, files)
        better = (data.get("higher_is_better", {}).get(name) or {}).get(
            metric.split(" ")[0]
        )
        own = (
            *_compute_interval(metric, value, stderr, n),
            n,
            data.get("n-shot", {}).get(name),
        )
        tasks[name].metrics[metric] = MetricResult(value, *own, better is not False)
    costs = {
        key: ours.get(key) for key in ("seconds", "prompt_tokens", "generated_tokens")
    }
    costs["seconds"] = float(
        costs["seconds"] or data.get("total_evaluation_time_seconds") or 0
    )
    model = data.get("model_name") or path.parent.name
    units = [t for t in tasks if t not in inner]
    return EvaluationResult(path, str(model), ours.get("step"), tasks, units, costs)


def is_perplexity(metric: str) -> bool:
    """Whether a metric, with its filter or without, is the exponential of a mean."""
    return metric.split(" ")[0].endswith("perplexity")


def _compute_interval(
    metric: str, value: float, stderr: float | None, n: int
) -> tuple[Any, Any, Any]:
    from scipy import stats

    if stderr is None:
        return None, None, None
    # Of figures in [0, 1] only zeros and ones have a binomial's variance.
    if n and abs(stderr**2 * (n - 1) - value * (1 - value)) < 1e-9:
        interval = stats.binomtest(round(value * n), n).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high), "Wilson"
    if is_perplexity(metric):  # normal is its logarithm
        factor = exp(1.96 * stderr / value)
        return value / factor, value * factor, "normal"
    return value - 1.96 * stderr, value + 1.96 * stderr, "normal"


def _list_members(name: str, groups: Mapping[str, list[str]]) -> list[str]:
    members = groups.get(name) or []
    return [
        each for member in members for each in (member, *_list_members(member, groups))
    ]


def _parse_sample(task: str, line: Mapping[str, Any]) -> EvalDoc:
    kind = line.get("filter", "none")
    values = {}
    for metric in line["metrics"]:
        is_ratio = metric.endswith("_perplexity") or metric == "bits_per_byte"
        pair = line[metric] if is_ratio else [line[metric], 1]
        if all(isinstance(x, int | float) and isfinite(x) for x in pair):
            name = metric if kind == "none" else f"{metric} ({kind})"
            values[name] = (float(pair[0]), float(pair[1]))
    calls = [[*call.values()] for call in line["arguments"].values()]
    prompt = os.path.commonprefix([call[0] for call in calls])  # noqa: RUF071
    if options := [
        call[1] for call in calls if len(call) > 1 and isinstance(call[1], str)
    ]:
        scores = [float(each[0]) for each in line["filtered_resps"]]
        lengths = [
            len(text.lstrip()) if "acc_norm" in values else 1 for text in options
        ]
        ranks = [
            score / max(length, 1)
            for score, length in zip(scores, lengths, strict=False)
        ]
        answer: dict[str, Any] = {"scores": scores, "choice": ranks.index(max(ranks))}
    else:
        texts = {"output": line["resps"][0][0], "answer": line["filtered_resps"][0]}
        answer = {name: _shorten(str(text)) for name, text in texts.items()}
    if len({*options}) == 1 < len(options):  # Contexts differ, as WinoGrande's do.
        options = [call[0][len(prompt) :] + call[1] for call in calls]
    key = (task, line["doc_id"], kind, line.get("doc_hash"))
    texts = (
        _shorten(prompt),
        _shorten(str(line.get("target"))),
        [*map(_shorten, options)],
    )
    return EvalDoc(key, values, line.get("prompt_hash"), *texts, answer)


def _shorten(text: str, most: int = 3000) -> str:
    note = f"\n[… {len(text) - most:,} characters left out …]\n"
    return text if len(text) <= most else text[: most // 2] + note + text[-most // 2 :]
