"""The loop: batches in, steps taken, what happened written down, the state kept safe."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.train.checkpoint import Checkpointer
from maxlm.train.config import TrainConfig
from maxlm.train.state import TrainState
from maxlm.train.step import Batch, Sums


@dataclass(frozen=True)
class Hooks:
    """What the loop calls besides the step."""

    record: Callable[[int, Mapping[str, float]], None]
    """(step, scalars), once a step, in order, mostly one step late."""
    evaluate: Callable[[TrainState], Mapping[str, float]] | None
    """Scalars to record every ``eval_every`` steps."""
    event: Callable[..., None]
    """``checkpoint`` (begun, not yet written), step; ``stop``, step, reason=done, interrupt or
    loss."""


def train(
    state: TrainState,
    step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
    batches: Iterator[Batch],
    *,
    config: TrainConfig,
    hooks: Hooks,
    checkpointer: Checkpointer,
    metadata: Mapping[str, Any],
    folder: str,
) -> TrainState:
    """Train from ``state.step`` to ``config.steps``.

    The device is kept one step ahead of the host: a step's scalars are read only once the next
    step has been handed over, so that logging never holds it up.

    Args:
        step: compiled, donating its state.
        batches: on the mesh, from step ``state.step`` on.
        metadata: saved with every checkpoint.
        folder: the run's, for messages.

    Returns:
        The final state, saved.

    Raises:
        MaxlmError: interrupted (after saving the state); a loss that is no number (without saving:
            the newest checkpoint is from before it).
    """
    start, pending, clock = int(state.step), None, _Clock()
    with _interrupts() as interrupted:
        for number in range(start + 1, config.steps + 1):
            with clock.waiting():
                batch = next(batches)
            state, sums = step(state, batch)
            if pending is not None:
                _record(hooks, clock, *pending)
            pending = number, sums
            evaluating = _due(config.eval_every, number) and number < config.steps
            if evaluating or checkpointer.due(number):
                # A checkpoint never comes before the records up to it: a run may be killed between.
                _record(hooks, clock, *pending)
                pending = None
            if evaluating and hooks.evaluate:
                hooks.record(number, hooks.evaluate(state))
                clock.restart()
            if checkpointer.save(number, state, metadata):
                hooks.event("checkpoint", number)
            if interrupted():
                break
        if pending is not None:
            _record(hooks, clock, *pending)
    if checkpointer.save(int(state.step), state, metadata, force=True):
        hooks.event("checkpoint", int(state.step))
    checkpointer.wait()
    if int(state.step) < config.steps:
        hooks.event("stop", int(state.step), reason="interrupt")
        raise MaxlmError(
            f"interrupted at step {int(state.step)} of {config.steps}, which is saved",
            where=folder,
            fix="run the same command to go on from there",
        )
    hooks.event("stop", int(state.step), reason="done")
    return state


def _due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


def _record(hooks: Hooks, clock: "_Clock", number: int, sums: Sums) -> None:
    values = {name: float(value) for name, value in jax.device_get(sums).items()}
    hooks.record(number, values | clock.lap())
    if not isfinite(values["loss"]):
        hooks.event("stop", number, reason="loss")
        raise MaxlmError(
            f"the loss is {values['loss']} at step {number}",
            where="train",
            fix="go on from the last checkpoint with a lower schedule.learning_rate or "
            "optimizer.clip_norm, in another run folder (--resume)",
        )


class _Clock:
    """Seconds from one step's end to the next's, and what of them went to waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._lap_began, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._lap_began, 1e-9)
        waited = self._waited
        self.restart()
        return {"seconds": seconds, "loader_wait": min(waited / seconds, 1.0)}


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the loop to stop after the step in hand; a second one stops at once.

    Processes of a larger job cannot each stop where they please, so there it keeps its meaning.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, press) if jax.process_count() == 1 else None
    except ValueError:  # Not the main thread (a notebook's worker): leave signals alone.
        before = None
    try:
        yield lambda: pressed
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def evaluate(
    step: Callable[[Any, Batch], Sums], params: Any, batches: Iterator[Batch]
) -> dict[str, float]:
    """The objective's sums over batches, added up in float64."""
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(step(params, batch)).items():
            totals[name] = totals.get(name, 0.0) + float(np.float64(value))
    return totals
