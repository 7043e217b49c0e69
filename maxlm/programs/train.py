"""Training, from a config to a trained model: what ``maxlm train`` does."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.evaluation.curves import draw_downstream
from maxlm.plan.predict import RunPlan
from maxlm.programs.evaluation import (
    DownstreamEvaluator,
    HeldOutEvaluator,
    HeldOutResults,
    MetricsCallback,
    format_downstream,
)
from maxlm.programs.open_run import OpenRun, Say, open_run
from maxlm.programs.prepare import PreparedData
from maxlm.programs.resume import TrainingPosition, count_rollbacks
from maxlm.programs.setup import RunSetup, open_training_batches
from maxlm.run import RunConfig
from maxlm.runtime.collectives import FlagAllReduce
from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.callbacks import CheckpointCallback, EvaluationCallback, StopCallback
from maxlm.train.display import ConsoleDisplay, plot_loss
from maxlm.train.profile import Profiler
from maxlm.train.records import read_records
from maxlm.train.state import TrainState
from maxlm.train.trainer import RollbackDecision, StepTimer, Trainer


@dataclass(frozen=True)
class TrainingResult:
    """A finished run."""

    setup: RunSetup
    data: PreparedData
    plan: RunPlan
    start_step: int
    """The step that it started or resumed from."""
    state: TrainState
    folder: Path
    heldout: HeldOutResults


def train_model(
    config: RunConfig,
    *,
    resume: str | Path | None = None,
    profile: tuple[int, int] | None = None,
    say: Say = print,
) -> TrainingResult:
    """Trains a model, or resumes from the newest checkpoint in its folder.

    Args:
        resume: another run's folder to resume from; what follows is kept in this run's own.
        profile: first and last step of a trace to write.
        say: takes, on process 0, lines that tell what happens.

    Raises:
        Preempted: by a scheduler's signal; the state is saved.
        MaxlmError: anything wrong with the config, the text, the devices or the folder;
            interrupted; losses or gradients that stay bad.
    """
    if profile and profile[0] > config.train.steps:
        what = f"step {profile[0]} never comes: the run has {config.train.steps} steps"
        raise MaxlmError(what, where="--profile", fix="name steps that it takes")
    with ExitStack() as stack:
        run = open_run(config, stack, resume=resume, say=say)
        setup, data, log, watchdog = run.setup, run.data, run.log, run.watchdog
        profiler = [Profiler(run.folder, *profile)] if profile else []
        if profile and profile[1] <= run.position.step:
            run.say(f"no trace is taken: step {profile[1]}, the last to trace, has been taken")
        step_fn = setup.jit_train_step()
        evaluator = HeldOutEvaluator(setup, data, on_batch=watchdog.reset_timer)
        downstream = DownstreamEvaluator(setup, data, on_work=watchdog.reset_timer)

        def train_from(position: TrainingPosition) -> TrainState | RollbackDecision:
            detector = LossSpikeDetector(setup.config.faults, position.detector_state)
            every_steps = setup.config.train.eval_every if data.eval_batch_sources else 0
            metadata = {**run.metadata, "skipped_batches": position.skips}
            saver, timer = run.state_restorer.checkpointer, StepTimer(log.event, position.step)
            with (
                open_training_batches(
                    setup, data.train_batch_source, position.step, position.skips
                ) as batches,
                ConsoleDisplay(config.train.steps, position.step, show=run.is_lead) as display,
                run.signals.defer_signals(),
            ):
                all_reduce = FlagAllReduce(setup.mesh)
                callbacks = [
                    watchdog,
                    *profiler,
                    MetricsCallback(setup, data, run.plan, log, display),
                    detector,
                    EvaluationCallback(evaluator.evaluate_metrics, every_steps),
                    EvaluationCallback(downstream.evaluate, config.train.downstream.every),
                    CheckpointCallback(saver, metadata, detector),
                    StopCallback(run.signals, all_reduce, saver.is_due_by_time, str(run.folder)),
                ]
                trainer = Trainer(step_fn, config.train.steps, callbacks, timer)
                return trainer.run(position.state, batches)

        position = run.position
        while isinstance(result := train_from(position), RollbackDecision):
            position = _roll_back(run, result, position)
        run.signals.raise_if_signaled()
        heldout = _finish(run, evaluator, downstream, result)
    return TrainingResult(setup, data, run.plan, run.position.step, result, run.folder, heldout)


def _roll_back(
    run: OpenRun, decision: RollbackDecision, position: TrainingPosition
) -> TrainingPosition:
    run.signals.raise_if_signaled()
    faults, count = run.setup.config.faults, count_rollbacks(run.folder)
    if count >= faults.max_rollbacks:
        run.log.event("stop", decision.last_bad_step, reason="rollback-limit")
        raise MaxlmError(
            f"{decision.reason} at step {decision.last_bad_step}, and the run has rolled back "
            f"{count} time{'' if count == 1 else 's'}",
            where=str(run.folder),
            fix="lower schedule.learning_rate in another run folder (--resume), or raise "
            "faults.max_rollbacks",
        )
    run.watchdog.start_timer(decision.first_bad_step, "restore")
    position = run.state_restorer.rollback(decision, position.skips, run.log.event)
    run.state_restorer.checkpointer.copy_newest_to_remote()
    run.log.rewind(position.step)
    first, last = position.skips[-1]
    told = {"reason": decision.reason, "batches": (first, last)}
    run.log.event("rollback", position.step, from_step=decision.last_bad_step, **told)
    run.say(
        f"rolling back from step {decision.last_bad_step} to step {position.step}: "
        f"{decision.reason}; batches {first} to {last} are skipped"
    )
    return position


def _finish(
    run: OpenRun, evaluator: HeldOutEvaluator, downstream: DownstreamEvaluator, state: TrainState
) -> HeldOutResults:
    """Evaluates on all held-out text, and on tasks, and closes the run's records."""
    step = int(state.step)
    run.watchdog.start_timer(step, "evaluation")
    began = time.monotonic()
    results, on_tasks = evaluator.evaluate(state), downstream.evaluate(state)
    if results or on_tasks:
        run.log.event("evaluate", step, seconds=time.monotonic() - began, final=True)
    run.log.event("stop", step, reason="done")
    run.watchdog.stop_timer()
    checkpointer = run.state_restorer.checkpointer
    if missing := checkpointer.remote_copy_failure:
        run.say(f"{missing}; the same command copies it")
    if checkpointer.local:
        checkpointer.local.clear()
    if run.is_lead:
        # A finished run may be started once more.
        records = read_records(run.folder / "metrics.jsonl")
        if results and not any(r["step"] == step and "eval_loss" in r for r in records):
            run.log.log(step, evaluator.make_metrics_record(step, results))
        if on_tasks:
            run.log.log(step, on_tasks)
            run.say(f"step {step} · {format_downstream(on_tasks)}")
        plots = run.folder / "plots"
        plots.mkdir(exist_ok=True)
        plot_loss(run.folder / "metrics.jsonl", plots / "loss.png")
        records, cost = [*read_records(run.folder / "metrics.jsonl")], run.plan.layout
        draw_downstream(records, cost.flops_per_token, plots / "downstream.png")
    return results
