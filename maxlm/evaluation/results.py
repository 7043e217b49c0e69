"""Reads evaluations in lm-evaluation-harness's form: ``results_TIME.json``, and for
each task ``samples_TASK_TIME.jsonl``."""

import os.path
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import exp, isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from maxlm.config import MaxlmError
from maxlm.runtime.json_files import check_regular_file, parse_json
from maxlm.runtime.json_types import JsonMapping, JsonObject

Parsed = TypeVar("Parsed")
DocKey = tuple[str, int, str, str | None]
"""Task, document's number, filter and hash: the same in two evaluations."""


class MetricResult(NamedTuple):
    """A figure with its 95% interval."""

    value: float
    low: float | None
    high: float | None
    interval: str | None
    """Wilson's of zeros and ones; else normal, by the standard error."""
    n: int
    shots: int | None
    higher_is_better: bool


class ListedFigure(NamedTuple):
    """A task's figure as a results file has it."""

    task: str
    metric: str
    """With its filter in brackets, but for the filter "none"."""
    value: float
    stderr: float | None
    """Standard error; None: the file has none."""
    num_docs: int


class DocScore(NamedTuple):
    """What a document adds to a figure: the figure is the sum of ``total`` over that of
    ``weight``."""

    total: float
    """Of a perplexity its log-likelihood in nats; else the score."""
    weight: float
    """Of a perplexity the document's words or bytes; else 1."""


class EvalDoc(NamedTuple):
    """A document's scores, and what a page shows of it."""

    key: DocKey
    values: dict[str, DocScore]
    """By metric."""
    prompt_hash: str | None
    prompt: str
    target: str
    options: list[str]
    answer: JsonObject
    """Log-likelihoods in nats and the option chosen, or generated text."""


class TaskResult(NamedTuple):
    """Results of a task, or of a group of tasks over all their documents."""

    metrics: dict[str, MetricResult]
    sample_files: dict[str, Path]
    """By task, several in a group; a file may be missing."""

    def read_samples(self) -> list[EvalDoc]:
        """Reads all documents' scores; raises MaxlmError for a file that is missing, or
        that has a damaged line."""
        samples: list[EvalDoc] = []
        for task, path in self.sample_files.items():
            samples += _parse_file(path, partial(_parse_sample, task))
        return samples


class EvaluationResult(NamedTuple):
    """One evaluation of one model."""

    path: Path
    model: str
    step: int | None
    tasks: dict[str, TaskResult]
    """Tasks and groups that have figures."""
    units: list[str]
    """The outermost of them: groups, and tasks outside groups."""
    costs: dict[str, float | None]
    """seconds, prompt_tokens, generated_tokens; 0 or None: not known."""


def choose_main_metric(metrics: Iterable[str]) -> str:
    """Chooses ``acc_norm``, else ``acc``, else the first, as published tables do; "" of
    none."""
    names = list(metrics)
    for name in ("acc_norm", "acc"):
        if name in names:
            return name
    return names[0] if names else ""


def read_newest_evaluations(source: Path) -> list[EvaluationResult]:
    """Reads the evaluations of each folder under a run or folder, each task's newest,
    by model and step; or one results file. Raises MaxlmError where there is none, and
    for one that is damaged."""
    paths = [source] if source.is_file() else sorted(source.rglob("results_*.json"))
    if not paths:
        message = "no evaluation here (results_*.json)"
        fix = "name a run, or a folder that maxlm eval or lm_eval --output_path wrote"
        raise MaxlmError(message, where=str(source), fix=fix)
    merged: dict[tuple[Path, str, int | None], EvaluationResult] = {}
    for path in reversed(paths):  # names end in the time: the newest first
        (evaluation,) = _parse_file(path, partial(_parse_results, path))
        key = (path.parent, evaluation.model, evaluation.step)
        if key in merged:
            evaluation = _merge_evaluations(merged[key], evaluation)
        merged[key] = evaluation

    def get_model_and_step(evaluation: EvaluationResult) -> tuple[str, int]:
        return evaluation.model, evaluation.step or 0

    return sorted(merged.values(), key=get_model_and_step)


def _merge_evaluations(
    newer: EvaluationResult, older: EvaluationResult
) -> EvaluationResult:
    """Adds the tasks that only an older evaluation has, and what that one cost."""
    if older.tasks.keys() <= newer.tasks.keys():
        return newer
    units = list(newer.units)
    units += [name for name in older.units if name not in newer.tasks]
    costs: dict[str, float | None] = {}
    for name, newer_cost in newer.costs.items():
        costs[name] = (newer_cost or 0) + (older.costs[name] or 0)
    return newer._replace(tasks=older.tasks | newer.tasks, units=units, costs=costs)


def list_metrics(results: JsonMapping) -> Iterator[ListedFigure]:
    """Yields the figures of all tasks and groups in the data of a results file."""
    for task, fields in results["results"].items():
        for key, value in fields.items():
            # Metrics are METRIC,FILTER; other keys are about the task.
            metric, _, filter_name = key.partition(",")
            is_figure = filter_name and not metric.endswith("_stderr")
            if not is_figure or not isinstance(value, int | float):
                continue
            stderr = fields.get(f"{metric}_stderr,{filter_name}")
            if not isinstance(stderr, float) or not isfinite(stderr):
                stderr = None
            # A metric may leave out documents of its task.
            all_docs = fields.get("sample_len", 0)
            num_docs = fields.get("sample_count", {}).get(key, all_docs)
            name = _name_metric(metric, filter_name)
            yield ListedFigure(task, name, value, stderr, num_docs)


def _name_metric(metric: str, filter_name: str) -> str:
    """Returns a metric's name with its filter, such as ``exact_match
    (flexible-extract)``."""
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def strip_filter(metric: str) -> str:
    """Returns a metric's name without its filter."""
    return metric.split(" ")[0]


def _parse_file(path: Path, parse: Callable[[Any], Parsed]) -> list[Parsed]:
    """Parses a JSON file, or each line of a JSON Lines file."""
    parsed: list[Parsed] = []
    fix = "evaluate again (lm_eval: with --log_samples)"
    check_regular_file(path, fix)
    try:
        data = path.read_bytes()
        texts = data.splitlines() if path.suffix == ".jsonl" else [data]
        for text in texts:
            where = f"{path}:{len(parsed) + 1}"
            parsed.append(parse(parse_json(text, where, fix)))
    except (
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        MaxlmError,
    ) as error:
        # The harness writes these files, in forms that change with its versions, and
        # has no schema of them: whatever does not fit is the file's fault.
        if isinstance(error, MaxlmError):
            fault = error.message
        else:
            fault = f"{type(error).__name__}: {error}"
        message = f"missing, damaged, or not an evaluation's ({fault})"
        where = f"{path}:{len(parsed) + 1}"
        raise MaxlmError(message, where=where, fix=fix) from error
    return parsed


def _parse_results(path: Path, data: JsonMapping) -> EvaluationResult:
    our_fields = data.get("maxlm") or {}
    groups = data.get("group_subtasks") or {}
    tasks: dict[str, TaskResult] = {}
    members_of_groups: set[str] = set()
    for figure in list_metrics(data):
        task = figure.task
        if not isfinite(figure.value):
            continue
        if task not in tasks:
            members = _list_members(task, groups)
            members_of_groups.update(members)
            # Groups within a group have no samples of their own.
            leaves = [member for member in members if not groups.get(member)]
            tasks[task] = TaskResult({}, _name_sample_files(path, leaves or [task]))
        tasks[task].metrics[figure.metric] = _make_metric_result(figure, data)
    seconds = our_fields.get("seconds") or data.get("total_evaluation_time_seconds")
    return EvaluationResult(
        path=path,
        model=str(data.get("model_name") or path.parent.name),
        step=our_fields.get("step"),
        tasks=tasks,
        units=[name for name in tasks if name not in members_of_groups],
        costs={
            "seconds": float(seconds or 0),
            "prompt_tokens": our_fields.get("prompt_tokens"),
            "generated_tokens": our_fields.get("generated_tokens"),
        },
    )


def _name_sample_files(results_path: Path, tasks: Iterable[str]) -> dict[str, Path]:
    """Returns the path of each task's samples, beside the results of the same time."""
    time = results_path.stem.removeprefix("results_")
    return {
        task: results_path.with_name(f"samples_{task}_{time}.jsonl") for task in tasks
    }


def _make_metric_result(figure: ListedFigure, data: JsonMapping) -> MetricResult:
    """Returns a figure with its interval, and with what the file's ``data`` says of
    it."""
    directions = data.get("higher_is_better", {}).get(figure.task) or {}
    # It is, unless the file says otherwise.
    higher_is_better = directions.get(strip_filter(figure.metric)) is not False
    low, high, interval = _compute_interval(figure)
    return MetricResult(
        value=figure.value,
        low=low,
        high=high,
        interval=interval,
        n=figure.num_docs,
        shots=data.get("n-shot", {}).get(figure.task),
        higher_is_better=higher_is_better,
    )


def is_perplexity(metric: str) -> bool:
    """Whether a metric, with its filter or without, is the exponential of a mean."""
    return strip_filter(metric).endswith("perplexity")


def _compute_interval(
    figure: ListedFigure,
) -> tuple[float | None, float | None, str | None]:
    """Computes the 95% interval's ends, and says its kind."""
    from scipy import stats

    value = figure.value
    stderr = figure.stderr
    n = figure.num_docs
    if stderr is None:
        return None, None, None
    # Of figures in [0, 1] only zeros and ones have a binomial's variance.
    variance = stderr**2 * (n - 1)
    if n and abs(variance - value * (1 - value)) < 1e-9:
        num_right = round(value * n)
        interval = stats.binomtest(num_right, n).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high), "Wilson"
    if is_perplexity(figure.metric):  # normal is its logarithm
        factor = exp(1.96 * stderr / value)
        return value / factor, value * factor, "normal"
    return value - 1.96 * stderr, value + 1.96 * stderr, "normal"


def _list_members(name: str, groups: Mapping[str, list[str]]) -> list[str]:
    """Lists the members of a group, and theirs; none of a task."""
    members: list[str] = []
    for member in groups.get(name) or []:
        members += [member, *_list_members(member, groups)]
    return members


def _parse_sample(task: str, line: JsonMapping) -> EvalDoc:
    filter_name = line.get("filter", "none")
    values = _parse_scores(line, filter_name)
    # The arguments of each call of the model: a context and an option of multiple
    # choice, or a prompt and settings.
    calls = [list(call.values()) for call in line["arguments"].values()]
    prompt = os.path.commonprefix([call[0] for call in calls])  # noqa: RUF071
    options = [call[1] for call in calls if len(call) > 1 and isinstance(call[1], str)]
    if options:
        scores = [float(response[0]) for response in line["filtered_resps"]]
        choice = _find_choice(scores, options, by_length="acc_norm" in values)
        answer: JsonObject = {"scores": scores, "choice": choice}
    else:
        answer = {
            "output": _shorten(str(line["resps"][0][0])),
            "answer": _shorten(str(line["filtered_resps"][0])),
        }
    is_one_text = len(set(options)) == 1
    if is_one_text and len(options) > 1:
        # The contexts differ instead, as WinoGrande's do: what each adds to the prompt
        # is part of the option.
        options = [call[0][len(prompt) :] + call[1] for call in calls]
    return EvalDoc(
        key=(task, line["doc_id"], filter_name, line.get("doc_hash")),
        values=values,
        prompt_hash=line.get("prompt_hash"),
        prompt=_shorten(prompt),
        target=_shorten(str(line.get("target"))),
        options=[_shorten(option) for option in options],
        answer=answer,
    )


def _parse_scores(line: JsonMapping, filter_name: str) -> dict[str, DocScore]:
    """Returns a document's finite scores, by metric."""
    scores: dict[str, DocScore] = {}
    for metric in line["metrics"]:
        is_ratio = metric.endswith("_perplexity") or metric == "bits_per_byte"
        pair = line[metric] if is_ratio else (line[metric], 1)
        total = pair[0]
        weight = pair[1]
        if _is_finite_number(total) and _is_finite_number(weight):
            name = _name_metric(metric, filter_name)
            scores[name] = DocScore(float(total), float(weight))
    return scores


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _find_choice(
    scores: Sequence[float], options: Sequence[str], *, by_length: bool
) -> int:
    """Returns the index of the option of the highest log-likelihood; ``by_length``: of
    the highest a character, as acc_norm chooses."""
    rates = []
    for score, option in zip(scores, options, strict=False):
        length = len(option.lstrip()) if by_length else 1
        rates.append(score / max(length, 1))
    return rates.index(max(rates))


def _shorten(text: str, max_chars: int = 3000) -> str:
    """Leaves out the middle of a long text."""
    if len(text) <= max_chars:
        return text
    note = f"\n[… {len(text) - max_chars:,} characters left out …]\n"
    return text[: max_chars // 2] + note + text[-max_chars // 2 :]
