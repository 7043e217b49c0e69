"""maxlm runs: what is printed, and one line for a mistake."""

import json

import pytest

from tests.train.test_runs import EVENTS, write_run


def test_list(run, tmp_path):
    write_run(tmp_path / "seven")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("train: {steps: 20000}")
    (tmp_path / "empty").mkdir()
    assert [
        line.split() for line in run("runs", "list", tmp_path).out.splitlines()
    ] == [
        ["run", "step", "of", "state", "loss", "goodput"],
        ["new", "0", "20,000", "not", "begun", "-", "-"],
        ["seven", "102", "-", "preempted", "0.0490", "56.0%"],
    ]
    listed = json.loads(run("runs", "list", tmp_path, "--json").out)
    assert [listed_run["name"] for listed_run in listed] == ["new", "seven"]
    assert run("runs", "list", tmp_path / "empty").out.startswith("no runs in ")


@pytest.mark.heavy
def test_show(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    folder = write_run(tmp_path / "seven")
    shown = json.loads(run("runs", "show", folder, "--json").out)
    assert shown["interruptions"] == {"killed": 1, "preempted": 1}
    image = tmp_path / "history.svg"
    out = run("runs", "show", folder, "--image", image).out
    assert "<svg" in image.read_text()
    for words in (
        "seven · preempted · step 102 · loss 0.0490 · held out 1.5000 · 8 devices",
        "goodput 56.0% of 5:30, 0.309 steps/s over all of it",
        "2 interruptions (killed 1, preempted 1), one in 2:20 of running",
    ):
        assert words in out
    rows = [line.split() for line in out.splitlines()]
    assert ["down", "0:50", "15.2%"] in rows
    assert ["50.5", "s", "90.1", "s", "99", "s", "100", "s", "-"] in rows
    assert any(row[-4:] == ["2:30", "0", "60", "killed"] for row in rows)


def test_a_run_that_went_silent(run, tmp_path):
    code, out, _ = run("runs", "show", write_run(tmp_path / "seven", EVENTS[:3]))
    assert (code, "killed, or silent: last heard of" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere"], "nowhere: no such folder..."),
        (["show", "."], "...is no run's folder..."),
        (["list", "nowhere"], "nowhere: no such folder..."),
        (
            ["show", "seven", "--image", "history.gif"],
            "history.gif: no image format has the suffix '.gif'; use .png, .svg, .pdf",
        ),
    ],
)
def test_a_mistake_is_one_line(
    arguments, message, check_refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "seven")
    check_refused(tmp_path, ["runs", *arguments], message)
