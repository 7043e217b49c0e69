"""A trace of a few steps, for xprof or TensorBoard's profile plugin."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.train.trainer import Callback, Trainer


def parse_steps(text: str) -> tuple[int, int]:
    """Returns the first and last step to trace of ``"10:13"``, or of ``"10"``."""
    first, _, last = text.partition(":")
    try:
        steps = int(first), int(last or first)
    except ValueError:
        steps = 0, 0
    if not 1 <= steps[0] <= steps[1] or text.endswith(":"):
        message = f"'{text}' names no steps"
        raise MaxlmError(
            message, where="--profile", fix="write the first and last: 10:13"
        )
    return steps


class Profiler(Callback):
    """Traces steps ``first`` to ``last`` into ``folder``/profile.

    A host's trace begins once the step before it is done, and ends when the last one
    is. Every process traces its own devices; of several, each writes to
    profile/process-N, as files are named after hosts. A run that resumes between the
    two steps is traced from its first one.
    """

    def __init__(self, folder: str | Path, first: int, last: int):
        self._folder = Path(folder) / "profile"
        self._first, self._last = first, last
        self._is_tracing, self._annotation, self._running = False, None, None

    def on_step_begin(self, trainer: Trainer, step: int, state: Any) -> None:
        if not self._first <= step <= self._last:
            return
        if not self._is_tracing:
            jax.block_until_ready(state)
            process_folder = (
                f"process-{jax.process_index()}" if jax.process_count() > 1 else ""
            )
            self._call(jax.profiler.start_trace, str(self._folder / process_folder))
            self._is_tracing = True
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def on_step_dispatched(self, trainer: Trainer, step: int, sums: Any) -> None:
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
