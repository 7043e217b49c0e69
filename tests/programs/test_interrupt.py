"""Ctrl-C saves, says so in one line, and the same command goes on to the same result."""

import json
import signal
import subprocess
import sys
import time

from maxlm.train.records import read_records
from tests.programs import tiny

STEPS = 30


def start(config: str, name: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "maxlm.cli.main", "train", config, f"name={name}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def results(run) -> list[tuple[int, dict[str, float]]]:
    same = ("loss", "grad_norm", "param_norm", "update_norm", "eval_loss", "tokens")
    return [
        (r["step"], {k: r[k] for k in same if k in r}) for r in read_records(run / "metrics.jsonl")
    ]


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path):
    text = tiny.write_text(tmp_path / "text")
    config = tiny.write_config(
        tmp_path,
        text,
        train={"steps": STEPS, "eval_every": 10},
        # A write after each step takes much longer than a step: none is missed.
        checkpoint={"every_steps": 1, "asynchronous": False},
        data={**tiny.settings(tmp_path, text)["data"], "workers": 1},
    )
    environment = tiny.environment(tmp_path)
    unbroken = start(config, "unbroken", environment)
    _, err = unbroken.communicate()
    assert unbroken.returncode == 0, err

    # What was planned stands beside what was measured.
    plan = json.loads((tmp_path / "unbroken" / "plan.json").read_text())
    steps = [r for r in read_records(tmp_path / "unbroken" / "metrics.jsonl") if "loss" in r]
    assert plan["machine"]["words"] == "1 CPU device on one host"
    assert {r["planned_seconds"] for r in steps} == {plan["time"]["step"]}
    assert {r["planned_memory"] for r in steps} == {plan["memory"]["total"]}
    assert all(r["seconds"] > 0 and r["mfu"] > 0 and r["planned_mfu"] > 0 for r in steps)

    broken = tmp_path / "broken"
    process = start(config, "broken", environment)
    while len(results(broken)) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    stopped = max(step for step, _ in results(broken))
    assert process.returncode == 2, err
    assert err.splitlines()[-1] == (
        f"error: {broken}: interrupted at step {stopped} of {STEPS}, which is saved; run the same "
        "command to resume"
    )
    assert "Traceback" not in err
    assert 3 <= stopped < STEPS
    assert (broken / "checkpoints" / str(stopped)).is_dir()

    again = start(config, "broken", environment)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert out.splitlines()[0] == f"resuming from step {stopped} in {broken / 'checkpoints'}"
    assert results(broken) == results(tmp_path / "unbroken")
    assert [step for step, values in results(broken) if "eval_loss" in values] == [10, 20, STEPS]

    # Finished, it has nothing left to do, and nothing is written down twice.
    once_more = start(config, "broken", environment)
    _, err = once_more.communicate()
    assert once_more.returncode == 0, err
    assert results(broken) == results(tmp_path / "unbroken")
