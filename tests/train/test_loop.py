"""The loop takes, records, evaluates and saves every step once, in order; an interrupt saves."""

import signal
from dataclasses import dataclass, field

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.train import loop
from maxlm.train.config import TrainConfig
from maxlm.train.loop import Hooks, evaluate, train


@dataclass(frozen=True)
class State:
    step: int


@dataclass
class Journal:
    """Stands in for all that the loop talks to, and writes down what it is told."""

    save_every: int = 0
    interrupt_at: tuple[int, ...] = ()
    lines: list[tuple] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    records: dict[int, dict[str, float]] = field(default_factory=dict)

    def due(self, step):
        return self.save_every > 0 and step % self.save_every == 0

    def save(self, step, state, metadata, force=False):
        assert (step, metadata) == (state.step, {"meta": 1})
        begun = force or self.due(step)
        if begun:
            self.lines.append(("save", step))
        return begun

    def wait(self):
        self.lines.append(("wait",))

    def record(self, step, values):
        kind = "evaluated" if "eval_loss" in values else "record"
        self.lines.append((kind, step))
        self.records.setdefault(step, {}).update(values)

    def event(self, kind, step, reason=None):
        self.events.append((kind, step, *filter(None, [reason])))

    def evaluate(self, state):
        return {"eval_loss": 100.0 + state.step}

    def step(self, state, batch):
        assert batch == state.step  # the batch of step s is number s
        for _ in range(self.interrupt_at.count(state.step + 1)):
            signal.raise_signal(signal.SIGINT)
        return State(state.step + 1), {"loss": np.float32(state.step + 1)}


def run(journal, start=0, evaluating=True, batches=None, **config):
    return train(
        State(start),
        journal.step,
        iter(range(start, 1000)) if batches is None else batches,
        config=TrainConfig(**config),
        hooks=Hooks(journal.record, journal.evaluate if evaluating else None, journal.event),
        checkpointer=journal,
        metadata={"meta": 1},
        folder="runs/x",
    )


def test_every_step_is_recorded_once_and_in_order():
    journal = Journal()
    assert run(journal, steps=7) == State(7)
    assert journal.lines == [*(("record", n) for n in range(1, 8)), ("save", 7), ("wait",)]
    assert {n: r["loss"] for n, r in journal.records.items()} == {n: n for n in range(1, 8)}


def test_it_goes_on_from_a_state():
    journal = Journal()
    assert run(journal, start=4, steps=6) == State(6)
    assert journal.lines == [("record", 5), ("record", 6), ("save", 6), ("wait",)]


def test_evaluations_follow_their_step_and_the_last_is_left_to_the_end():
    journal = Journal()
    run(journal, steps=6, eval_every=3)
    assert journal.lines[:5] == [
        *(("record", n) for n in (1, 2, 3)),
        ("evaluated", 3),
        ("record", 4),
    ]
    assert journal.records[3]["eval_loss"] == 103.0
    assert ("evaluated", 6) not in journal.lines


def test_nothing_is_evaluated_where_nothing_is_held_out():
    journal = Journal()
    run(journal, steps=4, eval_every=2, evaluating=False)
    assert [line for line in journal.lines if line[0] == "record"] == [
        ("record", n) for n in range(1, 5)
    ]
    assert not [line for line in journal.lines if line[0] == "evaluated"]


def test_a_checkpoint_comes_after_all_records_up_to_it():
    # A run killed after a save and before the record would never have that record.
    journal = Journal(save_every=2)
    run(journal, steps=5, eval_every=4)
    saves = [(i, line[1]) for i, line in enumerate(journal.lines) if line[0] == "save"]
    assert [step for _, step in saves] == [2, 4, 5]
    assert journal.events == [
        *(("checkpoint", step) for step in (2, 4, 5)),
        ("stop", 5, "done"),
    ]
    for index, step in saves:
        before = journal.lines[:index]
        assert [s for kind, s in before if kind == "record"] == list(range(1, step + 1))
    assert journal.lines.index(("evaluated", 4)) < journal.lines.index(("save", 4))


def test_an_interrupt_finishes_the_step_saves_and_says_how_to_go_on():
    journal, before = Journal(interrupt_at=(3,)), signal.getsignal(signal.SIGINT)
    with pytest.raises(MaxlmError) as error:
        run(journal, steps=9)
    assert str(error.value) == (
        "runs/x: interrupted at step 3 of 9, which is saved; run the same command to go on from "
        "there"
    )
    assert journal.lines == [*(("record", n) for n in (1, 2, 3)), ("save", 3), ("wait",)]
    assert journal.events == [("checkpoint", 3), ("stop", 3, "interrupt")]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_in_the_last_step_is_no_error():
    journal = Journal(interrupt_at=(4,))
    assert run(journal, steps=4) == State(4)
    assert journal.lines[-2:] == [("save", 4), ("wait",)]


def test_a_second_interrupt_stops_at_once():
    journal, before = Journal(interrupt_at=(3, 3)), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(journal, steps=9)
    assert ("save", 3) not in journal.lines
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("save_every", [0, 4])
def test_a_lost_loss_stops_the_run_before_it_is_saved(save_every):
    journal = Journal(save_every=save_every)
    take = journal.step

    def step(state, batch):
        state, sums = take(state, batch)
        return state, {"loss": np.float32("nan")} if state.step >= 4 else sums

    journal.step = step
    with pytest.raises(MaxlmError) as error:
        run(journal, steps=9)
    assert str(error.value) == (
        "train: the loss is nan at step 4; go on from the last checkpoint with a lower "
        "schedule.learning_rate or optimizer.clip_norm, in another run folder (--resume)"
    )
    assert journal.lines == [("record", n) for n in range(1, 5)]


def test_the_share_of_time_spent_waiting_for_data(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock, journal = Clock(), Journal()
    monkeypatch.setattr(loop, "time", clock)

    def slow_batches():
        for number in range(10):
            clock.now += 3.0
            yield number

    take = journal.step

    def slow_step(state, batch):
        clock.now += 1.0
        return take(state, batch)

    journal.step = slow_step
    run(journal, steps=6, batches=slow_batches())
    # Between the first and the last, each step waits 3 seconds of its 4.
    for step in range(2, 6):
        assert journal.records[step]["seconds"] == 4.0
        assert journal.records[step]["loader_wait"] == 0.75


def test_evaluation_adds_up_in_float64():
    # In float32 the ones would vanish beside 2²⁴.
    sums = iter([2.0**24, 1.0, 1.0])
    totals = evaluate(
        lambda params, batch: {"nll": np.float32(next(sums)), "tokens": np.float32(batch)},
        None,
        iter([5, 6, 7]),
    )
    assert totals == {"nll": 2.0**24 + 2, "tokens": 18.0}
