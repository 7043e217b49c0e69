"""Evaluations side by side, as JSON and as a page."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from maxlm.evaluation.results import (
    EvalDoc,
    EvaluationResult,
    TaskResult,
    choose_main_metric,
)
from maxlm.runtime.files import replace_file
from maxlm.runtime.report_page import write_report_page


def write_report(report: Mapping[str, Any], path: Path) -> list[Path]:
    """Writes the report as a page, ``.html``, and as JSON, ``.json``; returns their
    paths."""
    page, plain = path.with_suffix(".html"), path.with_suffix(".json")
    write_report_page(page, "maxlm.evaluation", report["title"], report)
    with replace_file(plain.absolute()) as new:
        new.write_text(f"{json.dumps(report, indent=1, allow_nan=False)}\n", "utf-8")
    return [page, plain]


def build_report(
    evaluations: Sequence[EvaluationResult], num_samples: int = 20
) -> dict[str, Any]:
    """Builds plain data: models, a row for each task and metric with 95% intervals, a
    row for each task of a group, and up to ``num_samples`` samples of each task or
    group, by the last step of each model (``shown``: numbers of ``models``)."""
    rows, samples, models = [], [], []
    shown = [
        *{
            (e.model, e.step is None and i): i for i, e in enumerate(evaluations)
        }.values()
    ]
    for unit in dict.fromkeys(chain(*(each.units for each in evaluations))):
        tasks = [each.tasks.get(unit) for each in evaluations]
        better = {
            m: r.higher_is_better for t in tasks if t for m, r in t.metrics.items()
        }
        main = choose_main_metric(better)
        parts = dict.fromkeys(
            p for task in tasks if task for p in task.sample_files if p != unit
        )
        for name, metric in [
            *((unit, each) for each in better),
            *((part, main) for part in parts),
        ]:
            found = [
                each.tasks[name].metrics if name in each.tasks else {}
                for each in evaluations
            ]
            cells = [own[metric]._asdict() if metric in own else None for own in found]
            row = {
                "task": name,
                "group": unit if name in parts else None,
                "metric": metric,
            }
            row |= {
                "main": metric == main,
                "higher_is_better": better[metric],
                "cells": cells,
            }
            rows.append(row)
        samples += _choose_samples(unit, main, [tasks[i] for i in shown], num_samples)
    names = [each.model.rstrip("/").rpartition("/")[2] for each in evaluations]
    full = zip(names, (each.step for each in evaluations), strict=True)
    full = [name if step is None else f"{name} · step {step}" for name, step in full]
    for i, (name, each) in enumerate(zip(full, evaluations, strict=True)):
        clash = f" ({each.path.parent})" if full.count(name) > 1 else ""
        cells = [row["cells"][i] for row in rows if row["main"] and not row["group"]]
        own = {
            "name": name + clash,
            "model": each.model,
            "step": each.step,
            "file": str(each.path),
        }
        models.append(
            own | {"documents": sum(cell["n"] for cell in cells if cell), **each.costs}
        )
    found = {"title": ", ".join(dict.fromkeys(names)), "models": models, "shown": shown}
    return found | {"rows": rows, "samples": samples}


def _choose_samples(
    task: str, metric: str, results: Sequence[TaskResult | None], count: int
) -> list[dict[str, Any]]:
    """In turn one of each pattern of right and wrong models, those that disagree
    first."""
    sides: list[dict[Any, EvalDoc]] = [{} for _ in results]
    for side, own in zip(sides, results, strict=True):
        # lm_eval writes no samples without --log_samples.
        if own and all(path.is_file() for path in own.sample_files.values()):
            side.update((s.key, s) for s in own.read_samples() if metric in s.values)
    patterns: dict[tuple[bool | None, ...], list[dict[str, Any]]] = {}
    for key in dict.fromkeys(chain(*sides)):
        own = [side.get(key) for side in sides]
        rights = tuple(
            s and {0.0: False, 1.0: True}.get(s.values[metric][0]) for s in own
        )
        answers = [
            s and {**s.answer, "right": r} for s, r in zip(own, rights, strict=True)
        ]
        _, _, _, prompt, target, options, _ = next(filter(None, own))
        shown = {
            "task": task,
            "part": key[0],
            "document": str(key[1]),
            "prompt": prompt,
        }
        shown |= {"target": target, "options": options, "answers": answers}
        patterns.setdefault(rights, []).append(shown)
    order = sorted(patterns, key=lambda rights: len({*rights}) == 1)
    return [
        *filter(None, chain(*zip_longest(*(patterns[rights] for rights in order))))
    ][:count]
