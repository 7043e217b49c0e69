"""The loop: batches in, steps taken, what happened written down, the state kept safe."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.errors import Preempted
from maxlm.runtime.collectives import FlagAllReduce
from maxlm.runtime.signals import SignalHandler, StopRequest
from maxlm.train.anomaly import LossWatch, Verdict
from maxlm.train.checkpoint.tiers import Tiers
from maxlm.train.config import TrainConfig
from maxlm.train.profile import Profiler
from maxlm.train.state import TrainState, remove_frozen
from maxlm.train.step import Batch, Sums
from maxlm.train.watchdog import Watchdog

# Seconds between two notes of progress in the event log: what a killed run loses of its account.
NOTED_EVERY = 10.0


@dataclass(frozen=True)
class Hooks:
    """What the loop calls besides the step."""

    record: Callable[[int, Mapping[str, float]], None]
    """(step, scalars), once a step, in order, mostly one step late."""
    evaluate: Callable[[TrainState], Mapping[str, float]] | None
    """Scalars to record every ``eval_every`` steps."""
    event: Callable[..., None]
    """(kind, step, **details); see docs/runs.md for the kinds."""


@dataclass(frozen=True)
class Guards:
    """What the loop minds besides the steps."""

    signals: SignalHandler
    agreement: FlagAllReduce
    watch: LossWatch
    watchdog: Watchdog
    profiler: Profiler


def train(
    state: TrainState,
    step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
    batches: Iterator[Batch],
    *,
    config: TrainConfig,
    hooks: Hooks,
    guards: Guards,
    tiers: Tiers,
    metadata: Mapping[str, Any],
    folder: str,
) -> TrainState | Verdict:
    """Train from ``state.step`` to ``config.steps``.

    The device is kept one step ahead of the host: a step's scalars are read only once the next
    step has been handed over, so that logging never holds it up.

    Args:
        step: compiled, donating its state.
        batches: on the mesh, from step ``state.step`` on.
        metadata: saved with every checkpoint.
        folder: the run's, for messages.

    Returns:
        The final state, saved; or why the run must go back to a checkpoint, with nothing saved.

    Raises:
        Preempted: told to stop by a scheduler; the state is saved.
        MaxlmError: interrupted; the state is saved.
    """
    start, number = int(state.step), int(state.step)
    loop = _Loop(hooks, guards, tiers, metadata, _Account(hooks.event, start))
    account, asked, pending = loop.account, StopRequest.NONE, None
    with guards.signals.deferred():
        for number in range(start + 1, config.steps + 1):
            guards.watchdog.expect(number, "first step" if number == start + 1 else "step")
            guards.profiler.before(number, state)
            with account.waiting():
                batch = next(batches)
            state, sums = step(state, batch)
            guards.profiler.after(number, sums)
            request = guards.signals.request | (
                StopRequest.SAVE if tiers.late() else StopRequest.NONE
            )
            proposed = guards.agreement.start(request)
            verdict = None
            if pending is not None:
                verdict, asked = loop.settle(*pending)
            pending = number, sums, proposed
            evaluating = _due(config.eval_every, number) and number < config.steps
            if verdict is None and (evaluating or asked or tiers.due(number)):
                # A checkpoint never comes before the records up to it: a run may be killed between.
                verdict, more = loop.settle(*pending)
                pending, asked = None, asked | more
            if verdict is not None:
                return loop.gone_bad(verdict)
            if evaluating and hooks.evaluate:
                guards.watchdog.expect(number, "evaluation")
                with account.timed("evaluating") as seconds:
                    hooks.record(number, hooks.evaluate(state))
                hooks.event("evaluate", number, seconds=seconds())
            loop.save(number, state, force=asked != StopRequest.NONE)
            if asked.stops:
                break
            asked = StopRequest.NONE
        if pending is not None:
            verdict, _ = loop.settle(*pending)
            if verdict is not None:
                return loop.gone_bad(verdict)
        loop.save(number, state, force=True)
        guards.watchdog.expect(number, "save")
        with account.timed("saving"):
            tiers.wait()
        loop.note_saved()
        account.note(number)
    if not asked.stops or number == config.steps:
        return state
    told = StopRequest.PREEMPT in asked
    hooks.event("stop", number, reason="preempted" if told else "interrupt")
    kind, words = (Preempted, "told to stop at") if told else (MaxlmError, "interrupted at")
    stopped = kind(
        f"{words} step {number} of {config.steps}, which is saved",
        where=folder,
        fix="run the same command to go on from there",
    )
    stopped.on_all_processes = True
    raise stopped


def _due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


@dataclass(frozen=True)
class _Loop:
    """What is done with a step once it is taken."""

    hooks: Hooks
    guards: Guards
    tiers: Tiers
    metadata: Mapping[str, Any]
    account: "_Account"

    def settle(self, number: int, sums: Sums, proposed: Any) -> tuple[Verdict | None, StopRequest]:
        """Wait for a step, write down its scalars, and judge them; what anyone wanted then."""
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        lap = self.account.lap(number)
        self.guards.watchdog.lap(lap["seconds"])
        self.hooks.record(number, values | lap)
        self.note_saved()
        if values.get("skipped"):
            self.hooks.event("skip", number, reason="the loss or a gradient is not finite")
        return self.guards.watch.see(number, values), self.guards.agreement.finish(proposed)

    def save(self, number: int, state: TrainState, force: bool) -> None:
        if not (force or self.tiers.due(number)):
            return
        self.guards.watchdog.expect(number, "save")
        metadata = {**self.metadata, "losses": self.guards.watch.memory}
        suspect = self.guards.watch.suspect(number)
        with self.account.timed("saving") as seconds:
            saved = remove_frozen(state)
            tier = self.tiers.save(number, saved, metadata, force=force, suspect=suspect)
        if tier is not None:
            self.account.note(number)
            self.hooks.event("checkpoint", number, tier=tier, seconds=seconds())

    def note_saved(self) -> None:
        """Write down which of the folder's checkpoints are complete by now."""
        for step in self.tiers.keeper.pop_completed():
            self.hooks.event("saved", step)

    def gone_bad(self, verdict: Verdict) -> Verdict:
        self.account.note(verdict.last)
        return verdict


@dataclass
class _Account:
    """Where the time goes: seconds from one step's end to the next's, and what of them went to
    waiting for data; cumulative seconds of each kind, noted in the event log now and then."""

    event: Callable[..., None]
    start: int
    spent: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("stepping", "loading", "saving", "evaluating"), 0.0)
    )

    def __post_init__(self) -> None:
        self._noted = time.monotonic()
        self._restart()

    def _restart(self) -> None:
        self._lap_began, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def timed(self, kind: str) -> Iterator[Callable[[], float]]:
        """Time that is no step's; yields what tells how long it took."""
        began = time.perf_counter()
        ended = began
        try:
            yield lambda: ended - began
        finally:
            ended = time.perf_counter()
            self.spent[kind] += ended - began
            self._lap_began += ended - began

    def lap(self, number: int) -> dict[str, float]:
        """A step's end."""
        seconds = max(time.perf_counter() - self._lap_began, 1e-9)
        waited = min(self._waited, seconds)
        self._restart()
        if number == self.start + 1:
            self.event("compiled", number, seconds=seconds - waited)
        else:
            self.spent["stepping"] += seconds - waited
        self.spent["loading"] += waited
        if time.monotonic() - self._noted >= NOTED_EVERY:
            self.note(number)
        return {"seconds": seconds, "loader_wait": waited / seconds}

    def note(self, number: int) -> None:
        self._noted = time.monotonic()
        self.event("progress", number, **{k: round(v, 6) for k, v in self.spent.items()})


def evaluate(
    step: Callable[[Any, Batch], Sums], params: Any, batches: Iterator[Batch]
) -> dict[str, float]:
    """The task's sums over batches, added up in float64."""
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(step(params, batch)).items():
            totals[name] = totals.get(name, 0.0) + float(np.float64(value))
    return totals
