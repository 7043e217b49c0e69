"""A trace of a few steps, for xprof or TensorBoard's profile plugin."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax

from maxlm.config import MaxlmError
from maxlm.optim.state import TrainState
from maxlm.optim.step import Metrics
from maxlm.train.trainer import Callback, Trainer


def parse_steps(text: str) -> tuple[int, int]:
    """Returns the first and last step to trace of ``"10:13"``, or of ``"10"``."""
    first, _, last = text.partition(":")
    try:
        first_step = int(first)
        last_step = int(last or first)
    except ValueError:
        first_step = last_step = 0
    if not 1 <= first_step <= last_step or text.endswith(":"):
        message = f"'{text}' names no steps"
        fix = "write the first and last: 10:13"
        raise MaxlmError(message, where="--profile", fix=fix)
    return first_step, last_step


class Profiler(Callback):
    """Traces steps ``first`` to ``last`` into ``folder``/profile.

    A host's trace begins once the step before it is done, and ends when the last one
    is. Every process traces its own devices; of several, each writes to
    profile/process-N, as files are named after hosts. A run that resumes between the
    two steps is traced from its first one.
    """

    def __init__(self, folder: str | Path, first: int, last: int):
        self._folder = Path(folder) / "profile"
        self._first = first
        self._last = last
        self._is_tracing = False
        self._annotation: jax.profiler.StepTraceAnnotation | None = None
        # Results of the step under way, to wait for before a trace ends.
        self._running: Metrics | None = None

    def on_step_begin(self, trainer: Trainer, step: int, state: TrainState) -> None:
        if not self._first <= step <= self._last:
            return
        if not self._is_tracing:
            jax.block_until_ready(state)
            folder = self._folder
            if jax.process_count() > 1:
                folder = folder / f"process-{jax.process_index()}"
            self._call(jax.profiler.start_trace, str(folder))
            self._is_tracing = True
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def on_step_dispatched(self, trainer: Trainer, step: int, sums: Metrics) -> None:
        self._running = sums if self._is_tracing else None
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if step >= self._last:
            self.on_stop(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        if self._is_tracing:
            self._is_tracing = False
            with suppress(RuntimeError):  # A step that failed is reported elsewhere.
                jax.block_until_ready(self._running)
            self._call(jax.profiler.stop_trace)

    def _call(self, call: Callable[..., None], *arguments: str) -> None:
        try:
            call(*arguments)
        except (RuntimeError, OSError) as error:  # XLA's errors are RuntimeErrors.
            fix = "free some disk space, or train without --profile"
            raise MaxlmError(
                f"no trace: {error}", where=str(self._folder), fix=fix
            ) from error
