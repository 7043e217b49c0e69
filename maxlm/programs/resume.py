"""Where a run's state comes from, its own checkpoints, another run's, or fresh initialization, and
the checks before it resumes: its config and text are the same, and no checkpoint was lost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jax
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.data.store import TokenStore
from maxlm.data.store.manifest import read_manifest
from maxlm.models.params import Params
from maxlm.programs.load import init_state, load_frozen_models
from maxlm.programs.prepare import PreparedText, check_prepared, remove_source_settings
from maxlm.programs.setup import Setup
from maxlm.run import IDENTITY, INCIDENTAL, RunConfig
from maxlm.runtime.collectives import broadcast_from_process_0
from maxlm.train.anomaly import RollbackDecision
from maxlm.train.checkpoint import Checkpointer, FoundCheckpoint, SkippedCheckpoint, check_same
from maxlm.train.records import read_records
from maxlm.train.skips import Skips, get_batch_number, get_skips, has_same_batches, record_skip
from maxlm.train.state import TrainState, remove_frozen

Say = Callable[[str], None]


@dataclass(frozen=True)
class ResumeSource:
    """Checkpoints to resume from, newest first, at least one."""

    checkpointer: Checkpointer
    is_own: bool
    """They are this run's, not another's."""
    found: list[FoundCheckpoint]
    skipped: list[SkippedCheckpoint]
    """Those known to be unreadable so far."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.found[0].metadata


@dataclass(frozen=True)
class TrainingPosition:
    """A state to train from."""

    state: TrainState
    step: int
    skips: Skips
    """Batches that are skipped."""
    place: str = ""
    """Place of the checkpoint; empty: the run starts."""
    losses: Mapping[str, Any] | None = None
    """Memory of the loss spike detector."""
    skipped: Sequence[SkippedCheckpoint] = ()
    """Newer checkpoints that cannot be resumed from."""


def find_resume_source(
    setup: Setup, checkpointer: Checkpointer, resume: str | Path | None, stack: ExitStack, say: Say
) -> ResumeSource | None:
    """Returns this run's own checkpoints, else those of the run to resume, else None.

    Own checkpoints that cannot be resumed from are reported and cleared away.
    """
    source = ResumeSource(checkpointer, True, *checkpointer.find())
    if not source.found:
        if any(each.is_damaged and each.tier.name != "local" for each in source.skipped):
            raise_unreadable(checkpointer, source.skipped)
        check_not_lost(checkpointer, resume)
        for each in source.skipped:
            say(str(each))
        checkpointer.quarantine(source.skipped, 0)
        if resume is None:
            check_prepared(setup.config, checkpointer.folder.parent)
            return None
        home = Path(resume) / "checkpoints"
        other = stack.enter_context(Checkpointer(home, "", read_only=True))
        source = ResumeSource(other, False, *other.find())
        if not source.found and source.skipped:
            raise_unreadable(other, source.skipped)
        if not source.found:
            raise MaxlmError("no checkpoint here", where=str(home), fix="train for longer")
    check_same_config(setup.config, source.metadata["config"], source.found[0].tier.place)
    return source


@dataclass(frozen=True)
class StateSource:
    """Where a run's states come from, at its start and at a rollback."""

    setup: Setup
    checkpointer: Checkpointer
    resume_source: ResumeSource | None

    def restore(self, skips: Skips) -> TrainingPosition:
        """Returns the position to start or resume at; raises MaxlmError if none can be read."""
        if self.resume_source:
            return self._restore_latest(self.resume_source, skips)
        return self._add_frozen(TrainingPosition(init_state(self.setup), 0, skips))

    def rollback(
        self, decision: RollbackDecision, skips: Skips, event: Callable[..., None]
    ) -> TrainingPosition:
        """Restores the newest checkpoint from before the bad steps, else the position that the run
        began at, and skips the batches since, as Chowdhery et al. 2022 (PaLM, section 5.1) did.

        ``event`` takes ("discard", step) before all checkpoints after ``step`` are deleted.
        """
        checkpointer = self.checkpointer
        checkpointer.wait()
        if checkpointer.remote:
            checkpointer.remote.close()  # Copies may be of a bad state.
        source = ResumeSource(checkpointer, True, *checkpointer.find())
        good = [each.step for each in source.found if each.step < decision.first]
        position = None if good else self.restore(skips)
        base = position.step if position else max(good)
        skip = get_batch_number(base, skips), get_batch_number(decision.last - 1, skips)
        if position:
            # Before the record: a run killed between the two would refuse all its checkpoints.
            event("discard", base)
            found = [(each.step, each.tier) for each in source.found]
            abandoned = [SkippedCheckpoint(*each, why="", is_damaged=False) for each in found]
            checkpointer.quarantine(abandoned, base)
        if jax.process_index() == 0:
            record_skip(checkpointer.folder.parent, skips, skip, decision.reason)
        skips = (*skips, skip)
        return replace(position, skips=skips) if position else self._restore_latest(source, skips)

    def load_frozen(self) -> dict[str, Params]:
        """Returns the parameters of the models that the task reads and does not train."""
        return load_frozen_models(self.setup, lambda: init_state(self.setup).params)

    def _restore_latest(self, source: ResumeSource, skips: Skips) -> TrainingPosition:
        """Restores the newest state that can be read and was trained on this run's batches.

        Hosts' own disks may be lost: if only they had checkpoints, and none can be used by these
        hosts, the run starts afresh.
        """

        def refuse(checkpoint: FoundCheckpoint) -> str | None:
            if has_same_batches(checkpoint.step, get_skips(checkpoint.metadata), skips):
                return None
            return "it was trained on batches that are skipped since"

        checkpointer = source.checkpointer
        state, found, skipped = checkpointer.restore_newest(
            source.found, remove_frozen(self.setup.abstract_state), refuse
        )
        skipped = sorted([*source.skipped, *skipped], key=lambda each: -each.step)
        if found is None:
            if any(each.tier.name != "local" for each in skipped):
                raise_unreadable(checkpointer, skipped)
            checkpointer.quarantine(skipped, 0)
            fresh = init_state(self.setup)
            return self._add_frozen(TrainingPosition(fresh, 0, skips, skipped=skipped))
        if source.is_own:
            checkpointer.quarantine(skipped, found.step)
        newer = [each for each in skipped if each.step >= found.step]
        losses = found.metadata.get("losses")
        return self._add_frozen(
            TrainingPosition(state, found.step, skips, found.tier.place, losses, newer)
        )

    def _add_frozen(self, position: TrainingPosition) -> TrainingPosition:
        return replace(position, state=replace(position.state, frozen=self.load_frozen()))


def make_metadata(
    config: RunConfig,
    corpus: PreparedText,
    saved: Mapping[str, Any] | None,
    frozen: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the metadata of a run's checkpoints; ``saved``: that of the checkpoint whose state or
    parameters the run starts from."""
    tokenizer = corpus.tokenizer.fingerprint
    metadata = {
        "config": config.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "stores": {name: _describe_store(store) for name, store in corpus.training.items()},
    }
    # An export needs to know of the published model that the parameters came from, if any, its
    # family and, while the tokenizer is still its own, its token ids.
    if saved and (known := saved.get("published")) is not None:
        kept = ("family", "tokens") if saved["tokenizer"] == tokenizer else ("family",)
        metadata["published"] = {key: known[key] for key in kept if key in known}
    return metadata | ({"frozen": frozen} if frozen else {})


def check_same_text(
    config: RunConfig,
    corpus: PreparedText,
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    where: str,
) -> None:
    """Checks that a checkpoint to resume from was made with this tokenizer, these frozen models and
    stores; ``saved`` and ``now``: its metadata, and of those to come."""
    check_same(saved, now, ("tokenizer",), where)
    for name, model in now.get("frozen", {}).items():
        was = saved.get("frozen", {}).get(name, {})
        if was.get("fingerprint") != model["fingerprint"]:
            what = f"the frozen model {name!r} from {model['source']} is not the one that training "
            what += f"began with, from {was.get('source', 'nowhere')}"
            fix = "put its parameters back, or train in another run folder"
            raise MaxlmError(what, where=where, fix=fix)
    before = saved.get("stores", {})  # Checkpoints of older versions do not describe stores.
    for source in config.data.sources:
        name, store = source.name, now["stores"][source.name]
        # An older run, or store, has no hash of tokens.
        if name not in before or all(
            store[key] == value or None in (store[key], value)
            for key, value in before[name].items()
        ):
            continue
        was, became = (
            f"{each['documents']:,} documents, {each['tokens']:,} tokens"
            for each in (before[name], store)
        )
        fix = "give it the documents that it had, or train in another run folder"
        manifest = read_manifest(corpus.training[name].place)
        for count in range(1, len(manifest.segments) + 1 if source.store else 1):
            if manifest.first(count).offsets_sha256 == before[name]["offsets_sha256"]:
                fix = f"set store_segments: {count} for it, or train in another run folder"
        what = f"the store of source {name!r} is not what it was ({was}; now {became})"
        raise MaxlmError(what, where=where, fix=fix)


def check_same_config(config: RunConfig, saved: Mapping[str, Any], where: str) -> None:
    """Checks the settings that must be those that the checkpoint was written with."""
    # Settings that are newer than the checkpoint get their defaults. The comparison shows what is
    # wrong with a config that is not valid.
    with suppress(ValidationError, MaxlmError):
        saved = RunConfig.model_validate(saved).model_dump(mode="json")
    now = config.model_dump(mode="json")
    check_same(resume_keys(saved), resume_keys(now), IDENTITY, where)


def resume_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without the settings that may change when a run resumes.

    ``store_segments`` may, so that a run can resume after an append to its store: what the store
    then holds is compared.
    """
    config = remove_source_settings(config, ("store_segments",))
    return {
        part: {k: v for k, v in settings.items() if f"{part}.{k}" not in INCIDENTAL}
        if isinstance(settings, Mapping)
        else settings
        for part, settings in config.items()
    }


def _describe_store(store: TokenStore) -> dict[str, Any]:
    """Returns what shows whether a store still holds the same documents."""
    counts = {"documents": store.num_documents, "tokens": store.num_tokens}
    digest = store.manifest.tokens_sha256  # None: an older version made the store.
    return counts | {"offsets_sha256": store.offsets_sha256, "tokens_sha256": digest}


def raise_unreadable(checkpointer: Checkpointer, skipped: Sequence[SkippedCheckpoint]) -> NoReturn:
    """Raises MaxlmError for a run that can resume from none of its checkpoints. It does not start
    afresh by itself: that would throw its training away."""
    what = f"no checkpoint can be resumed from: {', '.join(map(str, skipped))}"
    raise _restart_error(checkpointer, what, "repair one")


def check_not_lost(checkpointer: Checkpointer, resume: str | Path | None) -> None:
    """Checks, for a run without a checkpoint, that its events report none to resume from, its own
    or another run's."""
    saved, other = set[int](), None
    for event in _read_events(checkpointer.folder.parent):
        kind, step = event["event"], event["step"]
        if kind == "saved":
            saved.add(step)
        elif kind in ("start", "resume", "rollback", "discard"):
            saved = {each for each in saved if each <= step}
        if kind in ("start", "resume"):
            other = event.get("run")
    newest, other = broadcast_from_process_0([max(saved, default=None), other])
    if newest is not None:
        what = f"no checkpoint is left, but one of step {newest} was saved"
        raise _restart_error(checkpointer, what, "put it back")
    if other is not None and resume is None:
        what = f"no checkpoint is here, and the run resumes from {other}"
        raise _restart_error(checkpointer, what, f"give --resume {other} again")


def count_rollbacks(folder: Path) -> int:
    """Returns how often a run has rolled back in its life."""
    return broadcast_from_process_0(sum(e["event"] == "rollback" for e in _read_events(folder)))


def _read_events(folder: Path) -> Iterable[Mapping[str, Any]]:
    """Returns a run's events, on process 0; none on others."""
    return read_records(folder / "events.jsonl") if jax.process_index() == 0 else ()


def _restart_error(checkpointer: Checkpointer, what: str, fix: str) -> MaxlmError:
    copies = f" and {remote.place}" if (remote := checkpointer.remote) else ""
    restart = f"to start afresh, move {checkpointer.folder.parent}{copies} away, or set another"
    return MaxlmError(what, where=str(checkpointer.folder), fix=f"{fix}; {restart} name=...")
