"""The trainer takes, records, evaluates and saves every step once, in order; a stop
request saves, and a rollback does not."""

import signal
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.errors import Preempted
from maxlm.run.train_config import FaultToleranceConfig
from maxlm.runtime.collectives import FlagAllReduce
from maxlm.runtime.signals import handle_signals
from maxlm.train import callbacks, trainer
from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.trainer import Callback, RollbackDecision, StepTimer, Trainer
from maxlm.train.watchdog import Watchdog


@dataclass(frozen=True)
class State:
    step: int
    frozen: dict = field(default_factory=dict)


@dataclass
class Journal(Callback):
    """Stands in for all that callbacks talk to, and writes down what it is told."""

    save_every: int = 0
    late_at: int | None = None
    signals: dict[int, list[signal.Signals]] = field(default_factory=dict)
    bad: tuple[int, ...] = ()
    lines: list[tuple] = field(default_factory=list)
    events: list[tuple] = field(default_factory=list)
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    taken: int = 0

    folder_tier = SimpleNamespace(pop_completed=list)

    def is_due(self, step):
        return self.save_every > 0 and step % self.save_every == 0

    def is_due_by_time(self):
        return self.taken == self.late_at

    def save(self, step, state, metadata, *, force=False, first_suspect_step=None):
        first = step
        while first in self.bad:
            first -= 1
        assert first_suspect_step == (first + 1 if step in self.bad else None)
        assert step == state.step
        assert metadata["meta"] == 1
        good = step - sum(bad_step <= step for bad_step in self.bad)
        assert len(metadata["losses"]["losses"]) == good
        if not (force or self.is_due(step)) or ("save", step) in self.lines:
            return None
        self.lines.append(("save", step))
        return "folder"

    def wait(self):
        self.lines.append(("wait",))

    def on_step_end(self, trainer, step, metrics):
        self.lines.append(("record", step))
        self.records.setdefault(step, {}).update(metrics)

    def on_evaluation_end(self, trainer, step, metrics):
        self.lines.append(("evaluated", step))
        self.records[step].update(metrics)

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


def run(journal, mesh, *, steps, start=0, eval_every=0, batches=None):
    detector = LossSpikeDetector(FaultToleranceConfig(), {"losses": [1.0] * start})
    watchdog = Watchdog(FaultToleranceConfig(), None)
    with handle_signals("runs/x") as signals, signals.defer_signals():
        reduce = FlagAllReduce(mesh)
        late = journal.is_due_by_time
        trainer = Trainer(
            journal.step,
            steps,
            [
                watchdog,
                journal,
                detector,
                callbacks.EvaluationCallback(journal.evaluate, eval_every),
                callbacks.CheckpointCallback(journal, {"meta": 1}, detector),
                callbacks.StopCallback(signals, reduce, late, "runs/x"),
            ],
            StepTimer(journal.event, start),
        )
        return trainer.run(State(start), batches or iter(range(start, 1000)))


@pytest.fixture
def alone(one_device_mesh):
    return one_device_mesh


def test_every_step_is_recorded_once_and_in_order_from_any_state(alone):
    journal = Journal()
    assert run(journal, alone, start=4, steps=7) == State(7)
    assert journal.lines == [
        *(("record", n) for n in (5, 6, 7)),
        ("save", 7),
        ("wait",),
    ]
    assert {n: r["loss"] for n, r in journal.records.items()} == {
        n: n for n in (5, 6, 7)
    }


def test_a_step_is_dispatched_before_the_scalars_of_the_last_one_are_read(alone):
    journal = Journal()
    order = []

    class Scalar(float):
        def __float__(self):
            order.append("read")
            return 1.0

    def step(state, batch):
        order.append("dispatch")
        return State(state.step + 1), {"loss": Scalar()}

    journal.step = step
    run(journal, alone, steps=4)
    assert order == ["dispatch", *["dispatch", "read"] * 3, "read"]


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
    order = [journal.lines.index((kind, 4)) for kind in ("record", "evaluated", "save")]
    assert order == sorted(order)
    assert journal.records[4]["eval_loss"] == 104.0
    journal = Journal()  # The last evaluation is left to the end of the program.
    run(journal, alone, steps=4, eval_every=4)
    assert ("evaluated", 4) not in journal.lines


@pytest.mark.parametrize(
    ("received", "kind", "words", "reason"),
    [
        (signal.SIGINT, MaxlmError, "interrupted at", "interrupt"),
        (signal.SIGTERM, Preempted, "preempted at", "preempted"),
        (signal.SIGUSR1, Preempted, "preempted at", "preempted"),
    ],
)
def test_a_stop_signal_finishes_the_step_and_saves(
    alone, received, kind, words, reason
):
    journal = Journal(signals={3: [received]})
    before = signal.getsignal(received)
    with pytest.raises(MaxlmError) as error:
        run(journal, alone, steps=9)
    assert type(error.value) is kind
    assert str(error.value) == (
        f"runs/x: {words} step 4 of 9, which is saved; run the same command to resume"
    )
    # The device is a step ahead of what all processes know.
    assert journal.lines == [
        *(("record", n) for n in (1, 2, 3, 4)),
        ("save", 4),
        ("wait",),
    ]
    assert journal.events == [("checkpoint", 4), ("stop", 4, reason)]
    assert signal.getsignal(received) is before


def test_a_signal_in_the_last_step_is_no_error(alone):
    journal = Journal(signals={4: [signal.SIGTERM]})
    assert run(journal, alone, steps=4) == State(4)
    assert journal.lines[-2:] == [("save", 4), ("wait",)]


def test_a_checkpoint_that_is_late_is_written_a_step_later(alone):
    journal = Journal(late_at=5)
    assert run(journal, alone, steps=9) == State(9)
    assert [line[1] for line in journal.lines if line[0] == "save"] == [6, 9]
    assert journal.lines.index(("record", 6)) < journal.lines.index(("save", 6))


@pytest.mark.parametrize("save_every", [0, 2])
def test_non_finite_updates_in_a_row_end_it_before_anything_is_saved(alone, save_every):
    journal = Journal(save_every=save_every, bad=(3, 5, 6, 7))
    decision = run(journal, alone, steps=9)
    assert decision == RollbackDecision(5, 7, "3 updates in a row were not finite")
    assert Counter(e[0] for e in journal.events)["skip"] == 4
    assert ("save", 7) not in journal.lines
    assert [n for kind, n in journal.lines if kind == "record"] == list(range(1, 8))


def test_the_share_of_time_spent_waiting_for_data(alone, monkeypatch):
    now = [0.0]
    journal = Journal()
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(trainer, "time", clock)

    def slow_batches():
        for number in range(10):
            now[0] += 3.0
            yield number

    take = journal.step

    def slow_step(state, batch):
        now[0] += 1.0
        return take(state, batch)

    journal.step = slow_step
    run(journal, alone, steps=6, batches=slow_batches())
    # Between the first and the last, each step waits 3 seconds of its 4.
    for step in range(2, 6):
        assert journal.records[step]["seconds"] == 4.0
        assert journal.records[step]["loader_wait"] == 0.75
