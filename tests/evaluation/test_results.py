"""Evaluation folders are read as they were written, and what is damaged is named."""

import json
import math

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation.results import read_newest_evaluations
from tests.evaluation.folders import make_sample, write_evaluation

ARC = {"arc": {"acc": [1.0, 0.0, 1.0], "acc_norm": [1.0, 1.0, 1.0]}}


def test_figures_and_samples_are_read(tmp_path):
    path = write_evaluation(
        tmp_path, ARC, maxlm={"step": 7, "seconds": 12.5, "prompt_tokens": 99}
    )
    data = json.loads(path.read_text())
    # Figures that are no numbers are left out.
    data["results"]["arc"] |= {
        "f1,none": float("nan"),
        "acc_norm_stderr,none": "N/A",
        "x,none": "",
    }
    data["results"]["arc"] |= {"perplexity,none": 58.0, "perplexity_stderr,none": 33.0}
    path.write_text(json.dumps(data))
    (evaluation,) = read_newest_evaluations(tmp_path)
    assert (evaluation.model, evaluation.step, evaluation.units) == ("tiny", 7, ["arc"])
    assert evaluation.costs == {
        "seconds": 12.5,
        "prompt_tokens": 99,
        "generated_tokens": None,
    }
    task = evaluation.tasks["arc"]
    assert [*task.metrics] == ["acc", "acc_norm", "perplexity"]
    acc = task.metrics["acc"]
    assert (acc.value, acc.n, acc.shots) == (pytest.approx(2 / 3), 3, 5)
    assert task.metrics["acc_norm"].interval is None
    # Of the logarithm, whose standard error is 33 / 58.
    ends = math.log(58) + np.array([-1.96, 1.96]) * 33 / 58
    perplexity = task.metrics["perplexity"]
    assert [perplexity.low, perplexity.high] == pytest.approx(np.exp(ends))
    assert [sample.values["acc"] for sample in task.read_samples()] == [
        (1, 1),
        (0, 1),
        (1, 1),
    ]


def test_other_forms_of_scores(tmp_path):
    # A filter of its own, a sum and its weight, a pair that is none, no number.
    lines = [
        make_sample(0, {"exact_match": True}, filter="strict"),
        make_sample(1, {"word_perplexity": [-20.0, 4]}),
        make_sample(2, {"mcc": [1, 0]}),
        make_sample(4, {"acc": float("nan")}),
    ]
    write_evaluation(tmp_path, {"t": {"acc": [1.0]}}, samples={"t": lines})
    values = [
        s.values for s in read_newest_evaluations(tmp_path)[0].tasks["t"].read_samples()
    ]
    assert values == [
        {"exact_match (strict)": (1, 1)},
        {"word_perplexity": (-20, 4)},
        {},
        {},
    ]


def test_the_newest_evaluation_of_each_task_is_taken(tmp_path):
    for step in (30, 4):
        folder = tmp_path / "evaluations" / f"step-{step:06d}"
        for time, score, name in (("01T00", 0.0, "old"), ("02T00", 1.0, "new")):
            tasks = {"t": {"acc": [score, score]}, name: {"acc": [score]}}
            about = {"step": step, "seconds": 2.0}
            path = write_evaluation(folder, tasks, time=f"2026-01-{time}", maxlm=about)
    evaluations = read_newest_evaluations(tmp_path)
    assert [evaluation.step for evaluation in evaluations] == [4, 30]
    for evaluation in evaluations:
        values = {
            name: task.metrics["acc"].value for name, task in evaluation.tasks.items()
        }
        assert values == {"t": 1, "new": 1, "old": 0}
        assert {*evaluation.units} == {*values}
        assert evaluation.costs["seconds"] == 4
    assert [evaluation.step for evaluation in read_newest_evaluations(path)] == [4]


def test_groups_hold_their_tasks_at_any_depth(tmp_path):
    tasks = {name: {"acc": [1.0, 0.0]} for name in ("a", "b", "c", "d")}
    groups = {"top": ["low", "c"], "low": ["a", "b"], "a": []}
    scored = {"top": ["a", "b", "c"], "low": ["a", "b"]}
    write_evaluation(tmp_path, tasks, groups=scored, group_subtasks=groups)
    (evaluation,) = read_newest_evaluations(tmp_path)
    assert evaluation.units == ["d", "top"]
    assert {s.key[0] for s in evaluation.tasks["top"].read_samples()} == {"a", "b", "c"}


DEEP = '{"results": ' + "[" * 5000 + "]" * 5000 + "}"


@pytest.mark.parametrize(
    "text", ["", '{"results": ', "[]", "{}", '{"results": {"t": 3}}', "\xff", DEEP]
)
def test_a_damaged_results_file_is_named(tmp_path, text):
    path = tmp_path / "results_x.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(MaxlmError, match=f"^{path}:1: missing, damaged, or[^\n]*$"):
        read_newest_evaluations(tmp_path)
    with pytest.raises(MaxlmError, match="nowhere: no evaluation here"):
        read_newest_evaluations(tmp_path / "nowhere")


DAMAGED = ['{"doc_id": 1', "", DEEP, "3", '{"metrics": []}', '{"metrics": ["x"]}']


@pytest.mark.parametrize(
    "line", [*DAMAGED, json.dumps(make_sample(3, {}, filtered_resps=[[]]))]
)
def test_a_damaged_sample_is_named_with_its_line(tmp_path, line):
    write_evaluation(tmp_path, ARC)
    (path,) = tmp_path.glob("samples*")
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:2], line, *whole[2:]]))
    with pytest.raises(MaxlmError, match=f"^{path}:3: missing, damaged.*--log_samples"):
        read_newest_evaluations(tmp_path)[0].tasks["arc"].read_samples()
