"""A run whose processes are killed at random moments, on one host, on two, and on changing meshes,
ends like one that never was."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.programs import tiny

BENCHMARKS = tiny.ROOT / "benchmarks"
KILLS, STEPS = 10, 30


@pytest.mark.timeout(1200)
def test_runs_killed_ten_times_end_like_unbroken_ones(tmp_path, monkeypatch):
    folder = tmp_path / "tortured"
    text = tiny.write_text(tmp_path / "text", documents=40)
    options = ["--kills", KILLS, "--steps", STEPS, "--seed", 1, "--text", text, "--folder", folder]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "torture.py", *map(str, options)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} kills, 0 of which ended wrong" in done.stdout
    compared = re.findall(r"^│ (\w+) +│ (\w+)[^│]*│[^│]*│ (\w+) +│$", done.stdout, re.M)
    same = ("arrays", "records", "metadata", "steps", "batches", "files", "litter")
    near = ("arrays", "losses", "steps", "batches", "files", "litter")
    assert compared == [
        *[(campaign, what, "no") for campaign in ("one", "two") for what in same],
        *[("changing", what, "no") for what in near],
    ]
    monkeypatch.syspath_prepend(BENCHMARKS)
    check_that_differences_show(folder)


def check_that_differences_show(folder: Path) -> None:
    """Which runs that did end alike cannot tell."""
    import same_run  # pyright: ignore[reportMissingImports]
    import torture  # pyright: ignore[reportMissingImports]
    import torture_hosts  # pyright: ignore[reportMissingImports]

    assert torture.newest(torture_hosts.Job(folder, STEPS), "two", None) == STEPS
    damaged = [[24, "unreadable: params.x is not what was saved"]]
    for began, skipped, words in [
        (STEPS, [], ""),
        (STEPS, [[20, "process 1 has none"]], ""),
        (24, [], f"went on from step 24, and {STEPS} was saved"),
        (STEPS, damaged, "checkpoints [24] were damaged"),
    ]:
        attempt = SimpleNamespace(went_on=lambda b=began, s=skipped: {"step": b, "skipped": s})
        assert torture.lost_progress(attempt, STEPS) == words

    runs, one = folder / "runs", folder / "runs" / "one"
    other = runs / "unbroken-1x2-data=2"
    assert {each.what: each.wrong for each in same_run.compare(other, one, STEPS)} == {
        "arrays": True,
        "records": True,
        "metadata": True,
        "steps recorded": False,
    }
    assert not any(each.wrong for each in same_run.compare(other, one, STEPS, 1e-4))
    assert same_run.compare(other, one, STEPS, 1e-9)[0].wrong
    seen = folder / "seen"
    truth = seen / "unbroken-1x2-fsdp=2"
    assert not same_run.batches_seen(truth, seen / "one").wrong
    again = seen / "one" / "again.txt"
    again.write_text(f"7 3 {64 * '0'}\n")
    assert same_run.batches_seen(truth, seen / "one").wrong
    for path in (seen / "one").iterdir():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith("7 3 ")))
    assert same_run.batches_seen(truth, seen / "one").wrong
    (folder / "remote" / "one" / str(STEPS) / "COMPLETE").unlink()
    assert same_run.copied(one, folder / "remote" / "one", STEPS).wrong
    assert (
        "copy 30"
        in same_run.left_behind(one, folder / "local", "one", folder / "remote" / "one").found
    )
