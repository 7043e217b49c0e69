"""The loop takes, records, evaluates and saves every step once, in order; when told to stop it
saves, and when the numbers go bad it does not."""

import signal
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.errors import Preempted
from maxlm.runtime.collectives import FlagAllReduce
from maxlm.runtime.signals import StopRequest, handle_signals
from maxlm.train import loop
from maxlm.train.anomaly import LossWatch, Verdict
from maxlm.train.config import FaultsConfig, TrainConfig
from maxlm.train.loop import Guards, Hooks, evaluate, train
from maxlm.train.profile import Profiler
from maxlm.train.watchdog import Watchdog


@dataclass(frozen=True)
class State:
    step: int


@dataclass
class Journal:
    """Stands in for all that the loop talks to, and writes down what it is told."""

    save_every: int = 0
    late_at: int | None = None
    signals: dict[int, list[signal.Signals]] = field(default_factory=dict)
    bad: tuple[int, ...] = ()
    lines: list[tuple] = field(default_factory=list)
    events: list[tuple] = field(default_factory=list)
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    taken: int = 0
    keeper = SimpleNamespace(pop_completed=list)  # none ever completes

    def due(self, step):
        return self.save_every > 0 and step % self.save_every == 0

    def late(self):
        return self.taken == self.late_at

    def save(self, step, state, metadata, *, force=False, suspect=None):
        first = step
        while first in self.bad:
            first -= 1
        assert suspect == (first + 1 if step in self.bad else None)
        assert step == state.step
        assert metadata["meta"] == 1
        good = step - sum(each <= step for each in self.bad)
        assert len(metadata["losses"]["losses"]) == good
        if not (force or self.due(step)) or ("save", step) in self.lines:
            return None
        self.lines.append(("save", step))
        return "folder"

    def wait(self):
        self.lines.append(("wait",))

    def record(self, step, values):
        kind = "evaluated" if "eval_loss" in values else "record"
        self.lines.append((kind, step))
        self.records.setdefault(step, {}).update(values)

    def event(self, kind, step, **details):
        if kind not in ("progress", "compiled", "evaluate"):
            self.events.append((kind, step, *filter(None, [details.get("reason")])))

    def evaluate(self, state):
        return {"eval_loss": 100.0 + state.step}

    def step(self, state, batch):
        assert batch == state.step  # the batch of step s is number s
        self.taken = state.step + 1
        for number in self.signals.get(self.taken, ()):
            signal.raise_signal(number)
        skipped = float(self.taken in self.bad)
        loss = np.float32("nan") if skipped else np.float32(self.taken)
        return State(self.taken), {"loss": loss, "skipped": np.float32(skipped)}


def run(journal, mesh, start=0, evaluating=True, batches=None, **config):
    with handle_signals("runs/x") as signals:
        return train(
            State(start),
            journal.step,
            iter(range(start, 1000)) if batches is None else batches,
            config=TrainConfig(**config),
            hooks=Hooks(journal.record, journal.evaluate if evaluating else None, journal.event),
            guards=Guards(
                signals,
                FlagAllReduce(mesh),
                LossWatch(FaultsConfig(), {"losses": [1.0] * start}),
                Watchdog(FaultsConfig(), None),
                Profiler.off(),
            ),
            tiers=journal,
            metadata={"meta": 1},
            folder="runs/x",
        )


@pytest.fixture
def alone(one_device_mesh):
    return one_device_mesh


def test_every_step_is_recorded_once_and_in_order(alone):
    journal = Journal()
    assert run(journal, alone, steps=7) == State(7)
    assert journal.lines == [*(("record", n) for n in range(1, 8)), ("save", 7), ("wait",)]
    assert {n: r["loss"] for n, r in journal.records.items()} == {n: n for n in range(1, 8)}


def test_it_goes_on_from_a_state(alone):
    journal = Journal()
    assert run(journal, alone, start=4, steps=6) == State(6)
    assert journal.lines == [("record", 5), ("record", 6), ("save", 6), ("wait",)]


def test_evaluations_follow_their_step_and_the_last_is_left_to_the_end(alone):
    journal = Journal()
    run(journal, alone, steps=6, eval_every=3)
    assert journal.lines[:5] == [
        *(("record", n) for n in (1, 2, 3)),
        ("evaluated", 3),
        ("record", 4),
    ]
    assert journal.records[3]["eval_loss"] == 103.0
    assert ("evaluated", 6) not in journal.lines


def test_nothing_is_evaluated_where_nothing_is_held_out(alone):
    journal = Journal()
    run(journal, alone, steps=4, eval_every=2, evaluating=False)
    assert [line for line in journal.lines if line[0] == "record"] == [
        ("record", n) for n in range(1, 5)
    ]
    assert not [line for line in journal.lines if line[0] == "evaluated"]


def test_a_checkpoint_comes_after_all_records_up_to_it(alone):
    # A run killed after a save and before the record would never have that record.
    journal = Journal(save_every=2)
    run(journal, alone, steps=5, eval_every=4)
    saves = [(i, line[1]) for i, line in enumerate(journal.lines) if line[0] == "save"]
    assert [step for _, step in saves] == [2, 4, 5]
    assert journal.events == [("checkpoint", step) for step in (2, 4, 5)]
    for index, step in saves:
        before = journal.lines[:index]
        assert [s for kind, s in before if kind == "record"] == list(range(1, step + 1))
    assert journal.lines.index(("evaluated", 4)) < journal.lines.index(("save", 4))


@pytest.mark.parametrize(
    ("told", "kind", "words", "reason"),
    [
        (signal.SIGINT, MaxlmError, "interrupted at", "interrupt"),
        (signal.SIGTERM, Preempted, "told to stop at", "preempted"),
        (signal.SIGUSR1, Preempted, "told to stop at", "preempted"),
    ],
)
def test_told_to_stop_it_finishes_a_step_saves_and_says_how_to_go_on(
    alone, told, kind, words, reason
):
    journal, before = Journal(signals={3: [told]}), signal.getsignal(told)
    with pytest.raises(MaxlmError) as error:
        run(journal, alone, steps=9)
    assert type(error.value) is kind
    assert str(error.value) == (
        f"runs/x: {words} step 4 of 9, which is saved; run the same command to go on from there"
    )
    # The device is a step ahead of what is known to all.
    assert journal.lines == [*(("record", n) for n in (1, 2, 3, 4)), ("save", 4), ("wait",)]
    assert journal.events == [("checkpoint", 4), ("stop", 4, reason)]
    assert signal.getsignal(told) is before


def test_a_notice_in_the_last_step_is_no_error(alone):
    journal = Journal(signals={4: [signal.SIGTERM]})
    assert run(journal, alone, steps=4) == State(4)
    assert journal.lines[-2:] == [("save", 4), ("wait",)]


def test_a_second_interrupt_stops_at_once(alone):
    journal, before = Journal(signals={3: [signal.SIGINT] * 2}), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(journal, alone, steps=9)
    assert not [line for line in journal.lines if line[0] == "save"]
    assert signal.getsignal(signal.SIGINT) is before


def test_when_it_is_time_for_a_checkpoint_one_is_written_a_step_later(alone):
    journal = Journal(late_at=5)
    assert run(journal, alone, steps=9) == State(9)
    assert [line[1] for line in journal.lines if line[0] == "save"] == [6, 9]
    assert journal.lines.index(("record", 6)) < journal.lines.index(("save", 6))


@pytest.mark.parametrize("save_every", [0, 2])
def test_bad_updates_in_a_row_end_it_before_anything_is_saved(alone, save_every):
    journal = Journal(save_every=save_every, bad=(3, 5, 6, 7))
    verdict = run(journal, alone, evaluating=False, steps=9)
    assert verdict == Verdict(5, 7, "3 updates in a row were not finite")
    assert Counter(e[0] for e in journal.events)["skip"] == 4
    assert not [line for line in journal.lines if line == ("save", 7)]
    assert [line for line in journal.lines if line[0] == "record"] == [
        ("record", n) for n in range(1, 8)
    ]


def test_what_any_process_wants_is_known_by_its_bits(alone):
    agreement = FlagAllReduce(alone)
    for request in (StopRequest.NONE, StopRequest.SAVE, StopRequest.SAVE | StopRequest.PREEMPT):
        assert agreement.finish(agreement.start(request)) == request
    assert [request.stops for request in StopRequest] == [False, True, True]


def test_the_share_of_time_spent_waiting_for_data(alone, monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

        monotonic = perf_counter

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
    run(journal, alone, steps=6, batches=slow_batches())
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
