"""Evaluation folders as lm-evaluation-harness writes them, with scores that are
given."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def make_sample(doc: int, metrics: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    question = f"Question {doc}\nAnswer:"
    calls = [
        {"arg_0": question, "arg_1": option} for option in (" red", " green", " blue")
    ]
    scores = [["-2.5", "False"], ["-1.5", "True"], ["-3.5", "False"]]
    return {
        "doc_id": doc,
        "target": "1",
        "arguments": {f"gen_args_{i}": call for i, call in enumerate(calls)},
        "resps": [[score] for score in scores],
        "filtered_resps": scores,
        "filter": "none",
        "metrics": [*metrics],
        "doc_hash": f"{doc:064x}",
        "prompt_hash": f"{doc:064x}",
        **metrics,
        **changed,
    }


def write_evaluation(
    folder: Path,
    tasks: Mapping[str, Mapping[str, Sequence[Any]]],
    *,
    model: str = "tiny",
    time: str = "2026-01-02T03-04-05",
    groups: Mapping[str, Sequence[str]] | None = None,
    samples: Mapping[str, Sequence[dict[str, Any]]] | None = None,
    **more: Any,
) -> Path:
    """``tasks``: by task and metric a score for each document; numbers are averaged."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for task, metrics in tasks.items():
        results[task] = {"alias": task, "sample_len": len(next(iter(metrics.values())))}
        for metric, scores in metrics.items():
            spread = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else "N/A"
            results[task] |= {
                f"{metric},none": fmean(scores),
                f"{metric}_stderr,none": spread,
            }
        rows = zip(*metrics.values(), strict=True)
        made = [
            make_sample(i, dict(zip(metrics, row, strict=True)))
            for i, row in enumerate(rows)
        ]
        lines = map(json.dumps, (samples or {}).get(task, made))
        (folder / f"samples_{task}_{time}.jsonl").write_text(
            "".join(f"{x}\n" for x in lines)
        )
    for group, members in (groups or {}).items():
        scores = [
            score for task in tasks if task in members for score in tasks[task]["acc"]
        ]
        figures = {"acc,none": fmean(scores), "acc_stderr,none": 0.1}
        results[group] = figures | {"sample_len": len(scores)}
    data = {
        "results": results,
        "group_subtasks": groups or {},
        "n-shot": dict.fromkeys(results, 5),
        "model_name": model,
        **more,
    }
    path = folder / f"results_{time}.json"
    path.write_text(json.dumps(data))
    return path
