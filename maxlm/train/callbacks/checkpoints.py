"""Checkpoints between training steps and at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from maxlm.train.anomaly import LossSpikeDetector, RollbackDecision
from maxlm.train.checkpoint import Checkpointer
from maxlm.train.state import TrainState, remove_frozen
from maxlm.train.trainer import Callback, Trainer
from maxlm.train.watchdog import Watchdog


@dataclass
class CheckpointCallback(Callback):
    """Saves where a checkpoint is due, where one was requested, and at the end."""

    checkpointer: Checkpointer
    metadata: Mapping[str, Any]
    """Saved with every checkpoint, with the losses that ``detector`` remembers."""
    detector: LossSpikeDetector
    watchdog: Watchdog
    event: Callable[..., None]

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        return self.checkpointer.is_due(step)

    def on_state(self, trainer: Trainer, step: int, state: TrainState) -> None:
        if self.needs_state(trainer, step) or trainer.stop_request:
            self._save(trainer, step, state, force=bool(trainer.stop_request))

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        self._report_completed()

    def on_train_end(self, trainer: Trainer, step: int, state: TrainState) -> None:
        self._save(trainer, step, state, force=True)
        self.watchdog.expect(step, "save")
        with trainer.timer.timed("saving"):
            self.checkpointer.wait()
        self._report_completed()
        trainer.timer.report(step)

    def on_rollback(self, trainer: Trainer, decision: RollbackDecision) -> None:
        trainer.timer.report(decision.last)

    def _save(self, trainer: Trainer, step: int, state: TrainState, *, force: bool) -> None:
        self.watchdog.expect(step, "save")
        metadata = {**self.metadata, "losses": self.detector.memory}
        suspect = self.detector.first_suspect_step(step)
        with trainer.timer.timed("saving") as seconds:
            saved = remove_frozen(state)
            tier = self.checkpointer.save(step, saved, metadata, force=force, suspect=suspect)
        if tier is not None:
            trainer.timer.report(step)
            self.event("checkpoint", step, tier=tier, seconds=seconds())
            trainer.notify("on_checkpoint", step, tier)

    def _report_completed(self) -> None:
        """Writes an event for each checkpoint of the run's folder that has become complete."""
        for step in self.checkpointer.pop_completed():
            self.event("saved", step)
