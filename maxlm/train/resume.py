"""Finds a run's state: in its own checkpoints, another run's, or fresh initialization;
checks that its config and text are the same, and that no checkpoint was lost."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import jax
from pydantic import ValidationError

from maxlm.checkpoint.checkpointer import (
    Checkpointer,
    FoundCheckpoint,
    SkippedCheckpoint,
)
from maxlm.checkpoint.reading import check_same_settings
from maxlm.checkpoint.skips import Skips, get_batch_index, record_skip
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.data.store.manifest import read_manifest
from maxlm.data.store.store import TokenStore
from maxlm.models.params import Params
from maxlm.optim.state import TrainState
from maxlm.run.config import IDENTITY, INCIDENTAL, RunConfig
from maxlm.run.prepare import PreparedData, check_prepared_data
from maxlm.run.setup import RunSetup
from maxlm.run.warm_start import init_or_warm_start_state, load_frozen_models
from maxlm.runtime.collectives import run_on_process_0
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.train.anomaly import RollbackDecision
from maxlm.train.records import read_events, read_records

Say = Callable[[str], None]


@dataclass(frozen=True)
class ResumeSource:
    """Checkpoints to resume from, newest first, at least one."""

    checkpointer: Checkpointer
    is_own_run: bool
    """Whether they are this run's, not another's."""
    checkpoints: list[FoundCheckpoint]
    skipped: list[SkippedCheckpoint]
    """Checkpoints known to be unreadable so far."""

    @property
    def metadata(self) -> JsonMapping:
        return self.checkpoints[0].metadata


@dataclass(frozen=True)
class TrainingPosition:
    """A state to train from."""

    state: TrainState
    step: int
    skips: Skips
    checkpoint_place: str = ""
    """Place of the checkpoint; empty: the run starts."""
    other_folder: Path | None = None
    """Folder of the run that the checkpoint is of; None: this one, or there is none."""
    detector_state: JsonMapping | None = None
    """Memory of the loss spike detector."""
    skipped: Sequence[SkippedCheckpoint] = ()
    """Newer checkpoints that cannot be resumed from."""


def find_resume_source(
    setup: RunSetup,
    checkpointer: Checkpointer,
    resume: str | Path | None,
    stack: ExitStack,
    say: Say,
) -> ResumeSource | None:
    """Returns this run's own checkpoints, else those of the run to resume, else None.

    Own checkpoints that cannot be resumed from are reported and cleared away.
    """
    source = ResumeSource(checkpointer, True, *checkpointer.find())
    if not source.checkpoints:
        # Hosts' own disks may be lost: what they had is no reason to stop.
        has_damaged_checkpoint = any(
            checkpoint.is_damaged and checkpoint.tier.name != "local"
            for checkpoint in source.skipped
        )
        if has_damaged_checkpoint:
            raise_no_readable_checkpoint(checkpointer, source.skipped)
        check_no_lost_checkpoint(checkpointer, resume)
        for checkpoint in source.skipped:
            say(str(checkpoint))
        checkpointer.discard_skipped(source.skipped, 0)
        if resume is None:
            check_prepared_data(setup.config, checkpointer.folder.parent)
            return None
        home = Path(resume) / "checkpoints"
        other = stack.enter_context(Checkpointer(home, "", read_only=True))
        source = ResumeSource(other, False, *other.find())
        if not source.checkpoints and source.skipped:
            raise_no_readable_checkpoint(other, source.skipped)
        if not source.checkpoints:
            raise MaxlmError(
                "no checkpoint here", where=str(home), fix="train for longer"
            )
    place = source.checkpoints[0].tier.place
    check_same_config(setup.config, source.metadata["config"], place)
    return source


@dataclass(frozen=True)
class StateRestorer:
    """Source of a run's states, at its start and at a rollback."""

    setup: RunSetup
    checkpointer: Checkpointer
    resume_source: ResumeSource | None

    def restore(
        self,
        skips: Skips,
        frozen: dict[str, Params],
        source: ResumeSource | None = None,
    ) -> TrainingPosition:
        """Returns the position to start or resume at, with the ``frozen`` models in its
        state; raises MaxlmError if none can be read. ``source``: default,
        ``resume_source``."""
        source = source or self.resume_source
        if source:
            position = self._restore_latest(source, skips)
        else:
            position = TrainingPosition(init_or_warm_start_state(self.setup), 0, skips)
        return replace(position, state=replace(position.state, frozen=frozen))

    def rollback(
        self,
        decision: RollbackDecision,
        skips: Skips,
        log_event: Callable[..., None],
        batches_per_rollout: int = 1,
    ) -> TrainingPosition:
        """Restores the newest checkpoint from before the bad steps, else the position
        that the run began at, and skips the batches since, as Chowdhery et al. 2022
        (PaLM, section 5.1) did.

        ``log_event`` takes ("discard", step) before all checkpoints after ``step`` are
        deleted. ``batches_per_rollout``: batches that are made together, of which none
        is trained on once another is bad.
        """
        checkpointer = self.checkpointer
        checkpointer.wait()
        if checkpointer.remote:
            checkpointer.remote.close()  # Copies may be of a bad state.
        source = ResumeSource(checkpointer, True, *checkpointer.find())
        good_steps = [
            checkpoint.step
            for checkpoint in source.checkpoints
            if checkpoint.step < decision.first_bad_step
        ]
        frozen = load_frozen_models(self.setup)
        start_position = None
        if good_steps:
            base_step = max(good_steps)
        else:
            start_position = self.restore(skips, frozen)
            base_step = start_position.step
        first_batch = get_batch_index(base_step, skips)
        last_batch = get_batch_index(decision.last_bad_step - 1, skips)
        # To the end of its rollout: the rest of it is of the same bad samples.
        last_batch += -(last_batch + 1) % batches_per_rollout
        skip = (first_batch, last_batch)
        if start_position:
            # Before the record: a run killed between the two would refuse all its
            # checkpoints.
            log_event("discard", base_step)
            abandoned = [
                SkippedCheckpoint(
                    checkpoint.step, checkpoint.tier, why="", is_damaged=False
                )
                for checkpoint in source.checkpoints
            ]
            checkpointer.discard_skipped(abandoned, base_step)
        if jax.process_index() == 0:
            record_skip(checkpointer.folder.parent, skips, skip, decision.reason)
        skips = (*skips, skip)
        if start_position:
            return replace(start_position, skips=skips)
        return self.restore(skips, frozen, source)

    def _restore_latest(self, source: ResumeSource, skips: Skips) -> TrainingPosition:
        """Restores the newest state that can be read and was trained on this run's
        batches.

        Hosts' own disks may be lost: if only they had checkpoints, and none can be used
        by these hosts, the run starts afresh.
        """
        checkpointer = source.checkpointer
        abstract_state = replace(self.setup.abstract_state, frozen={})
        state, restored_from, skipped = checkpointer.restore_newest(
            source.checkpoints, abstract_state, skips
        )
        skipped = sorted(
            [*source.skipped, *skipped], key=lambda checkpoint: -checkpoint.step
        )
        if restored_from is None:
            if any(checkpoint.tier.name != "local" for checkpoint in skipped):
                raise_no_readable_checkpoint(checkpointer, skipped)
            checkpointer.discard_skipped(skipped, 0)
            fresh_state = init_or_warm_start_state(self.setup)
            return TrainingPosition(fresh_state, 0, skips, skipped=skipped)
        if source.is_own_run:
            checkpointer.discard_skipped(skipped, restored_from.step)
        newer = [
            checkpoint
            for checkpoint in skipped
            if checkpoint.step >= restored_from.step
        ]
        where = restored_from.tier.place
        losses = restored_from.metadata.get("losses")
        other_folder = None if source.is_own_run else checkpointer.folder.parent
        return TrainingPosition(
            state,
            restored_from.step,
            skips,
            checkpoint_place=where,
            other_folder=other_folder,
            detector_state=losses,
            skipped=newer,
        )


def make_run_metadata(
    config: RunConfig,
    data: PreparedData,
    source_metadata: JsonMapping | None,
    frozen_models: JsonMapping,
) -> JsonObject:
    """Returns the metadata of a run's checkpoints; ``source_metadata``: that of the
    checkpoint whose state or parameters the run starts from."""
    tokenizer = data.tokenizer.fingerprint
    metadata = {
        "config": config.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "stores": {
            name: _describe_store(store) for name, store in data.train_stores.items()
        },
    }
    # An export needs to know of the published model that the parameters came from, if
    # any, its family and, while the tokenizer is still its own, its token ids.
    published = source_metadata and source_metadata.get("published")
    if source_metadata and published is not None:
        keys = ["family"]
        if source_metadata["tokenizer"] == tokenizer:
            keys.append("tokens")
        metadata["published"] = {
            key: published[key] for key in keys if key in published
        }
    if source_metadata and source_metadata["config"].get("adapter"):
        # What else than the adapter it trained belongs to the adapter that goes on from
        # it.
        trainable = source_metadata["config"]["train"].get("trainable") or ()
        trained_before = {*source_metadata.get("trained_before", ()), *trainable}
        metadata["trained_before"] = sorted(trained_before)
    if frozen_models:
        metadata["frozen"] = frozen_models
    return metadata


def check_same_inputs(
    config: RunConfig,
    data: PreparedData,
    origin: ResumeSource,
    new_metadata: JsonMapping,
) -> None:
    """Checks that the checkpoint to resume from was made with this tokenizer, these
    frozen models and stores; ``new_metadata``: of those to come."""
    saved_metadata = origin.metadata
    place = str(origin.checkpointer.folder)
    check_same_settings(saved_metadata, new_metadata, ("tokenizer",), place)
    for name, model in new_metadata.get("frozen", {}).items():
        saved_model = saved_metadata.get("frozen", {}).get(name, {})
        if saved_model.get("fingerprint") != model["fingerprint"]:
            message = (
                f"the frozen model {name!r} from {model['source']} is not the one "
                f"that training began with, from {saved_model.get('source', 'nowhere')}"
            )
            fix = "put its parameters back, or train in another run folder"
            raise MaxlmError(message, where=place, fix=fix)
    saved_stores = saved_metadata.get("stores", {})  # A converted model's has none.
    for source in config.data.sources:
        name = source.name
        store = new_metadata["stores"][name]
        saved_store = saved_stores.get(name, store)
        if store == saved_store:
            continue
        remedy = "give it the documents that it had"
        if source.store:
            # A store that was appended to is read as it was by its number of segments.
            manifest = read_manifest(data.train_stores[name].place)
            for count in range(1, len(manifest.segments) + 1):
                offsets_sha256 = manifest.take_segments(count).offsets_sha256
                if offsets_sha256 == saved_store["offsets_sha256"]:
                    remedy = f"set store_segments: {count} for it"
        describe = "{documents:,} documents, {tokens:,} tokens".format_map
        message = (
            f"the store of source {name!r} is not what it was "
            f"({describe(saved_store)}; now {describe(store)})"
        )
        fix = f"{remedy}, or train in another run folder"
        raise MaxlmError(message, where=place, fix=fix)


def check_same_config(config: RunConfig, saved_config: JsonMapping, where: str) -> None:
    """Checks the settings that must be those that the checkpoint was written with."""
    # Settings that are newer than the checkpoint get their defaults. The comparison
    # shows what is wrong with a config that is not valid.
    with suppress(ValidationError, MaxlmError):
        saved_config = RunConfig.model_validate(saved_config).model_dump(mode="json")
    current = config.model_dump(mode="json")
    check_same_settings(saved_config, current, IDENTITY, where, ignored=INCIDENTAL)


def _describe_store(store: TokenStore) -> JsonObject:
    """Returns what shows whether a store still holds the same documents."""
    counts = {"documents": store.num_documents, "tokens": store.num_tokens}
    digest = store.manifest.tokens_sha256
    return counts | {"offsets_sha256": store.offsets_sha256, "tokens_sha256": digest}


def raise_no_readable_checkpoint(
    checkpointer: Checkpointer, skipped: Sequence[SkippedCheckpoint]
) -> NoReturn:
    """Raises MaxlmError for a run that can resume from none of its checkpoints. It does
    not start afresh by itself: that would throw its training away."""
    message = f"no checkpoint can be resumed from: {', '.join(map(str, skipped))}"
    raise _restart_error(checkpointer, message, "repair one")


@dataclass(frozen=True)
class RecordedProgress:
    """Progress of a run's attempts so far, as its own records tell of it."""

    newest_saved_step: int | None = None
    """Step of the newest checkpoint that was saved, and that no rollback discarded."""
    other_run: str | None = None
    """Folder of the run that the last attempt went on from."""
    has_attempts: bool = False
    """Whether the events tell of any attempt."""
    base_step: int = 0
    """Step that training last began, resumed or rolled back at."""
    last_begun_step: int = 0
    """Step of the newest checkpoint that was begun."""
    last_step: int = 0
    """Step of the newest record in metrics.jsonl."""


def read_recorded_progress(folder: Path) -> RecordedProgress:
    """Reads a run's events.jsonl and metrics.jsonl; lines that hold no record are
    passed over."""
    saved = set[int]()
    other_run = None
    has_attempts = False
    base_step = 0
    last_begun_step = 0
    for event in read_events(folder / "events.jsonl"):
        kind = event["event"]
        step = event["step"]
        if kind == "checkpoint":
            last_begun_step = max(last_begun_step, step)
        elif kind == "saved":
            saved.add(step)
        elif kind in ("start", "resume", "rollback", "discard"):
            saved = {step_saved for step_saved in saved if step_saved <= step}
            base_step = step
        if kind in ("start", "resume"):
            other_run = event.get("run")
            has_attempts = True
    records = read_records(folder / "metrics.jsonl")
    last_step = max((record["step"] for record in records), default=0)
    return RecordedProgress(
        newest_saved_step=max(saved, default=None),
        other_run=other_run,
        has_attempts=has_attempts,
        base_step=base_step,
        last_begun_step=last_begun_step,
        last_step=last_step,
    )


def _read_progress_on_process_0(folder: Path) -> RecordedProgress:
    return RecordedProgress(
        **run_on_process_0(lambda: asdict(read_recorded_progress(folder)))
    )


def check_no_lost_checkpoint(
    checkpointer: Checkpointer, resume: str | Path | None
) -> None:
    """Checks, for a run without a checkpoint, that there was none to resume from, its
    own or another run's: a run that started afresh would drop all records of the
    training so far."""
    folder = checkpointer.folder.parent
    progress = _read_progress_on_process_0(folder)
    newest = progress.newest_saved_step
    if newest is not None:
        message = f"no checkpoint is left, but one of step {newest} was saved"
        raise _restart_error(checkpointer, message, "put it back")
    if progress.other_run is not None and resume is None:
        message = (
            f"no checkpoint is here, and the run resumes from {progress.other_run}"
        )
        raise _restart_error(
            checkpointer, message, f"give --resume {progress.other_run} again"
        )
    # Without events there is no telling whether a checkpoint was saved.
    was_begun = run_on_process_0(lambda: _must_have_begun_checkpoint(folder, progress))
    if progress.last_step and (was_begun or not progress.has_attempts):
        message = (
            "no checkpoint is left, events.jsonl is lost or cut short, and "
            f"metrics.jsonl has records up to step {progress.last_step}"
        )
        raise _restart_error(checkpointer, message, "put both back")


def _must_have_begun_checkpoint(folder: Path, progress: RecordedProgress) -> bool:
    """Whether the last attempt must have begun a checkpoint that its events do not tell
    of: an update after one that was due has a record only behind that one's event."""
    try:
        # What the last attempt was told: this one has not written its config yet.
        config = load_config(RunConfig, folder / "config.yaml").value
    except MaxlmError:
        return False
    every = config.checkpoint.every_steps
    if not every:
        return False
    due = (progress.base_step // every + 1) * every
    return progress.last_begun_step < due < progress.last_step


def describe_lost_checkpoint(
    checkpointer: Checkpointer, step: int, skipped: Sequence[SkippedCheckpoint]
) -> str | None:
    """Returns a line for the user if a newer checkpoint than that of ``step``, which a
    run resumes from, was saved and is gone; None: none is, or ``skipped`` tells of
    it."""
    folder = checkpointer.folder.parent
    newest = _read_progress_on_process_0(folder).newest_saved_step
    if newest is None or newest <= step:
        return None
    if any(checkpoint.step == newest for checkpoint in skipped):
        return None
    return (
        f"checkpoint {newest} is gone: events.jsonl says that it was saved, and none "
        f"of the run's places has it; the {newest - step:,} steps since step {step} "
        "are trained again"
    )


def _restart_error(checkpointer: Checkpointer, message: str, fix: str) -> MaxlmError:
    places = str(checkpointer.folder.parent)
    if checkpointer.remote:
        places += f" and {checkpointer.remote.place}"
    restart = f"to start afresh, move {places} away, or set another name=..."
    return MaxlmError(message, where=str(checkpointer.folder), fix=f"{fix}; {restart}")
