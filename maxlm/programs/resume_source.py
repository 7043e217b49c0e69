"""The checkpoints that a run resumes from: its own, or another run's."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.programs.prepare import check_prepared
from maxlm.programs.resume_checks import check_not_lost, check_same_config, raise_unreadable
from maxlm.programs.setup import Setup
from maxlm.train.checkpoint import (
    Checkpointer,
    FoundCheckpoint,
    SkippedCheckpoint,
    group_sizes,
)

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

    def refresh(self) -> "ResumeSource":
        """Lists another run's checkpoints again: it may still train, and delete its old ones."""
        if self.is_own:
            return self
        self.checkpointer.reload()
        found, skipped = self.checkpointer.find()
        return replace(self, found=found, skipped=skipped) if found else self


def find_resume_source(
    setup: Setup, checkpointer: Checkpointer, resume: str | Path | None, stack: ExitStack, say: Say
) -> ResumeSource | None:
    """Returns this run's own checkpoints, else those of the run to resume, else None.

    Own checkpoints that cannot be resumed from are reported and cleared away.

    Raises:
        MaxlmError: they, or the text prepared here, are of another config; none of them can be
            read; none to resume from.
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
        home, grouped = Path(resume) / "checkpoints", group_sizes(setup.specs)
        if not home.is_dir():
            fix = "name a run that has saved one"
            raise MaxlmError("no checkpoints here", where=str(home), fix=fix)
        other = stack.enter_context(Checkpointer(home, "", grouped=grouped, read_only=True))
        source = ResumeSource(other, False, *other.find())
        if not source.found and source.skipped:
            raise_unreadable(other, source.skipped)
        if not source.found:
            raise MaxlmError("no checkpoint here", where=str(home), fix="train for longer")
    check_same_config(setup.config, source.metadata["config"], source.found[0].tier.place)
    return source
