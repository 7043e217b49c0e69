"""Numbers gone bad: an update is left out, or the run goes back and leaves out the
batches since; it then is the run that never had them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.skips import read_skips
from maxlm.config import MaxlmError
from maxlm.train import resume as resume_module
from maxlm.train.resume import StateRestorer
from tests.train import tiny
from tests.train.tiny import read_events, read_metrics

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]

STEPS = 18
WRONG = ("[3]", "[7, 3]", '["1", "2"]')
FAULTS = {"max_skipped": 2, "spike_window": 8, "spike_steps": 2, "spike_threshold": 3.0}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollback")
    return tiny.write_config(
        folder,
        "",
        **tiny.prepare(folder / "prepared"),
        train={"steps": STEPS},
        checkpoint={"every_steps": 4},
        faults=FAULTS,
        reporting={"tensorboard": False},
    )


@pytest.fixture
def train(config, tmp_path):
    """``train(name, *overrides, resume=None)``: the result, and what it said."""

    def train(name, *overrides, resume=None):
        place = [f"folder={tmp_path}", f"name={name}"]
        return tiny.train(config, *place, *overrides, resume=resume)

    return train


def spoil(monkeypatch, no_number, other_targets=()):
    """Change batches, by their numbers, before they are trained on."""

    def change(number, batch):
        if number in no_number:
            return batch | {"weights": batch["weights"] * jnp.nan}
        if number in other_targets:
            return batch | {"targets": (batch["targets"] * 7 + 3) % 300}
        return batch

    tiny.spoil_batches(monkeypatch, change)


def losses(folder):
    records = [record for record in read_metrics(folder) if "loss" in record]
    return {record["step"]: record["loss"] for record in records}


def assert_same_state(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


def test_a_run_leaves_out_updates_and_goes_back_and_is_then_the_run_without_those_batches(
    train, tmp_path, monkeypatch
):
    # Before any checkpoint; once, which is no reason to go back; two in a row; two
    # spikes.
    spoil(monkeypatch, no_number={1, 2, 5, 12, 13, 28, 29}, other_targets={19, 20})
    rollbacks = [
        # from step, to step, first and last batch that are skipped, reason
        (3, 0, [0, 2], "2 updates in a row were not finite"),
        (11, 8, [11, 13], "2 updates in a row were not finite"),
        (15, 12, [18, 20], "above the spike limit of"),
    ]
    first, lines = train("bad", "train.steps=16")
    events = read_events(first.folder, "rollback")
    expected_lines = []
    for event, (start, end, batches, reason) in zip(events, rollbacks, strict=True):
        assert event["from_step"] == start
        assert event["step"] == end
        assert event["batches"] == batches
        assert reason in event["reason"]
        expected_lines.append(
            f"rolling back from step {start} to step {end}: {event['reason']}; "
            f"batches {batches[0]} to {batches[1]} are skipped"
        )
    assert [line for line in lines if "rolling back" in line] == expected_lines
    skips = [
        {"batches": event["batches"], "reason": event["reason"]} for event in events
    ]
    assert json.loads((first.folder / "skipped_batches.json").read_text()) == skips
    assert [e["step"] for e in read_events(first.folder, "skip")] == [2, 3, 3, 10, 11]

    # It is started again.
    trained, _ = train("bad")
    assert trained.start_step == 16
    recorded = read_metrics(trained.folder)
    assert [r["step"] for r in recorded if r.get("skipped")] == [3]
    assert [r["step"] for r in recorded] == list(range(1, STEPS + 1))
    norms = {r["step"]: r["param_norm"] for r in recorded}
    assert norms[3] == norms[2]  # nothing changed
    assert norms[4] != norms[3]
    for array in jax.tree.leaves(jax.device_get(trained.state)):
        assert np.isfinite(array).all()
    skipped = [batches for _, _, batches, _ in rollbacks]
    with FolderTier(trained.folder / "checkpoints", read_only=True) as keeper:
        assert keeper.metadata()["skipped_batches"] == skipped

    # A run told from its beginning to leave them out.
    (tmp_path / "told").mkdir()
    ranges = [{"batches": batches} for batches in skipped]
    (tmp_path / "told" / "skipped_batches.json").write_text(json.dumps(ranges))
    forewarned, _ = train("told")
    assert not read_events(forewarned.folder, "rollback")
    assert losses(forewarned.folder) == losses(trained.folder)
    assert_same_state(trained, forewarned)

    # Another goes on from it, as advised to one that gives up: only its own rollbacks
    # count.
    settings = [
        "faults.max_rollbacks=1",
        "schedule.final_fraction=0.5",
        "train.steps=22",
    ]
    other, _ = train("other", *settings, resume=trained.folder)
    [back] = read_events(other.folder, "rollback")
    assert (back["step"], back["batches"]) == (18, [27, 29])


def test_a_run_that_stays_bad_gives_up_and_never_saves_what_is_no_number(
    train, tmp_path, monkeypatch
):
    spoil(monkeypatch, no_number=range(6, 99))
    with pytest.raises(MaxlmError) as error:
        train("bad", "faults.max_rollbacks=2")
    folder = tmp_path / "bad"
    assert str(error.value) == (
        f"{folder}: 2 updates in a row were not finite at step 6, and the run has "
        "rolled back 2 times; lower schedule.learning_rate in another run folder "
        "(--resume), or raise faults.max_rollbacks"
    )
    assert [e["batches"] for e in read_events(folder, "rollback")] == [[4, 7], [8, 9]]
    with FolderTier(folder / "checkpoints", read_only=True) as keeper:
        for step in keeper.steps():
            assert keeper.metadata(step)["losses"]["skipped"] == 0


@pytest.mark.parametrize("record", ["[{}]", *(f'[{{"batches": {b}}}]' for b in WRONG)])
def test_a_record_of_batches_that_is_none_is_refused(tmp_path, record):
    (tmp_path / "skipped_batches.json").write_text(record)
    with pytest.raises(
        MaxlmError, match=r"batches.json: is no list of ranges of batches; rewrite"
    ):
        read_skips(tmp_path)


@pytest.mark.more
def test_checkpoints_of_bad_steps_are_not_gone_on_from_also_after_a_kill_in_a_rollback(
    train, monkeypatch
):
    """Of the first bad steps are all checkpoints, which are set aside, and of the
    others one with nothing new."""
    spoil(monkeypatch, no_number={0, 1, 4, 5})
    settings = ["train.steps=6", "checkpoint.every_steps=1"]
    whole, _ = train("whole", *settings)
    events = read_events(whole.folder, "rollback")
    rollbacks = [(event["step"], event["batches"]) for event in events]
    assert rollbacks == [(0, [0, 1]), (2, [4, 5])]
    original = StateRestorer.rollback

    def killed(*_):
        raise KeyboardInterrupt

    def rollback(*arguments):
        patch.setattr(resume_module, "record_skip", killed)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StateRestorer, "rollback", rollback)
        with pytest.raises(KeyboardInterrupt):
            train("cut", *settings)
    again, _ = train("cut", *settings)
    assert list(losses(again.folder)) == list(range(1, 7))
    assert_same_state(again, whole)
