"""Emergency checkpoints: each process's own shards, in one file a step on a disk of its host's own.

They are quick to write and outlive the job (a preemption, a crash, a hang), not the host. A file is
complete once it has its name, and a step can be restored if every process has a file of it with
the shards that its devices need: the same mesh over the same processes.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.work.paths import replacing, writing
from maxlm.train.checkpoint.fingerprint import fingerprints
from maxlm.train.checkpoint.reading import Leaves, PyTree, Unreadable, first_line, named_leaves

KEPT = 2  # A process may be done with a step that another has yet to write.
_SUFFIX = ".safetensors"


class LocalTier:
    """The files of one process. All processes call every method but ``steps`` together.

    Args:
        folder: on this host's own disk; made if missing.
        name: of the run, so that several may share the disk.

    Raises:
        MaxlmError: it cannot be written.
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder = Path(folder).expanduser() / name / f"process-{jax.process_index()}"
        self._thread: threading.Thread | None = None
        self._failed: MaxlmError | None = None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f".*{_SUFFIX}.*"):  # by a process that was killed
                left.unlink()

    def steps(self) -> list[int]:
        """Steps of which this process has a file, oldest first."""
        names = (path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"{step}{_SUFFIX}"

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Copy the state to the host, and write it while training goes on.

        Raises:
            MaxlmError: the file before this one could not be written.
        """
        self.wait()
        leaves = named_leaves(state)
        known = fingerprints(leaves)
        shards = {
            f"{name}@{_key(shard.index, leaf.shape)}": shard.data
            for name, leaf in leaves.items()
            for shard in leaf.addressable_shards
        }
        for shard in shards.values():
            shard.copy_to_host_async()
        # A copy: on CPU the arrays' memory would be the next step's.
        arrays = {key: np.array(shard) for key, shard in shards.items()}
        header = {"metadata": json.dumps({"step": step, **metadata, "fingerprints": known})}
        self._thread = threading.Thread(target=self._write, args=(step, arrays, header))
        self._thread.start()

    def _write(self, step: int, arrays: dict[str, np.ndarray], header: dict[str, str]) -> None:
        from safetensors.numpy import save_file

        try:
            with replacing(self.path(step)) as temporary:
                save_file(arrays, temporary, header)
            for old in self.steps()[:-KEPT]:
                self.path(old).unlink(missing_ok=True)
        except Exception as error:  # safetensors has its own for a full disk
            fix = "free some space there, or leave out checkpoint.local_folder"
            what = f"a local checkpoint was not written ({first_line(error)})"
            self._failed = MaxlmError(what, where=str(self.folder), fix=fix)

    def metadata(self, step: int) -> dict[str, Any]:
        """
        Raises:
            Unreadable: there is no such file, or it is damaged.
        """
        with _opened(self.path(step)) as file:
            return json.loads(file.metadata()["metadata"])

    def read(self, step: int, abstract: PyTree) -> Leaves:
        """The state's arrays by name, each device's part from this process's file.

        Raises:
            Unreadable: it is damaged, or holds other shards.
        """
        leaves = named_leaves(abstract)
        with _opened(self.path(step)) as file:
            there = set(file.keys())
            read: dict[str, np.ndarray] = {}

            def shard(name: str, shape: tuple[int, ...], index: Any) -> np.ndarray:
                key = f"{name}@{_key(index, shape)}"
                if key not in there:
                    raise ValueError("it was written on another mesh or by other processes")
                if key not in read:
                    read[key] = file.get_tensor(key)
                return read[key]

            return {
                name: jax.make_array_from_callback(
                    leaf.shape,
                    leaf.sharding,
                    lambda index, name=name, shape=leaf.shape: shard(name, shape, index),
                )
                for name, leaf in leaves.items()
            }

    def forget(self, step: int) -> None:
        """Delete the file of a step, if there is one."""
        self.path(step).unlink(missing_ok=True)

    def wait(self) -> None:
        """Return once nothing is being written any more.

        Raises:
            MaxlmError: the last file could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A shard's place: ``0:4,2:8``."""
    bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return ",".join(f"{first}:{last}" for first, last in bounds)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read from; all that fails is :class:`Unreadable`."""
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            yield file
    except Exception as error:
        what = f"unreadable ({first_line(error)})"
        raise Unreadable(what, where=str(path), fix="restore another step") from error
