"""Training, from a config to a trained model: what ``maxlm train`` does."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import jax

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reading import layer_group_shapes
from maxlm.checkpoint.skips import get_skips, read_skips
from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchSource
from maxlm.optim.state import TrainState
from maxlm.optim.step import Metrics
from maxlm.run.config import RunConfig
from maxlm.run.prepare import (
    PreparedData,
    prepare_data_on_all_hosts,
    read_vocab_size,
)
from maxlm.run.rollout_source import (
    RolloutContext,
    RolloutSource,
    ValidatedRollouts,
    open_step_batches,
)
from maxlm.run.setup import RunSetup, set_up_run, use_compilation_cache
from maxlm.run.warm_start import (
    check_init_checkpoint,
    describe_frozen_models,
    load_frozen_models,
)
from maxlm.runtime.collectives import FlagAllReduce, run_on_process_0
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.signals import SignalHandler, handle_signals
from maxlm.tasks.task import DeviceBatch
from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.callbacks import (
    CheckpointCallback,
    EvaluationCallback,
    RolloutCallback,
    StopCallback,
)
from maxlm.train.display import ConsoleDisplay, plot_metrics
from maxlm.train.heldout import HeldOutEvaluator, HeldOutResults
from maxlm.train.metrics import MetricsCallback, format_downstream
from maxlm.train.profile import Profiler
from maxlm.train.prometheus import check_prometheus_port
from maxlm.train.records import MetricsLog, read_events, read_records
from maxlm.train.resume import (
    ResumeSource,
    Say,
    StateRestorer,
    TrainingPosition,
    check_no_lost_checkpoint,
    check_same_inputs,
    describe_lost_checkpoint,
    find_resume_source,
    make_run_metadata,
)
from maxlm.train.run_folder import (
    create_run_folder,
    get_process_start_unix_seconds,
    lock_run_folder,
    record_stop_on_error,
    write_refused_rows,
    write_run_description,
)
from maxlm.train.trainer import RollbackDecision, StepTimer, Trainer
from maxlm.train.watchdog import Watchdog

if TYPE_CHECKING:
    from maxlm.plan.predict import RunPlan

DownstreamEvaluation = Callable[[TrainState], dict[str, float]]
"""Returns a metrics record of scores on tasks; {} where none are asked for."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished run."""

    setup: RunSetup
    data: PreparedData
    plan: "RunPlan"
    start_step: int
    """The step that it started or resumed from."""
    state: TrainState
    folder: Path
    heldout: HeldOutResults


class TrainingProgram(Protocol):
    """A program that trains, as the command line calls it; see :func:`train_model`."""

    def __call__(
        self,
        config: RunConfig,
        *,
        resume: str | Path | None,
        profile: tuple[int, int] | None,
    ) -> TrainingResult: ...


@dataclass(frozen=True)
class _OpenRun:
    """A run whose folder, text, checkpoints and records are open."""

    setup: RunSetup
    folder: Path
    is_lead: bool
    """Whether this process writes and prints."""
    say: Say
    signals: SignalHandler
    watchdog: Watchdog
    data: PreparedData
    state_restorer: StateRestorer
    position: TrainingPosition
    """Position where training starts or resumes."""
    metadata: JsonObject
    """Saved with every checkpoint."""
    plan: "RunPlan"
    log: MetricsLog


@dataclass(frozen=True)
class _TrainingParts:
    """What a run trains and evaluates with; a rollback keeps it."""

    step_fn: Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]
    """Compiled at its first call."""
    evaluator: HeldOutEvaluator
    evaluate_downstream: DownstreamEvaluation
    profiler: Profiler | None


def train_model(
    config: RunConfig,
    *,
    resume: str | Path | None = None,
    profile: tuple[int, int] | None = None,
    say: Say = print,
) -> TrainingResult:
    """Trains a model, or resumes from the newest checkpoint in its folder.

    Args:
        resume: another run's folder to resume from; what follows is kept in this run's
            own.
        profile: first and last step of a trace to write.
        say: takes, on process 0, lines that tell what happens.

    Raises:
        Preempted: by a scheduler's signal; the state is saved.
        MaxlmError: anything wrong with the config, the text, the devices or the folder;
            interrupted; losses or gradients that stay bad.
    """
    _check_profile_steps(config, profile)
    with ExitStack() as stack:
        run = _open_run(config, stack, resume=resume, say=say)
        parts = _make_training_parts(run, profile)
        position = run.position
        outcome = _train_from(run, parts, position)
        while isinstance(outcome, RollbackDecision):
            position = _roll_back(run, outcome, position)
            outcome = _train_from(run, parts, position)
        run.signals.raise_if_signaled()
        heldout = _finish(run, parts, outcome)
    return TrainingResult(
        setup=run.setup,
        data=run.data,
        plan=run.plan,
        start_step=run.position.step,
        state=outcome,
        folder=run.folder,
        heldout=heldout,
    )


def _check_profile_steps(config: RunConfig, profile: tuple[int, int] | None) -> None:
    if profile is None:
        return
    first_step, _ = profile
    num_steps = config.train.steps
    if first_step > num_steps:
        message = f"step {first_step} never comes: the run has {num_steps} steps"
        raise MaxlmError(message, where="--profile", fix="name steps that it takes")


def _make_training_parts(
    run: _OpenRun, profile: tuple[int, int] | None
) -> _TrainingParts:
    profiler = None
    if profile is not None:
        first_step, last_step = profile
        profiler = Profiler(run.folder, first_step, last_step)
        if last_step <= run.position.step:
            run.say(
                f"no trace is taken: step {last_step}, the last to trace, has been "
                "taken"
            )
    # Evaluations may outlast the watchdog's limit for a step; each batch resets it.
    reset_timer = run.watchdog.reset_timer
    return _TrainingParts(
        step_fn=run.setup.jit_train_step(),
        evaluator=HeldOutEvaluator(run.setup, run.data, on_batch=reset_timer),
        evaluate_downstream=_open_downstream(run.setup, run.data, run.watchdog),
        profiler=profiler,
    )


def _train_from(
    run: _OpenRun, parts: _TrainingParts, position: TrainingPosition
) -> TrainState | RollbackDecision:
    """Trains from a position to the last step, or until the losses ask for a
    rollback."""
    setup = run.setup
    config = setup.config
    num_steps = config.train.steps
    checkpointer = run.state_restorer.checkpointer
    metadata = {**run.metadata, "skipped_batches": position.skips}
    detector = LossSpikeDetector(config.faults, position.detector_state)
    timer = StepTimer(run.log.event, position.step)
    eval_every = config.train.eval_every if run.data.eval_batch_sources else 0
    context = RolloutContext(
        setup=setup,
        tokenizer=run.data.tokenizer,
        folder=run.folder,
        other_folder=position.other_folder,
        start_step=position.step,
        skips=position.skips,
        say=run.say,
        on_work=run.watchdog.reset_timer,
    )
    training_batches = open_step_batches(
        context,
        run.data.train_batch_source,
        # Once a stop is requested, no batch waits for workers that are still starting.
        is_stop_requested=lambda: run.signals.request.stops,
    )
    console = ConsoleDisplay(
        num_steps, position.step, show=run.is_lead, shown=config.task.shown_metrics
    )
    with training_batches as batches, console as display, run.signals.defer_signals():
        all_reduce = FlagAllReduce(setup.mesh)
        profilers = [] if parts.profiler is None else [parts.profiler]
        rolling_out = []
        if batches.rollouts is not None:
            rolling_out.append(RolloutCallback(batches))
        validating = []
        rollouts = batches.rollouts
        if isinstance(rollouts, ValidatedRollouts) and rollouts.has_validation:
            validation = EvaluationCallback(
                rollouts.validate, config.train.eval_every, at_end=True
            )
            validating.append(validation)
        callbacks = [
            run.watchdog,
            *profilers,
            *rolling_out,
            MetricsCallback(setup, run.data, run.plan, run.log, display),
            detector,
            EvaluationCallback(parts.evaluator.evaluate_metrics, eval_every),
            *validating,
            EvaluationCallback(
                parts.evaluate_downstream, config.train.downstream.every
            ),
            CheckpointCallback(checkpointer, metadata, detector),
            # The last: where a run stops early it raises, and the others have ended.
            StopCallback(
                run.signals, all_reduce, checkpointer.is_due_by_time, str(run.folder)
            ),
        ]
        trainer = Trainer(parts.step_fn, num_steps, callbacks, timer)
        return trainer.run(position.state, batches.arrays)


def _open_run(
    config: RunConfig, stack: ExitStack, *, resume: str | Path | None, say: Say
) -> _OpenRun:
    """Prepares a run's text, and restores its state or initializes it; ``stack`` closes
    what is opened. For the rest see :func:`train_model`.

    The order matters: a config that does not fit is refused before anything is written,
    and the run's description and records are written last, once it has its state.
    """
    is_lead = jax.process_index() == 0
    say = say if is_lead else lambda _: None
    folder = Path(config.folder, config.name)

    setup = _set_up_and_check(config, folder, is_lead=is_lead)

    # The folder, and the checkpoints to resume from.
    signals = stack.enter_context(handle_signals(str(folder)))
    stack.enter_context(create_run_folder(config, folder, is_lead=is_lead))
    if is_lead:
        stack.enter_context(lock_run_folder(folder))
    checkpointer = stack.enter_context(
        Checkpointer(
            folder / "checkpoints",
            config.name,
            config.checkpoint,
            layer_groups=layer_group_shapes(setup.specs),
        )
    )
    source = find_resume_source(setup, checkpointer, resume, stack, say)
    if source is None:
        source_metadata = check_init_checkpoint(setup)
    else:
        source_metadata = source.metadata

    # The tokenizer and the text.
    data = prepare_data_on_all_hosts(config, folder)
    if source and not source.is_own_run:
        # The other run may have trained on meanwhile, and deleted old checkpoints.
        source = find_resume_source(setup, checkpointer, resume, stack, say)

    # The state: restored, or initialized. The watchdog covers a restore that hangs.
    state_restorer = StateRestorer(setup, checkpointer, source)
    watchdog = stack.enter_context(Watchdog(config.faults, folder, jax.process_index()))
    watchdog.start_timer(0, "restore")
    frozen = load_frozen_models(setup)
    frozen_record = describe_frozen_models(setup, frozen)
    metadata = make_run_metadata(config, data, source_metadata, frozen_record)
    if source:
        check_same_inputs(config, data, source, metadata)
    skips = read_skips(folder)
    if skips is None:
        # A new run: the one that it resumes from may have skipped batches.
        skips = get_skips(source.metadata) if source else ()
    position = state_restorer.restore(skips, frozen)
    if not position.checkpoint_place:
        check_no_lost_checkpoint(checkpointer, resume)
    _say_notes(data, position, say)
    _say_start(config, position, source, checkpointer, say)
    if position.step > config.train.steps:
        step = position.step
        message = f"the run is at step {step}, train.steps={config.train.steps}"
        fix = f"set train.steps to {step} or more, or train in another run folder"
        raise MaxlmError(message, where=str(folder), fix=fix)

    # The run's description and records.
    plan = _plan_run(config, setup, say)
    write_run_description(folder, config, plan, is_lead=is_lead)
    if is_lead:
        write_refused_rows(folder, _name_batch_sources(data))
    log = stack.enter_context(
        MetricsLog(folder, position.step, write=is_lead, reporting=config.reporting)
    )
    if log.damaged_lines:
        say(
            f"{folder}/metrics.jsonl: lines that cannot be read, of records lost: "
            f"{log.damaged_lines}"
        )
    _log_start(log, position, source)
    stack.enter_context(record_stop_on_error(signals, log, position.step))
    watchdog.event = log.event  # there was no log before
    # An attempt that was killed may have left the newest without its copy.
    checkpointer.copy_newest_to_remote()
    return _OpenRun(
        setup=setup,
        folder=folder,
        is_lead=is_lead,
        say=say,
        signals=signals,
        watchdog=watchdog,
        data=data,
        state_restorer=state_restorer,
        position=position,
        metadata=metadata,
        plan=plan,
        log=log,
    )


def _set_up_and_check(config: RunConfig, folder: Path, *, is_lead: bool) -> RunSetup:
    """Sets a run up; raises MaxlmError for what does not fit, before anything is
    written or read."""
    setup = set_up_run(config)
    config.reporting.check_packages()
    if is_lead:
        check_prometheus_port(config.reporting)
    use_compilation_cache(config)
    vocab_size = read_vocab_size(config, folder)
    config.task.check_vocab_size(vocab_size, config.model.vocab_size)
    return setup


def _name_batch_sources(data: PreparedData) -> dict[str, BatchSource]:
    return {"training": data.train_batch_source, **data.eval_batch_sources}


def _say_notes(data: PreparedData, position: TrainingPosition, say: Say) -> None:
    """Says which checkpoints are skipped, what could not be verified, and what the
    batch sources leave out."""
    for skipped_checkpoint in position.skipped:
        say(str(skipped_checkpoint))
    for line in data.unchecked:
        say(line)
    for name, batch_source in _name_batch_sources(data).items():
        # Sources of rows have notes (data.rows.RowSource); others need not.
        for note in getattr(batch_source, "notes", ()):
            say(f"{name}: {note}")


def _say_start(
    config: RunConfig,
    position: TrainingPosition,
    source: ResumeSource | None,
    checkpointer: Checkpointer,
    say: Say,
) -> None:
    """Says what the run resumes or starts from, and which checkpoint is gone."""
    if not position.checkpoint_place:
        if config.train.start_from:
            say(f"starting from the parameters in {config.train.start_from}")
        return
    if source is not None and source.is_own_run:
        lost = describe_lost_checkpoint(checkpointer, position.step, position.skipped)
        if lost:
            say(lost)
    say(f"resuming from step {position.step} in {position.checkpoint_place}")


def _log_start(
    log: MetricsLog, position: TrainingPosition, source: ResumeSource | None
) -> None:
    """Writes the event that opens an attempt."""
    other_run = None
    if source and not source.is_own_run:
        other_run = str(source.checkpointer.folder.parent)
    log.event(
        "resume" if position.step else "start",
        position.step,
        began=get_process_start_unix_seconds(),
        run=other_run,
        devices=jax.device_count(),
        processes=jax.process_count(),
        device_kind=jax.devices()[0].device_kind,
        skipped=[[checkpoint.step, checkpoint.why] for checkpoint in position.skipped],
    )


def _plan_run(config: RunConfig, setup: RunSetup, say: Say) -> "RunPlan":
    """Plans the run on its devices, for the record and to compare with what is
    measured."""
    # Imported here: nothing else of training needs the planner.
    from maxlm.plan.known_errors import format_known_time_errors
    from maxlm.plan.machine import Machine
    from maxlm.plan.predict import plan_run
    from maxlm.plan.show import format_prediction

    machine = Machine.from_devices(setup.mesh.devices.ravel().tolist())
    plan = plan_run(config, machine, sizes=dict(setup.mesh.shape))
    say(f"planned: {format_prediction(plan)}")
    if plan.known_time_errors:
        say(format_known_time_errors(plan.known_time_errors))
    return plan


def _open_downstream(
    setup: RunSetup, data: PreparedData, watchdog: Watchdog
) -> DownstreamEvaluation:
    """Opens the evaluation on tasks where the run asks for one, with the engine and the
    harness that it takes."""
    config = setup.config.train.downstream
    if not config.tasks and not config.position_documents:
        return lambda state: {}
    from maxlm.train.downstream import DownstreamEvaluator

    return DownstreamEvaluator(setup, data, on_work=watchdog.reset_timer).evaluate


def _roll_back(
    run: _OpenRun, decision: RollbackDecision, position: TrainingPosition
) -> TrainingPosition:
    """Returns the position before the bad steps, whose batches it skips; raises
    MaxlmError where the run has rolled back as often as it may."""
    run.signals.raise_if_signaled()
    bad_step = decision.last_bad_step
    max_rollbacks = run.setup.config.faults.max_rollbacks
    # The events of all attempts, so that restarts do not reset the limit.
    num_rollbacks = run_on_process_0(
        lambda: sum(
            event["event"] == "rollback"
            for event in read_events(run.folder / "events.jsonl")
        )
    )
    if num_rollbacks >= max_rollbacks:
        run.log.event("stop", bad_step, reason="rollback-limit")
        times = "time" if num_rollbacks == 1 else "times"
        raise MaxlmError(
            f"{decision.reason} at step {bad_step}, and the run has rolled back "
            f"{num_rollbacks} {times}",
            where=str(run.folder),
            fix="lower schedule.learning_rate in another run folder (--resume), or "
            "raise faults.max_rollbacks",
        )
    run.watchdog.start_timer(decision.first_bad_step, "restore")
    batch_source = run.data.train_batch_source
    batches_per_rollout = 1
    if isinstance(batch_source, RolloutSource):
        batches_per_rollout = batch_source.batches_per_rollout
    position = run.state_restorer.rollback(
        decision, position.skips, run.log.event, batches_per_rollout
    )
    run.state_restorer.checkpointer.copy_newest_to_remote()
    run.log.rewind(position.step)
    first_batch, last_batch = position.skips[-1]
    run.log.event(
        "rollback",
        position.step,
        from_step=bad_step,
        reason=decision.reason,
        batches=(first_batch, last_batch),
    )
    run.say(
        f"rolling back from step {bad_step} to step {position.step}: "
        f"{decision.reason}; batches {first_batch} to {last_batch} are skipped"
    )
    return position


def _finish(run: _OpenRun, parts: _TrainingParts, state: TrainState) -> HeldOutResults:
    """Evaluates on all held-out text, and on tasks, and closes the run's records."""
    step = int(state.step)
    run.watchdog.start_timer(step, "evaluation")
    began = time.monotonic()
    evaluation = parts.evaluator.evaluate(state)
    results = evaluation.whole  # empty where no text is held out
    task_scores = parts.evaluate_downstream(state)
    if results or task_scores:
        run.log.event("evaluate", step, seconds=time.monotonic() - began, final=True)
    run.log.event("stop", step, reason="done")
    run.watchdog.stop_timer()
    checkpointer = run.state_restorer.checkpointer
    copy_failure = checkpointer.remote_copy_failure
    if copy_failure:
        run.say(f"{copy_failure}; the same command copies it")
    if checkpointer.local:
        # The last state is in the run's folder: hosts' own copies have served.
        checkpointer.local.clear()
    if run.is_lead:
        metrics_path = run.folder / "metrics.jsonl"
        # A finished run may be started once more: it has its record already.
        has_record = any(
            record["step"] == step and "eval_loss" in record
            for record in read_records(metrics_path)
        )
        if results and not has_record:
            run.log.log(step, parts.evaluator.make_final_record(step, evaluation))
        if task_scores:
            run.log.log(step, task_scores)
            run.say(f"step {step} · {format_downstream(task_scores)}")
        _draw_plots(run)
    return results


def _draw_plots(run: _OpenRun) -> None:
    # Only a run that ends draws.
    from maxlm.evaluation.curves import draw_downstream

    metrics_path = run.folder / "metrics.jsonl"
    plots = run.folder / "plots"
    plots.mkdir(exist_ok=True)
    task = run.setup.config.task
    plot_metrics(metrics_path, plots / f"{task.plot_name}.png", task.plotted_metrics)
    records = [*read_records(metrics_path)]
    flops_per_token = run.plan.layout.flops_per_token
    draw_downstream(records, flops_per_token, plots / "downstream.png")
