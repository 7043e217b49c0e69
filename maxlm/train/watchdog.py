"""Steps that never end: each process watches its own, and ends itself rather than hang."""

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
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST
from maxlm.train.config import FaultsConfig

_LOOKED_AT = 100
_LEAST = 5  # steps, before which a median says little
# Of the limit: a process that ends takes its peers along, which may find the hang a little later,
# and are to write down what they do first.
_LEEWAY, _MOST_LEEWAY = 0.1, 10.0  # seconds at most
_PATIENCE = 20.0  # seconds for writing it down


@dataclass(frozen=True)
class _Awaited:
    """What is awaited; one made anew is another."""

    step: int
    words: str
    began: float
    limit: float  # seconds


class Watchdog:
    """A thread that ends the process when what is expected does not come. A context manager.

    It writes what all Python threads are doing to ``FOLDER/hangs/`` and to stderr first.

    Args:
        folder: the run's.
        event: told of a hang (``event("hang", step, process=..., seconds=...)``); may be set
            later.
        end: how the process ends; a test may look instead.
    """

    def __init__(
        self,
        config: FaultsConfig,
        folder: Path,
        process: int = 0,
        event: Callable[..., None] = lambda *_, **__: None,
        end: Callable[[int], Any] = os._exit,
    ):
        self._config, self.folder, self._process = config, folder, process
        self.event, self._end = event, end
        self._seconds: deque[float] = deque(maxlen=_LOOKED_AT)
        self._done = threading.Event()
        # The training thread replaces it, the watching thread reads it.
        self._awaited = _Awaited(0, "", time.monotonic(), float("inf"))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def lap(self, seconds: float) -> None:
        """A step took so long."""
        self._seconds.append(seconds)

    def expect(self, step: int, what: str = "step") -> None:
        """From now on, what is awaited: the next step, or what takes longer (``"evaluation"``,
        ``"save"``, ``"first step"``), and has the time of ``idle_seconds``."""
        typical = self._typical(what)
        median_words = "" if typical is None else f" ({typical:.3g} s is the median)"
        words = f"{what} {step}{median_words}"
        self._awaited = _Awaited(step, words, time.monotonic(), self.limit(what))

    def limit(self, what: str) -> float:
        """Seconds that it may take: a step a multiple of the median of those before it, once there
        are enough of them."""
        typical = self._typical(what)
        if typical is None:
            return self._config.idle_seconds
        return max(self._config.hang_seconds, self._config.hang_factor * typical)

    def _typical(self, what: str) -> float | None:
        return median(self._seconds) if what == "step" and len(self._seconds) >= _LEAST else None

    def restart(self) -> None:
        """What is awaited has come nearer, and has its time once more."""
        self._awaited = replace(self._awaited, began=time.monotonic())

    def rest(self) -> None:
        """Nothing is awaited."""
        self._awaited = replace(self._awaited, limit=float("inf"))

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            awaited = self._awaited
            seconds = time.monotonic() - awaited.began
            if seconds >= awaited.limit:
                if self._hangs(awaited, seconds):
                    return
            elif self._done.wait(min(awaited.limit - seconds, 1.0)):
                return

    def _hangs(self, awaited: _Awaited, seconds: float) -> bool:
        """Tell of it, and end the process unless it comes after all; False if it has."""
        # Whatever becomes of the telling: the disk that it is written to may be what hangs.
        telling = threading.Thread(target=self._tell, args=(awaited, seconds), daemon=True)
        telling.start()
        telling.join(_PATIENCE)
        if self._done.wait(min(_LEEWAY * awaited.limit, _MOST_LEEWAY)):
            return True
        if self._awaited is awaited:
            self._end(LOST)
            return True
        words = f"{self.folder}: process {self._process}: {awaited.words} has come after all"
        print(f"{words}, training goes on", file=sys.stderr, flush=True)
        return False

    def _tell(self, awaited: _Awaited, seconds: float) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        name = f"process-{self._process}-step-{awaited.step}.txt"
        path = self.folder / "hangs" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            there = f"what its threads were doing is in {path}"
        except OSError as error:
            there = f"{path} cannot be written: {error.strerror}"
        print(
            f"error: {self.folder}: process {self._process} hangs: {awaited.words} has taken "
            f"{seconds:.3g} s; {there}; run the same command to go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        with suppress(MaxlmError):  # a full disk: it has been told here
            self.event("hang", awaited.step, process=self._process, seconds=seconds)
