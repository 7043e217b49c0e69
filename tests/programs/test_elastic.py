"""A run that goes from machine to machine takes the same batches and has the same losses."""

import json

import pytest

from tests.programs import tiny
from tests.programs.jobs import Jobs

STEPS = 20


@pytest.fixture
def jobs(tmp_path):
    config = tiny.write_config(
        tmp_path,
        tiny.write_text(tmp_path / "text"),
        train={"steps": STEPS, "max_device_rows": 2},
        checkpoint={"every_steps": 0},
        reporting={"tensorboard": False},
    )
    started = Jobs(tmp_path, config)
    yield started
    started.end()


def test_a_run_that_moves_is_the_run_that_stayed(jobs):
    jobs.trained("stayed", devices=4)
    home = jobs.folder / "moved"
    machines = [
        # processes, devices of each, mesh, steps by then, parts of the batch of 8
        (2, 2, "{data: 2, fsdp: 2}", 5, 1),
        (1, 1, "{fsdp: 1}", 9, 4),
        (1, 2, "{data: 2, fsdp: 1}", 14, 2),
        (2, 1, "{fsdp: 2}", STEPS, 2),
    ]
    before = 0
    for processes, devices, mesh, until, parts in machines:
        said = jobs.trained(
            "moved", f"mesh={mesh}", f"train.steps={until}", processes=processes, devices=devices
        )
        resumed = f"resuming from step {before} in {home / 'checkpoints'}"
        assert (resumed in said) == (before > 0)
        plan = json.loads((home / "plan.json").read_text())
        assert plan["micro_batches"] == parts
        before = until
    want = [r for r in jobs.records("stayed") if "loss" in r]
    got = [r for r in jobs.records("moved") if "loss" in r]
    assert [r["step"] for r in got] == [r["step"] for r in want] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in got] == [r["tokens"] for r in want]
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in want], rel=1e-5)
    assert want[-1]["loss"] < want[0]["loss"] - 0.5
    starts = jobs.events("moved", "start", "resume")
    assert [(e["processes"], e["devices"]) for e in starts] == [(2, 4), (1, 1), (1, 2), (2, 2)]

    # A machine that the batch does not divide over.
    [process] = jobs.train("moved", devices=3)
    code, _, err = process.ended()
    assert (code, err) == (
        2,
        [
            "error: train.max_device_rows: a batch of 8 sequences does not divide over 3 devices "
            "into parts of 2 or less; use a mesh whose batch axes and stages divide the batch"
        ],
    )
