"""Evaluation between training steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from maxlm.train.state import TrainState
from maxlm.train.trainer import Callback, Trainer
from maxlm.train.watchdog import Watchdog


@dataclass
class EvaluationCallback(Callback):
    """Evaluates every so many steps, but not after the last one: the program ends with a longer
    evaluation."""

    evaluate: Callable[[TrainState], Mapping[str, float]]
    every_steps: int
    """0: never."""
    watchdog: Watchdog
    event: Callable[..., None]

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        return bool(self.every_steps) and step % self.every_steps == 0 and step < trainer.num_steps

    def on_state(self, trainer: Trainer, step: int, state: TrainState) -> None:
        if not self.needs_state(trainer, step):
            return
        self.watchdog.expect(step, "evaluation")
        with trainer.timer.timed("evaluating") as seconds:
            trainer.notify("on_evaluate", step, self.evaluate(state))
        self.event("evaluate", step, seconds=seconds())
