"""Published weights to a checkpoint and back, one tensor in memory at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.check import check_coverage, match_entries
from maxlm.huggingface.checkpoint import ReadSlice, RunCheckpointReader, RunCheckpointWriter
from maxlm.huggingface.dtypes import NUMPY, TensorDtypes, is_floating, split_into_slabs
from maxlm.huggingface.files import StoredTensor, list_stored_tensors, read_tensor
from maxlm.huggingface.writer import SHARD_BYTES, SafetensorsWriter
from maxlm.models.families.entries import TensorEntry

Progress = Callable[[int, int, str], Any]
"""Called after each tensor: bytes of tensors done, bytes in all, its name."""


class HasShape(Protocol):
    """The part of ``ParamSpec`` that an import reads."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def ignore_progress(done: int, total: int, name: str) -> None:
    """Ignores progress."""


def import_tensors(
    folder: str | Path,
    entries: Sequence[TensorEntry],
    specs: Mapping[str, HasShape],
    writer: RunCheckpointWriter,
    progress: Progress = ignore_progress,
    *,
    ignored: Iterable[str] = (),
    lossy: bool = False,
    warn: Callable[[str], object] = lambda line: None,
) -> TensorDtypes:
    """Write all parameters of a folder of safetensors files into a checkpoint, as fp32.

    Args:
        specs: the declarations of all parameters by canonical name, ``named(param_specs(model))``.
        ignored: patterns of tensors that may be there without being used (``*.inv_freq``).
        lossy: round fp64 values.
        warn: called with a line if values are NaN or infinite.

    Returns:
        The number formats they had, for the checkpoint's metadata.

    Raises:
        MaxlmError: before anything is written: files that cannot be read, or that do not hold each
            tensor of ``entries`` once and nothing else, or entries that do not fill each parameter
            once; later: a full disk, or fp64 values that would be rounded.
    """
    shapes = {name: tuple(spec.shape) for name, spec in specs.items()}
    leads = check_coverage(entries, shapes)
    pairs = match_entries(list_stored_tensors(folder), entries, ignored, where=str(folder))
    for name, shape in shapes.items():
        writer.declare(name, shape, leads[name])
    total = sum(stored.nbytes for stored, _ in pairs)
    done, bad, first = 0, 0, ""
    for stored, entry in sorted(pairs, key=lambda pair: (pair[0].path, pair[0].offset)):
        count = _import_one(stored, entry, shapes, writer, lossy)
        bad, first = bad + count, first or (stored.name if count else "")
        done += stored.nbytes
        progress(done, total, entry.theirs)
    if bad:
        warn(f"warning: {bad:,} values are NaN or infinite, the first of them in {first}")
    return TensorDtypes.from_dtypes({entry.theirs: stored.dtype for stored, entry in pairs})


def export_tensors(
    checkpoint: RunCheckpointReader,
    entries: Sequence[TensorEntry],
    dtypes: TensorDtypes,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = ignore_progress,
    *,
    lossy: bool = False,
    overwrite: bool = False,
) -> None:
    """Write all parameters of a checkpoint into a folder of safetensors files.

    Args:
        dtypes: the number formats of tensors: those they were imported with, or others.
        shard_bytes: the most that a file holds, unless one tensor is larger.
        lossy: round to these formats; otherwise a value that would change is an error.
        overwrite: replace the model in a folder that is not empty; other files in it stay.

    Raises:
        MaxlmError: entries that do not use each parameter of the checkpoint once, a folder that is
            not empty, a damaged checkpoint, values that would change, a full disk. The folder is
            left as it was.
    """
    leads = check_coverage(entries, checkpoint.shapes)
    kinds = {entry.theirs: (dtypes.of(entry.theirs), tuple(entry.shape)) for entry in entries}
    for dtype in {dtype for dtype, _ in kinds.values()}:
        if dtype not in NUMPY or not is_floating(dtype):
            known = ", ".join(filter(is_floating, NUMPY))
            raise MaxlmError(f"no number format {dtype!r} for weights", fix=f"use one of {known}")
    sizes = {name: prod(shape) * NUMPY[dtype].itemsize for name, (dtype, shape) in kinds.items()}
    total, done = sum(sizes.values()), 0
    with SafetensorsWriter(folder, kinds, shard_bytes, overwrite=overwrite) as writer:
        # Parameter by parameter, so that each need only be decoded once.
        for names, group in groupby(sorted(entries, key=_names), key=_names):
            with ExitStack() as stack:
                slices = {
                    name: stack.enter_context(
                        checkpoint.slices(name, leads[name], scratch=writer.folder)
                    )
                    for name in set(names)
                }
                for entry in group:
                    _export_one(slices, entry, writer, lossy)
                    done += sizes[entry.theirs]
                    progress(done, total, entry.theirs)
        writer.commit()


def _import_one(
    stored: StoredTensor,
    entry: TensorEntry,
    shapes: Mapping[str, Shape],
    writer: RunCheckpointWriter,
    lossy: bool,
) -> int:
    """Write a tensor's parts, and return how many of its values are not finite."""
    # Apart from the loop, so that nothing of this tensor outlives it.
    tensor = read_tensor(stored, np.dtype(np.float32), lossy=lossy)
    bad = sum(slab.size - int(np.isfinite(slab).sum()) for slab in split_into_slabs(tensor))
    parts = entry.split(tensor)
    del tensor  # where they are copies
    for place, part in zip(entry.ours, parts, strict=True):
        want = shapes[place.name][len(place.index) :]
        assert part.shape == want, f"{entry.theirs}: {place} of {part.shape}, not {want}"
        writer.write(place.name, place.index, part)
    return bad


def _export_one(
    slices: Mapping[str, ReadSlice], entry: TensorEntry, writer: SafetensorsWriter, lossy: bool
) -> None:
    parts = [slices[place.name](place.index) for place in entry.ours]
    writer.write(entry.theirs, entry.join(parts), lossy=lossy)


def _names(entry: TensorEntry) -> tuple[str, ...]:
    return tuple(place.name for place in entry.ours)
