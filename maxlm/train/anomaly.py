"""Detects updates that are not finite and loss spikes, from a run's scalars alone."""

from collections.abc import Mapping
from math import isfinite
from statistics import median

from maxlm.run.train_config import FaultToleranceConfig
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.train.trainer import Callback, RollbackDecision, Trainer

# The standard deviation of a normal distribution over its median absolute deviation
# (the inverse of the third quartile of a standard normal), and the least deviation, as
# a share of the loss.
_DEVIATIONS_PER_MAD = 1.4826
_LEAST_DEVIATION = 0.005


class LossSpikeDetector(Callback):
    """Reports updates that were skipped because they were not finite, and asks for a
    rollback after several of them, or several loss spikes, in a row. Every process
    decides the same from the same scalars. ``state_dict``: of an earlier detector, as
    it was saved with a checkpoint, so that a resumed run judges as one that never
    stopped."""

    def __init__(
        self, config: FaultToleranceConfig, state_dict: JsonMapping | None = None
    ):
        self._config = config
        state_dict = state_dict or {}
        losses = list(state_dict.get("losses", ()))
        self._losses: list[float] = losses[-config.spike_window :]
        self._skipped: int = state_dict.get("skipped", 0)
        self._spikes: int = state_dict.get("spikes", 0)

    @property
    def state_dict(self) -> JsonObject:
        """The recent losses and the lengths of the current rows of bad steps, as JSON
        values."""
        return {
            "losses": self._losses,
            "skipped": self._skipped,
            "spikes": self._spikes,
        }

    def first_suspect_step(self, step: int) -> int | None:
        """Returns the first of the steps up to ``step`` that may turn out to be bad, if
        any."""
        num_bad = max(self._skipped, self._spikes)
        return step - num_bad + 1 if num_bad else None

    def on_step_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        if metrics.get("skipped"):
            trainer.event("skip", step, reason="the loss or a gradient is not finite")
        trainer.rollback = trainer.rollback or self.update(step, metrics)

    def update(
        self, step: int, metrics: Mapping[str, float]
    ) -> RollbackDecision | None:
        """Takes a step's ``loss``, ``skipped`` (1.0: the update was left out) and
        ``param_norm``. Returns the steps to undo, once too many in a row are bad."""
        if not isfinite(metrics.get("param_norm", 0.0)):
            return RollbackDecision(step, step, "the parameters are not finite")
        self._skipped = self._skipped + 1 if metrics.get("skipped") else 0
        if self._skipped:
            # A row of spikes goes on: its beginning is to be undone too.
            if self._spikes:
                self._spikes += 1
            if self._skipped < self._config.max_skipped:
                return None
            reason = f"{self._skipped} updates in a row were not finite"
            return RollbackDecision(step - self._skipped + 1, step, reason)
        loss = metrics["loss"]
        limit = self._spike_limit()
        if loss <= limit:
            self._spikes = 0
            self._losses = [*self._losses, loss][-self._config.spike_window :]
            return None
        self._spikes += 1
        if self._spikes < self._config.spike_steps:
            return None
        reason = f"the loss is {loss:.4f}, above the spike limit of {limit:.4f}"
        return RollbackDecision(step - self._spikes + 1, step, reason)

    def _spike_limit(self) -> float:
        threshold = self._config.spike_threshold
        if threshold is None or len(self._losses) < self._config.spike_window:
            return float("inf")
        middle = median(self._losses)
        deviation = _DEVIATIONS_PER_MAD * median(
            abs(loss - middle) for loss in self._losses
        )
        return middle + threshold * max(deviation, _LEAST_DEVIATION * abs(middle))
