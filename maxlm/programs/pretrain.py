"""Training, from a config to a trained model: the story of `maxlm train`."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from maxlm.config import MaxlmError, to_yaml
from maxlm.models.params import Params
from maxlm.plan.predict import Machine, RunPlan, plan_run
from maxlm.plan.show import format_prediction
from maxlm.programs.environment import environment, process_began
from maxlm.programs.evaluation import held_out
from maxlm.programs.feed import training_batches
from maxlm.programs.frozen import (
    check_frozen_models,
    describe_frozen_models,
    load_frozen_models,
)
from maxlm.programs.prepare import Corpus, planned_vocab, prepare, preparing, writable
from maxlm.programs.record import recorder
from maxlm.programs.resume import (
    Origin,
    Position,
    Say,
    check_not_lost,
    check_stores,
    described,
    find_beginning,
    find_origin,
    go_back,
    go_on,
    published,
    read_skips,
    started,
    times_gone_back,
    too_often,
)
from maxlm.programs.setup import Setup, run_folder, set_up, use_compilation_cache
from maxlm.run import RunConfig
from maxlm.runtime.collectives import FlagAllReduce
from maxlm.runtime.files import check_not_deleted, locked_folder, replacing, writing
from maxlm.runtime.signals import SignalHandler, handle_signals
from maxlm.sharding import describe_links
from maxlm.train.anomaly import LossWatch, Verdict
from maxlm.train.checkpoint import Checkpointer, check_same, group_sizes
from maxlm.train.checkpoint.tiers import Tiers
from maxlm.train.display import ConsoleDisplay, plot_loss
from maxlm.train.loop import Guards, Hooks, train
from maxlm.train.metrics import MetricsLog
from maxlm.train.profile import Profiler
from maxlm.train.records import read_records
from maxlm.train.skips import Skips
from maxlm.train.state import TrainState
from maxlm.train.step import Batch, Sums
from maxlm.train.watchdog import Watchdog


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    setup: Setup
    corpus: Corpus
    plan: RunPlan
    start: int
    """The step that it began or went on from."""
    state: TrainState
    folder: Path
    heldout: dict[str, dict[str, float]]
    """Per source; see ``held_out``."""


def pretrain(
    config: RunConfig,
    *,
    resume: str | Path | None = None,
    profile: tuple[int, int] | None = None,
    say: Say = print,
) -> Trained:
    """Train a model, or go on from the newest checkpoint in its folder.

    Args:
        resume: another run's folder to go on from; what follows is kept in this run's own.
        profile: first and last step of a trace to write.
        say: told, on process 0, what happens.

    Raises:
        Preempted: a scheduler's notice; all that was done is saved.
        MaxlmError: anything wrong with the config, the text, the devices or the folder;
            interrupted; numbers that stay bad.
    """
    lead = jax.process_index() == 0
    say = say if lead else lambda _: None
    folder = run_folder(config)
    # What does not fit is refused before anything is written or read.
    setup = set_up(config)
    config.reporting.check()
    if profile and profile[0] > config.train.steps:
        what = f"step {profile[0]} never comes: the run has {config.train.steps} steps"
        raise MaxlmError(what, where="--profile", fix="name steps that it takes")
    use_compilation_cache(config)
    config.task.check_vocab_size(planned_vocab(config, folder), config.model.vocab_size)
    with ExitStack() as stack:
        signals = stack.enter_context(handle_signals(str(folder)))
        if lead:
            stack.enter_context(_alone(folder))
        with preparing(config, folder, lead=lead):
            tiers = stack.enter_context(
                Tiers(
                    folder / "checkpoints",
                    config.name,
                    config.checkpoint,
                    grouped=group_sizes(setup.specs),
                )
            )
            origin = find_origin(setup, tiers, folder, resume, stack, say)
            beginning = None if origin else find_beginning(setup, stack)
            corpus = _prepare_together(config, folder)
            # In the time that took, the run it begins from may have gone on.
            origin = origin and origin.renewed()
            if beginning:
                beginning.reload()
        watchdog = stack.enter_context(Watchdog(config.faults, folder, jax.process_index()))
        watchdog.expect(0, "restore")

        def load_frozen() -> dict[str, Params]:
            return load_frozen_models(
                setup, lambda: started(setup, find_beginning(setup, stack)).params
            )

        metadata = _metadata(
            config, corpus, origin, beginning, describe_frozen_models(setup, load_frozen())
        )
        skips = read_skips(folder, origin)

        def fresh() -> TrainState:
            return started(setup, find_beginning(setup, stack) if origin else beginning)

        def begin() -> Position:
            return go_on(setup, origin.renewed(), skips, fresh) if origin else Position(fresh(), 0)

        position = begin().with_frozen(load_frozen())
        first = position.step
        if not position.place:
            check_not_lost(tiers, resume)
        for each in position.skipped:
            say(str(each))
        if position.place:
            say(f"resuming from step {first} in {position.place}")
        elif beginning:
            say(f"starting from the parameters in {beginning.folder.parent}")
        if first > config.train.steps:
            raise MaxlmError(
                f"the run is at step {first}, train.steps={config.train.steps}",
                where=str(folder),
                fix=f"set train.steps to {first} or more, or train in another run folder",
            )
        if profile and profile[1] <= first:
            say(f"no trace is taken: step {profile[1]}, the last to be traced, has been taken")
        plan = plan_run(
            config,
            Machine.from_devices(setup.mesh.devices.ravel().tolist()),
            sizes=dict(setup.mesh.shape),
            links=describe_links(setup.mesh),
        )
        say(format_prediction(plan))
        _describe(folder, config, plan, lead=lead)
        log = stack.enter_context(MetricsLog(folder, first, write=lead, reporting=config.reporting))
        if count := log.damaged_lines:
            say(f"{folder}/metrics.jsonl: lines that cannot be read, of records lost: {count}")
        log.event(
            "resume" if first else "start",
            first,
            began=process_began(),
            run=str(origin.tiers.folder.parent) if origin and not origin.own else None,
            devices=jax.device_count(),
            processes=jax.process_count(),
            device_kind=jax.devices()[0].device_kind,
            skipped=[[each.step, each.why] for each in position.skipped],
        )
        stack.enter_context(_noted(signals, log, first))
        watchdog.event = log.event
        tiers.catch_up()
        profiler = stack.enter_context(Profiler(folder, *profile) if profile else Profiler.off())
        step, evaluated = setup.step_function(), setup.evaluation_function()

        def evaluate(state: TrainState, max_batches: int | None = None) -> Any:
            def eval_step(params: Any, batch: Batch) -> Sums:
                watchdog.restart()
                return evaluated(params, state.frozen, batch)

            return held_out(setup, eval_step, parameters(state), corpus, max_batches)

        def quick_evaluation(state: TrainState) -> Mapping[str, float]:
            results = evaluate(state, config.train.eval_batches)
            return _evaluation_record(config, int(state.step), results)

        def train_from(position: Position, skips: Skips) -> TrainState | Verdict:
            with (
                training_batches(setup, corpus.batches, position.step, skips) as batches,
                ConsoleDisplay(config.train.steps, position.step, show=lead) as display,
            ):
                return train(
                    position.state,
                    step,
                    batches,
                    config=config.train,
                    hooks=Hooks(
                        record=recorder(setup, corpus, plan, log, display),
                        evaluate=quick_evaluation if corpus.evaluation else None,
                        event=log.event,
                    ),
                    guards=Guards(
                        signals=signals,
                        agreement=FlagAllReduce(setup.mesh),
                        watch=LossWatch(config.faults, position.losses),
                        watchdog=watchdog,
                        profiler=profiler,
                    ),
                    tiers=tiers,
                    metadata={**metadata, "skipped_batches": skips},
                    folder=str(folder),
                )

        while isinstance(ended := train_from(position, skips), Verdict):
            signals.raise_if_signaled()
            if (times := times_gone_back(folder)) >= config.faults.max_rollbacks:
                log.event("stop", ended.last, reason="rollback-limit")
                raise too_often(ended, times, folder)
            watchdog.expect(ended.first, "restore")
            del position  # Its arrays are gone: the step was given their memory.
            position, skips = go_back(setup, tiers, ended, skips, folder, begin, fresh, log.event)
            position = position.with_frozen(load_frozen())
            tiers.catch_up()
            log.rewind(position.step)
            log.event(
                "rollback",
                position.step,
                from_step=ended.last,
                reason=ended.reason,
                batches=skips[-1],
            )
            say(
                f"going back from step {ended.last} to step {position.step}: {ended.reason}; "
                f"batches {skips[-1][0]} to {skips[-1][1]} are left out"
            )
        state = ended
        signals.raise_if_signaled()
        watchdog.expect(int(state.step), "evaluation")
        evaluation_began = time.monotonic()
        results = evaluate(state)
        if results:
            seconds = time.monotonic() - evaluation_began
            log.event("evaluate", int(state.step), seconds=seconds, final=True)
        log.event("stop", int(state.step), reason="done")
        watchdog.rest()
        if missing := tiers.uncopied:
            say(f"{missing}; the same command copies it")
        tiers.free_hosts()
        if lead:
            if results and not _evaluated_at(folder, int(state.step)):
                log.log(int(state.step), _evaluation_record(config, int(state.step), results))
            (folder / "plots").mkdir(exist_ok=True)
            plot_loss(folder / "metrics.jsonl", folder / "plots" / "loss.png")
    return Trained(setup, corpus, plan, first, state, folder, results)


def _metadata(
    config: RunConfig,
    corpus: Corpus,
    origin: Origin | None,
    beginning: Checkpointer | None,
    frozen: Mapping[str, Any],
) -> dict[str, Any]:
    """What is saved with every checkpoint.

    Raises:
        MaxlmError: those to go on from were made with other text.
    """
    own = {
        "config": config.model_dump(mode="json"),
        "tokenizer": corpus.tokenizer.fingerprint,
        "stores": {name: described(store) for name, store in corpus.training.items()},
    }
    if frozen:
        own["frozen"] = frozen
    if origin:
        saved, where = origin.metadata, str(origin.tiers.folder)
        check_same(saved, own, ("tokenizer",), where)
        check_frozen_models(saved.get("frozen", {}), frozen, where)
        # Checkpoints of older versions say nothing of stores.
        check_stores(config, saved.get("stores", {}), own["stores"], corpus, where)
    if origin or beginning:
        before = origin.metadata if origin else beginning.metadata() if beginning else {}
        own |= published(before, corpus.tokenizer.fingerprint)
    return own


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run's folder: two runs that write to it would ruin both.

    Raises:
        MaxlmError: another process holds it; something failed, and the folder is gone.
    """
    note = folder / "lock"
    with ExitStack() as stack:
        stack.enter_context(writable(folder))
        try:
            stack.enter_context(locked_folder(folder))
        except MaxlmError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            who = "unknown"
            with suppress(OSError):  # It ends just now.
                who = " ".join(note.read_text().split()) or who
            what = f"another run writes to this folder ({who})"
            fix = "wait for it to end, stop it, or give this one another name=..."
            raise MaxlmError(what, where=str(folder), fix=fix) from error
        with writing(note):
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield
        except Exception:
            if not note.exists():  # Whatever failed, that is why.
                check_not_deleted(folder / "config.yaml")
            raise
        finally:
            note.unlink(missing_ok=True)


@contextmanager
def _noted(signals: SignalHandler, log: MetricsLog, step: int) -> Iterator[None]:
    """Write down what ends the run outside its loop, or unforeseen."""
    try:
        yield
    except BaseException as error:
        if not log.stopped:
            reason = "interrupt" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(MaxlmError):  # a full disk, perhaps, which is what `error` says
                log.event("stop", step, reason="preempted" if signals.interrupted_work else reason)
        raise


def _describe(folder: Path, config: RunConfig, plan: RunPlan, *, lead: bool) -> None:
    """What another person needs to judge the run, or to run it again."""
    about = environment()
    described = {
        "config.yaml": to_yaml(config),
        "plan.json": f"{json.dumps(plan.to_json(), indent=2)}\n",
        "environment.json": f"{json.dumps(about, indent=2)}\n",
    }
    for name, text in described.items() if lead else ():
        with replacing(folder / name) as temporary:
            temporary.write_text(text)


def _evaluation_record(
    config: RunConfig, step: int, results: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """``eval_loss`` is over the tokens of all sources, the rates are each source's own."""
    counted = sum(result["tokens"] for result in results.values())
    loss = sum(result["loss"] * result["tokens"] for result in results.values()) / counted
    tokens = step * config.data.batch_size * config.data.seq_len
    record = {"tokens": tokens, "eval_loss": loss}
    return record | {
        f"eval_bits_per_byte/{name}": result["bits_per_byte"]
        for name, result in results.items()
        if "bits_per_byte" in result
    }


def _evaluated_at(folder: Path, step: int) -> bool:
    """Whether the evaluation that ends a run is in its records: it may be started once more."""
    records = read_records(folder / "metrics.jsonl")
    return any(record["step"] == step and "eval_loss" in record for record in records)


def parameters(state: TrainState) -> Any:
    """The parameters to use a model with: their moving average where there is one."""
    return state.params if state.ema is None else state.ema


def _prepare_together(config: RunConfig, folder: Path) -> Corpus:
    """Process 0 builds what is missing, the others wait and open it."""
    corpus = prepare(config, folder) if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corpus")
    return corpus or prepare(config, folder)
