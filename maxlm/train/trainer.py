"""The training loop. It takes steps; callbacks record, evaluate, save and watch."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import jax

from maxlm.optim.state import TrainState
from maxlm.optim.step import Metrics
from maxlm.runtime.signals import StopRequest
from maxlm.tasks.task import DeviceBatch

# Seconds between two ``progress`` events: what a killed run loses of its account.
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class RollbackDecision:
    """The updates of a range of steps are bad: the run must return to a checkpoint
    before them."""

    first_bad_step: int
    last_bad_step: int
    reason: str


class WriteEvent(Protocol):
    """Writes an event of the run, as :meth:`~maxlm.train.records.RunLog.event` does."""

    def __call__(self, kind: str, step: int, **details: str | float) -> None: ...


@dataclass
class TimedActivity:
    """An activity that :meth:`StepTimer.time_activity` times."""

    seconds: float = 0.0
    """0 until the activity is over."""


@dataclass
class StepTimer:
    """Measures each step, from the end of the one before, and adds up seconds by
    activity. The first step, which compiles its program, is in no total: an event has
    its seconds."""

    event: WriteEvent
    """Writes ``compiled`` after the first step, and ``progress`` with the totals at
    most every ``PROGRESS_SECONDS``."""
    start_step: int
    """Steps made before."""
    seconds_by_activity: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("stepping", "loading", "generating", "saving", "evaluating"), 0.0
        )
    )

    def __post_init__(self) -> None:
        self._reported = time.monotonic()
        self._restart()

    def _restart(self) -> None:
        self._step_began = time.perf_counter()
        self._waited = 0.0

    @contextmanager
    def time_data_wait(self) -> Iterator[None]:
        """Counts the block's time as a wait for data, within its step."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def time_activity(
        self, activity: Literal["evaluating", "generating", "saving"]
    ) -> Iterator[TimedActivity]:
        """Times the block as an activity that is no part of a step; the yielded object
        has its seconds once the block is over."""
        timed = TimedActivity()
        began = time.perf_counter()
        try:
            yield timed
        finally:
            timed.seconds = time.perf_counter() - began
            self.seconds_by_activity[activity] += timed.seconds
            # The step's clock stands still meanwhile.
            self._step_began += timed.seconds

    def finish_step(self, step: int) -> dict[str, float]:
        """Returns a step's ``seconds`` and ``loader_wait``, the share spent waiting for
        data."""
        # A clock may not have moved, and the share below divides by these seconds.
        seconds = max(time.perf_counter() - self._step_began, 1e-9)
        waited = min(self._waited, seconds)
        self._restart()
        if step == self.start_step + 1:
            self.event("compiled", step, seconds=seconds - waited)
        else:
            self.seconds_by_activity["stepping"] += seconds - waited
        self.seconds_by_activity["loading"] += waited
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self.log_progress(step)
        return {"seconds": seconds, "loader_wait": waited / seconds}

    def log_progress(self, step: int) -> None:
        """Writes the totals as a ``progress`` event."""
        self._reported = time.monotonic()
        seconds = {
            name: round(spent, 6) for name, spent in self.seconds_by_activity.items()
        }
        self.event("progress", step, **seconds)


def measure_peak_memory_bytes() -> dict[str, float]:
    """Returns peak memory in bytes: ``device_memory_peak`` of the first local device if
    the backend counts it (GPU, TPU), else ``process_memory_peak`` (resident set, JAX's
    and Python's)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"device_memory_peak": stats["peak_bytes_in_use"]}
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return {
        "process_memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    }


Work = Literal["evaluation", "rollout", "save"]
"""Work of the loop that is no step."""


class Callback:
    """Hooks that a `Trainer` calls, on all processes at the same steps. By default they
    do nothing.

    A hook may set ``trainer.stop_request`` or ``trainer.rollback``; both take effect
    once the hooks of the step have run.
    """

    def on_step_begin(self, trainer: "Trainer", step: int, state: TrainState) -> None:
        """Step ``step`` is about to be dispatched; ``state`` is still being
        computed."""

    def on_step_dispatched(self, trainer: "Trainer", step: int, sums: Metrics) -> None:
        """The devices have the step. Work queued here runs behind it; wait for
        nothing."""

    def on_step_end(
        self, trainer: "Trainer", step: int, metrics: dict[str, float]
    ) -> None:
        """The step's scalars are on the host, mostly one step after it was
        dispatched."""

    def get_metrics(self, step: int) -> Mapping[str, float]:
        """Returns what is to be logged with the step's scalars; asked for once, before
        :meth:`on_step_end`."""
        return {}

    def needs_state(self, trainer: "Trainer", step: int) -> bool:
        """Whether to call :meth:`on_state` after ``step``, which the next then does not
        overlap."""
        return False

    def on_state(self, trainer: "Trainer", step: int, state: TrainState) -> None:
        """The state after ``step``, whose :meth:`on_step_end` has run, and no next step
        has."""

    def on_work_begin(self, trainer: "Trainer", step: int, activity: Work) -> None:
        """Work that is no step begins."""

    def on_work_end(self, trainer: "Trainer", step: int, activity: Work) -> None:
        """Work that is no step is done, and the step goes on."""

    def on_evaluation_end(
        self, trainer: "Trainer", step: int, metrics: dict[str, float]
    ) -> None:
        """An evaluation is done."""

    def on_train_end(self, trainer: "Trainer", step: int, state: TrainState) -> None:
        """The last step is done, or the one that the run stops at."""

    def on_stop(self, trainer: "Trainer") -> None:
        """No step follows: training is done, fails, or the run must return to a
        checkpoint."""


@dataclass
class Trainer:
    """Takes steps and calls callbacks, in the order of their list.

    The device is kept one step ahead of the host: a step's scalars are read only once
    the next step has been dispatched, so that no callback holds it up.
    """

    step_fn: Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]
    """Compiled, donating its state."""
    num_steps: int
    """Updates of the whole run."""
    callbacks: Sequence[Callback]
    timer: StepTimer
    stop_request: StopRequest = StopRequest.NONE
    """Flags that processes have set together, the same on all: save, or save and stop;
    ``NONE``, which is falsy: none of them."""
    rollback: RollbackDecision | None = None
    """Reason why the run must return to a checkpoint."""

    def run(
        self, state: TrainState, batches: Iterator[DeviceBatch]
    ) -> TrainState | RollbackDecision:
        """Trains from ``state.step`` to ``num_steps``, on batches from ``state.step``
        on.

        Returns the final state, or the decision to roll back, after which nothing was
        saved. Raises what a callback raises, such as ``Preempted``.
        """
        try:
            return self._run(state, batches)
        finally:
            for callback in self.callbacks:
                callback.on_stop(self)

    def event(self, kind: str, step: int, **details: str | float) -> None:
        """Writes an event of the run."""
        self.timer.event(kind, step, **details)

    def begin_work(self, step: int, activity: Work) -> None:
        """Tells the callbacks that work that is no step begins behind ``step``."""
        for callback in self.callbacks:
            callback.on_work_begin(self, step, activity)

    def end_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Hands the callbacks the metrics of an evaluation of the state after
        ``step``."""
        for callback in self.callbacks:
            callback.on_evaluation_end(self, step, metrics)

    def _run(
        self, state: TrainState, batches: Iterator[DeviceBatch]
    ) -> TrainState | RollbackDecision:
        start = int(state.step)
        step = start
        # A step that was dispatched, and whose scalars are not read yet.
        pending: tuple[int, Metrics] | None = None
        for step in range(start + 1, self.num_steps + 1):
            for callback in self.callbacks:
                callback.on_step_begin(self, step, state)
            with self.timer.time_data_wait():
                batch = next(batches)
            state, sums = self.step_fn(state, batch)
            for callback in self.callbacks:
                callback.on_step_dispatched(self, step, sums)
            # The scalars of the step before, while the devices take this one. Its
            # callbacks may request a stop or a rollback.
            if pending:
                self._finish_step(*pending)
            pending = (step, sums)

            # Every callback is asked, on every process alike.
            needs_state = [
                callback.needs_state(self, step) for callback in self.callbacks
            ]
            if self.rollback is None and (self.stop_request or any(needs_state)):
                # A checkpoint follows the records up to it: the process may be killed
                # in between.
                self._finish_step(*pending)
                pending = None
                # This step, too, may have called for a rollback: then its state is of
                # no use.
                if self.rollback is None:
                    for callback in self.callbacks:
                        callback.on_state(self, step, state)
                    if self.stop_request.stops:
                        break
                    # What was requested is a checkpoint, and it is saved.
                    self.stop_request = StopRequest.NONE
            if self.rollback:
                break

        if pending and not self.rollback:
            self._finish_step(*pending)
        if self.rollback:
            # The seconds since the last totals belong to the run, although its steps
            # are taken back.
            self.timer.log_progress(self.rollback.last_bad_step)
            return self.rollback
        for callback in self.callbacks:
            callback.on_train_end(self, step, state)
        return state

    def _finish_step(self, step: int, sums: Metrics) -> None:
        """Waits for a step and hands its scalars to the callbacks."""
        scalars = {name: float(value) for name, value in jax.device_get(sums).items()}
        metrics = scalars | self.timer.finish_step(step)
        for callback in self.callbacks:
            metrics |= callback.get_metrics(step)
        for callback in self.callbacks:
            callback.on_step_end(self, step, metrics)
