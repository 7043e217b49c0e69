"""Checkpoints of parameters alone, written and read a slice at a time.

What is written is what ``maxlm.checkpoint.Checkpointer`` restores: an Orbax
checkpoint, each parameter under its canonical name in zarr3. Orbax itself saves whole
arrays from devices, so its few JSON files are written here. What is read is any
checkpoint that maxlm wrote, maybe with its adapter merged.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import (
    Shape,
    ZarrArray,
    create_array,
    open_array,
    split_into_boxes,
)
from maxlm.models.adapters import Adapter
from maxlm.models.params import Params, flatten_names, is_leaf
from maxlm.runtime.json_files import read_json_object

ReadSlice = Callable[[Shape], np.ndarray]
"""Leading indices → the slice there."""

_OTHER = "use another checkpoint"
_HANDLERS = {
    "state": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
    "metadata": "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler",
}


class ParamWriter(Protocol):
    """Takes parameters slice by slice: :class:`RunCheckpointWriter`, or what keeps them
    in memory."""

    def declare(
        self,
        name: str,
        shape: Shape,
        num_lead_axes: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None: ...
    def write(self, name: str, lead_index: Shape, values: np.ndarray) -> None: ...


class CheckpointReader(Protocol):
    """The parameters of a checkpoint, by slices."""

    folder: Path
    shapes: dict[str, Shape]

    def open_slice_reader(
        self, name: str, num_lead_axes: int, scratch_folder: Path
    ) -> AbstractContextManager[ReadSlice]: ...


class RunCheckpointWriter:
    """A checkpoint in the making: ``declare`` all parameters, ``write`` all slices,
    ``commit``."""

    def __init__(self, folder: str | Path, *, step: int = 0):
        self._step = step
        self._folder = Path(folder).absolute() / str(step)
        self._arrays: dict[str, ZarrArray] = {}

    def declare(
        self,
        name: str,
        shape: Shape,
        num_lead_axes: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        """Announces a parameter, written in slices at ``num_lead_axes`` leading
        indices."""
        array_folder = self._folder / "state" / f"params.{name}"
        self._arrays[name] = create_array(array_folder, shape, num_lead_axes, dtype)

    def write(self, name: str, lead_index: Shape, values: np.ndarray) -> None:
        """Writes the slice of a parameter at some leading indices, and waits for the
        disk."""
        array = self._arrays[name]
        assert values.dtype == array.dtype, name
        array.write(lead_index, values)

    def commit(self, metadata: Mapping[str, Any]) -> None:
        """Completes the checkpoint; ``step`` and ``versions`` are added to the
        metadata."""
        versions = {name: version(name) for name in ("jax", "orbax-checkpoint")}
        metadata = {"step": self._step, "versions": versions, **metadata}
        now = time.time_ns()
        # Orbax's description of a flat dict of arrays.
        leaves = {
            str((f"params.{name}",)): {
                "key_metadata": [{"key": f"params.{name}", "key_type": 2}],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": array.shape,
                },
            }
            for name, array in self._arrays.items()
        }
        state = {
            "tree_metadata": leaves,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        checkpoint = {
            "item_handlers": _HANDLERS,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
        _write_json(self._folder / "state" / "_METADATA", state)
        _write_json(self._folder / "metadata" / "metadata", metadata)
        _write_json(self._folder / "_CHECKPOINT_METADATA", checkpoint)


class RunCheckpointReader:
    """The parameters of a saved checkpoint, the newest or that of a step, by slices, on
    whatever mesh it was written; ``name`` is the part of the state to read ("ema":
    their average)."""

    def __init__(
        self, folder: str | Path, step: int | None = None, *, name: str = "params"
    ):
        folder = Path(folder)
        step_names = (path.parents[1].name for path in folder.glob("*/state/_METADATA"))
        steps = sorted(int(text) for text in step_names if text.isdigit())
        if not steps or step not in (None, *steps):
            if steps:
                message = f"no checkpoint of step {step}"
                fix = f"use one of {', '.join(map(str, steps))}"
            else:
                message = "no checkpoint here"
                fix = "name a run that has one"
            raise MaxlmError(message, where=str(folder), fix=fix)
        self.step = steps[-1] if step is None else step
        self.folder = folder / str(self.step)
        self._prefix = f"{name}."
        tree = _read_tree(self.folder / "state" / "_METADATA")
        keys = [
            ".".join(key["key"] for key in leaf["key_metadata"])
            for leaf in tree.values()
        ]
        names = [
            key.removeprefix(self._prefix)
            for key in keys
            if key.startswith(self._prefix)
        ]
        if not names:
            fix = "read another part of it"
            raise MaxlmError(f"it holds no {name}", where=str(self.folder), fix=fix)
        self.shapes = {name: self.open(name).shape for name in sorted(names)}
        """Shapes of all parameters, by canonical name."""

    def open(self, name: str) -> ZarrArray:
        """Opens a parameter's array; to read all its slices see
        :meth:`open_slice_reader`."""
        return open_array(self.folder / "state", self._prefix + name)

    @contextmanager
    def open_slice_reader(
        self, name: str, num_lead_axes: int, scratch_folder: Path
    ) -> Iterator[ReadSlice]:
        """Opens a parameter to read its slices, at ``num_lead_axes`` leading indices,
        one by one.

        Training stores many layers in one compressed piece. Such a parameter is decoded
        once, into a file in the folder ``scratch_folder`` that is removed then.
        """
        array = self.open(name)
        if math.prod(array.chunk_shape[:num_lead_axes]) <= 1:
            yield array.read
        else:
            with tempfile.NamedTemporaryFile(
                dir=scratch_folder, suffix=".maxlm-scratch"
            ) as file:
                _unpack(array, num_lead_axes, file)
                # A map that is dropped after each slice holds no memory for longer.
                yield lambda index: np.array(_mapped(array, file.name)[index])


class MergedCheckpointReader:
    """The parameters of a checkpoint with its adapter merged into them, by slices."""

    def __init__(self, inner: CheckpointReader, adapter: Adapter, specs: Params):
        self.inner = inner
        self.folder = inner.folder
        self.shapes = {name: spec.shape for name, spec in flatten_names(specs).items()}
        """Shapes of all parameters, by canonical name."""
        adapted = flatten_names(adapter.adapt(specs), is_leaf)
        self._leaves = {
            name: param for name, param in adapted.items() if is_leaf(param)
        }
        self._kind = adapter.kind

    @contextmanager
    def open_slice_reader(
        self, name: str, num_lead_axes: int, scratch_folder: Path
    ) -> Iterator[ReadSlice]:
        """Opens a parameter to read its slices; see :class:`RunCheckpointReader`."""
        kernel = name.removesuffix(".bias") + ".kernel"
        with ExitStack() as stack:

            def open_slices(name: str) -> ReadSlice:
                opened = self.inner.open_slice_reader(
                    name, num_lead_axes, scratch_folder
                )
                return stack.enter_context(opened)

            # A bias is read with its kernel's adapter, which may change it too.
            owner = name
            if name not in self._leaves and name.endswith(".bias"):
                owner = kernel
            leaf = self._leaves.get(owner)
            if leaf is None:
                yield open_slices(name)
                return
            part_readers = {
                part.name: open_slices(f"{owner}.{part.name}")
                for part in fields(leaf)
                if f"{owner}.{part.name}" in self.inner.shapes
            }
            read_bias = open_slices(name) if owner != name else None

            def read_merged(index: Shape) -> np.ndarray:
                parts = {
                    part: read_part(index) for part, read_part in part_readers.items()
                }
                adapted = replace(leaf, **parts)
                if read_bias is not None:
                    return np.asarray(adapted.merge_bias(read_bias(index)))
                merged = adapted.merge()
                if merged is None:
                    message = f"{name} with adapter.kind={self._kind} cannot be merged"
                    fix = "--adapter writes the adapter alone"
                    raise MaxlmError(message, where=str(self.folder), fix=fix)
                return np.asarray(merged)

            yield read_merged


def copy_param(
    reader: CheckpointReader,
    writer: ParamWriter,
    name: str,
    num_lead_axes: int,
    scratch_folder: Path,
) -> None:
    """Copies a dense parameter as fp32, a slice at ``num_lead_axes`` leading indices in
    memory at a time."""
    shape = reader.shapes[name]
    writer.declare(name, shape, num_lead_axes)
    with reader.open_slice_reader(name, num_lead_axes, scratch_folder) as read:
        for index in np.ndindex(*shape[:num_lead_axes]):
            writer.write(name, index, read(index).astype(np.float32))


def _unpack(array: ZarrArray, num_lead_axes: int, file: IO[bytes]) -> None:
    """Decodes all of an array into a file, as a map of it has it."""
    # Writing to a map of a file for which the disk has no room would end the process.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, array.nbytes)
    else:
        file.truncate(array.nbytes)
    for box in split_into_boxes(array.shape, array.chunk_shape):
        values = array.read_box(box)
        for index_in_box in np.ndindex(values.shape[:num_lead_axes]):
            # ``box`` has the axes behind the leading ones, too: zip stops before them.
            lead_index = tuple(
                part.start + offset
                for part, offset in zip(box, index_in_box, strict=False)
            )
            _mapped(array, file.name)[lead_index + box[num_lead_axes:]] = values[
                index_in_box
            ]


def _mapped(array: ZarrArray, path: str) -> np.ndarray:
    return np.memmap(path, array.dtype, "r+", shape=array.shape)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), "utf-8")


def _read_tree(path: Path) -> dict[str, Any]:
    """Orbax's description of the arrays in a checkpoint."""
    tree = read_json_object(path, _OTHER).get("tree_metadata")
    if not isinstance(tree, dict):
        message = "damaged checkpoint (there is no tree_metadata)"
        raise MaxlmError(message, where=str(path), fix=_OTHER)
    return tree
