"""Checkpoints: layout-free, asynchronous, atomic.

A checkpoint holds every array of a state under its canonical name (``params.layers.query``,
``opt_state.1.mu.layers.query``), whole as far as a reader can tell, and a JSON file of metadata.
Nothing of the mesh, the number of processes or Python's types is needed to read it back.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from maxlm.config import MaxlmError, differences
from maxlm.train.config import CheckpointConfig
from maxlm.train.grouped import Groups, is_grouped, on_disk, reshaped

PyTree = Any


def named_leaves(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    """The leaves of any pytree by dotted path; dict keys, attribute names and indices alike."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = jax.tree_util.keystr
    return {prefix + name(path, simple=True, separator="."): leaf for path, leaf in leaves}


class Checkpointer:
    """The checkpoints of one run, in one folder. All processes call every method together.

    Args:
        folder: made if missing. What an interrupted save left behind in it is removed.
        read_only: change nothing, so that a run that is still writing can be read.
        grouped: of parameters that a circular pipeline holds as [groups, layers / groups, ...],
            by canonical name, these two sizes; on disk they are [layers, ...].

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
    ):
        self.folder = Path(folder).absolute()
        self.config = config or CheckpointConfig()
        self._grouped = grouped or {}
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates each file it touches.
        if read_only and not self.folder.is_dir():
            fix = "name a run that has saved one"
            raise MaxlmError("no checkpoints here", where=str(folder), fix=fix)
        policies: list[Any] = [LatestN(self.config.keep_last)]
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
            metadata: JSON values; ``step`` and ``versions`` are added.
            force: write whether due or not.

        Returns:
            Whether a checkpoint was begun: False if none is due, or ``step`` has one already.

        Raises:
            MaxlmError: this checkpoint, or the one before it, could not be written.
        """
        if not (force or self.due(step)) or step in self._manager.all_steps():
            return False
        versions = {name: version(name) for name in ("jax", "orbax-checkpoint")}
        metadata = {"step": step, "versions": versions, **metadata}
        with self._explained("a checkpoint was not written", "free some space or rights, resume"):
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(self._ungrouped(named_leaves(state))),
                    metadata=ocp.args.JsonSave(metadata),
                ),
                force=True,
            )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first; waits for one being written."""
        self.wait()  # Orbax lists a step as soon as its save begins.
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; waits for one being written."""
        return max(self.steps(), default=None)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the state at ``step`` (default: the newest).

        Raises:
            MaxlmError: no such checkpoint, or an unreadable one.
        """
        step = self._existing(step)
        with self._explained(f"checkpoint {step} is unreadable", "restore another step"):
            return self._manager.restore(
                step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )["metadata"]

    def restore(self, step: int | None, abstract: PyTree) -> PyTree:
        """A saved state, each array read straight into the sharding that is asked for.

        Args:
            step: default, the newest.
            abstract: the state as ``ShapeDtypeStruct`` leaves with shardings, on any mesh
                (no sharding: the first device). Arrays are cast to its dtypes.

        Raises:
            MaxlmError: no such checkpoint, an unreadable one, or one of another model or
                optimizer (names the first array that differs, parameters before others).
        """
        return self._restore(step, abstract, prefix="", complete=True)

    def restore_params(self, step: int | None, abstract: PyTree, name: str = "params") -> PyTree:
        """One sub-tree of a saved state (its parameters), reading nothing else.

        See :meth:`restore`; ``abstract`` is the sub-tree alone, and so is what is returned.
        """
        return self._restore(step, abstract, prefix=f"{name}.", complete=False)

    def check_params(self, step: int | None, abstract: PyTree, name: str = "params") -> None:
        """Check, reading no array, that :meth:`restore_params` would find what it looks for.

        Raises:
            MaxlmError: as that does.
        """
        self._found(self._existing(step), abstract, prefix=f"{name}.", complete=False)

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

    def _restore(self, step: int | None, abstract: PyTree, prefix: str, complete: bool) -> PyTree:
        step = self._existing(step)
        held, wanted = self._found(step, abstract, prefix, complete)
        with self._explained(f"checkpoint {step} is unreadable", "restore another step"):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        item=wanted,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                        partial_restore=not complete,
                    )
                ),
            )["state"]
        grouped = {name for name, leaf in held.items() if self._is_grouped(name, leaf)}
        restored |= reshaped({name: restored[name] for name in grouped}, held)
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[n] for n in wanted])

    def _found(
        self, step: int, abstract: PyTree, prefix: str, complete: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Leaves by name, as they are held and as they are on disk, where they are."""
        held = {name: _placed(leaf) for name, leaf in named_leaves(abstract, prefix).items()}
        wanted = {n: on_disk(x) if self._is_grouped(n, x) else x for n, x in held.items()}
        with self._explained(f"checkpoint {step} is unreadable", "restore another step"):
            stored = self._manager.item_metadata(step)["state"].tree
        shapes = {n: tuple(m.shape) for n, m in stored.items() if complete or n.startswith(prefix)}
        _check_same_arrays(shapes, wanted, where=str(self.folder / str(step)))
        return held, wanted

    def _is_grouped(self, name: str, leaf: Any) -> bool:
        return is_grouped(name, leaf.shape, self._grouped)

    def _ungrouped(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        grouped = {name: leaf for name, leaf in leaves.items() if self._is_grouped(name, leaf)}
        want = {name: on_disk(_placed(leaf)) for name, leaf in grouped.items()}
        return dict(leaves) | reshaped(grouped, want)

    @contextmanager
    def _explained(self, what: str, fix: str) -> Iterator[None]:
        """Storage fails in as many ways as there are backends: all become one kind of error."""
        try:
            yield
        except MaxlmError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise MaxlmError(
                f"{what} ({lines[0][:200]})", where=str(self.folder), fix=fix
            ) from error


def group_sizes(specs: PyTree) -> Groups:
    """The ``grouped`` argument of :class:`Checkpointer`, from declarations (``ParamSpec``)."""
    return {name: spec.shape[:2] for name, spec in named_leaves(specs).items() if spec.lead == 2}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same_arrays(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str
) -> None:
    names = sorted({*stored, *wanted}, key=lambda name: (not name.startswith("params."), name))
    for name in names:
        there = str(list(stored[name])) if name in stored else "absent"
        here = str(list(wanted[name].shape)) if name in wanted else "absent"
        if there != here:
            other = "model" if name.startswith("params.") else "optimizer or training state"
            raise MaxlmError(
                f"checkpoint of another {other}: {name} is {there} in it, {here} in this run",
                where=where,
                fix="use the config it was trained with, or another run folder",
            )


def check_same(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    keys: Sequence[str],
    where: str = "resume",
    what: str = "the checkpoint was written",
) -> None:
    """Refuse to go on from a checkpoint whose config differs where it must not.

    Args:
        saved, current: configs as (nested) JSON values.
        keys: dotted keys that must be equal, each with all below it ("model", "data.seed").
        what: was done with the saved config, for the message.

    Raises:
        MaxlmError: naming every key that differs, with both values.
    """
    different = [
        f"{key}={theirs!r} became {ours!r}"
        for key, theirs, ours in differences(saved, current)
        if any(key == top or key.startswith((f"{top}.", f"{top}[")) for top in keys)
    ]
    if different:
        raise MaxlmError(
            f"{what} with another config: {', '.join(different)}",
            where=where,
            fix="set them back, or train in another run folder",
        )
