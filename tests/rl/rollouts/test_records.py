"""Promise: what a rollout returned is read back to the last bit, or a damaged record is
one line."""

import json

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.rl.rollouts import records
from maxlm.rl.rollouts.records import (
    RolloutFiles,
    SampleLog,
    ScoredSample,
    read_sample_log,
)
from maxlm.rl.samples import Prompt, Sample

SAMPLE = Sample(
    Prompt(4, (1, 2), {"answer": "x"}),
    1,
    tokens=[1, 2, 3, 4],
    is_sampled=[False, False, True, True],
    log_probs=[0, 0, -0.5, -0.25],
    versions=[-1, -1, 5, 6],
    is_complete=True,
    turns=[("assistant", "é\n")],
)


def make_arrays():
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(0, 9, (3, 7)).astype(np.int32),
        "weights": random.random((3, 7), np.float32),
        "empty": np.zeros(0, np.float64),
    }


def test_arrays_are_read_back(tmp_path):
    files = RolloutFiles(tmp_path)
    assert files.read(12) is None
    arrays = make_arrays()
    files.write(12, arrays)
    assert (tmp_path / "rollouts/00000012.npz").exists()
    actual = files.read(12)
    assert actual is not None
    assert actual.keys() == arrays.keys()
    for name, array in arrays.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array)


def test_damaged_files_are_one_line(tmp_path):
    files = RolloutFiles(tmp_path)
    arrays = make_arrays()
    files.write(3, arrays)
    path = files.get_path(3)
    whole = path.read_bytes()
    errors = []
    for place in [*range(0, len(whole), 17), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 255
        for damaged in (whole[:place], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                actual = files.read(3)
            except MaxlmError as error:
                errors.append(str(error))
                continue
            # A byte that means nothing, such as a time.
            assert actual is not None
            for name, array in arrays.items():
                np.testing.assert_array_equal(actual[name], array)
    assert len(errors) > len(whole) // 17
    for error in errors:
        assert f"{path}: the record of rollout 3 is damaged" in error
        assert "\n" not in error


@pytest.mark.parametrize("has_record", [False, True])
def test_a_record_that_another_host_does_not_see_is_one_line(
    has_record, tmp_path, monkeypatch
):
    files = RolloutFiles(tmp_path)
    other = RolloutFiles(tmp_path / "other")
    arrays = make_arrays()
    other.write(3, arrays)
    if has_record:
        files.write(3, arrays)
    digests = []

    def gather(digest):
        digests.append(digest)
        return [*digests]

    monkeypatch.setattr(records, "all_gather_json", gather)
    # Process 0, and then process 1.
    assert other.read_on_all_hosts(3) is not None
    if has_record:
        assert files.read_on_all_hosts(3) is not None
        return
    with pytest.raises(MaxlmError) as error:
        files.read_on_all_hosts(3)
    assert str(error.value) == (
        f"{files.get_path(3)}: process 1 reads another record of rollout 3 than "
        "process 0, or none; put the run in a folder that all hosts share"
    )


def test_rollouts_that_a_checkpoint_needs_stay(tmp_path):
    files = RolloutFiles(tmp_path)
    for number in range(9):
        files.write(number, {"a": np.zeros(1)})
    files.delete_old(num_kept=3, first_needed=4)
    assert files.list_numbers() == [4, 5, 6, 7, 8]
    files.delete_old(num_kept=3, first_needed=8)
    assert files.list_numbers() == [6, 7, 8]
    files.delete_after(6)
    assert files.list_numbers() == [6]


def test_a_rollout_that_is_drawn_again_has_its_new_lines(tmp_path):
    scored = ScoredSample(SAMPLE, "q", {"exact": 1.0, "judge": None}, 1.0, float("nan"))
    log = SampleLog(tmp_path)
    for number in range(3):
        log.append(2 * number, number, [scored, scored])
    path = tmp_path / "samples/rollouts.jsonl"
    with path.open("ab") as file:  # a kill cut the last line short
        file.write(b'{"step": 6, "rol')
    lines = [*read_sample_log(tmp_path)]
    assert [line["rollout"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert lines[2] == {
        "step": 2,
        "rollout": 1,
        "row": 4,
        "sample": 1,
        "prompt": "q",
        "turns": [["assistant", "é\n"]],
        "rewards": {"exact": 1.0, "judge": None},
        "reward": 1.0,
        "advantage": None,
        "length": 2,
        "complete": True,
        "versions": [5, 6],
    }
    again = SampleLog(tmp_path)
    assert [*read_sample_log(tmp_path)] == lines
    again.append(2, 1, [scored])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["rollout"] for line in lines] == [0, 0, 1]
    again.append(4, 2, [scored])
    assert [line["rollout"] for line in read_sample_log(tmp_path)] == [0, 0, 1, 2]
    silent = SampleLog(tmp_path / "other", write=False)
    silent.append(0, 0, [scored])
    assert not silent.path.exists()
