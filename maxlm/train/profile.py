"""A trace of a few steps, for xprof or TensorBoard's profile plugin."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError


def parse_steps(text: str) -> tuple[int, int]:
    """The first and the last of the steps that ``"10:13"`` names, both of them traced, or ``"10"``.

    Raises:
        MaxlmError: it names none.
    """
    first, _, last = text.partition(":")
    try:
        steps = int(first), int(last or first)
    except ValueError:
        steps = 0, 0
    if not 1 <= steps[0] <= steps[1] or text.endswith(":"):
        raise MaxlmError(
            f"'{text}' names no steps", where="--profile", fix="write the first and last: 10:13"
        )
    return steps


class Profiler:
    """Traces steps ``first`` to ``last`` into ``folder``/profile. A context manager.

    The loop calls `before` and `after` at every step. A host's trace begins once the step before it
    is done, and ends when the last one is: the devices' work on these steps, all of it and nothing
    else. Every process traces its own devices; of several, each into process-N in it, as files are
    named after hosts, which may have several.

    A run that begins between the two steps is traced from its first one.
    """

    def __init__(self, folder: str | Path, first: int, last: int):
        self._folder = Path(folder) / "profile"
        self._first, self._last = first, last
        self._tracing, self._step, self._running = False, None, None

    @classmethod
    def off(cls) -> "Profiler":
        """Traces nothing."""
        return cls("", 1, 0)

    def before(self, step: int, running: Any) -> None:
        """A step is about to be handed to the devices.

        Args:
            running: arrays of the step before, which the trace waits for.

        Raises:
            MaxlmError: another trace is being taken in this process.
        """
        if not self._first <= step <= self._last:
            return
        if not self._tracing:
            jax.block_until_ready(running)
            own = f"process-{jax.process_index()}" if jax.process_count() > 1 else ""
            self._traced(jax.profiler.start_trace, str(self._folder / own))
            self._tracing = True
        self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.__enter__()

    def after(self, step: int, result: Any) -> None:
        """It has been handed over.

        Args:
            result: arrays that are there when the step is done, and are donated to no other.

        Raises:
            MaxlmError: the trace cannot be written.
        """
        self._running = result if self._tracing else None
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Write what was traced; also if training ends before the last of the steps."""
        if self._tracing:
            self._tracing = False
            with suppress(RuntimeError):  # A step that failed has its say elsewhere.
                jax.block_until_ready(self._running)
            self._traced(jax.profiler.stop_trace)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _traced(self, call: Callable[..., None], *arguments: str) -> None:
        try:
            call(*arguments)
        except (RuntimeError, OSError) as error:  # XLA's errors are RuntimeErrors.
            fix = "free some disk space, or train without --profile"
            raise MaxlmError(f"no trace: {error}", where=str(self._folder), fix=fix) from error
