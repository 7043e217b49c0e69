"""Where the time of training goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Seconds between two ``progress`` events: what a killed run loses of its account.
PROGRESS_SECONDS = 10.0


@dataclass
class StepTimer:
    """Measures each step, from the end of the one before, and adds up seconds by activity.

    Args:
        event: takes (kind, step, **details); told ``compiled`` after the first step and
            ``progress``, with the totals, now and then.
        start: steps made before.
    """

    event: Callable[..., None]
    start: int
    spent: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("stepping", "loading", "saving", "evaluating"), 0.0)
    )

    def __post_init__(self) -> None:
        self._reported = time.monotonic()
        self._restart()

    def _restart(self) -> None:
        self._step_began, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def timed(self, activity: str) -> Iterator[Callable[[], float]]:
        """Times an activity that is no part of a step; yields a function that returns its seconds
        once it is over."""
        began = time.perf_counter()
        ended = began
        try:
            yield lambda: ended - began
        finally:
            ended = time.perf_counter()
            self.spent[activity] += ended - began
            self._step_began += ended - began

    def finish_step(self, step: int) -> dict[str, float]:
        """Returns a step's ``seconds`` and ``loader_wait``, the share spent waiting for data."""
        seconds = max(time.perf_counter() - self._step_began, 1e-9)
        waited = min(self._waited, seconds)
        self._restart()
        if step == self.start + 1:
            self.event("compiled", step, seconds=seconds - waited)
        else:
            self.spent["stepping"] += seconds - waited
        self.spent["loading"] += waited
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self.report(step)
        return {"seconds": seconds, "loader_wait": waited / seconds}

    def report(self, step: int) -> None:
        """Writes the totals as a ``progress`` event."""
        self._reported = time.monotonic()
        self.event("progress", step, **{k: round(v, 6) for k, v in self.spent.items()})
