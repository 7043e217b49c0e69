"""Evaluations side by side, as JSON and as a page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from maxlm.evaluation.results import (
    DocKey,
    EvalDoc,
    EvaluationResult,
    TaskResult,
    choose_main_metric,
)
from maxlm.runtime.files import replace_file
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.runtime.report_page import write_report_page


def write_report(report: JsonMapping, path: Path) -> list[Path]:
    """Writes the report as a page, ``.html``, and as JSON, ``.json``; returns their
    paths."""
    page = path.with_suffix(".html")
    plain = path.with_suffix(".json")
    write_report_page(page, "maxlm.evaluation", report["title"], report)
    with replace_file(plain.absolute()) as new:
        new.write_text(f"{json.dumps(report, indent=1, allow_nan=False)}\n", "utf-8")
    return [page, plain]


def build_report(
    evaluations: Sequence[EvaluationResult], num_samples: int = 20
) -> JsonObject:
    """Builds plain data: models, a row for each task and metric with 95% intervals, a
    row for each task of a group, and up to ``num_samples`` samples of each task or
    group, by the last step of each model (``shown``: numbers of ``models``)."""
    rows: list[JsonObject] = []
    samples: list[JsonObject] = []
    shown = _list_last_steps(evaluations)
    units = chain(*(evaluation.units for evaluation in evaluations))
    for unit in dict.fromkeys(units):
        results = [evaluation.tasks.get(unit) for evaluation in evaluations]
        directions = _read_directions(results)
        main_metric = choose_main_metric(directions)
        rows += _make_rows(unit, evaluations, directions, main_metric)
        shown_results = [results[number] for number in shown]
        samples += _choose_samples(unit, main_metric, shown_results, num_samples)
    short_names = [
        evaluation.model.rstrip("/").rpartition("/")[2] for evaluation in evaluations
    ]
    return {
        "title": ", ".join(dict.fromkeys(short_names)),
        "models": _describe_models(evaluations, short_names, rows),
        "shown": shown,
        "rows": rows,
        "samples": samples,
    }


def _read_directions(results: Iterable[TaskResult | None]) -> dict[str, bool]:
    """Returns whether higher is better, by metric of any of the results."""
    directions: dict[str, bool] = {}
    for result in results:
        if result is not None:
            for metric, figure in result.metrics.items():
                directions[metric] = figure.higher_is_better
    return directions


def _make_rows(
    unit: str,
    evaluations: Sequence[EvaluationResult],
    directions: Mapping[str, bool],
    main_metric: str,
) -> list[JsonObject]:
    """Makes a row for each metric of a task or group, and for each task of the group
    one of its main metric."""
    members: dict[str, None] = {}  # an ordered set
    for evaluation in evaluations:
        if unit in evaluation.tasks:
            sample_files = evaluation.tasks[unit].sample_files
            members |= dict.fromkeys(task for task in sample_files if task != unit)
    tasks_and_metrics = [(unit, metric) for metric in directions]
    tasks_and_metrics += [(task, main_metric) for task in members]
    rows: list[JsonObject] = []
    for task, metric in tasks_and_metrics:
        cells = [_make_cell(evaluation, task, metric) for evaluation in evaluations]
        row = {
            "task": task,
            "group": unit if task in members else None,
            "metric": metric,
            "main": metric == main_metric,
            "higher_is_better": directions[metric],
            "cells": cells,
        }
        rows.append(row)
    return rows


def _list_last_steps(evaluations: Sequence[EvaluationResult]) -> list[int]:
    """Lists the indices of the last evaluation of each run, and of all that have no
    step."""
    last: dict[tuple[str, int | None], int] = {}
    for index, evaluation in enumerate(evaluations):
        # A later one takes its run's place; without a step each is a run of its own.
        run_index = index if evaluation.step is None else None
        last[evaluation.model, run_index] = index
    return list(last.values())


def _make_cell(
    evaluation: EvaluationResult, task: str, metric: str
) -> JsonObject | None:
    """Returns an evaluation's figure as plain data; None: it has none."""
    result = evaluation.tasks.get(task)
    if result is None or metric not in result.metrics:
        return None
    return result.metrics[metric]._asdict()


def _describe_models(
    evaluations: Sequence[EvaluationResult],
    short_names: Sequence[str],
    rows: Sequence[JsonObject],
) -> list[JsonObject]:
    """Describes the report's models, told apart by step and, where need be, by
    folder."""
    names = [
        name if evaluation.step is None else f"{name} · step {evaluation.step}"
        for name, evaluation in zip(short_names, evaluations, strict=True)
    ]
    models: list[JsonObject] = []
    for number, (name, evaluation) in enumerate(zip(names, evaluations, strict=True)):
        if names.count(name) > 1:
            name = f"{name} ({evaluation.path.parent})"
        num_documents = 0
        for row in rows:
            cell = row["cells"][number]
            # A group's tasks are counted with it.
            if row["main"] and not row["group"] and cell:
                num_documents += cell["n"]
        model = {
            "name": name,
            "model": evaluation.model,
            "step": evaluation.step,
            "file": str(evaluation.path),
            "documents": num_documents,
            **evaluation.costs,
        }
        models.append(model)
    return models


def _choose_samples(
    task: str, metric: str, results: Sequence[TaskResult | None], count: int
) -> list[JsonObject]:
    """Chooses documents in turn, one of each pattern of right and wrong models, those
    first on which models disagree."""
    docs_by_model = [_read_docs_with_metric(result, metric) for result in results]
    patterns: dict[tuple[bool | None, ...], list[JsonObject]] = {}
    for key in dict.fromkeys(chain(*docs_by_model)):
        docs_of_key = [docs.get(key) for docs in docs_by_model]
        rights = tuple(_is_right(doc, metric) for doc in docs_of_key)
        answers: list[JsonObject | None] = []
        for doc, is_right in zip(docs_of_key, rights, strict=True):
            answers.append(None if doc is None else {**doc.answer, "right": is_right})
        # What a page shows of the document is the same in all evaluations.
        any_doc = next(doc for doc in docs_of_key if doc is not None)
        member, document, _, _ = key
        sample = {
            "task": task,
            "part": member,
            "document": str(document),
            "prompt": any_doc.prompt,
            "target": any_doc.target,
            "options": any_doc.options,
            "answers": answers,
        }
        patterns.setdefault(rights, []).append(sample)

    def agrees(rights: tuple[bool | None, ...]) -> bool:
        return len(set(rights)) == 1

    # False sorts before True: disagreement comes first.
    ordered = [patterns[rights] for rights in sorted(patterns, key=agrees)]
    in_turn = chain(*zip_longest(*ordered))
    return [sample for sample in in_turn if sample is not None][:count]


def _read_docs_with_metric(
    result: TaskResult | None, metric: str
) -> dict[DocKey, EvalDoc]:
    """Reads the documents that have a metric, by key; none where samples are
    missing."""
    docs: dict[DocKey, EvalDoc] = {}
    # lm_eval writes no samples without --log_samples.
    if result and all(path.is_file() for path in result.sample_files.values()):
        for doc in result.read_samples():
            if metric in doc.values:
                docs[doc.key] = doc
    return docs


def _is_right(doc: EvalDoc | None, metric: str) -> bool | None:
    """Whether an answer is right; None: there is none, or it is right in part."""
    if doc is None:
        return None
    score = doc.values[metric].total
    if score in (0.0, 1.0):
        return score == 1.0
    return None
