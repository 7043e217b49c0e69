"""Promise: a policy that two processes train together is the one that one process
trains; the environment and rewards are asked on process 0 alone, and a run of which a
process was killed goes on as if it had not been."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlm.rl.rollouts.records import RolloutFiles, read_sample_log
from tests.rl.call_notes import read_notes
from tests.train import tiny
from tests.train.jobs import Jobs

pytestmark = [pytest.mark.heavy, pytest.mark.more]

STEPS, MINIBATCHES, ROWS, NUM_SAMPLES = 6, 2, 6, 3
NUM_ROLLOUTS = STEPS // MINIBATCHES
SAMPLES_OF_ROLLOUT = MINIBATCHES * ROWS
METRICS = ("loss", "grad_norm", "kl", "entropy", "policy_ratio", "reward")


@pytest.fixture
def jobs(tmp_path):
    text = tiny.write_text(tmp_path / "text")
    settings = tiny.settings(tmp_path, text)
    settings["data"] |= {"heldout_fraction": 0, "seq_len": 48, "batch_size": ROWS}
    settings["model"] |= {"vocab_size": 260, "max_seq_len": 48}
    parts: dict[str, Any] = {
        "data": settings["data"],
        "model": settings["model"],
        "tokenizer": {"vocab_size": 257},
        # Of four devices: rows lie on both processes, or on the two of one.
        "mesh": {"fsdp": 2, "tensor": 2},
        "task": {
            "kind": "grpo",
            # An end of the text is likely.
            "rollouts": {"sampling": {"max_new_tokens": 12, "logit_bias": {256: 3.0}}},
            "engine": {"max_sequences": 4, "page_size": 4, "prefill_tokens": 32},
            "num_samples": NUM_SAMPLES,
            # Two updates and a reference: all need what models say of a rollout.
            "minibatches": MINIBATCHES,
            "kl_coef": 0.1,
        },
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": MINIBATCHES},
        "reporting": {"tensorboard": False},
        "faults": {"peer_seconds": 10},
    }
    config = tiny.write_config(tmp_path, text, **parts)
    worker = Path(__file__).with_name("policy_worker.py")
    started = Jobs(tmp_path, config, command="rl", worker=worker)
    yield started
    started.end()


def make_settings(notes: Path, num_samples: int | None = None) -> list[str]:
    """Settings of a run that notes in a folder what is asked where, and that loses
    process 1 once it has scored so many samples."""
    notes.mkdir()
    environment = {"kind": "test_noting", "folder": str(notes)}
    reward = {"kind": "test_killing", "folder": str(notes), "num_samples": num_samples}
    return [
        f"task.environment={json.dumps(environment)}",
        f"task.rewards={json.dumps([reward])}",
    ]


def assert_same_run(run: Path, expected: Path) -> None:
    """The same samples and batches; numbers but for rounding."""
    for number in range(NUM_ROLLOUTS):
        arrays = RolloutFiles(run).read(number)
        expected_arrays = RolloutFiles(expected).read(number)
        assert arrays is not None
        assert expected_arrays is not None
        assert arrays.keys() == expected_arrays.keys()
        for name, array in arrays.items():
            if name != "settings":
                np.testing.assert_allclose(
                    array, expected_arrays[name], rtol=2e-6, atol=2e-6, err_msg=name
                )
    samples = [*read_sample_log(run)]
    assert len(samples) == NUM_ROLLOUTS * SAMPLES_OF_ROLLOUT
    for sample, other in zip(samples, read_sample_log(expected), strict=True):
        assert sample.pop("advantage") == pytest.approx(other.pop("advantage"))
        assert sample == other
    records = tiny.read_metrics(run)
    expected_records = tiny.read_metrics(expected)
    assert [record["step"] for record in records] == [*range(1, STEPS + 1)]
    for record, other in zip(records, expected_records, strict=True):
        for name in METRICS:
            if name in other:
                assert record[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)


def test_two_processes_train_the_policy_of_one(jobs, tmp_path):
    alone = tmp_path / "alone-notes"
    jobs.trained("alone", *make_settings(alone), devices=4)
    # Amid the second rollout.
    notes = tmp_path / "pair-notes"
    num_samples = SAMPLES_OF_ROLLOUT + NUM_SAMPLES
    settings = make_settings(notes, num_samples)
    processes = jobs.train("pair", *settings, processes=2, devices=2)
    (code, _, err), (killed_code, _, _) = [process.ended() for process in processes]
    assert (code, killed_code) == (76, -9), err
    assert any("process 1" in line and "is gone" in line for line in err)

    out = jobs.trained("pair", *settings, processes=2, devices=2)
    resumed = f"resuming from step {MINIBATCHES} in {tmp_path / 'pair/checkpoints'}"
    assert resumed in out
    assert_same_run(tmp_path / "pair", tmp_path / "alone")
    # Turns went both ways, and answers were of both lengths.
    lines = [*read_sample_log(tmp_path / "alone")]
    assert {len(line["turns"]) for line in lines} >= {1, 3}
    assert len({line["reward"] for line in lines}) > 1
    for call in ("respond", "score", "reward"):
        assert read_notes(notes, 0, call)
        assert not read_notes(notes, 1, call)
    num_scored = NUM_ROLLOUTS * SAMPLES_OF_ROLLOUT
    assert len(read_notes(alone, 0, "score")) == num_scored
