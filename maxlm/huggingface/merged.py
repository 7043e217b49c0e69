"""Checkpoints of adapted parameters, read as those of a model without the adapter."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.checkpoint import ReadSlice, RunCheckpointReader
from maxlm.models.adapters import Adapter
from maxlm.models.params import Params, flatten_names, is_leaf


class MergedCheckpointReader:
    """The parameters of a checkpoint with its adapter merged into them, by slices."""

    def __init__(self, inner: RunCheckpointReader, adapter: Adapter, specs: Params):
        self.inner, self.folder = inner, inner.folder
        self.shapes = {name: spec.shape for name, spec in flatten_names(specs).items()}
        """Shapes of all parameters, by canonical name."""
        adapted = flatten_names(adapter.adapt(specs), is_leaf)
        self._leaves = {name: own for name, own in adapted.items() if is_leaf(own)}
        self._kind = adapter.kind

    @contextmanager
    def open_slice_reader(
        self, name: str, num_lead_axes: int, scratch_folder: Path
    ) -> Iterator[ReadSlice]:
        """Opens a parameter to read its slices; see :class:`RunCheckpointReader`."""
        kernel = name.removesuffix(".bias") + ".kernel"
        with ExitStack() as stack:

            def open_slices(name: str) -> ReadSlice:
                opened = self.inner.open_slice_reader(name, num_lead_axes, scratch_folder)
                return stack.enter_context(opened)

            owner = name if name in self._leaves else kernel if name.endswith(".bias") else ""
            leaf = self._leaves.get(owner)
            if leaf is None:
                yield open_slices(name)
                return
            slices = {
                part.name: open_slices(f"{owner}.{part.name}")
                for part in fields(leaf)
                if f"{owner}.{part.name}" in self.inner.shapes
            }
            bias = open_slices(name) if owner != name else None

            def read(index: Shape) -> np.ndarray:
                own = replace(leaf, **{part: read(index) for part, read in slices.items()})
                if bias is not None:
                    return np.asarray(own.merge_bias(bias(index)))
                if (merged := own.merge()) is None:
                    what = f"{name} with adapter.kind={self._kind} cannot be merged"
                    fix = "--adapter writes the adapter alone"
                    raise MaxlmError(what, where=str(self.folder), fix=fix)
                return np.asarray(merged)

            yield read
