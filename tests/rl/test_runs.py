"""Promise: a run of ``maxlm rl`` that stops and is resumed is the same run to the last
bit, also where samples are under way; and what is begun ahead changes nothing but how
old the parameters are."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlm.rl.rollouts.records import RolloutFiles
from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.records import read_records
from maxlm.train.trainer import RollbackDecision
from tests.rl import policy_runs

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return policy_runs.prepare(tmp_path_factory.mktemp("parts"))


def read_sampled(folder) -> list:
    """Returns what all samples of a run are, but for when they were drawn."""
    samples = policy_runs.read_run(folder)["samples"]
    return [
        {name: value for name, value in sample.items() if name != "versions"}
        for sample in samples
    ]


@pytest.mark.more
def test_what_is_begun_ahead_is_what_would_be_drawn(tmp_path, parts):
    """With parameters that stay: the same samples, and the same gradients."""
    stays = {"kind": "constant", "warmup_steps": 0, "learning_rate": 1e-12}
    runs = {}
    for staleness in (0, 2):
        folder = tmp_path / str(staleness)
        path = policy_runs.write_config(
            folder, {**parts, "schedule": stays}, rollouts={"staleness": staleness}
        )
        policy_runs.train(path, "train.steps=4")
        runs[staleness] = [*read_records(folder / "tiny/metrics.jsonl")]
    assert read_sampled(tmp_path / "2") == read_sampled(tmp_path / "0")
    for ahead, synchronous in zip(runs[2], runs[0], strict=True):
        for name in ("loss", "grad_norm", "reward", "response_length"):
            if name in synchronous:
                expected = pytest.approx(synchronous[name], rel=1e-4, abs=1e-6)
                assert ahead[name] == expected, name
    steps = [record for record in runs[2] if "staleness" in record]
    assert max(record["max_staleness"] for record in steps) in (1, 2)


class StopsHere(Exception):
    """Ends a run at a place."""


def test_a_run_that_stops_goes_on_as_it_was(tmp_path, parts, monkeypatch):
    """Behind a rollout that no step has trained on, with samples under way."""
    rollouts = {"staleness": 2}
    straight = policy_runs.write_config(tmp_path / "a", parts, rollouts=rollouts)
    policy_runs.train(straight)
    expected = policy_runs.read_run(tmp_path / "a")
    assert expected["rollout 3 unfinished_lengths"].size
    stopped = policy_runs.write_config(tmp_path / "b", parts, rollouts=rollouts)
    write = RolloutFiles.write

    def write_and_stop(files, number, arrays):
        write(files, number, arrays)
        if number == 3:
            raise StopsHere

    with monkeypatch.context() as patch:
        patch.setattr(RolloutFiles, "write", write_and_stop)
        with pytest.raises(StopsHere):
            policy_runs.train(stopped)
    # In another folder, from the checkpoint of step 2: its samples go on.
    branch = policy_runs.write_config(tmp_path / "c", parts, rollouts=rollouts)
    policy_runs.train(branch, resume=tmp_path / "b/tiny")
    branched = policy_runs.read_run(tmp_path / "c")
    assert branched["samples"][0]["step"] == 2
    for name in branched.keys() - {"samples"}:
        np.testing.assert_equal(branched[name], expected[name], name)
    policy_runs.train(stopped)
    policy_runs.assert_same_run(policy_runs.read_run(tmp_path / "b"), expected)


def read_history(folder: Path) -> dict[str, Any]:
    """Returns what a run is but for the record of its settings, which has its skips."""
    run = policy_runs.read_run(folder)
    return {name: run[name] for name in run if not name.endswith("settings")}


@pytest.mark.more
def test_a_rollback_skips_prompts_with_their_batches(tmp_path, parts, monkeypatch):
    """The third of three checkpoints is of bad steps; and the run is the same from the
    first, which is from before what it skips."""
    path = policy_runs.write_config(
        tmp_path,
        parts | {"checkpoint": {"every_steps": 2, "keep_last": 9}},
        rollouts={"staleness": 2},
    )
    run = tmp_path / "tiny"
    seen: dict[str, list] = {}
    update = LossSpikeDetector.update

    def find_bad_step(detector, step, metrics):
        if step == 5 and "before" not in seen:
            seen["before"] = policy_runs.read_run(tmp_path)["samples"]
            return RollbackDecision(5, 5, "a test")
        return update(detector, step, metrics)

    monkeypatch.setattr(LossSpikeDetector, "update", find_bad_step)
    policy_runs.train(path)
    # Step 5 was of rollout 4, with a fifth one begun ahead.
    actual = read_history(tmp_path)
    rollouts = {s["step"]: s["rollout"] for s in actual["samples"]}
    assert rollouts == {0: 0, 1: 1, 2: 2, 3: 3, 4: 5, 5: 6}
    assert len(actual["samples"]) == 6 * 24
    bad_rows = {s["row"] for s in seen["before"] if s["rollout"] == 4}
    assert len(bad_rows) == 8
    rows = {s["row"] for s in actual["samples"]}
    assert not rows & bad_rows
    ages = {s["step"] - s["versions"][0] for s in actual["samples"]}
    assert min(ages) == 0
    assert max(ages) in (1, 2)
    for record in read_records(run / "metrics.jsonl"):
        assert record.get("max_staleness", 0) <= 2

    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"{step}")
    policy_runs.train(path)
    again = read_history(tmp_path)
    skipped = {name for name in actual if name.startswith("rollout 4 ")}
    assert again.keys() == actual.keys() - skipped
    for name in again:
        np.testing.assert_equal(again[name], actual[name], name)


@pytest.mark.more
def test_records_that_no_checkpoint_needs_are_deleted(tmp_path, parts):
    path = policy_runs.write_config(tmp_path, parts, rollouts={"keep_records": 1})
    policy_runs.train(path)
    numbers = RolloutFiles(tmp_path / "tiny").list_numbers()
    # With rollout 5 checkpoints 2 and 4 were there; rollout 1 says what comes behind 2.
    assert numbers == [1, 2, 3, 4, 5]
    ages = policy_runs.read_run(tmp_path)["rollout 5 batch_versions"]
    assert set(np.unique(ages)) == {-1, 5}


def test_with_the_switch_the_engine_is_the_trainer_to_the_last_bit(tmp_path, parts):
    """At another temperature than 1, and where the engine cuts prompts and batches
    unlike the trainer."""
    sampling = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    path = policy_runs.write_config(
        tmp_path,
        parts | {"parallel": {"batch_invariant": True}},
        rollouts={"sampling": sampling},
        engine={
            "max_sequences": 4,
            "page_size": 4,
            "prefill_tokens": 32,
            "batch_invariant": True,
        },
    )
    policy_runs.train(path, "train.steps=2", "compute_dtype=float32")
    for record in read_records(tmp_path / "tiny/metrics.jsonl"):
        assert record["engine_difference"] == 0
        assert record["engine_ratio"] == 1
