"""Where a run's state comes from: checkpoints, or fresh initialization."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax

from maxlm.models.params import Params
from maxlm.programs.frozen import load_frozen_models
from maxlm.programs.init_checkpoint import find_init_checkpoint, init_state
from maxlm.programs.resume_checks import raise_unreadable
from maxlm.programs.resume_source import ResumeSource
from maxlm.programs.setup import Setup
from maxlm.train.anomaly import RollbackDecision
from maxlm.train.checkpoint import (
    Checkpointer,
    FolderTier,
    FoundCheckpoint,
    SkippedCheckpoint,
)
from maxlm.train.skips import Skips, get_batch_number, get_skips, has_same_batches, record_skip
from maxlm.train.state import TrainState, remove_frozen


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


def restore_latest(
    setup: Setup, source: ResumeSource, skips: Skips, init: Callable[[], TrainState]
) -> TrainingPosition:
    """Restores the newest state that can be read and was trained on this run's batches.

    Args:
        init: makes a fresh state. Hosts' own disks may be lost: if only they had checkpoints, and
            none can be used by these hosts, the run starts afresh.

    Raises:
        MaxlmError: there is none.
    """

    def refuse(checkpoint: FoundCheckpoint) -> str | None:
        if has_same_batches(checkpoint.step, get_skips(checkpoint.metadata), skips):
            return None
        return "it was trained on batches that are skipped since"

    checkpointer = source.checkpointer
    state, found, skipped = checkpointer.restore_newest(
        source.found, remove_frozen(setup.abstract_state), refuse
    )
    skipped = sorted([*source.skipped, *skipped], key=lambda each: -each.step)
    if found is None:
        if any(each.tier.name != "local" for each in skipped):
            raise_unreadable(checkpointer, skipped)
        checkpointer.quarantine(skipped, 0)
        return TrainingPosition(init(), 0, skips, skipped=skipped)
    if source.is_own:
        checkpointer.quarantine(skipped, found.step)
    newer = [each for each in skipped if each.step >= found.step]
    losses = found.metadata.get("losses")
    return TrainingPosition(state, found.step, skips, found.tier.place, losses, newer)


@dataclass(frozen=True)
class StateSource:
    """Where a run's states come from, at its start and at a rollback."""

    setup: Setup
    checkpointer: Checkpointer
    resume_source: ResumeSource | None
    init_checkpoint: FolderTier | None
    stack: ExitStack
    """Closes what is opened."""

    @property
    def saved_metadata(self) -> Mapping[str, Any] | None:
        """Metadata of the checkpoint that the state or the parameters come from."""
        if self.resume_source:
            return self.resume_source.metadata
        return self.init_checkpoint and self.init_checkpoint.metadata()

    def refresh(self) -> "StateSource":
        """Lists the checkpoints of other runs again, which may have trained on meanwhile."""
        if self.init_checkpoint:
            self.init_checkpoint.reload()
        return replace(self, resume_source=self.resume_source and self.resume_source.refresh())

    def restore(self, skips: Skips) -> TrainingPosition:
        """Returns the position to start or resume at; raises MaxlmError if none can be read."""
        if self.resume_source:
            source = self.resume_source.refresh()
            return self._add_frozen(restore_latest(self.setup, source, skips, self._init))
        return self._add_frozen(TrainingPosition(self._init(), 0, skips))

    def rollback(
        self, decision: RollbackDecision, skips: Skips, event: Callable[..., None]
    ) -> TrainingPosition:
        """Restores the newest checkpoint from before the bad steps, else the position that the run
        began at, and skips the batches since, as Chowdhery et al. 2022 (PaLM, section 5.1) did.

        Args:
            event: takes (``"discard"``, step) before all checkpoints after ``step`` are deleted.
        """
        checkpointer = self.checkpointer
        checkpointer.wait()
        checkpointer.stop_copying()  # of a state that may be bad
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
        if position:
            return replace(position, skips=skips)
        return self._add_frozen(restore_latest(self.setup, source, skips, self._init))

    def load_frozen(self) -> dict[str, Params]:
        """Returns the parameters of the models that the task reads and does not train."""
        return load_frozen_models(self.setup, lambda: self._init().params)

    def _add_frozen(self, position: TrainingPosition) -> TrainingPosition:
        return replace(position, state=replace(position.state, frozen=self.load_frozen()))

    def _init(self) -> TrainState:
        checkpoint = self.init_checkpoint or find_init_checkpoint(self.setup, self.stack)
        return init_state(self.setup, checkpoint)
