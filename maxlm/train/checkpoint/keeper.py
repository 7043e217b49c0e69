"""Checkpoints in one folder: layout-free, asynchronous, atomic.

A checkpoint holds every array of a state under its canonical name (``params.layers.query``,
``opt_state.1.mu.layers.query``), whole as far as a reader can tell, and a JSON file of metadata.
Nothing of the mesh, the number of processes or Python's types is needed to read it back.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from maxlm.config import MaxlmError
from maxlm.runtime.collectives import broadcast_from_process_0, raise_on_all_hosts
from maxlm.train.checkpoint.reading import (
    Leaves,
    PyTree,
    as_held,
    as_on_disk,
    check_arrays,
    first_line,
    make_metadata,
    named_leaves,
    patiently,
    read_arrays,
    read_metadata,
    verify,
)
from maxlm.train.config import CheckpointConfig
from maxlm.train.grouped import Groups


class Checkpointer:
    """The checkpoints of one run, in one folder. All processes call every method together.

    Args:
        folder: made if missing. What an interrupted save left behind in it is removed.
        read_only: change nothing, so that a run that is still writing can be read.
        grouped: of parameters that a circular pipeline holds as [groups, layers / groups, ...],
            by canonical name, these two sizes; on disk they are [layers, ...].
        held: asked at each save for steps that must stay for now, besides those that are kept.

    Raises:
        MaxlmError: the folder cannot be made; or, ``read_only``, does not exist.
    """

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        grouped: Groups | None = None,
        held: Callable[[], set[int]] = set,
    ):
        self.folder = Path(folder).absolute()
        self.config = config or CheckpointConfig()
        self._grouped = grouped or {}
        self._pending: list[int] = []  # steps of saves, until ``pop_completed`` returns them
        # Orbax narrates each file it touches, and what it raises besides.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if read_only and not self.folder.is_dir():
            fix = "name a run that has saved one"
            raise MaxlmError("no checkpoints here", where=str(folder), fix=fix)
        policies: list[Any] = [LatestN(self.config.keep_last), _Held(held)]
        if self.config.keep_every:
            policies.append(EveryNSteps(self.config.keep_every))
        with self._explained("cannot keep checkpoints here", "name a folder that can be written"):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy(policies),
                    enable_async_checkpointing=self.config.asynchronous,
                    cleanup_tmp_directories=not read_only,
                    create=not read_only,
                    read_only=read_only,
                    # Hosts see a shared folder change at different times.
                    single_host_load_and_broadcast=not read_only and jax.process_count() > 1,
                ),
                handler_registry=ocp.handlers.create_default_handler_registry(
                    state=ocp.PyTreeCheckpointHandler(use_zarr3=True),
                    metadata=ocp.JsonCheckpointHandler(),
                ),
            )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written at ``step``."""
        every = self.config.every_steps
        return every > 0 and step % every == 0

    def save(
        self, step: int, state: PyTree, metadata: Mapping[str, Any], force: bool = False
    ) -> bool:
        """Start writing a checkpoint, if one is due at ``step``; the arrays may then be donated.

        Args:
            state: any pytree of arrays; with several processes, arrays over all their devices.
            metadata: JSON values; see :func:`make_metadata`.
            force: write whether due or not.

        Returns:
            Whether a checkpoint was begun: False if none is due, or ``step`` has one already.

        Raises:
            MaxlmError: this checkpoint, or the one before it, could not be written.
        """
        if not (force or self.due(step)) or step in self._manager.all_steps():
            return False
        arrays = as_on_disk(named_leaves(state), self._grouped)
        on_devices = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
        metadata = make_metadata(step, on_devices, metadata)
        with self._explained("a checkpoint was not written", "free some space or rights, resume"):
            self._pending.append(step)
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), metadata=ocp.args.JsonSave(metadata)
                ),
                force=True,
            )

    def pop_completed(self) -> list[int]:
        """Return the steps whose saves have completed since the last call; waits for nothing."""
        saving = self._pending[-1:] if self._manager.is_saving_in_progress() else []
        done = [s for s in self._pending if s not in saving and self.path(s).is_dir()]
        self._pending = saving
        return done

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first; waits for one being written."""
        self.wait()  # Orbax lists a step as soon as its save begins.
        # Of a folder that another run writes to, each process may have seen something else.
        return broadcast_from_process_0(self.begun())

    def begun(self) -> list[int]:
        """Steps of all checkpoints, one that is being written too; waits for nothing."""
        return sorted(map(int, self._manager.all_steps()))  # NumPy's, if broadcast

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; waits for one being written."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint at ``step``."""
        return self.folder / str(step)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the state at ``step`` (default: the newest).

        Raises:
            MaxlmError: no such checkpoint, or an unreadable one.
        """
        return read_metadata(self.path(self._existing(step)))

    def restore(self, step: int | None, abstract: PyTree) -> PyTree:
        """A saved state, each array read straight into the sharding that is asked for, and checked
        to be what was saved.

        Args:
            step: default, the newest.
            abstract: the state as ``ShapeDtypeStruct`` leaves with shardings, on any mesh
                (no sharding: the first device). Arrays are cast to its dtypes.

        Raises:
            Unreadable: it is damaged.
            MaxlmError: no such checkpoint, or one of another model or optimizer (names the first
                array that differs, parameters before others).
        """
        path = self.path(self._existing(step))
        return restore_from(path, abstract, self._grouped)

    def restore_params(self, step: int | None, abstract: PyTree, name: str = "params") -> PyTree:
        """One sub-tree of a saved state (its parameters), reading nothing else.

        See :meth:`restore`; ``abstract`` is the sub-tree alone, and so is what is returned.
        """
        path = self.path(self._existing(step))
        return restore_from(path, abstract, self._grouped, prefix=f"{name}.", complete=False)

    def check_params(self, step: int | None, abstract: PyTree, name: str = "params") -> None:
        """Check, reading no array, that :meth:`restore_params` would find what it looks for.

        Raises:
            MaxlmError: as that does.
        """
        path = self.path(self._existing(step))
        check_arrays(path, abstract, self._grouped, prefix=f"{name}.", complete=False)

    def reload(self) -> None:
        """See what was changed in the folder by other means.

        Raises:
            Unreadable: it cannot be listed.
        """
        # Another run that deletes a checkpoint meanwhile makes it fail.
        raise_on_all_hosts(lambda: patiently(self.folder, self._manager.reload))

    def wait(self) -> None:
        """Return once nothing is being written any more.

        Raises:
            MaxlmError: the last checkpoint could not be written.
        """
        with self._explained("a checkpoint was not written", "free some space or rights, resume"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written and let go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise MaxlmError("no checkpoint here", where=str(self.folder), fix="train for longer")
        if step is not None and step not in steps:
            raise MaxlmError(
                f"no checkpoint of step {step}",
                where=str(self.folder),
                fix=f"use one of {', '.join(map(str, steps))}",
            )
        return steps[-1] if step is None else step

    @contextmanager
    def _explained(self, what: str, fix: str) -> Iterator[None]:
        """Storage fails in as many ways as there are backends: all become one kind of error."""
        try:
            yield
        except MaxlmError:
            raise
        except Exception as error:
            raise MaxlmError(
                f"{what} ({first_line(error)})", where=str(self.folder), fix=fix
            ) from error


@dataclass(frozen=True)
class _Held:
    """A preservation policy of Orbax's."""

    steps: Callable[[], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = self.steps()
        return [each.step in steps for each in checkpoints]


def restore_from(
    path: Path, abstract: PyTree, groups: Groups, *, prefix: str = "", complete: bool = True
) -> PyTree:
    """The state in a checkpoint's folder; see :meth:`Checkpointer.restore`. All processes call it
    together, and it ends alike on all."""

    def read() -> tuple[dict[str, int], Leaves, Leaves]:
        known = read_metadata(path).get("fingerprints", {})
        return known, *read_arrays(path, abstract, groups, prefix=prefix, complete=complete)

    known, dtypes, arrays = raise_on_all_hosts(read)
    verify(path, arrays, known, dtypes)
    return as_held(arrays, abstract, groups, prefix)
