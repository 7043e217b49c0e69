"""When a run's numbers have gone bad for good: a pure function of its losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

from maxlm.train.config import FaultsConfig

# Deviations of normal numbers are 1.4826 times as wide as their median (the inverse of the third
# quartile of a standard normal). A loss that hardly moves is given this share of itself.
_NORMAL = 1.4826
_LEAST = 0.005


@dataclass(frozen=True)
class Verdict:
    """The run must go back: the updates of steps ``first`` to ``last`` are bad."""

    first: int
    last: int
    reason: str


class LossWatch:
    """Looks at every step's scalars, in order.

    Every process sees the same ones and comes to the same verdict. ``memory`` is saved with each
    checkpoint and given back, so that a run that was started again judges as one that never
    stopped.
    """

    def __init__(self, config: FaultsConfig, memory: Mapping[str, Any] | None = None):
        self._config = config
        memory = memory or {}
        self._losses: list[float] = list(memory.get("losses", ()))[-config.spike_window :]
        self._skipped, self._spikes = memory.get("skipped", 0), memory.get("spikes", 0)

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers, as JSON values."""
        return {"losses": self._losses, "skipped": self._skipped, "spikes": self._spikes}

    def suspect(self, step: int) -> int | None:
        """The first of the steps up to ``step`` that may turn out to be bad, if any."""
        bad = max(self._skipped, self._spikes)
        return step - bad + 1 if bad else None

    def see(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """
        Args:
            values: ``loss``, ``skipped`` (1.0: the update was left out), ``param_norm``.
        """
        if not isfinite(values.get("param_norm", 0.0)):
            return Verdict(step, step, "the parameters are not finite")
        self._skipped = self._skipped + 1 if values.get("skipped") else 0
        if self._skipped:
            if self._spikes:  # A streak goes on: what began it is to be undone too.
                self._spikes += 1
            if self._skipped < self._config.max_skipped:
                return None
            first = step - self._skipped + 1
            return Verdict(first, step, f"{self._skipped} updates in a row were not finite")
        loss = values["loss"]
        limit = self._limit()
        if loss <= limit:
            self._spikes = 0
            self._losses = [*self._losses, loss][-self._config.spike_window :]
            return None
        self._spikes += 1
        if self._spikes < self._config.spike_steps:
            return None
        reason = f"the loss is {loss:.4f}, {limit:.4f} is the most that is no spike"
        return Verdict(step - self._spikes + 1, step, reason)

    def _limit(self) -> float:
        threshold = self._config.spike_threshold
        if threshold is None or len(self._losses) < self._config.spike_window:
            return float("inf")
        middle = median(self._losses)
        deviation = _NORMAL * median(abs(loss - middle) for loss in self._losses)
        return middle + threshold * max(deviation, _LEAST * abs(middle))
