"""The report of a run of policies says what its records say."""

import json
import random

import pytest

from maxlm.cli.main import main
from maxlm.rl.report import build_run_report, choose_samples, thin_out

NUM_STEPS = 1037


def make_sample(number: int, reward: float | None) -> dict:
    return {
        "step": number // 4,
        "rollout": number // 4,
        "row": number,
        "sample": 0,
        "prompt": f"{number}+1=",
        "turns": [["assistant", f"{number} </script><b>"]],
        "rewards": {"right": reward},
        "reward": reward,
        "advantage": None if reward is None else reward - 0.5,
        "length": 3,
        "complete": True,
        "versions": [number // 4, number // 4],
    }


def write_run(folder, records, samples):
    (folder / "samples").mkdir(parents=True)
    for name, lines in (
        ("metrics.jsonl", records),
        ("samples/rollouts.jsonl", samples),
    ):
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / name).write_text(text)


def make_record(step: int) -> dict:
    return {
        "step": step,
        "reward": step / NUM_STEPS,
        "reward/right": 0.0,
        "reward/short": step / NUM_STEPS,
        "entropy": 2.0 if step < 900 else 0.1,
        "engine_difference": float("nan") if step % 2 else 1e-5,
        "zero_variance_groups": 0.9,
        "reward_timeouts/right": 7.0,
        "reward_timeouts/short": 0.0,
        "generation_seconds": 2.0 if step % 3 else 8.0,
        "rollout_seconds": 9.0,
        "seconds": 1.5,
    }


def test_curves_phases_and_what_stands_out(tmp_path):
    records = [make_record(step) for step in range(1, NUM_STEPS + 1)]
    # A step that was made again: the later record counts.
    records.append({"step": NUM_STEPS, "reward": 3.0})
    write_run(tmp_path / "run", records, [make_sample(5, 1.0)])
    report = build_run_report(tmp_path / "run")
    curves = {curve["name"]: curve for curve in report["curves"]}
    assert report["steps"] == NUM_STEPS
    rewards = [step / NUM_STEPS for step in range(1, NUM_STEPS)] + [3.0]
    assert curves["reward"]["first"] == rewards[0]
    assert curves["reward"]["last"] == pytest.approx(sum(rewards[-103:]) / 103)
    assert len(curves["reward"]["points"]) <= 400
    mean = sum(value for _, value in curves["reward"]["points"][:-1]) / 345
    assert mean == pytest.approx(sum(rewards[:1035]) / 1035)
    # NaN is left out.
    assert {value for _, value in curves["engine_difference"]["points"]} == {1e-5}
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert list(phases) == ["generation", "training step"]
    assert phases["generation"]["median"] == 2.0
    assert phases["generation"]["total"] == 2.0 * NUM_STEPS + 6.0 * (NUM_STEPS // 3)
    notes = " | ".join(report["notes"])
    assert "reward/right is 0 in every rollout" in notes
    assert "90% of the prompts" in notes
    assert "7 samples of the last rollout took longer" in notes
    assert "reward_timeouts/short" not in curves
    assert "entropy fell from 2 to 0.1" in notes
    assert "reward/short" not in notes
    assert "engine" not in notes


@pytest.mark.parametrize("num_samples", [0, 1, 7, 500])
def test_samples_are_those_of_the_extremes(num_samples):
    rewards = [random.Random(number).choice([0.0, 0.5, 1.0]) for number in range(101)]
    samples = [make_sample(number, reward) for number, reward in enumerate(rewards)]
    samples[13]["reward"] = None
    chosen, num_seen = choose_samples(iter(samples), num_samples)
    assert num_seen == 101
    assert chosen["newest"] == samples[::-1][:num_samples]
    scored = [sample for sample in samples if sample["reward"] is not None]
    # Of equal ones the newer come first.
    best = sorted(scored, key=lambda sample: (-sample["reward"], -sample["row"]))
    worst = sorted(scored, key=lambda sample: (sample["reward"], -sample["row"]))
    assert chosen["best"] == best[:num_samples]
    assert chosen["worst"] == worst[:num_samples]


def test_a_curve_has_no_more_points_than_it_may():
    points = [(step, float(step)) for step in range(11)]
    assert thin_out(points, 4) == [(1, 1), (4, 4), (7, 7), (9.5, 9.5)]
    assert thin_out(points, 11) == points


def test_the_command_writes_a_page_or_a_line(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, [make_record(1)], [make_sample(5, 1.0)])
    assert main(["rl", "report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "5 \\u003c/script>\\u003cb>" in page
    assert capsys.readouterr().out == f"written: {run / 'report.html'}\n"
    other = tmp_path / "other"
    write_run(other, [{"step": 1, "loss": 2.0}], [])
    assert main(["rl", "report", str(other)]) == 2
    assert capsys.readouterr().err == (
        f"error: {other}: no rollouts are recorded; name the folder of a run of "
        "`maxlm rl`, once it has made a step\n"
    )
