"""Stop signals and timed checkpoints, on all processes at one step."""

from collections import deque
from collections.abc import Callable
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.errors import Preempted
from maxlm.runtime.collectives import FlagAllReduce
from maxlm.runtime.signals import SignalHandler, StopRequest
from maxlm.train.state import TrainState
from maxlm.train.step import Sums
from maxlm.train.trainer import Callback, Trainer


class StopCallback(Callback):
    """Combines what processes request with every step. Put it last: where a run stops early, it
    raises once the other callbacks have ended.

    Args:
        signals: this process's requests.
        all_reduce: combines them behind the step, without waiting for it.
        save_is_due: whether this process's clock asks for a checkpoint.
        event: takes (kind, step, **details).
        folder: the run's folder, for messages.
    """

    def __init__(
        self,
        signals: SignalHandler,
        all_reduce: FlagAllReduce,
        save_is_due: Callable[[], bool],
        event: Callable[..., None],
        folder: str,
    ):
        self._signals, self._all_reduce, self._save_is_due = signals, all_reduce, save_is_due
        self._event, self._folder = event, folder
        self._reductions: deque[Any] = deque()

    def on_step_dispatched(self, trainer: Trainer, step: int, sums: Sums) -> None:
        save = StopRequest.SAVE if self._save_is_due() else StopRequest.NONE
        self._reductions.append(self._all_reduce.start(self._signals.request | save))

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        trainer.stop_request |= self._all_reduce.finish(self._reductions.popleft())

    def on_train_end(self, trainer: Trainer, step: int, state: TrainState) -> None:
        if not trainer.stop_request.stops or step == trainer.num_steps:
            return
        preempted = StopRequest.PREEMPT in trainer.stop_request
        self._event("stop", step, reason="preempted" if preempted else "interrupt")
        kind, words = (Preempted, "preempted") if preempted else (MaxlmError, "interrupted")
        error = kind(
            f"{words} at step {step} of {trainer.num_steps}, which is saved",
            where=self._folder,
            fix="run the same command to resume",
        )
        error.on_all_processes = True
        raise error
