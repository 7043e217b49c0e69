"""The checkpoints in a run's folder, written by Orbax.

A checkpoint holds every array of a state under its canonical name
(``params.layers.query``, ``opt_state.1.mu.layers.query``), undivided for a reader, and
a JSON file of metadata. Nothing of the mesh, the number of processes or Python's types
is needed to read it back.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    CustomSteps,
    EveryNSteps,
    LatestN,
)

from maxlm.checkpoint.config import CheckpointConfig
from maxlm.checkpoint.reading import (
    Groups,
    PyTree,
    add_integrity_fields,
    check_saved_shapes,
    convert_storage_errors,
    flatten_layer_groups,
    read_metadata,
    restore_from,
    with_retries,
)
from maxlm.config import MaxlmError
from maxlm.models.params import flatten_names
from maxlm.runtime.collectives import broadcast_from_process_0, raise_on_all_hosts
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.json_types import JsonMapping, JsonObject


def list_checkpoint_steps(folder: str | Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, ascending; opens none."""
    return sorted(
        int(path.name) for path in Path(folder).glob("[0-9]*") if path.name.isdigit()
    )


class FolderTier(AbstractContextManager["FolderTier"]):
    """The checkpoints in one folder. All processes call every method together. A
    context manager.

    Args:
        folder: made if missing. What an interrupted save left behind in it is removed.
        read_only: change nothing, so that a run that is still writing can be read.
        layer_groups: for parameters that a circular pipeline holds as [groups, layers /
            groups, ...], by canonical name, these two sizes; needed to write, not to
            read.
    """

    name = "folder"

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        layer_groups: Groups | None = None,
    ):
        self.folder = Path(folder).absolute()
        self.place = str(self.folder)
        self._config = config or CheckpointConfig()
        self._groups = layer_groups or {}
        # Steps of saves, until ``pop_completed`` returns them.
        self._pending: list[int] = []
        # Orbax logs each file it touches, and the errors it raises besides.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if read_only and not self.folder.is_dir():
            fix = "name a run that has saved one"
            raise MaxlmError("no checkpoints here", where=str(folder), fix=fix)
        # Orbax asks them at each save, which replaces the first.
        self._policies: list[Any] = [CustomSteps([]), LatestN(self._config.keep_last)]
        if self._config.keep_every:
            self._policies.append(EveryNSteps(self._config.keep_every))
        # Hosts see a shared folder change at different times.
        broadcasts = not read_only and jax.process_count() > 1
        message = "cannot keep checkpoints here"
        fix = "name a folder that can be written"
        with convert_storage_errors(message, self.place, fix):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy(self._policies),
                    enable_async_checkpointing=self._config.asynchronous,
                    cleanup_tmp_directories=not read_only,
                    create=not read_only,
                    read_only=read_only,
                    single_host_load_and_broadcast=broadcasts,
                ),
                handler_registry=ocp.handlers.create_default_handler_registry(
                    state=ocp.PyTreeCheckpointHandler(use_zarr3=True),
                    metadata=ocp.JsonCheckpointHandler(),
                ),
            )

    def is_due(self, step: int) -> bool:
        every = self._config.every_steps
        return every > 0 and step % every == 0

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: JsonMapping,
        protected_steps: Sequence[int] = (),
    ) -> bool:
        """Starts writing a checkpoint of arrays (with several processes, over all their
        devices) and JSON values; the arrays may then be donated. False: ``step`` has
        one. Raises MaxlmError if this one, or the one before it, could not be written.
        ``protected_steps``: those that must stay now, besides what the config keeps."""
        if step in self._manager.all_steps():
            return False
        arrays = flatten_layer_groups(flatten_names(state), self._groups)
        on_devices = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
        metadata = add_integrity_fields(step, on_devices, metadata)
        with self._explain_writing():
            self._pending.append(step)
            self._policies[0] = CustomSteps(protected_steps)
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    metadata=ocp.args.JsonSave(metadata),
                ),
                force=True,
            )

    def pop_completed(self) -> list[int]:
        """Returns the steps whose saves have completed since the last call; waits for
        nothing."""
        saving = []
        if self._manager.is_saving_in_progress():
            saving = self._pending[-1:]
        # A save that failed leaves no folder of its name.
        completed = [
            step
            for step in self._pending
            if step not in saving and self.path(step).is_dir()
        ]
        self._pending = saving
        return completed

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first; waits for a
        save."""
        self.wait()  # Orbax lists a step as soon as its save begins.
        # In a folder that another run writes to, processes may see different steps.
        return broadcast_from_process_0(self.steps_including_unfinished())

    def steps_including_unfinished(self) -> list[int]:
        """Returns the steps of all checkpoints and of one being written; waits for
        nothing."""
        return sorted(map(int, self._manager.all_steps()))  # NumPy's, if broadcast

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint; waits for a save."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def metadata(self, step: int | None = None) -> JsonObject:
        """Returns what was saved beside the state at ``step`` (default: the newest);
        raises MaxlmError if there is none, or UnreadableCheckpoint."""
        path = self.path(self._find_step(step))
        return raise_on_all_hosts(lambda: read_metadata(path))

    def restore(
        self,
        step: int | None,
        abstract: PyTree,
        subtree: str = "",
        *,
        is_part: bool = False,
    ) -> PyTree:
        """Returns a saved state, each array read straight into the sharding that is
        asked for, and checked against its fingerprint.

        Args:
            step: default, the newest.
            subtree: the part of the state, such as ``params``, to read alone; default:
                all.
            abstract: it as ``ShapeDtypeStruct`` leaves with shardings, on any mesh
                (no sharding: the first device). Arrays are cast to its dtypes.
            is_part: whether the subtree may hold other arrays.

        Raises:
            UnreadableCheckpoint: it is damaged.
            MaxlmError: no such checkpoint, or one of another model or optimizer (names
                the first array that differs, parameters before others).
        """
        path = self.path(self._find_step(step))
        return restore_from(path, abstract, subtree=subtree, is_part=is_part)

    def check_shapes(
        self, step: int | None, abstract: PyTree, subtree: str = ""
    ) -> None:
        """Checks, reading no array, that :meth:`restore` would find what it looks for;
        raises as it does."""
        check_saved_shapes(self.path(self._find_step(step)), abstract, subtree=subtree)

    def discard_skipped(
        self, is_damaged_by_step: Mapping[int, bool], resume_step: int
    ) -> None:
        """Takes checkpoints (step -> whether it is damaged) out of the way of those to
        come: renames damaged ones to ``40.damaged``, as they may be repaired, and
        deletes others."""
        if jax.process_index() != 0:
            return
        for step, is_damaged in is_damaged_by_step.items():
            path = self.path(step)
            if not path.exists():
                continue
            # A kill leaves half of an old one that was being deleted.
            has_metadata = (path / "metadata" / "metadata").exists()
            is_half = step < resume_step and not has_metadata
            with convert_write_errors(path):
                if is_damaged and not is_half:
                    aside = path.with_name(f"{step}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                else:
                    shutil.rmtree(path)

    def reload(self) -> None:
        """Lists again what other processes changed in the folder; raises
        UnreadableCheckpoint."""
        # It fails while another run deletes a checkpoint.
        raise_on_all_hosts(lambda: with_retries(self.folder, self._manager.reload))

    def wait(self) -> None:
        """Waits until nothing is being written; raises MaxlmError if the last one was
        not."""
        with self._explain_writing():
            self._manager.wait_until_finished()

    def _explain_writing(self) -> AbstractContextManager[None]:
        fix = "free disk space or fix permissions, then rerun"
        return convert_storage_errors("a checkpoint was not written", self.place, fix)

    def close(self) -> None:
        """Finishes what is being written."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_step(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise MaxlmError(
                "no checkpoint here", where=self.place, fix="train for longer"
            )
        if step is not None and step not in steps:
            fix = f"use one of {', '.join(map(str, steps))}"
            raise MaxlmError(f"no checkpoint of step {step}", where=self.place, fix=fix)
        return steps[-1] if step is None else step
