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
    how = {
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 4},
        "faults": FAULTS,
    }
    how["reporting"] = {"tensorboard": False}
    return tiny.write_config(folder, "", **how, **tiny.prepare(folder / "prepared"))


@pytest.fixture
def train(config, tmp_path):
    """``train(name, *overrides, resume=None)``: the result, and what it said."""

    def train(name, *overrides, **how):
        return tiny.train(
            config, f"folder={tmp_path}", f"name={name}", *overrides, **how
        )

    return train


def spoil(monkeypatch, **how):
    """Change batches before they are trained on: ``no_number={1, 2},
    other_targets={5}``."""
    made = {n: globals()[name] for name, numbers in how.items() for n in numbers}
    tiny.spoil_batches(
        monkeypatch, lambda n, batch: made[n](batch) if n in made else batch
    )


def no_number(batch):
    return batch | {"weights": batch["weights"] * jnp.nan}


def other_targets(batch):
    return batch | {"targets": (batch["targets"] * 7 + 3) % 300}


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder) if "loss" in r}


def assert_same_state(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


def test_a_run_leaves_out_updates_and_goes_back_and_is_then_the_run_without_those_batches(
    train, tmp_path, monkeypatch
):
    # Before any checkpoint; once, which is no reason to go back; two in a row; two
    # spikes.
    spoil(monkeypatch, no_number={1, 2, 5, 12, 13, 28, 29}, other_targets={19, 20})
    backs = [
        # from step, to step, batches that are skipped
        (3, 0, [0, 2], "2 updates in a row were not finite"),
        (11, 8, [11, 13], "2 updates in a row were not finite"),
        (15, 12, [18, 20], "above the spike limit of"),
    ]
    first, said = train("bad", "train.steps=16")
    events = read_events(first.folder, "rollback")
    assert [(e["from_step"], e["step"], e["batches"]) for e in events] == [
        b[:3] for b in backs
    ]
    assert all(
        reason in event["reason"]
        for event, (*_, reason) in zip(events, backs, strict=True)
    )
    assert [line for line in said if "rolling back" in line] == [
        f"rolling back from step {start} to step {end}: {event['reason']}; "
        f"batches {batches[0]} to {batches[1]} are skipped"
        for event, (start, end, batches, _) in zip(events, backs, strict=True)
    ]
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
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(trained.state))
    )
    with FolderTier(trained.folder / "checkpoints", read_only=True) as keeper:
        assert keeper.metadata()["skipped_batches"] == [
            batches for _, _, batches, _ in backs
        ]

    # A run told from its beginning to leave them out.
    (tmp_path / "told").mkdir()
    ranges = [{"batches": batches} for _, _, batches, _ in backs]
    (tmp_path / "told" / "skipped_batches.json").write_text(json.dumps(ranges))
    told, _ = train("told")
    assert not read_events(told.folder, "rollback")
    assert losses(told.folder) == losses(trained.folder)
    assert_same_state(trained, told)

    # Another goes on from it, as advised to one that gives up: only its own rollbacks
    # count.
    how = ["faults.max_rollbacks=1", "schedule.final_fraction=0.5", "train.steps=22"]
    other, _ = train("other", *how, resume=trained.folder)
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
        f"rolled back 2 "
        "times; lower schedule.learning_rate in another run folder (--resume), or "
        "raise "
        "faults.max_rollbacks"
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
    how = ["train.steps=6", "checkpoint.every_steps=1"]
    whole, _ = train("whole", *how)
    backs = [(e["step"], e["batches"]) for e in read_events(whole.folder, "rollback")]
    assert backs == [(0, [0, 1]), (2, [4, 5])]
    original = StateRestorer.rollback

    def killed(*_):
        raise KeyboardInterrupt

    def rollback(*arguments):
        patch.setattr(resume_module, "record_skip", killed)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StateRestorer, "rollback", rollback)
        with pytest.raises(KeyboardInterrupt):
            train("cut", *how)
    again, _ = train("cut", *how)
    assert list(losses(again.folder)) == list(range(1, 7))
    assert_same_state(again, whole)
