"""Emergency checkpoints: each process's own shards, in one file a step on its host's
own disk.

They are quick to write and outlive the job (a preemption, a crash, a hang), but not the
host. A file has its name once it is complete, and a step can be restored if every
process has a file of it with the shards that its devices need: the same mesh over the
same processes. A file that cannot be written is reported, and training continues.
"""

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from maxlm.checkpoint.reading import (
    PyTree,
    UnreadableCheckpoint,
    add_integrity_fields,
    check_fingerprints,
    describe_error,
    parse_metadata,
    with_retries,
)
from maxlm.models.params import flatten_names
from maxlm.runtime.collectives import all_gather_json, raise_on_all_hosts
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.json_types import JsonMapping, JsonObject

NUM_KEPT = 2  # A process may have written a step that another has yet to write.
_SUFFIX = ".safetensors"
_FIX = "restore another step"


class LocalTier:
    """The files on the disks of a run's hosts. All processes call every method
    together. ``folder``: on this host's own disk; made if missing. ``name``: of the
    run, unlike any other's that uses the disk."""

    name = "local"

    def __init__(self, folder: str | Path, name: str, every_steps: int):
        # Beside it are those of other processes, and of this host's former process
        # numbers.
        self._run_folder = Path(folder).expanduser() / name
        self.folder = self._run_folder / f"process-{jax.process_index()}"
        self.place = str(self.folder)
        self._every_steps = every_steps
        self._thread: threading.Thread | None = None
        with convert_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Temporary files of safetensors', which a kill leaves.
            for path in self._run_folder.glob("process-*/.tmp*"):
                path.unlink(missing_ok=True)

    def is_due(self, step: int) -> bool:
        return step % self._every_steps == 0

    def path(self, step: int) -> Path:
        return self.folder / f"{step}{_SUFFIX}"

    def save(self, step: int, state: PyTree, metadata: JsonMapping) -> None:
        """Copies arrays to the host, and writes them while training continues; waits
        for the file before this one. One copy of this process's shards is in its memory
        meanwhile."""
        self.wait()
        leaves = flatten_names(state)
        header = {"metadata": json.dumps(add_integrity_fields(step, leaves, metadata))}
        arrays: dict[str, np.ndarray] = {}
        for name, leaf in leaves.items():
            for shard in leaf.addressable_shards:
                key = f"{name}@{_shard_key(shard.index, leaf.shape)}"
                if key not in arrays:
                    # A copy: on CPU the array's memory would be the next step's.
                    arrays[key] = np.array(shard.data)
        self._thread = threading.Thread(target=self._write, args=(step, arrays, header))
        self._thread.start()

    def _write(
        self, step: int, arrays: dict[str, np.ndarray], header: dict[str, str]
    ) -> None:
        try:
            # Under another name until it is complete.
            save_file(arrays, self.path(step), header)
            oldest_step = self._own_steps()[-NUM_KEPT:][0]
            for file_step, path in self._list_files("process-*"):
                if file_step < oldest_step:
                    path.unlink(missing_ok=True)
        except Exception as error:  # safetensors has its own for a full disk
            print(
                f"local checkpoint {step} was not written to {self.folder} "
                f"({describe_error(error)}); training continues",
                file=sys.stderr,
                flush=True,
            )

    def _list_files(self, processes: str) -> Iterator[tuple[int, Path]]:
        for path in self._run_folder.glob(f"{processes}/*{_SUFFIX}"):
            if path.stem.isdigit():
                yield int(path.stem), path

    def _own_steps(self) -> list[int]:
        return sorted(step for step, _ in self._list_files(self.folder.name))

    def steps(self) -> list[int]:
        """Returns the steps of which any process has a file, oldest first."""
        return sorted(set().union(*all_gather_json(self._own_steps())))

    def metadata(self, step: int) -> JsonObject:
        """Returns what was saved beside the state; raises UnreadableCheckpoint where a
        process has no file, or a damaged one, or files are of different saves."""
        has_file = all_gather_json(self.path(step).exists())
        if not all(has_file):
            message = f"process {has_file.index(False)} has none"
            raise UnreadableCheckpoint(message, where=self.place, fix=_FIX)
        metadata = raise_on_all_hosts(lambda: self._read_metadata(step))
        # A host that was away may have kept a file of the same step from before.
        fingerprints = json.dumps(metadata.get("fingerprints"), sort_keys=True)
        digest = hashlib.sha256(fingerprints.encode()).hexdigest()
        digests = all_gather_json(digest)
        if len(set(digests)) > 1:
            raise UnreadableCheckpoint(
                "its files are not of one save", where=self.place, fix=_FIX
            )
        return metadata

    def _read_metadata(self, step: int) -> JsonObject:
        def read() -> JsonObject:
            with safe_open(self.path(step), "np") as file:
                return parse_metadata(file.metadata()["metadata"])

        return with_retries(self.path(step), read)

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """Returns the state, each part from its process's file; raises
        UnreadableCheckpoint."""
        path = self.path(step)
        abstract_arrays = flatten_names(abstract)

        def read() -> tuple[dict[str, int], dict[str, jax.Array]]:
            fingerprints = self._read_metadata(step)["fingerprints"]
            arrays = with_retries(path, lambda: _read_shards(path, abstract_arrays))
            return fingerprints, arrays

        fingerprints, leaves = raise_on_all_hosts(read)
        check_fingerprints(path, leaves, fingerprints, {})
        return jax.tree.unflatten(jax.tree.structure(abstract), list(leaves.values()))

    def discard_skipped(
        self, is_damaged_by_step: Mapping[int, bool], resume_step: int
    ) -> None:
        """Deletes all files that are newer than the step that the run resumes from."""
        for step, path in self._list_files("process-*"):
            if step > resume_step:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes all files of the run on this host."""
        self.wait()
        shutil.rmtree(self._run_folder, ignore_errors=True)

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    close = wait


def _read_shards(
    path: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads arrays by name; raises UnreadableCheckpoint if the file holds other
    shards."""
    with safe_open(path, "np") as file:
        keys = set(file.keys())
        shards = {}

        def read_shard(
            name: str, shape: tuple[int, ...], index: tuple[slice, ...] | None
        ) -> np.ndarray:
            assert index is not None
            key = f"{name}@{_shard_key(index, shape)}"
            if key not in keys:
                message = (
                    "unreadable (it was written on another mesh or by other processes)"
                )
                raise UnreadableCheckpoint(message, where=str(path), fix=_FIX)
            if key not in shards:
                shards[key] = file.get_tensor(key)
            return shards[key]

        arrays = {}
        for name, leaf in leaves.items():
            read = partial(read_shard, name, leaf.shape)
            arrays[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
        return arrays


def _shard_key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A shard's place: ``0:4,2:8``."""
    bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return ",".join(f"{first}:{last}" for first, last in bounds)
