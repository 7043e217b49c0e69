"""A run's checkpoints in all places: its own folder, its hosts' disks, and copies
elsewhere.

A run resumes from the newest checkpoint that can be read, in whichever place it is.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from maxlm.checkpoint.config import CheckpointConfig
from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.local import LocalTier
from maxlm.checkpoint.reading import Groups, PyTree, UnreadableCheckpoint
from maxlm.checkpoint.remote import RemoteTier
from maxlm.checkpoint.skips import Skips, get_skips, has_same_batches
from maxlm.runtime.collectives import all_gather_json
from maxlm.runtime.json_types import JsonMapping

CheckpointTier = LocalTier | FolderTier | RemoteTier
"""A place for checkpoints, with a name and a place (path or URL) for messages. All
processes call every method together."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint."""

    step: int
    tier: CheckpointTier
    metadata: JsonMapping


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint that cannot be resumed from."""

    step: int
    tier: CheckpointTier
    why: str
    is_damaged: bool = True
    """Whether it cannot be read; else it is not wanted."""

    def __str__(self) -> str:
        prefix = "" if self.tier.name == "folder" else f"{self.tier.name} "
        return f"{prefix}checkpoint {self.step} is skipped: {self.why}"


class Checkpointer(AbstractContextManager["Checkpointer"]):
    """Saves to and restores from all tiers of a run. All processes call every method
    together. A context manager.

    Args:
        folder, layer_groups, read_only: see :class:`FolderTier`.
        name: of the run, under which its files lie in places that runs share.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        config: CheckpointConfig | None = None,
        *,
        layer_groups: Groups | None = None,
        read_only: bool = False,
    ):
        self._config = config or CheckpointConfig()
        self.folder = Path(folder).absolute()
        self.local = self.remote = None
        local_folder = self._config.local_folder
        if local_folder:
            # Runs of the same name in other folders may use the same disk.
            digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
            self.local = LocalTier(
                local_folder, f"{name}-{digest}", self._config.local_every_steps
            )
        remote_folder = self._config.remote_folder
        if remote_folder:
            place = f"{remote_folder}/{name}"
            self.remote = RemoteTier(place, self._config, self.folder)
        self.folder_tier = FolderTier(
            folder, config, layer_groups=layer_groups, read_only=read_only
        )
        # By how quickly they are read.
        tiers = (self.local, self.folder_tier, self.remote)
        self.tiers: list[CheckpointTier] = [tier for tier in tiers if tier]
        self._saved_at = time.monotonic()

    def is_due_by_time(self) -> bool:
        """Whether ``every_minutes`` have passed since the last checkpoint began (or the
        start), by this process's clock."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def is_due(self, step: int) -> bool:
        """Whether something is to be written at ``step``, whatever the time."""
        if self.folder_tier.is_due(step):
            return True
        return self.local is not None and self.local.is_due(step)

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: JsonMapping,
        *,
        force: bool = False,
        first_suspect_step: int | None = None,
    ) -> str | None:
        """Starts writing a checkpoint, if one is due at ``step``; the arrays may then
        be donated. Returns the name of the tier; None: nothing was due, or the folder
        has this one.

        Args:
            force: write one to the run's folder in any case.
            first_suspect_step: from which on updates may be bad: the newest checkpoint
                before it is kept besides.
        """
        if force or self.folder_tier.is_due(step):
            saved_steps = self.folder_tier.steps_including_unfinished()
            good_steps = [
                saved_step
                for saved_step in saved_steps
                if saved_step < (first_suspect_step or 0)
            ]
            protected_steps = good_steps[-1:]
            if self.remote:
                protected_steps += self.remote.steps_being_copied
            if not self.folder_tier.save(step, state, metadata, protected_steps):
                return None
            if self.remote:
                self.remote.start_copy(step)
            self._saved_at = time.monotonic()
            return self.folder_tier.name
        if self.local and self.local.is_due(step):
            self.local.save(step, state, metadata)
            return self.local.name
        return None

    def copy_newest_to_remote(self) -> None:
        """Copies the folder's newest checkpoint, if its copy is missing: a process was
        killed, or the remote place could not be reached."""
        newest = self.folder_tier.latest()
        if self.remote and newest is not None and newest not in self.remote.steps():
            self.remote.start_copy(newest)

    @property
    def remote_copy_failure(self) -> str | None:
        """Returns why the newest checkpoint lacks a copy that it should have; waits for
        copies."""
        if not self.remote:
            return None
        self.remote.wait()
        if self.remote.failure is None:
            return None
        place = self.remote.place
        return f"the last checkpoint is not in {place}: {self.remote.failure}"

    def find(self) -> tuple[list[FoundCheckpoint], list[SkippedCheckpoint]]:
        """Returns all checkpoints with readable metadata, newest first, and the
        others."""
        everything = [(step, tier) for tier in self.tiers for step in tier.steps()]
        # Newest first; of one step the tier that is read most quickly, as sorts are
        # stable.
        everything.sort(key=lambda step_and_tier: -step_and_tier[0])
        candidates = []
        skipped = []
        for step, tier in everything:
            try:
                candidates.append(FoundCheckpoint(step, tier, tier.metadata(step)))
            except UnreadableCheckpoint as error:
                skipped.append(SkippedCheckpoint(step, tier, error.message))
        return candidates, skipped

    def restore_newest(
        self, candidates: Sequence[FoundCheckpoint], abstract: PyTree, skips: Skips = ()
    ) -> tuple[PyTree, FoundCheckpoint | None, list[SkippedCheckpoint]]:
        """Restores the first of ``candidates`` that can be read and was trained on the
        batches of a run with these ``skips``. Returns the state and its checkpoint
        (None twice if there is none), and those skipped."""
        skipped = []
        for candidate in candidates:
            step = candidate.step
            tier = candidate.tier
            skips_of_checkpoint = get_skips(candidate.metadata)
            if not has_same_batches(step, skips_of_checkpoint, skips):
                why = "it was trained on batches that are skipped since"
                skipped.append(SkippedCheckpoint(step, tier, why, is_damaged=False))
                continue
            try:
                state = tier.restore(step, abstract)
            except UnreadableCheckpoint as error:
                skipped.append(SkippedCheckpoint(step, tier, error.message))
            else:
                return state, candidate, skipped
        return None, None, skipped

    def discard_skipped(
        self, skipped: Sequence[SkippedCheckpoint], resume_step: int
    ) -> None:
        """Takes checkpoints out of the way of those to come, in a run that resumes from
        ``resume_step`` (0: it starts)."""
        for tier in self.tiers:
            is_damaged_by_step = {
                checkpoint.step: checkpoint.is_damaged
                for checkpoint in skipped
                if checkpoint.tier is tier
            }
            tier.discard_skipped(is_damaged_by_step, resume_step)
        all_gather_json(None)  # Process 0 is done.
        self.folder_tier.reload()

    def wait(self) -> None:
        """Waits until nothing is being written; copies may still be made. Raises
        MaxlmError if the last checkpoint could not be written."""
        self.folder_tier.wait()
        if self.local:
            self.local.wait()

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for tier in self.tiers:
                stack.callback(tier.close)
