"""A report's figures are those of the samples, and samples shown are as they were
written."""

import json
from math import sqrt

import pytest

from maxlm.cli.main import main
from maxlm.evaluation.report import build_report
from maxlm.evaluation.results import read_newest_evaluations
from tests.evaluation.folders import make_sample, write_evaluation

HARD = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
EASY = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
SUBJECTS = {"m_law": {"acc": [1.0, 0.0, 0.0]}, "m_art": {"acc": [1.0] * 4}}


@pytest.fixture
def folders(tmp_path):
    """Two checkpoints of a run, and another model that has one task less and is worse
    at one."""
    for step, scores in ((100, HARD), (200, EASY)):
        tasks = {"arc": {"acc": scores, "f1": [x / 2 for x in EASY]}, **SUBJECTS}
        costs = {
            "step": step,
            "seconds": 60,
            "prompt_tokens": 5000,
            "generated_tokens": 7,
        }
        folder = tmp_path / "run" / "evaluations" / f"step-{step:06d}"
        write_evaluation(
            folder, tasks, model="runs/own", groups={"m": [*SUBJECTS]}, maxlm=costs
        )
    write_evaluation(
        tmp_path / "other", {"arc": {"acc": [0.0] * 11}}, model="hub/other"
    )
    return [tmp_path / "run", tmp_path / "other"]


def build(folders, num_samples=20):
    evaluations = []
    for folder in folders:
        evaluations += read_newest_evaluations(folder)
    return build_report(evaluations, num_samples)


def wilson(hits, n, z=1.959963984540054):
    """The ends where the observed share is z standard errors from the share tested."""
    middle = hits + z * z / 2
    error = z * sqrt(hits * (n - hits) / n + z * z / 4)
    return [(middle - error) / (n + z * z), (middle + error) / (n + z * z)]


def test_the_figures_are_those_of_the_samples(folders, tmp_path):
    report = build(folders)
    names = [model["name"] for model in report["models"]]
    assert names == ["own · step 100", "own · step 200", "other"]
    rows = {(row["task"], row["metric"]): row for row in report["rows"]}
    groups = {task: row["group"] for (task, _), row in rows.items()}
    assert groups == {"arc": None, "m": None, "m_law": "m", "m_art": "m"}
    for cell, names in zip(
        rows["arc", "acc"]["cells"], (HARD, EASY, [0.0] * 11), strict=True
    ):
        assert cell["value"] == pytest.approx(sum(names) / 11)
        assert [cell["low"], cell["high"]] == pytest.approx(
            wilson(sum(names), 11), abs=1e-9
        )
        assert (cell["interval"], cell["n"], cell["shots"]) == ("Wilson", 11, 5)
    f1 = rows["arc", "f1"]["cells"]
    mean = sum(EASY) / 22
    error = 1.96 * sqrt(sum((x / 2 - mean) ** 2 for x in EASY) / 10 / 11)
    assert [f1[1]["low"], f1[1]["high"]] == pytest.approx([mean - error, mean + error])
    assert (f1[1]["interval"], f1[2]) == ("normal", None)
    group, law = rows["m", "acc"]["cells"], rows["m_law", "acc"]["cells"][0]
    assert (group[1]["value"], group[1]["n"], group[2]) == (
        pytest.approx(5 / 7),
        7,
        None,
    )
    assert [law["low"], law["high"]] == pytest.approx(wilson(1, 3), abs=1e-9)
    assert report["shown"] == [1, 2]  # The last step of the run, and the other model.
    costs = {
        "documents": 18,
        "seconds": 60,
        "prompt_tokens": 5000,
        "generated_tokens": 7,
    }
    assert report["models"][0].items() >= costs.items()
    again = [model["name"] for model in build([folders[1], folders[1]])["models"]]
    assert again == [f"other ({tmp_path}/other)"] * 2


def test_a_model_without_steps_and_step_0_of_a_run_are_two(tmp_path):
    for name, costs in (("a", None), ("b", {"step": 0, "seconds": 1})):
        write_evaluation(
            tmp_path / name, {"arc": {"acc": EASY}}, model="runs/own", maxlm=costs
        )
    report = build([tmp_path / "a", tmp_path / "b"])
    assert [model["step"] for model in report["models"]] == [None, 0]
    assert report["shown"] == [0, 1]


def test_samples_show_each_pattern_and_the_choice(folders):
    report = build(folders, num_samples=3)
    arc = [sample for sample in report["samples"] if sample["task"] == "arc"]
    rights = [[a["right"] for a in sample["answers"]] for sample in arc]
    assert rights == [[True, False], [False, False], [True, False]]
    shown = {
        "prompt": "Question 0\nAnswer:",
        "target": "1",
        "options": [" red", " green", " blue"],
    }
    assert arc[0].items() >= shown.items()
    assert arc[0]["answers"][0] == {
        "right": True,
        "scores": [-2.5, -1.5, -3.5],
        "choice": 1,
    }
    next(folders[1].glob("samples*")).unlink()  # As lm_eval without --log_samples.
    assert build(folders)["samples"][0]["answers"][1] is None


def test_other_forms_of_samples(tmp_path):
    calls = {
        i: {"arg_0": f"{who} beat Bob so", "arg_1": " won."}
        for i, who in enumerate("AB")
    }
    lengths = {
        i: {"arg_0": "Q", "arg_1": text} for i, text in enumerate((" ab", " abcdefgh"))
    }
    generated = {
        "arguments": {"0": {"arg_0": "2+3?", "arg_1": {"until": ["\n"]}}},
        "target": "6",
    }
    generated |= {"resps": [["5, I think"]], "filtered_resps": ["5"]}
    two = {"filtered_resps": [["-4", "False"], ["-8", "False"]]}
    lines = [
        make_sample(0, {"acc_norm": 0.0}, arguments=calls, **two),
        make_sample(1, {"acc_norm": 1.0}, arguments=lengths, **two),
        make_sample(2, {"acc_norm": 0.0}, **generated),
    ]
    write_evaluation(
        tmp_path, {"t": {"acc_norm": [0.0, 1.0, 0.0]}}, samples={"t": lines}
    )
    wino, long, maths = build([tmp_path])["samples"]
    assert wino["options"] == ["A beat Bob so won.", "B beat Bob so won."]
    assert wino["answers"][0]["choice"] == 0
    assert long["answers"][0]["choice"] == 1  # -1 a character, against -2.
    assert maths["answers"] == [{"right": False, "output": "5, I think", "answer": "5"}]


def test_the_command_writes_a_page_with_hostile_text_and_the_same_as_json(
    tmp_path, capsys
):
    hostile = "</script><script>alert(1)</script> {{data}} \u202e'\"`${x}"
    calls = {"gen_args_0": {"arg_0": "p" * 100_000 + hostile, "arg_1": " y"}}
    lines = [make_sample(0, {"acc": 1.0}, arguments=calls)]
    write_evaluation(
        tmp_path, {"t": {"acc": [1.0]}}, model=hostile, samples={"t": lines}
    )
    page = tmp_path / "out.html"
    assert main(["eval", "report", str(tmp_path), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"written: {page} {tmp_path / 'out.json'}\n"
    text = page.read_text()
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == build([tmp_path])
    assert text.count("<script") == text.count("</script>") == 3
    assert len(text) < 60_000
    assert report["samples"][0]["prompt"].endswith(hostile)
    assert "characters left out" in report["samples"][0]["prompt"]
