"""Finds a run's state: in its own checkpoints, another run's, or fresh initialization."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.models.params import Params
from maxlm.programs.load import init_or_warm_start_state, load_frozen_models
from maxlm.programs.prepare import check_prepared_data
from maxlm.programs.resume_checks import (
    check_no_lost_checkpoint,
    check_same_config,
    raise_no_readable_checkpoint,
)
from maxlm.programs.setup import RunSetup
from maxlm.train.anomaly import RollbackDecision
from maxlm.train.checkpoint import Checkpointer, FoundCheckpoint, SkippedCheckpoint
from maxlm.train.skips import Skips, get_batch_index, get_skips, has_same_batches, record_skip
from maxlm.train.state import TrainState, remove_frozen

Say = Callable[[str], None]


@dataclass(frozen=True)
class ResumeSource:
    """Checkpoints to resume from, newest first, at least one."""

    checkpointer: Checkpointer
    is_own_run: bool
    """Whether they are this run's, not another's."""
    found: list[FoundCheckpoint]
    skipped: list[SkippedCheckpoint]
    """Checkpoints known to be unreadable so far."""

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
    checkpoint_place: str = ""
    """Place of the checkpoint; empty: the run starts."""
    detector_state: Mapping[str, Any] | None = None
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
    if not source.found:
        if any(each.is_damaged and each.tier.name != "local" for each in source.skipped):
            raise_no_readable_checkpoint(checkpointer, source.skipped)
        check_no_lost_checkpoint(checkpointer, resume)
        for each in source.skipped:
            say(str(each))
        checkpointer.discard_skipped(source.skipped, 0)
        if resume is None:
            check_prepared_data(setup.config, checkpointer.folder.parent)
            return None
        home = Path(resume) / "checkpoints"
        other = stack.enter_context(Checkpointer(home, "", read_only=True))
        source = ResumeSource(other, False, *other.find())
        if not source.found and source.skipped:
            raise_no_readable_checkpoint(other, source.skipped)
        if not source.found:
            raise MaxlmError("no checkpoint here", where=str(home), fix="train for longer")
    check_same_config(setup.config, source.metadata["config"], source.found[0].tier.place)
    return source


@dataclass(frozen=True)
class StateRestorer:
    """Source of a run's states, at its start and at a rollback."""

    setup: RunSetup
    checkpointer: Checkpointer
    resume_source: ResumeSource | None

    def restore(self, skips: Skips, frozen: dict[str, Params]) -> TrainingPosition:
        """Returns the position to start or resume at, with the ``frozen`` models in its state;
        raises MaxlmError if none can be read."""
        if self.resume_source:
            position = self._restore_latest(self.resume_source, skips)
        else:
            position = TrainingPosition(init_or_warm_start_state(self.setup), 0, skips)
        return _add_frozen(position, frozen)

    def rollback(
        self, decision: RollbackDecision, skips: Skips, log_event: Callable[..., None]
    ) -> TrainingPosition:
        """Restores the newest checkpoint from before the bad steps, else the position that the run
        began at, and skips the batches since, as Chowdhery et al. 2022 (PaLM, section 5.1) did.

        ``log_event`` takes ("discard", step) before all checkpoints after ``step`` are deleted.
        """
        checkpointer = self.checkpointer
        checkpointer.wait()
        if checkpointer.remote:
            checkpointer.remote.close()  # Copies may be of a bad state.
        source = ResumeSource(checkpointer, True, *checkpointer.find())
        good = [each.step for each in source.found if each.step < decision.first_bad_step]
        position = None if good else self.restore(skips, self.load_frozen_params())
        base = position.step if position else max(good)
        skip = get_batch_index(base, skips), get_batch_index(decision.last_bad_step - 1, skips)
        if position:
            # Before the record: a run killed between the two would refuse all its checkpoints.
            log_event("discard", base)
            found = [(each.step, each.tier) for each in source.found]
            abandoned = [SkippedCheckpoint(*each, why="", is_damaged=False) for each in found]
            checkpointer.discard_skipped(abandoned, base)
        if jax.process_index() == 0:
            record_skip(checkpointer.folder.parent, skips, skip, decision.reason)
        skips = (*skips, skip)
        if position:
            return replace(position, skips=skips)
        return _add_frozen(self._restore_latest(source, skips), self.load_frozen_params())

    def load_frozen_params(self) -> dict[str, Params]:
        """Returns the parameters of the models that the task reads and does not train."""
        return load_frozen_models(self.setup, lambda: init_or_warm_start_state(self.setup).params)

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
        wanted = remove_frozen(self.setup.abstract_state)
        state, found, skipped = checkpointer.restore_newest(source.found, wanted, refuse)
        skipped = sorted([*source.skipped, *skipped], key=lambda each: -each.step)
        if found is None:
            if any(each.tier.name != "local" for each in skipped):
                raise_no_readable_checkpoint(checkpointer, skipped)
            checkpointer.discard_skipped(skipped, 0)
            fresh = init_or_warm_start_state(self.setup)
            return TrainingPosition(fresh, 0, skips, skipped=skipped)
        if source.is_own_run:
            checkpointer.discard_skipped(skipped, found.step)
        newer = [each for each in skipped if each.step >= found.step]
        where, losses = found.tier.place, found.metadata.get("losses")
        return TrainingPosition(state, found.step, skips, where, losses, newer)


def _add_frozen(position: TrainingPosition, frozen: dict[str, Params]) -> TrainingPosition:
    return replace(position, state=replace(position.state, frozen=frozen))
