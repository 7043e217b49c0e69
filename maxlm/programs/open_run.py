"""Everything that a run needs before its first step."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.plan.predict import Machine, RunPlan, plan_run
from maxlm.plan.show import format_prediction
from maxlm.programs.load import check_init_checkpoint, describe_frozen_models
from maxlm.programs.prepare import PreparedData, prepare_data_on_all_hosts, read_vocab_size
from maxlm.programs.resume import (
    Say,
    StateRestorer,
    TrainingPosition,
    check_no_lost_checkpoint,
    check_same_inputs,
    find_resume_source,
    make_run_metadata,
)
from maxlm.programs.run_folder import (
    create_run_folder,
    get_process_start_unix_seconds,
    lock_run_folder,
    record_stop_on_error,
    run_folder_path,
    write_run_description,
)
from maxlm.programs.setup import RunSetup, set_up_run, use_compilation_cache
from maxlm.run import RunConfig
from maxlm.runtime.signals import SignalHandler, handle_signals
from maxlm.sharding import describe_links
from maxlm.train.checkpoint.checkpointer import Checkpointer
from maxlm.train.checkpoint.reading import layer_group_shapes
from maxlm.train.records import MetricsLog
from maxlm.train.skips import get_skips, read_skips
from maxlm.train.watchdog import Watchdog


@dataclass(frozen=True)
class OpenRun:
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
    plan: RunPlan
    log: MetricsLog


def open_run(
    config: RunConfig, stack: ExitStack, *, resume: str | Path | None, say: Say
) -> OpenRun:
    """Prepares a run's text, and restores its state or initializes it; ``stack`` closes what is
    opened. For the rest see :func:`maxlm.programs.train.train_model`."""
    is_lead = jax.process_index() == 0
    say = say if is_lead else lambda _: None
    folder = run_folder_path(config)
    # What does not fit is refused before anything is written or read.
    setup = set_up_run(config)
    config.reporting.check_packages()
    use_compilation_cache(config)
    config.task.check_vocab_size(read_vocab_size(config, folder), config.model.vocab_size)
    signals = stack.enter_context(handle_signals(str(folder)))
    stack.enter_context(create_run_folder(config, folder, is_lead=is_lead))
    if is_lead:
        stack.enter_context(lock_run_folder(folder))
    home, grouped = folder / "checkpoints", layer_group_shapes(setup.specs)
    own = Checkpointer(home, config.name, config.checkpoint, layer_groups=grouped)
    checkpointer = stack.enter_context(own)
    source = find_resume_source(setup, checkpointer, resume, stack, say)
    saved = source.metadata if source else check_init_checkpoint(setup)
    data = prepare_data_on_all_hosts(config, folder)
    if source and not source.is_own_run:  # It may have trained on meanwhile, and deleted old ones.
        source = find_resume_source(setup, checkpointer, resume, stack, say)
    states = StateRestorer(setup, checkpointer, source)
    watchdog = stack.enter_context(Watchdog(config.faults, folder, jax.process_index()))
    watchdog.start_timer(0, "restore")
    frozen = states.load_frozen_params()
    metadata = make_run_metadata(config, data, saved, describe_frozen_models(setup, frozen))
    if source:
        where = str(source.checkpointer.folder)
        check_same_inputs(config, data, source.metadata, metadata, where)
    skips = read_skips(folder)
    if skips is None:
        skips = get_skips(source.metadata) if source else ()
    position = states.restore(skips, frozen)
    step = position.step
    if not position.checkpoint_place:
        check_no_lost_checkpoint(checkpointer, resume)
    for each in position.skipped:
        say(str(each))
    for name, rows in {"training": data.train_batch_source, **data.eval_batch_sources}.items():
        for note in getattr(rows, "notes", ()):
            say(f"{name}: {note}")
    if position.checkpoint_place:
        say(f"resuming from step {step} in {position.checkpoint_place}")
    elif start := config.train.start_from:
        say(f"starting from the parameters in {start}")
    if step > config.train.steps:
        what = f"the run is at step {step}, train.steps={config.train.steps}"
        fix = f"set train.steps to {step} or more, or train in another run folder"
        raise MaxlmError(what, where=str(folder), fix=fix)
    machine = Machine.from_devices(setup.mesh.devices.ravel().tolist())
    sizes, links = dict(setup.mesh.shape), describe_links(setup.mesh)
    plan = plan_run(config, machine, sizes=sizes, links=links)
    say(format_prediction(plan))
    write_run_description(folder, config, plan, is_lead=is_lead)
    log = stack.enter_context(MetricsLog(folder, step, write=is_lead, reporting=config.reporting))
    if count := log.damaged_lines:
        say(f"{folder}/metrics.jsonl: lines that cannot be read, of records lost: {count}")
    log.event(
        "resume" if step else "start",
        step,
        began=get_process_start_unix_seconds(),
        run=str(source.checkpointer.folder.parent) if source and not source.is_own_run else None,
        devices=jax.device_count(),
        processes=jax.process_count(),
        device_kind=jax.devices()[0].device_kind,
        skipped=[[each.step, each.why] for each in position.skipped],
    )
    stack.enter_context(record_stop_on_error(signals, log, step))
    watchdog.event = log.event
    checkpointer.copy_newest_to_remote()
    return OpenRun(
        setup, folder, is_lead, say, signals, watchdog, data, states, position, metadata, plan, log
    )
