"""Emergency checkpoints: each process's own shards, in one file a step on its host's own disk.

They are quick to write and outlive the job (a preemption, a crash, a hang), but not the host. A
file is complete once it has its name, and a step can be restored if every process has a file of it
with the shards that its devices need: the same mesh over the same processes. A file that cannot be
written is reported, and training continues.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.runtime.collectives import all_gather_json, broadcast_from_process_0, raise_on_all_hosts
from maxlm.runtime.files import convert_write_errors
from maxlm.train.checkpoint.reading import (
    PyTree,
    Unreadable,
    check_fingerprints,
    describe_error,
    make_metadata,
    named_leaves,
    parse_metadata,
    with_retries,
)

NUM_KEPT = 2  # A process may have written a step that another has yet to write.
_SUFFIX = ".safetensors"
_START = "start"  # names the start of the run that a process's folder was last used by


class LocalTier:
    """The files on the disks of a run's hosts. All processes call every method together.

    Args:
        folder: on this host's own disk; made if missing.
        name: of the run, unlike any other's that uses the disk.
        every_steps: steps between two saves.

    Raises:
        MaxlmError: it cannot be written.
    """

    name = "local"

    def __init__(self, folder: str | Path, name: str, every_steps: int):
        self.folder = Path(folder).expanduser() / name / f"process-{jax.process_index()}"
        self.place = str(self.folder)
        self._every_steps = every_steps
        self._thread: threading.Thread | None = None
        self._stale_dirs: list[Path] = []
        """Of processes that are on another host now."""
        with convert_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Of all the run's processes: this host may have had others.
            for left in self.folder.parent.glob("process-*/.*"):
                if not _is_alive(left.name[1:]):  # it was killed
                    shutil.rmtree(left, ignore_errors=True)
            for left in self.folder.glob(".tmp*"):  # likewise, as safetensors calls its own
                left.unlink(missing_ok=True)
            start = broadcast_from_process_0(uuid.uuid4().hex)
            (self.folder / _START).write_text(start)
            all_gather_json(None)  # Those that share this disk have written it too.
            for each in self.folder.parent.glob("process-*"):
                note = each / _START
                if not note.exists() or note.read_text() != start:
                    self._stale_dirs.append(each)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written at ``step``."""
        return step % self._every_steps == 0

    def path(self, step: int) -> Path:
        """This process's file of a step."""
        return self.folder / f"{step}{_SUFFIX}"

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> bool:
        """Copies arrays to the host, and writes them while training continues; waits for the file
        before this one. One copy of this process's shards is in its memory meanwhile."""
        leaves = named_leaves(state)
        metadata = make_metadata(step, leaves, metadata)
        self.wait()
        arrays: dict[str, np.ndarray] = {}
        for name, leaf in leaves.items():
            for shard in leaf.addressable_shards:
                key = f"{name}@{_shard_key(shard.index, leaf.shape)}"
                if key not in arrays:
                    # A copy: on CPU the array's memory would be the next step's.
                    arrays[key] = np.array(shard.data)
        header = {"metadata": json.dumps(metadata)}
        self._thread = threading.Thread(target=self._write, args=(step, arrays, header))
        self._thread.start()
        return True

    def _write(self, step: int, arrays: dict[str, np.ndarray], header: dict[str, str]) -> None:
        from safetensors.numpy import save_file

        try:
            # A folder, since safetensors writes to a file of yet another name first.
            unfinished = self.folder / f".{os.getpid()}" / str(step)
            unfinished.parent.mkdir(exist_ok=True)
            save_file(arrays, unfinished, header)
            unfinished.replace(self.path(step))
            for old in self._own_steps()[:-NUM_KEPT]:
                self.path(old).unlink(missing_ok=True)
            while self._stale_dirs:  # This host has a newer file now.
                shutil.rmtree(self._stale_dirs.pop(), ignore_errors=True)
        except Exception as error:  # safetensors has its own for a full disk
            print(
                f"local checkpoint {step} was not written to {self.folder} "
                f"({describe_error(error)}); training continues",
                file=sys.stderr,
                flush=True,
            )

    def _own_steps(self) -> list[int]:
        names = (path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}"))
        return sorted(int(name) for name in names if name.isdigit())

    def steps(self) -> list[int]:
        """Returns the steps of which any process has a file, oldest first."""
        return sorted(set().union(*all_gather_json(self._own_steps())))

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state.

        Raises:
            Unreadable: a process has no file, or a damaged one; files are of different saves.
        """
        has_file = all_gather_json(self.path(step).exists())
        fix = "restore another step"
        if not all(has_file):
            what = f"process {has_file.index(False)} has none"
            raise Unreadable(what, where=self.place, fix=fix)
        metadata = raise_on_all_hosts(lambda: self._read_metadata(step))
        # A host that was away may have kept a file of the same step from before.
        known = json.dumps(metadata.get("fingerprints"), sort_keys=True).encode()
        if len(set(all_gather_json(hashlib.sha256(known).hexdigest()))) > 1:
            raise Unreadable("its files are not of one save", where=self.place, fix=fix)
        return metadata

    def _read_metadata(self, step: int) -> dict[str, Any]:
        from safetensors import safe_open

        def read() -> dict[str, Any]:
            with safe_open(self.path(step), "np") as file:
                return parse_metadata(file.metadata()["metadata"])

        return with_retries(self.path(step), read)

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """Returns the state, each device's part from its process's file.

        Raises:
            Unreadable: it is damaged, or holds other shards.
        """
        path, wanted = self.path(step), named_leaves(abstract)

        def read() -> tuple[dict[str, int], dict[str, jax.Array]]:
            known = self._read_metadata(step)["fingerprints"]
            return known, with_retries(path, lambda: _read_shards(path, wanted))

        known, leaves = raise_on_all_hosts(read)
        check_fingerprints(path, leaves, known, {})
        return jax.tree.unflatten(jax.tree.structure(abstract), list(leaves.values()))

    def quarantine(self, steps: Mapping[int, bool], resume_step: int) -> None:
        """Deletes all files that are newer than the step that the run resumes from."""
        for step in self._own_steps():
            if step > resume_step:
                self.path(step).unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes all files of the run that this process has on this host."""
        self.wait()
        for each in (self.folder, *self._stale_dirs):
            shutil.rmtree(each, ignore_errors=True)
        with suppress(OSError):  # Other processes still have theirs.
            self.folder.parent.rmdir()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Finishes what is being written, and leaves nothing else behind."""
        self.wait()
        shutil.rmtree(self.folder / f".{os.getpid()}", ignore_errors=True)


def _read_shards(path: Path, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads arrays by name; each device's part is in this process's file.

    Raises:
        Unreadable: the file holds other shards.
    """
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        keys, shards = set(file.keys()), {}

        def read_shard(name: str, shape: tuple[int, ...], index: Any) -> np.ndarray:
            key = f"{name}@{_shard_key(index, shape)}"
            if key not in keys:
                what = "unreadable (it was written on another mesh or by other processes)"
                raise Unreadable(what, where=str(path), fix="restore another step")
            if key not in shards:
                shards[key] = file.get_tensor(key)
            return shards[key]

        return {
            name: jax.make_array_from_callback(
                leaf.shape,
                leaf.sharding,
                lambda index, name=name, shape=leaf.shape: read_shard(name, shape, index),
            )
            for name, leaf in leaves.items()
        }


def _shard_key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A shard's place: ``0:4,2:8``."""
    bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return ",".join(f"{first}:{last}" for first, last in bounds)


def _is_alive(process: str) -> bool:
    """Whether there is another process of this number on this host."""
    if process == str(os.getpid()):  # of an earlier one: containers count anew
        return False
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
