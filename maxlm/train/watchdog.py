"""Detects steps that hang; a process that hangs ends itself."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST
from maxlm.optim.state import TrainState
from maxlm.run.train_config import FaultToleranceConfig
from maxlm.train.trainer import Callback, Trainer

_MEDIAN_STEPS = 100
_LEAST_STEPS = 5  # before which a median says little
# A process that ends takes its peers along. They may detect the same hang a little
# later, and get this share of the limit, and at most these seconds, to write down what
# they do.
_GRACE_SHARE = 0.1
_MAX_GRACE_SECONDS = 10.0
_REPORT_SECONDS = 20.0


@dataclass(frozen=True)
class WatchdogTimer:
    """The work that is under way, in words, and the seconds that it may take."""

    step: int
    description: str
    start_seconds: float
    timeout_seconds: float


class Watchdog(Callback):
    """A thread that ends the process when the work under way takes too long. A context
    manager.

    It first writes what all Python threads are doing to ``hangs/`` in the run's
    ``folder``, and to stderr.
    """

    def __init__(self, config: FaultToleranceConfig, folder: Path, process: int = 0):
        self._config = config
        self.folder = folder
        self._process = process
        self.exit_process: Callable[[int], object] = os._exit  # tests replace it
        self.event: Callable[..., None] = lambda *_, **__: None
        """Takes ``event("hang", step, process=..., seconds=...)``."""
        self._step_seconds: deque[float] = deque(maxlen=_MEDIAN_STEPS)
        self._done = threading.Event()
        self._is_first_step = True
        # The training thread replaces it, the watching thread reads it.
        self.awaited = WatchdogTimer(0, "", time.monotonic(), float("inf"))
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

    def on_step_begin(self, trainer: Trainer, step: int, state: TrainState) -> None:
        self.start_timer(step, "first step" if self._is_first_step else "step")
        self._is_first_step = False

    def on_work_begin(self, trainer: Trainer, step: int, activity: str) -> None:
        self.start_timer(step, activity)

    def on_work_end(self, trainer: Trainer, step: int, activity: str) -> None:
        self.start_timer(step)

    def on_step_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        self._step_seconds.append(metrics["seconds"])

    def on_stop(self, trainer: Trainer) -> None:
        self._is_first_step = True

    def start_timer(self, step: int, activity: str = "step") -> None:
        """Says what is under way from now on: ``"step"``, limited by a multiple of the
        median of those before it, once there are enough; or what takes longer (``"first
        step"``, ``"evaluation"``, ``"save"``, ``"restore"``), limited by
        ``idle_seconds``."""
        description = f"{activity} {step}"
        limit = self._config.idle_seconds
        if activity == "step" and len(self._step_seconds) >= _LEAST_STEPS:
            typical = median(self._step_seconds)
            description += f" ({typical:.3g} s is the median)"
            limit = max(self._config.hang_seconds, self._config.hang_factor * typical)
        self.awaited = WatchdogTimer(step, description, time.monotonic(), limit)

    def reset_timer(self) -> None:
        """Restarts the time of what is under way, which has made progress."""
        self.awaited = replace(self.awaited, start_seconds=time.monotonic())

    def stop_timer(self) -> None:
        """Expects nothing until the next :meth:`start_timer`."""
        self.awaited = replace(self.awaited, timeout_seconds=float("inf"))

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            awaited = self.awaited
            seconds = time.monotonic() - awaited.start_seconds
            if seconds >= awaited.timeout_seconds:
                if self._handle_hang(awaited, seconds):
                    return
            elif self._done.wait(min(awaited.timeout_seconds - seconds, 1.0)):
                return

    def _handle_hang(self, awaited: WatchdogTimer, seconds: float) -> bool:
        """Reports a hang and ends the process, unless the work is done after all; then
        False."""
        # The disk that it writes to may be what hangs.
        report = threading.Thread(
            target=self._report, args=(awaited, seconds), daemon=True
        )
        report.start()
        report.join(_REPORT_SECONDS)
        grace_seconds = min(_GRACE_SHARE * awaited.timeout_seconds, _MAX_GRACE_SECONDS)
        if self._done.wait(grace_seconds):
            return True
        if self.awaited is awaited:
            self.exit_process(LOST)
            return True
        print(
            f"{self.folder}: process {self._process}: {awaited.description} is done "
            "after all, training continues",
            file=sys.stderr,
            flush=True,
        )
        return False

    def _report(self, awaited: WatchdogTimer, seconds: float) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        path = (
            self.folder / "hangs" / f"process-{self._process}-step-{awaited.step}.txt"
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"what its threads were doing is in {path}"
        except OSError as error:
            where = f"{path} cannot be written: {error.strerror}"
        print(
            f"error: {self.folder}: process {self._process} hangs: "
            f"{awaited.description} has taken {seconds:.3g} s; {where}; run the same "
            "command to resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        with suppress(MaxlmError):  # a full disk; the line above has said it
            self.event("hang", awaited.step, process=self._process, seconds=seconds)
