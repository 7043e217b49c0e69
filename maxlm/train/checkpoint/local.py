"""Emergency checkpoints: each process's own shards, in one file a step on a disk of its host's own.

They are quick to write and outlive the job (a preemption, a crash, a hang), not the host. A file is
complete once it has its name, and a step can be restored if every process has a file of it with
the shards that its devices need: the same mesh over the same processes. They are a help, not a
promise: one that cannot be written is told of, and training goes on.
"""

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

from maxlm.runtime.collectives import all_gather_json, broadcast_from_process_0
from maxlm.runtime.files import writing
from maxlm.train.checkpoint.reading import (
    Leaves,
    PyTree,
    Unreadable,
    first_line,
    named_leaves,
    parse_metadata,
    patiently,
)

KEPT = 2  # A process may be done with a step that another has yet to write.
_SUFFIX = ".safetensors"
_START = "start"  # names the start of the run that a process's folder was last used by


class LocalTier:
    """The files of one process.

    Args:
        folder: on this host's own disk; made if missing.
        name: of the run, unlike any other's that uses the disk.

    Raises:
        MaxlmError: it cannot be written.
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder = Path(folder).expanduser() / name / f"process-{jax.process_index()}"
        self._thread: threading.Thread | None = None
        self._strangers: list[Path] = []
        """Of processes that are on another host now."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Of all the run's processes: this host may have had others.
            for left in self.folder.parent.glob("process-*/.*"):
                if not _alive(left.name[1:]):  # it was killed
                    shutil.rmtree(left, ignore_errors=True)
            for left in self.folder.glob(".tmp*"):  # likewise, as safetensors calls its own
                left.unlink(missing_ok=True)
            start = broadcast_from_process_0(uuid.uuid4().hex)
            (self.folder / _START).write_text(start)
            all_gather_json(None)  # Those that share this disk have written it too.
            for each in self.folder.parent.glob("process-*"):
                note = each / _START
                if not note.exists() or note.read_text() != start:
                    self._strangers.append(each)

    def steps(self) -> list[int]:
        """Steps of which this process has a file, oldest first."""
        names = (path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"{step}{_SUFFIX}"

    def save(self, step: int, leaves: Leaves, metadata: Mapping[str, Any]) -> None:
        """Copy arrays (by name) to the host, and write them while training goes on; waits for the
        file before this one. One copy of this process's shards is in its memory meanwhile."""
        self.wait()
        arrays: dict[str, np.ndarray] = {}
        for name, leaf in leaves.items():
            for shard in leaf.addressable_shards:
                key = f"{name}@{_key(shard.index, leaf.shape)}"
                if key not in arrays:
                    # A copy: on CPU the array's memory would be the next step's.
                    arrays[key] = np.array(shard.data)
        header = {"metadata": json.dumps(metadata)}
        self._thread = threading.Thread(target=self._write, args=(step, arrays, header))
        self._thread.start()

    def _write(self, step: int, arrays: dict[str, np.ndarray], header: dict[str, str]) -> None:
        from safetensors.numpy import save_file

        try:
            # A folder, since safetensors writes to a file of yet another name first.
            unfinished = self.folder / f".{os.getpid()}" / str(step)
            unfinished.parent.mkdir(exist_ok=True)
            save_file(arrays, unfinished, header)
            unfinished.replace(self.path(step))
            for old in self.steps()[:-KEPT]:
                self.forget(old)
            while self._strangers:  # This host has better now.
                shutil.rmtree(self._strangers.pop(), ignore_errors=True)
        except Exception as error:  # safetensors has its own for a full disk
            print(
                f"local checkpoint {step} was not written to {self.folder} ({first_line(error)}); "
                "training goes on",
                file=sys.stderr,
                flush=True,
            )

    def metadata(self, step: int) -> dict[str, Any]:
        """
        Raises:
            Unreadable: there is no such file, or it is damaged.
        """
        from safetensors import safe_open

        def read() -> dict[str, Any]:
            with safe_open(self.path(step), "np") as file:
                return parse_metadata(file.metadata()["metadata"])

        return patiently(self.path(step), read)

    def read(self, step: int, abstract: PyTree) -> Leaves:
        """The state's arrays by name, each device's part from this process's file.

        Raises:
            Unreadable: it is damaged, or holds other shards.
        """
        from safetensors import safe_open

        leaves = named_leaves(abstract)

        def read() -> Leaves:
            with safe_open(self.path(step), "np") as file:
                there, parts = set(file.keys()), {}

                def part(name: str, shape: tuple[int, ...], index: Any) -> np.ndarray:
                    key = f"{name}@{_key(index, shape)}"
                    if key not in there:
                        what = "unreadable (it was written on another mesh or by other processes)"
                        fix = "restore another step"
                        raise Unreadable(what, where=str(self.path(step)), fix=fix)
                    if key not in parts:
                        parts[key] = file.get_tensor(key)
                    return parts[key]

                return {
                    name: jax.make_array_from_callback(
                        leaf.shape,
                        leaf.sharding,
                        lambda index, name=name, shape=leaf.shape: part(name, shape, index),
                    )
                    for name, leaf in leaves.items()
                }

        return patiently(self.path(step), read)

    def forget(self, step: int) -> None:
        """Delete the file of a step, if there is one."""
        self.path(step).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all of the run's that this process has on this host."""
        self.wait()
        for each in (self.folder, *self._strangers):
            shutil.rmtree(each, ignore_errors=True)
        with suppress(OSError):  # Others have not gone yet.
            self.folder.parent.rmdir()

    def wait(self) -> None:
        """Return once nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Finish what is being written, and leave nothing else behind."""
        self.wait()
        shutil.rmtree(self.folder / f".{os.getpid()}", ignore_errors=True)


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A shard's place: ``0:4,2:8``."""
    bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return ",".join(f"{first}:{last}" for first, last in bounds)


def _alive(process: str) -> bool:
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
