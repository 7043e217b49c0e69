"""Callbacks of the trainer: evaluation, checkpoints and stop requests. Others are
beside what they watch: loss spikes, the watchdog, the profiler."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import jax

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import MaxlmError
from maxlm.config.errors import Preempted
from maxlm.optim.state import TrainState
from maxlm.optim.step import Metrics
from maxlm.run.rollout_source import StepBatches
from maxlm.runtime.collectives import FlagAllReduce
from maxlm.runtime.json_types import JsonMapping
from maxlm.runtime.signals import SignalHandler, StopRequest
from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.trainer import Callback, Trainer


@dataclass
class EvaluationCallback(Callback):
    """Evaluates every so many steps."""

    evaluate: Callable[[TrainState], dict[str, float]]
    every_steps: int
    """0: never between."""
    at_end: bool = False
    """Whether after the last step; false: the program ends with an evaluation of its
    own."""

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        if step == trainer.num_steps:
            return self.at_end
        return bool(self.every_steps) and step % self.every_steps == 0

    def on_state(self, trainer: Trainer, step: int, state: TrainState) -> None:
        if not self.needs_state(trainer, step):
            return
        trainer.begin_work(step, "evaluation")
        with trainer.timer.time_activity("evaluating") as evaluation:
            metrics = self.evaluate(state)
            trainer.end_evaluation(step, metrics)
        trainer.event("evaluate", step, seconds=evaluation.seconds)


@dataclass
class RolloutCallback(Callback):
    """Asks for the batch of each step with the state that the step begins with."""

    batches: StepBatches
    """Those that the trainer takes."""
    _metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def on_step_begin(self, trainer: Trainer, step: int, state: TrainState) -> None:
        trainer.begin_work(step, "rollout")
        with trainer.timer.time_activity("generating") as rollout:
            metrics = self.batches.roll_out(state)
        self._metrics[step] = {"rollout_seconds": rollout.seconds, **metrics}
        for callback in trainer.callbacks:
            callback.on_work_end(trainer, step, "rollout")

    def get_metrics(self, step: int) -> Mapping[str, float]:
        return self._metrics.pop(step)

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        # The next rollout waits for this step in any case: its record comes first.
        return True


@dataclass
class CheckpointCallback(Callback):
    """Saves where a checkpoint is due, where one was requested, and at the end."""

    checkpointer: Checkpointer
    metadata: JsonMapping
    """Saved with every checkpoint, with the losses that ``detector`` remembers."""
    detector: LossSpikeDetector

    def needs_state(self, trainer: Trainer, step: int) -> bool:
        return self.checkpointer.is_due(step)

    def on_state(self, trainer: Trainer, step: int, state: TrainState) -> None:
        if self.needs_state(trainer, step) or trainer.stop_request:
            self._save(trainer, step, state, force=bool(trainer.stop_request))

    def on_step_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        self._report_completed(trainer)

    def on_train_end(self, trainer: Trainer, step: int, state: TrainState) -> None:
        self._save(trainer, step, state, force=True)
        trainer.begin_work(step, "save")
        with trainer.timer.time_activity("saving"):
            self.checkpointer.wait()
        self._report_completed(trainer)
        trainer.timer.log_progress(step)

    def _save(
        self, trainer: Trainer, step: int, state: TrainState, *, force: bool
    ) -> None:
        trainer.begin_work(step, "save")
        metadata = {**self.metadata, "losses": self.detector.state_dict}
        suspect = self.detector.first_suspect_step(step)
        with trainer.timer.time_activity("saving") as saving:
            # Frozen models come from their own folders, and are in no checkpoint.
            tier = self.checkpointer.save(
                step,
                replace(state, frozen={}),
                metadata,
                force=force,
                first_suspect_step=suspect,
            )
        if tier is not None:
            trainer.timer.log_progress(step)
            trainer.event("checkpoint", step, tier=tier, seconds=saving.seconds)

    def _report_completed(self, trainer: Trainer) -> None:
        for step in self.checkpointer.folder_tier.pop_completed():
            trainer.event("saved", step)


@dataclass
class StopCallback(Callback):
    """Combines what processes request with every step. Put it last: where a run stops
    early, it raises once the other callbacks have ended."""

    signals: SignalHandler
    """Requests of this process."""
    all_reduce: FlagAllReduce
    save_is_due: Callable[[], bool]
    """Whether this process's clock asks for a checkpoint."""
    folder: str
    """Folder of the run, for messages."""
    _reductions: deque[StopRequest | jax.Array] = field(default_factory=deque)

    def on_step_dispatched(self, trainer: Trainer, step: int, sums: Metrics) -> None:
        # Started here and read in `on_step_end`: it runs behind the step, and holds
        # nothing up.
        save = StopRequest.SAVE if self.save_is_due() else StopRequest.NONE
        self._reductions.append(self.all_reduce.start(self.signals.request | save))

    def on_step_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        trainer.stop_request |= self.all_reduce.finish(self._reductions.popleft())

    def on_train_end(self, trainer: Trainer, step: int, state: TrainState) -> None:
        if not trainer.stop_request.stops or step == trainer.num_steps:
            return
        error_class = MaxlmError
        reason = "interrupt"
        word = "interrupted"
        if StopRequest.PREEMPT in trainer.stop_request:
            error_class = Preempted
            reason = word = "preempted"
        trainer.event("stop", step, reason=reason)
        error = error_class(
            f"{word} at step {step} of {trainer.num_steps}, which is saved",
            where=self.folder,
            fix="run the same command to resume",
        )
        error.on_all_processes = True
        raise error
