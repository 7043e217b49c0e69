"""maxlm runs: what is printed, and one line for a mistake."""

import json

import pytest

from maxlm.cli.main import main
from tests.programs.test_runs import EVENTS, write_run


def test_list(tmp_path, capsys):
    write_run(tmp_path / "seven")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("train: {steps: 20000}")
    assert main(["runs", "list", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["run", "step", "of", "state", "loss", "goodput"],
        ["new", "0", "20,000", "not", "begun", "-", "-"],
        ["seven", "102", "-", "preempted", "0.0490", "56.0%"],
    ]
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["new", "seven"]
    (tmp_path / "empty").mkdir()
    assert main(["runs", "list", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out.startswith("no runs in ")


def test_show(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    folder = write_run(tmp_path / "seven")
    assert main(["runs", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    for words in (
        "seven · preempted · step 102 · loss 0.0490 · held out 1.5000 · 8 devices",
        "goodput 56.0% of 5:30, 0.309 steps/s over all of it",
        "2 interruptions (killed 1, preempted 1), one in 2:20 of running",
    ):
        assert words in out
    rows = [line.split() for line in out.splitlines()]
    assert ["down", "0:50", "15.2%"] in rows
    assert ["50.5", "s", "90.1", "s", "99.01", "s", "100", "s", "-"] in rows
    assert any(row[-4:] == ["2:30", "0", "60", "killed"] for row in rows)
    image = folder / "plots" / "goodput.png"
    assert f"drawn: {image}" in out
    assert image.read_bytes().startswith(b"\x89PNG")


def test_show_as_json_changes_nothing(tmp_path, capsys):
    folder = write_run(tmp_path / "seven")
    assert main(["runs", "show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["interruptions"] == {"killed": 1, "preempted": 1}
    assert not (folder / "plots").exists()


def test_a_folder_that_cannot_be_written_is_shown_all_the_same(tmp_path, capsys):
    folder = write_run(tmp_path / "seven", EVENTS[:3])
    (folder / "plots").write_text("a file where a folder should be")
    assert main(["runs", "show", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "killed, or silent: last heard of" in printed.out
    assert printed.err.startswith(f"not drawn: {folder / 'plots'}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nowhere"], "nowhere: no such folder"),
        (["show", "."], "is no run's folder"),
        (["list", "nowhere"], "nowhere: no such folder"),
        (["show"], "missing argument 'run'"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1
