"""The training loop. It takes steps; callbacks record, evaluate, save and watch."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from maxlm.optim.state import TrainState
from maxlm.optim.step import Sums
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


@dataclass
class StepTimer:
    """Measures each step, from the end of the one before, and adds up seconds by
    activity."""

    event: Callable[..., None]
    """Takes (kind, step, **details): ``compiled`` after the first step, ``progress``
    with the totals now and then."""
    start_step: int
    """Steps made before."""
    seconds_by_activity: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("stepping", "loading", "saving", "evaluating"), 0.0
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
        """Times waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def time_activity(self, activity: str) -> Iterator[Callable[[], float]]:
        """Times an activity that is no part of a step; yields a function that returns
        its seconds once it is over."""
        began = time.perf_counter()
        ended = began
        try:
            yield lambda: ended - began
        finally:
            ended = time.perf_counter()
            self.seconds_by_activity[activity] += ended - began
            self._step_began += ended - began

    def finish_step(self, step: int) -> dict[str, float]:
        """Returns a step's ``seconds`` and ``loader_wait``, the share spent waiting for
        data."""
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


class Callback:
    """Hooks that a `Trainer` calls, on all processes at the same steps. By default they
    do nothing.

    A hook may set ``trainer.stop_request`` or ``trainer.rollback``; both take effect
    once the hooks of the step have run.
    """

    def on_step_begin(self, trainer: "Trainer", step: int, state: TrainState) -> None:
        """Step ``step`` is about to be dispatched; ``state`` is still being
        computed."""

    def on_step_dispatched(self, trainer: "Trainer", step: int, sums: Sums) -> None:
        """The devices have the step. Work queued here runs behind it; wait for
        nothing."""

    def on_step_end(
        self, trainer: "Trainer", step: int, metrics: dict[str, float]
    ) -> None:
        """The step's scalars are on the host, mostly one step after it was
        dispatched."""

    def needs_state(self, trainer: "Trainer", step: int) -> bool:
        """Whether to call :meth:`on_state` after ``step``, which the next then does not
        overlap."""
        return False

    def on_state(self, trainer: "Trainer", step: int, state: TrainState) -> None:
        """The state after ``step``, whose :meth:`on_step_end` has run, and no next step
        has."""

    def on_work_begin(self, trainer: "Trainer", step: int, activity: str) -> None:
        """Work that is no step begins: an ``"evaluation"`` or a ``"save"``."""

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

    step_fn: Callable[[TrainState, DeviceBatch], tuple[TrainState, Sums]]
    """Compiled, donating its state."""
    num_steps: int
    """Updates of the whole run."""
    callbacks: Sequence[Callback]
    timer: StepTimer
    stop_request: StopRequest = StopRequest.NONE
    """Action that all processes agreed on after this step."""
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
            self.notify("on_stop")

    def event(self, kind: str, step: int, **details: str | float) -> None:
        """Writes an event of the run."""
        self.timer.event(kind, step, **details)

    def notify(self, hook: str, *arguments: Any) -> None:
        """Calls a hook of every callback."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _run(
        self, state: TrainState, batches: Iterator[DeviceBatch]
    ) -> TrainState | RollbackDecision:
        start = int(state.step)
        step = start
        # A step that was dispatched, and whose scalars are not read yet.
        pending: tuple[int, Sums] | None = None
        for step in range(start + 1, self.num_steps + 1):
            self.notify("on_step_begin", step, state)
            with self.timer.time_data_wait():
                batch = next(batches)
            state, sums = self.step_fn(state, batch)
            self.notify("on_step_dispatched", step, sums)
            # The scalars of the step before, while the devices take this one.
            if pending:
                self._finish_step(*pending)
            pending = (step, sums)
            needs_state = [
                callback.needs_state(self, step) for callback in self.callbacks
            ]
            if self.rollback is None and (self.stop_request or any(needs_state)):
                # A checkpoint follows the records up to it: the process may be killed
                # in between.
                self._finish_step(*pending)
                pending = None
                if self.rollback is None:
                    self.notify("on_state", step, state)
                    if self.stop_request.stops:
                        break
                    self.stop_request = StopRequest.NONE
            if self.rollback:
                break
        if pending and not self.rollback:
            self._finish_step(*pending)
        if self.rollback:
            self.timer.log_progress(self.rollback.last_bad_step)
            return self.rollback
        self.notify("on_train_end", step, state)
        return state

    def _finish_step(self, step: int, sums: Sums) -> None:
        """Waits for a step and hands its scalars to the callbacks."""
        metrics = {name: float(value) for name, value in jax.device_get(sums).items()}
        self.notify("on_step_end", step, metrics | self.timer.finish_step(step))
