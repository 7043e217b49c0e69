"""A run's checkpoints in all places: its own folder, its hosts' disks, and a copy elsewhere.

What can be gone on from is looked for in all of them, and the newest that can be read is taken.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from maxlm.runtime.collectives import all_gather_json, broadcast_from_process_0, raise_on_all_hosts
from maxlm.runtime.files import writing
from maxlm.train.checkpoint.keeper import Checkpointer, restore_from
from maxlm.train.checkpoint.local import LocalTier
from maxlm.train.checkpoint.reading import (
    PyTree,
    Unreadable,
    make_metadata,
    named_leaves,
    read_metadata,
    verify,
)
from maxlm.train.checkpoint.remote import RemoteTier
from maxlm.train.config import CheckpointConfig
from maxlm.train.grouped import Groups

Tier = Literal["folder", "local", "remote"]
_FETCHED = ".fetched"
_WORDS = {"folder": "", "local": "local ", "remote": "remote "}


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    step: int
    tier: Tier
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Skipped:
    """One that cannot be gone on from."""

    step: int
    tier: Tier
    why: str
    damaged: bool = True
    """It cannot be read; else it is not wanted."""

    def __str__(self) -> str:
        return f"{_WORDS[self.tier]}checkpoint {self.step} is skipped: {self.why}"


class Tiers:
    """A context manager; all processes call every method together.

    Args:
        folder: the run's.
        name: the run's, under which its files lie in places that it shares.
        grouped: see :class:`Checkpointer`.

    Raises:
        MaxlmError: a place cannot be written, or reached.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        config: CheckpointConfig,
        *,
        grouped: Groups | None = None,
        read_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config, self._grouped, self._clock = config, grouped or {}, clock
        self._name, self._held = name, set[int]()
        # Runs of the same name in other folders may use the same disk.
        owner = str(Path(folder).absolute())
        own = hashlib.sha256(owner.encode()).hexdigest()[:8]
        self._local = (
            LocalTier(config.local_folder, f"{name}-{own}") if config.local_folder else None
        )
        lead = jax.process_index() == 0
        if lead and not read_only:  # left by a kill
            shutil.rmtree(Path(folder) / _FETCHED, ignore_errors=True)

        def reach() -> RemoteTier | None:
            place = config.remote_folder
            return RemoteTier(f"{place}/{name}", config, owner) if place and lead else None

        self._remote = raise_on_all_hosts(reach)
        self.keeper = Checkpointer(
            folder, config, grouped=grouped, read_only=read_only, held=self._needed
        )
        self._saved = clock()

    def _needed(self) -> set[int]:
        return self._held | (self._remote.busy if self._remote else set())

    @property
    def folder(self) -> Path:
        return self.keeper.folder

    def place(self, tier: Tier) -> str:
        """Where the checkpoints of a tier are, for messages (of the local one: this process's)."""
        if tier == "remote":
            return f"{self.config.remote_folder}/{self._name}"
        return str(self._local.folder if tier == "local" and self._local else self.folder)

    def late(self) -> bool:
        """Whether ``every_minutes`` have passed since the last checkpoint began (or the start), by
        this process's clock."""
        minutes = self.config.every_minutes
        return minutes is not None and self._clock() - self._saved >= 60 * minutes

    def due(self, step: int) -> bool:
        """Whether something is to be written at ``step``, whatever the time."""
        local = self._local is not None and step % self.config.local_every_steps == 0
        return local or self.keeper.due(step)

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: Mapping[str, Any],
        *,
        force: bool = False,
        suspect: int | None = None,
    ) -> Tier | None:
        """Start writing a checkpoint, if one is due at ``step``; the arrays may then be donated.

        Args:
            force: write one to the run's folder in any case.
            suspect: a step from which on the run may have gone bad: the newest checkpoint before
                it is kept besides.

        Returns:
            Where one was begun; None: nowhere, or the folder has this one.

        Raises:
            MaxlmError: this checkpoint, or the one before it, could not be written to the folder.
        """
        if force or self.keeper.due(step):
            good = [each for each in self.keeper.begun() if suspect and each < suspect]
            self._held = {max(good)} if good else set()
            if not self.keeper.save(step, state, metadata, force=True):
                return None
            if self._remote:
                self._remote.copy(self.keeper.path(step))
            self._saved = self._clock()
            return "folder"
        if self._local is None or step % self.config.local_every_steps:
            return None
        leaves = named_leaves(state)
        self._local.save(step, leaves, make_metadata(step, leaves, metadata))
        return "local"

    def catch_up(self) -> None:
        """Copy the folder's newest checkpoint, if its copy is missing: who made it was killed, or
        the other place could not be reached."""
        newest = self.keeper.latest()
        if self._remote and newest is not None and newest not in self._remote.steps():
            self._remote.copy(self.keeper.path(newest))

    def stop_copying(self) -> None:
        """Leave off what is being copied; ``catch_up`` begins it anew."""
        if self._remote:
            self._remote.stop()

    @property
    def uncopied(self) -> str | None:
        """Why the newest checkpoint has no copy, if it should have one."""
        if self._remote is None:
            return None
        self._remote.wait()
        failure = self._remote.failure
        return failure and f"the last checkpoint is not in {self.place('remote')}: {failure}"

    def found(self) -> tuple[list[Found], list[Skipped]]:
        """All complete checkpoints with readable metadata, newest first, and the others; also the
        local ones that only some processes have."""
        remote = self._remote.steps() if self._remote else []
        folder, remote = broadcast_from_process_0([self.keeper.steps(), remote])
        own = all_gather_json(self._local.steps() if self._local else [])
        steps: dict[Tier, list[int]] = {  # by how quickly they are read
            "local": sorted(set.intersection(*map(set, own))),
            "folder": folder,
            "remote": remote,
        }
        found, skipped = [], []
        for step in set.union(*map(set, own)).difference(steps["local"]):
            without = next(n for n, each in enumerate(own) if step not in each)
            skipped.append(Skipped(step, "local", f"process {without} has none", damaged=False))
        everything: list[tuple[int, Tier]] = [(s, tier) for tier in steps for s in steps[tier]]
        everything.sort(key=lambda each: -each[0])
        for step, tier in everything:
            try:
                found.append(Found(step, tier, self._metadata(step, tier)))
            except Unreadable as error:
                skipped.append(Skipped(step, tier, error.what))
        return found, skipped

    def restore(self, checkpoint: Found, abstract: PyTree) -> PyTree:
        """The state in a checkpoint, each array in the sharding that is asked for.

        Raises:
            Unreadable: it is damaged, or not for this mesh.
            MaxlmError: it is of another model or optimizer.
        """
        step = checkpoint.step
        if checkpoint.tier == "folder":
            return restore_from(self.keeper.path(step), abstract, self._grouped)
        if checkpoint.tier == "remote":
            path = self._fetched(step)
            try:
                return restore_from(path, abstract, self._grouped)
            finally:
                all_gather_json(None)  # all have read it
                if self._remote:
                    shutil.rmtree(path.parent, ignore_errors=True)
        local = self._local
        assert local is not None
        leaves = raise_on_all_hosts(lambda: local.read(step, abstract))
        known = {name: int(x) for name, x in checkpoint.metadata["fingerprints"].items()}
        verify(local.path(step), leaves, known, {})
        return jax.tree.unflatten(jax.tree.structure(abstract), list(leaves.values()))

    def restore_newest(
        self,
        found: Sequence[Found],
        abstract: PyTree,
        refuse: Callable[[Found], str | None] = lambda _: None,
    ) -> tuple[PyTree, Found | None, list[Skipped]]:
        """The state of the first of ``found`` that can be read.

        Args:
            refuse: why one is not to be gone on from.

        Returns:
            The state and whose it is, None twice if there is none; those skipped on the way.
        """
        skipped = []
        for each in found:
            why = refuse(each)
            if why is not None:
                skipped.append(Skipped(each.step, each.tier, why, damaged=False))
                continue
            try:
                return self.restore(each, abstract), each, skipped
            except Unreadable as error:
                skipped.append(Skipped(each.step, each.tier, error.what))
        return None, None, skipped

    def set_aside(self, skipped: Sequence[Skipped], step: int) -> None:
        """Take checkpoints that cannot be gone on from out of the way of those to come.

        A damaged one in the run's folder is renamed (``40.damaged``), and a damaged copy stays as
        it is: what cannot be read now may be read another day. Others are deleted.

        Args:
            step: that is gone on from.
        """
        if self._local:
            for newer in self._local.steps():
                if newer > step:
                    self._local.forget(newer)
        for each in skipped:
            if each.tier == "remote" and self._remote and each.damaged:
                self._remote.overlook(each.step)
            elif each.tier == "remote" and self._remote:
                self._remote.forget(each.step)
            elif each.tier == "folder" and jax.process_index() == 0:
                path = self.keeper.path(each.step)
                # A kill leaves half of an old one that was being deleted.
                half = each.step < step and not (path / "metadata" / "metadata").exists()
                kept = each.damaged and not half
                aside = path.with_name(f"{each.step}.{'damaged' if kept else 'left'}")
                shutil.rmtree(aside, ignore_errors=True)
                if path.exists():
                    with writing(path):
                        path.rename(aside)
                if not kept:
                    shutil.rmtree(aside, ignore_errors=True)
        all_gather_json(None)
        self.keeper.reload()

    def wait(self) -> None:
        """Return once nothing is being written any more; copies may still be made.

        Raises:
            MaxlmError: the last checkpoint could not be written.
        """
        self.keeper.wait()
        if self._local:
            self._local.wait()

    def free_hosts(self) -> None:
        """Delete what is on the hosts' own disks: the run is done, and its end in the folder."""
        if self._local:
            self._local.clear()

    def __enter__(self) -> "Tiers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_copying()
        try:
            self.keeper.close()
        finally:
            if self._local:
                self._local.close()

    def _metadata(self, step: int, tier: Tier) -> dict[str, Any]:
        if tier == "folder":
            return raise_on_all_hosts(lambda: read_metadata(self.keeper.path(step)))
        if tier == "remote":
            return broadcast_from_process_0(
                raise_on_all_hosts(lambda: self._remote and self._remote.metadata(step))
            )
        metadata = raise_on_all_hosts(lambda: self._local.metadata(step) if self._local else {})
        # A host that was away may have kept a file of the same step from before.
        known = json.dumps(metadata.get("fingerprints"), sort_keys=True).encode()
        if len(set(all_gather_json(hashlib.sha256(known).hexdigest()))) > 1:
            fix = "restore another step"
            raise Unreadable("its files are not of one save", where=self.place(tier), fix=fix)
        return metadata

    def _fetched(self, step: int) -> Path:
        """A copy's files, where all processes read them."""
        path = self.folder / _FETCHED / str(step)
        remote = self._remote

        def fetch() -> None:
            if remote:
                shutil.rmtree(path.parent, ignore_errors=True)
                remote.fetch(step, path)

        raise_on_all_hosts(fetch)
        return path
