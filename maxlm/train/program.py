"""Training, from a config to a trained model: what ``maxlm train`` does."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reading import layer_group_shapes
from maxlm.checkpoint.skips import get_skips, read_skips
from maxlm.config import MaxlmError
from maxlm.optim.state import TrainState
from maxlm.run.config import RunConfig
from maxlm.run.prepare import (
    PreparedData,
    prepare_data_on_all_hosts,
    read_vocab_size,
)
from maxlm.run.setup import (
    RunSetup,
    open_training_batches,
    set_up_run,
    use_compilation_cache,
)
from maxlm.run.warm_start import (
    check_init_checkpoint,
    describe_frozen_models,
    load_frozen_models,
)
from maxlm.runtime.collectives import FlagAllReduce, run_on_process_0
from maxlm.runtime.signals import SignalHandler, handle_signals
from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.callbacks import CheckpointCallback, EvaluationCallback, StopCallback
from maxlm.train.display import ConsoleDisplay, plot_loss
from maxlm.train.heldout import HeldOutEvaluator, HeldOutResults
from maxlm.train.metrics import MetricsCallback, format_downstream
from maxlm.train.profile import Profiler
from maxlm.train.prometheus import check_prometheus_port
from maxlm.train.records import MetricsLog, read_events, read_records
from maxlm.train.resume import (
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
    metadata: dict[str, Any]
    """Saved with every checkpoint."""
    plan: "RunPlan"
    log: MetricsLog


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
    if profile and profile[0] > config.train.steps:
        message = (
            f"step {profile[0]} never comes: the run has {config.train.steps} steps"
        )
        raise MaxlmError(message, where="--profile", fix="name steps that it takes")
    with ExitStack() as stack:
        run = _open_run(config, stack, resume=resume, say=say)
        setup, data, log, watchdog = run.setup, run.data, run.log, run.watchdog
        profiler = [Profiler(run.folder, *profile)] if profile else []
        if profile and profile[1] <= run.position.step:
            run.say(
                f"no trace is taken: step {profile[1]}, the last to trace, has been "
                "taken"
            )
        step_fn = setup.jit_train_step()
        evaluator = HeldOutEvaluator(setup, data, on_batch=watchdog.reset_timer)
        evaluate_downstream = _open_downstream(setup, data, watchdog)

        def train_from(position: TrainingPosition) -> TrainState | RollbackDecision:
            detector = LossSpikeDetector(setup.config.faults, position.detector_state)
            every_steps = (
                setup.config.train.eval_every if data.eval_batch_sources else 0
            )
            metadata = {**run.metadata, "skipped_batches": position.skips}
            saver = run.state_restorer.checkpointer
            timer = StepTimer(log.event, position.step)
            with (
                open_training_batches(
                    setup,
                    data.train_batch_source,
                    position.step,
                    position.skips,
                    lambda: run.signals.request.stops,
                ) as batches,
                ConsoleDisplay(
                    config.train.steps, position.step, show=run.is_lead
                ) as display,
                run.signals.defer_signals(),
            ):
                all_reduce = FlagAllReduce(setup.mesh)
                callbacks = [
                    watchdog,
                    *profiler,
                    MetricsCallback(setup, data, run.plan, log, display),
                    detector,
                    EvaluationCallback(evaluator.evaluate_metrics, every_steps),
                    EvaluationCallback(
                        evaluate_downstream, config.train.downstream.every
                    ),
                    CheckpointCallback(saver, metadata, detector),
                    StopCallback(
                        run.signals, all_reduce, saver.is_due_by_time, str(run.folder)
                    ),
                ]
                trainer = Trainer(step_fn, config.train.steps, callbacks, timer)
                return trainer.run(position.state, batches)

        position = run.position
        while isinstance(result := train_from(position), RollbackDecision):
            position = _roll_back(run, result, position)
        run.signals.raise_if_signaled()
        heldout = _finish(run, evaluator, evaluate_downstream, result)
    return TrainingResult(
        setup, data, run.plan, run.position.step, result, run.folder, heldout
    )


def _open_run(
    config: RunConfig, stack: ExitStack, *, resume: str | Path | None, say: Say
) -> _OpenRun:
    """Prepares a run's text, and restores its state or initializes it; ``stack`` closes
    what is opened. For the rest see :func:`train_model`."""
    is_lead = jax.process_index() == 0
    say = say if is_lead else lambda _: None
    folder = Path(config.folder, config.name)
    # What does not fit is refused before anything is written or read.
    setup = set_up_run(config)
    config.reporting.check_packages()
    if is_lead:
        check_prometheus_port(config.reporting)
    use_compilation_cache(config)
    config.task.check_vocab_size(
        read_vocab_size(config, folder), config.model.vocab_size
    )
    signals = stack.enter_context(handle_signals(str(folder)))
    stack.enter_context(create_run_folder(config, folder, is_lead=is_lead))
    if is_lead:
        stack.enter_context(lock_run_folder(folder))
    home = folder / "checkpoints"
    grouped = layer_group_shapes(setup.specs)
    opened = Checkpointer(home, config.name, config.checkpoint, layer_groups=grouped)
    checkpointer = stack.enter_context(opened)
    source = find_resume_source(setup, checkpointer, resume, stack, say)
    saved = source.metadata if source else check_init_checkpoint(setup)
    data = prepare_data_on_all_hosts(config, folder)
    if (
        source and not source.is_own_run
    ):  # It may have trained on meanwhile, and deleted old ones.
        source = find_resume_source(setup, checkpointer, resume, stack, say)
    states = StateRestorer(setup, checkpointer, source)
    watchdog = stack.enter_context(Watchdog(config.faults, folder, jax.process_index()))
    watchdog.start_timer(0, "restore")
    frozen = load_frozen_models(setup)
    metadata = make_run_metadata(
        config, data, saved, describe_frozen_models(setup, frozen)
    )
    if source:
        check_same_inputs(config, data, source, metadata)
    skips = read_skips(folder)
    if skips is None:
        skips = get_skips(source.metadata) if source else ()
    position = states.restore(skips, frozen)
    step = position.step
    if not position.checkpoint_place:
        check_no_lost_checkpoint(checkpointer, resume)
    for skipped_checkpoint in position.skipped:
        say(str(skipped_checkpoint))
    for line in data.unchecked:
        say(line)
    batch_sources = {"training": data.train_batch_source, **data.eval_batch_sources}
    for name, rows in batch_sources.items():
        for note in getattr(rows, "notes", ()):
            say(f"{name}: {note}")
    if position.checkpoint_place:
        is_own_run = source is not None and source.is_own_run
        if is_own_run and (
            lost := describe_lost_checkpoint(checkpointer, step, position.skipped)
        ):
            say(lost)
        say(f"resuming from step {step} in {position.checkpoint_place}")
    elif start := config.train.start_from:
        say(f"starting from the parameters in {start}")
    if step > config.train.steps:
        message = f"the run is at step {step}, train.steps={config.train.steps}"
        fix = f"set train.steps to {step} or more, or train in another run folder"
        raise MaxlmError(message, where=str(folder), fix=fix)
    plan = _plan_run(config, setup, say)
    write_run_description(folder, config, plan, is_lead=is_lead)
    if is_lead:
        write_refused_rows(folder, batch_sources)
    log = stack.enter_context(
        MetricsLog(folder, step, write=is_lead, reporting=config.reporting)
    )
    if count := log.damaged_lines:
        say(
            f"{folder}/metrics.jsonl: lines that cannot be read, of records lost: "
            f"{count}"
        )
    log.event(
        "resume" if step else "start",
        step,
        began=get_process_start_unix_seconds(),
        run=str(source.checkpointer.folder.parent)
        if source and not source.is_own_run
        else None,
        devices=jax.device_count(),
        processes=jax.process_count(),
        device_kind=jax.devices()[0].device_kind,
        skipped=[
            [skipped_checkpoint.step, skipped_checkpoint.why]
            for skipped_checkpoint in position.skipped
        ],
    )
    stack.enter_context(record_stop_on_error(signals, log, step))
    watchdog.event = log.event
    checkpointer.copy_newest_to_remote()
    return _OpenRun(
        setup,
        folder,
        is_lead,
        say,
        signals,
        watchdog,
        data,
        states,
        position,
        metadata,
        plan,
        log,
    )


def _plan_run(config: RunConfig, setup: RunSetup, say: Say) -> "RunPlan":
    """Plans the run on its devices, for the record and to compare with what is
    measured."""
    # The plan is a room of its own that nothing else of training needs.
    from maxlm.plan.known_errors import format_known_time_errors
    from maxlm.plan.predict import Machine, plan_run
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
    run.signals.raise_if_signaled()
    faults = run.setup.config.faults
    events = run.folder / "events.jsonl"
    count = run_on_process_0(
        lambda: sum(e["event"] == "rollback" for e in read_events(events))
    )
    if count >= faults.max_rollbacks:
        run.log.event("stop", decision.last_bad_step, reason="rollback-limit")
        raise MaxlmError(
            f"{decision.reason} at step {decision.last_bad_step}, and the run has "
            f"rolled back {count} time{'' if count == 1 else 's'}",
            where=str(run.folder),
            fix="lower schedule.learning_rate in another run folder (--resume), or "
            "raise "
            "faults.max_rollbacks",
        )
    run.watchdog.start_timer(decision.first_bad_step, "restore")
    position = run.state_restorer.rollback(decision, position.skips, run.log.event)
    run.state_restorer.checkpointer.copy_newest_to_remote()
    run.log.rewind(position.step)
    first, last = position.skips[-1]
    details = {"reason": decision.reason, "batches": (first, last)}
    run.log.event(
        "rollback", position.step, from_step=decision.last_bad_step, **details
    )
    run.say(
        f"rolling back from step {decision.last_bad_step} to step {position.step}: "
        f"{decision.reason}; batches {first} to {last} are skipped"
    )
    return position


def _finish(
    run: _OpenRun,
    evaluator: HeldOutEvaluator,
    evaluate_downstream: DownstreamEvaluation,
    state: TrainState,
) -> HeldOutResults:
    """Evaluates on all held-out text, and on tasks, and closes the run's records."""
    step = int(state.step)
    run.watchdog.start_timer(step, "evaluation")
    began = time.monotonic()
    evaluation = evaluator.evaluate(state)
    results = evaluation.whole
    on_tasks = evaluate_downstream(state)
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
            run.log.log(step, evaluator.make_final_record(step, evaluation))
        if on_tasks:
            run.log.log(step, on_tasks)
            run.say(f"step {step} · {format_downstream(on_tasks)}")
        plots = run.folder / "plots"
        plots.mkdir(exist_ok=True)
        plot_loss(run.folder / "metrics.jsonl", plots / "loss.png")
        from maxlm.evaluation.curves import draw_downstream

        records = [*read_records(run.folder / "metrics.jsonl")]
        cost = run.plan.layout
        draw_downstream(records, cost.flops_per_token, plots / "downstream.png")
    return results
