"""Non-finite updates and loss spikes."""

from collections.abc import Callable
from dataclasses import dataclass

from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.trainer import Callback, Trainer


@dataclass
class LossSpikeCallback(Callback):
    """Reports updates that were skipped because they were not finite, and asks for a rollback after
    several of them, or several loss spikes, in a row."""

    detector: LossSpikeDetector
    event: Callable[..., None]

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        if metrics.get("skipped"):
            self.event("skip", step, reason="the loss or a gradient is not finite")
        trainer.rollback = trainer.rollback or self.detector.update(step, metrics)
