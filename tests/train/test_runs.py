"""What a run's folder tells of it: beside the plan, the config and the records it was
made of."""

import json
import struct

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.run.config import RunConfig
from maxlm.train.goodput import summarize_run_events
from maxlm.train.history_image import NUM_COLUMNS, draw_history
from maxlm.train.runs import list_runs, read_run

BEGAN = 1_700_000_000.0


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def event(kind, step, after, **details):
    return {"event": kind, "step": step, "time": BEGAN + after, **details}


EVENTS = [
    event("start", 0, 10, began=BEGAN, devices=8),
    event("compiled", 1, 40, seconds=30),
    event("progress", 60, 150, stepping=100, loading=10),
    event("checkpoint", 51, 150, tier="folder", seconds=0),
    event("resume", 51, 220, began=BEGAN + 200, devices=8),
    event("compiled", 52, 230, seconds=10),
    event("progress", 102, 330, stepping=100),
    event("stop", 102, 330, reason="preempted"),
]


def write_run(folder, events=EVENTS):
    """Steps of 1, 2, ..., 100 seconds, in an order of chance; the first of each attempt
    of 1000."""
    seconds = np.random.default_rng(0).permutation(np.arange(1.0, 101)).tolist()
    steps = [step for step in range(1, 103) if step not in (1, 52)]
    records = [
        {"step": s, "loss": 5 / s, "seconds": t}
        for s, t in zip(steps, seconds, strict=True)
    ]
    records += [{"step": step, "loss": 9.0, "seconds": 1000.0} for step in (1, 52)]
    records.sort(key=lambda record: record["step"])
    write_lines(folder / "metrics.jsonl", [*records, {"step": 102, "eval_loss": 1.5}])
    write_lines(folder / "events.jsonl", events)
    return folder


def test_a_run_beside_its_plan_and_config(tmp_path):
    folder = write_run(tmp_path / "seven")
    config = load_config(RunConfig, "llama2_7b", ["data.batch_size=128"]).value
    plan = plan_run(config, Machine.from_name("v5p-64"))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    run = read_run(folder, now=BEGAN + 1e6)
    assert (run.name, run.state, run.step, run.steps) == (
        "seven",
        "preempted",
        102,
        config.train.steps,
    )
    assert (run.loss, run.eval_loss) == (5 / 102, 1.5)
    # Of 1, 2, ..., 100 with linear interpolation; no first step is among them.
    assert run.step_seconds == pytest.approx({50: 50.5, 90: 90.1, 99: 99.01, 100: 100})
    assert plan.goodput is not None
    assert run.planned == {
        "step_seconds": plan.step_seconds,
        "goodput": plan.goodput.configured,
    }
    # 59 steps in 100 s, nine of which the second attempt takes again.
    report = run.to_json()
    assert report["seconds"]["lost"] == pytest.approx(100 * 9 / 59)
    assert report["goodput"] == pytest.approx((200 - 100 * 9 / 59) / 330)
    assert report["steps_per_second"] == pytest.approx(102 / 330)
    assert report["interruptions"] == {"killed": 1, "preempted": 1}
    assert report["mean_time_to_interruption"] == pytest.approx((150 + 130) / 2)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_folder_may_hold_next_to_nothing(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("{not: [yaml")
    (tmp_path / "new" / "plan.json").write_text("[1]")
    run = read_run(tmp_path / "new")
    assert (run.state, run.step, run.steps, run.loss) == ("not begun", 0, None, None)
    assert run.to_json()["goodput"] is None


def test_events_of_an_older_version_are_time_of_no_known_use(tmp_path):
    events = [
        event("start", 0, 0, devices=8),
        event("checkpoint", 5, 10),
        event("stop", 5, 11),
    ]
    write_lines(tmp_path / "old" / "events.jsonl", events)
    seconds = read_run(tmp_path / "old").history.seconds_by_activity
    assert {part: value for part, value in seconds.items() if value} == {"other": 11}


def test_runs_of_a_folder_by_name(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    assert [run.name for run in list_runs(tmp_path)] == ["a", "b"]


def test_an_image_shows_all_of_the_time_and_every_attempt(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = []
    areas = {}
    plot = Axes.plot
    stairs = Axes.stairs

    def record_line(self, x, y, **style: object):
        lines.append((np.atleast_1d(x), np.atleast_1d(y)))
        return plot(self, x, y, **style)

    def record_area(self, top, edges, *, baseline, label, **style: object):
        part = label.split()[0]
        areas[part] = top - baseline
        return stairs(self, top, edges, baseline=baseline, label=label, **style)

    monkeypatch.setattr(Axes, "plot", record_line)
    monkeypatch.setattr(Axes, "stairs", record_area)
    history = summarize_run_events(EVENTS, now_unix_seconds=BEGAN + 1e6)
    image = tmp_path / "plots" / "history.png"
    draw_history(history, image, title="seven")
    assert struct.unpack(">II", image.read_bytes()[16:24]) == (1500, 825)
    assert [path.name for path in image.parent.iterdir()] == ["history.png"]
    assert sum(areas.values()) == pytest.approx(np.ones(NUM_COLUMNS))
    seconds = {part: x for part, x in history.seconds_by_activity.items() if x}
    column_seconds = 330 / NUM_COLUMNS
    assert {
        part: heights.sum() * column_seconds for part, heights in areas.items()
    } == (pytest.approx(seconds))
    # The run was down from 150 to 200 s.
    is_down = areas["down"] > 0.5
    assert np.flatnonzero(is_down)[[0, -1]] * column_seconds == pytest.approx(
        [150, 200], abs=2
    )
    # Both attempts, each with a mark at its end; in minutes.
    assert [(y[0], y[-1]) for _, y in lines] == [
        (0, 60),
        (60, 60),
        (51, 102),
        (102, 102),
    ]
    assert lines[0][0][-1] == lines[1][0][0] == pytest.approx(150 / 60)
    with pytest.raises(MaxlmError, match="no time to draw"):
        draw_history(summarize_run_events([], 0.0), image, title="new")


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(MaxlmError, match="nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(MaxlmError, match="is no run's folder; maxlm runs list"):
        read_run(tmp_path)
    with pytest.raises(MaxlmError, match="no such folder"):
        list_runs(tmp_path / "nowhere")
