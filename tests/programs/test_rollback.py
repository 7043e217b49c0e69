"""Numbers gone bad: an update is left out, or the run goes back and leaves out the batches since;
it then is the run that never had them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.programs import resume as resume_module
from maxlm.programs.resume import StateRestorer
from maxlm.train.checkpoint import FolderTier
from maxlm.train.skips import read_skips
from tests.programs import tiny
from tests.programs.tiny import read_events, read_metrics

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 18
WRONG = ("[3]", "[7, 3]", '["1", "2"]')
FAULTS = {"max_skipped": 2, "spike_window": 8, "spike_steps": 2, "spike_threshold": 3.0}


@pytest.fixture
def text(tmp_path):
    return tiny.write_text(tmp_path / "text")


def spoil(monkeypatch, numbers, how):
    """Change the batches of these numbers before they are trained on."""
    tiny.spoil_batches(monkeypatch, lambda n, batch: how(batch) if n in numbers else batch)


def no_number(batch):
    return batch | {"weights": batch["weights"] * jnp.nan}


def other_targets(batch):
    return batch | {"targets": (batch["targets"] * 7 + 3) % 300}


def train(tmp_path, text, name, *overrides, resume=None, **top):
    top = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 4}, "faults": FAULTS} | top
    path = tiny.write_config(tmp_path, text, **top)
    return tiny.train(path, f"name={name}", "data.heldout_fraction=0", *overrides, resume=resume)


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder) if "loss" in r}


def assert_same_state(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


def test_an_update_that_is_not_finite_is_left_out_and_the_run_goes_on(tmp_path, text, monkeypatch):
    spoil(monkeypatch, {5, 9}, no_number)
    trained, said = train(tmp_path, text, "bad")
    assert not [line for line in said if "rolling back" in line]
    assert [e["step"] for e in read_events(trained.folder, "skip")] == [6, 10]
    recorded = read_metrics(trained.folder)
    assert [r["step"] for r in recorded if r.get("skipped")] == [6, 10]
    assert [r["step"] for r in recorded] == list(range(1, STEPS + 1))
    norms = {r["step"]: r["param_norm"] for r in recorded}
    assert norms[6] == norms[5]  # nothing changed
    assert norms[7] != norms[6]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(trained.state)))


@pytest.mark.parametrize(
    ("numbers", "how", "last", "reason"),
    [
        ({13, 14}, no_number, 15, "2 updates in a row were not finite"),
        ({13, 14, 15}, other_targets, 15, "above the spike limit of"),
    ],
)
def test_a_run_goes_back_and_is_then_the_run_without_those_batches(
    tmp_path, text, monkeypatch, numbers, how, last, reason
):
    spoil(monkeypatch, numbers, how)
    trained, said = train(tmp_path, text, "bad")
    [back] = read_events(trained.folder, "rollback")
    assert (back["step"], back["from_step"]) == (12, last)
    assert back["batches"] == [12, last - 1]
    assert reason in back["reason"]
    assert said[-1] == (
        f"rolling back from step {last} to step 12: {back['reason']}; "
        f"batches 12 to {last - 1} are skipped"
    )
    record = trained.folder / "skipped_batches.json"
    assert json.loads(record.read_text()) == [{"batches": [12, last - 1], "reason": back["reason"]}]

    # A run told from its beginning to leave them out.
    other = tmp_path / "told"
    other.mkdir()
    (other / "skipped_batches.json").write_text(json.dumps([{"batches": [12, last - 1]}]))
    told, _ = train(tmp_path, text, "told")
    assert not read_events(other, "rollback", "skip")
    assert losses(told.folder) == losses(trained.folder)
    assert len(losses(told.folder)) == STEPS
    assert_same_state(trained, told)

    # One that stops after rolling back, and is started again.
    if how is no_number:
        train(tmp_path, text, "parts", "train.steps=16")
        parts, _ = train(tmp_path, text, "parts")
        assert parts.start_step == 16
        assert_same_state(parts, trained)
        with FolderTier(parts.folder / "checkpoints", read_only=True) as keeper:
            assert keeper.metadata()["skipped_batches"] == [[12, last - 1]]


def test_checkpoints_written_while_numbers_were_going_bad_are_not_gone_on_from(
    tmp_path, text, monkeypatch
):
    spoil(monkeypatch, {13, 14}, no_number)
    trained, _ = train(tmp_path, text, "bad", checkpoint={"every_steps": 1, "keep_last": 4})
    [back] = read_events(trained.folder, "rollback")
    assert (back["step"], back["batches"]) == (13, [13, 14])  # 14 was saved, with nothing new


def test_a_run_that_goes_bad_before_any_checkpoint_begins_anew(tmp_path, text, monkeypatch):
    spoil(monkeypatch, {1, 2}, no_number)
    trained, _ = train(tmp_path, text, "bad", "train.steps=6")
    [back] = read_events(trained.folder, "rollback")
    assert (back["step"], back["from_step"], back["batches"]) == (0, 3, [0, 2])
    assert list(losses(trained.folder)) == list(range(1, 7))


def test_a_run_that_stays_bad_gives_up_and_never_saves_what_is_no_number(
    tmp_path, text, monkeypatch
):
    spoil(monkeypatch, range(6, 99), no_number)
    with pytest.raises(MaxlmError) as error:
        train(tmp_path, text, "bad", "faults.max_rollbacks=2")
    folder = tmp_path / "bad"
    assert str(error.value) == (
        f"{folder}: 2 updates in a row were not finite at step 6, and the run has rolled back 2 "
        "times; lower schedule.learning_rate in another run folder (--resume), or raise "
        "faults.max_rollbacks"
    )
    assert [e["batches"] for e in read_events(folder, "rollback")] == [[4, 7], [8, 9]]
    with FolderTier(folder / "checkpoints", read_only=True) as keeper:
        for step in keeper.steps():
            assert keeper.metadata(step)["losses"]["skipped"] == 0


def test_only_what_this_run_went_back_from_counts(tmp_path, text, monkeypatch):
    """As the message advises: another run goes on from one that went back."""
    spoil(monkeypatch, {13, 14, 28, 29}, no_number)
    before, _ = train(tmp_path, text, "before")
    how = ["faults.max_rollbacks=1", "schedule.learning_rate=1e-4", "train.steps=32"]
    train(tmp_path, text, "other", *how, resume=before.folder)
    [back] = read_events(tmp_path / "other", "rollback")
    assert back["batches"] == [27, 29]


@pytest.mark.parametrize("record", ["[{}]", *(f'[{{"batches": {b}}}]' for b in WRONG)])
def test_a_record_of_batches_that_is_none_is_refused(tmp_path, record):
    (tmp_path / "skipped_batches.json").write_text(record)
    with pytest.raises(MaxlmError, match=r"batches.json: is no list of ranges of batches; rewrite"):
        read_skips(tmp_path)


def test_a_kill_in_a_rollback_to_the_beginning_leaves_a_run_that_goes_on(
    tmp_path, text, monkeypatch
):
    """All checkpoints are of the bad steps: they are set aside, and the batches recorded."""
    spoil(monkeypatch, {0, 1}, no_number)
    how = {"checkpoint": {"every_steps": 1}}
    whole, _ = train(tmp_path, text, "whole", "train.steps=6", **how)
    assert [e["batches"] for e in read_events(whole.folder, "rollback")] == [[0, 1]]
    original = StateRestorer.rollback

    def killed(*_):
        raise KeyboardInterrupt

    def rollback(*arguments):
        patch.setattr(resume_module, "record_skip", killed)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StateRestorer, "rollback", rollback)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, text, "cut", "train.steps=6", **how)
    again, _ = train(tmp_path, text, "cut", "train.steps=6", **how)
    assert list(losses(again.folder)) == list(range(1, 7))
    assert_same_state(again, whole)
