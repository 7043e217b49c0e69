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
from maxlm.huggingface.check import check_places, matched
from maxlm.huggingface.checkpoint import CheckpointReader, CheckpointWriter, ReadSlice
from maxlm.huggingface.dtypes import NUMPY, Dtypes, is_floating, slabs
from maxlm.huggingface.files import Stored, read, stored_tensors
from maxlm.huggingface.writer import SHARD_BYTES, SafetensorsWriter
from maxlm.models.families.entries import Entry

Progress = Callable[[int, int, str], Any]
"""Called after each tensor: bytes of tensors done, bytes in all, its name."""


class Spec(Protocol):
    """What is asked of a ``ParamSpec``."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def silent(done: int, total: int, name: str) -> None:
    """Show nothing."""


def import_tensors(
    folder: str | Path,
    entries: Sequence[Entry],
    specs: Mapping[str, Spec],
    writer: CheckpointWriter,
    progress: Progress = silent,
    *,
    ignored: Iterable[str] = (),
    lossy: bool = False,
    warn: Callable[[str], object] = lambda line: None,
) -> Dtypes:
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
    leads = check_places(entries, shapes)
    pairs = matched(stored_tensors(folder), entries, ignored, where=str(folder))
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
    return Dtypes.common({entry.theirs: stored.dtype for stored, entry in pairs})


def export_tensors(
    checkpoint: CheckpointReader,
    entries: Sequence[Entry],
    dtypes: Dtypes,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
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
    leads = check_places(entries, checkpoint.shapes)
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
    stored: Stored,
    entry: Entry,
    shapes: Mapping[str, Shape],
    writer: CheckpointWriter,
    lossy: bool,
) -> int:
    """Write a tensor's parts, and return how many of its values are not finite."""
    # Apart from the loop, so that nothing of this tensor outlives it.
    tensor = read(stored, np.dtype(np.float32), lossy=lossy)
    bad = sum(slab.size - int(np.isfinite(slab).sum()) for slab in slabs(tensor))
    parts = entry.split(tensor)
    del tensor  # where they are copies
    for place, part in zip(entry.ours, parts, strict=True):
        want = shapes[place.name][len(place.index) :]
        assert part.shape == want, f"{entry.theirs}: {place} of {part.shape}, not {want}"
        writer.write(place.name, place.index, part)
    return bad


def _export_one(
    slices: Mapping[str, ReadSlice], entry: Entry, writer: SafetensorsWriter, lossy: bool
) -> None:
    parts = [slices[place.name](place.index) for place in entry.ours]
    writer.write(entry.theirs, entry.join(parts), lossy=lossy)


def _names(entry: Entry) -> tuple[str, ...]:
    return tuple(place.name for place in entry.ours)
