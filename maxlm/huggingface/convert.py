"""Published weights to a checkpoint and back, one tensor in memory at a time.

That a family's table, the files and our parameters agree is checked before anything is
written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.checkpoint import (
    MergedCheckpointReader,
    ReadSlice,
    RunCheckpointReader,
)
from maxlm.huggingface.families.names import TensorEntry
from maxlm.huggingface.files import (
    NUMPY,
    SHARD_BYTES,
    SafetensorsWriter,
    StoredTensor,
    TensorDtypes,
    is_floating,
    iterate_flat_chunks,
    list_stored_tensors,
    read_tensor,
    split_into_slabs,
)
from maxlm.runtime.progress import Progress, ignore_progress


class ParamWriter(Protocol):
    """Takes parameters slice by slice: ``RunCheckpointWriter``, or what keeps them in
    memory."""

    def declare(self, name: str, shape: Shape, num_lead_axes: int = 0) -> None: ...
    def write(self, name: str, lead_index: Shape, values: np.ndarray) -> None: ...


_OTHER_CONFIG = "check that the config is this model's"
_SHOWN = 4


def import_tensors(
    folder: str | Path,
    entries: Sequence[TensorEntry],
    shapes: Mapping[str, Shape],
    writer: ParamWriter,
    progress: Progress = ignore_progress,
    *,
    ignored: Iterable[str] = (),
    warn: Callable[[str], object] = lambda line: None,
) -> TensorDtypes:
    """Write all parameters of a folder of safetensors files to ``writer``, as fp32, and
    return the number formats they had, for its metadata. Files of another model are
    refused before anything is written.

    Args:
        shapes: of all parameters, by canonical name.
        ignored: patterns of tensors that may be there without being used
            (``*.inv_freq``).
        progress: is told of the bytes of tensors that are done, and of all.
        warn: called with a line if values are NaN or infinite.
    """
    leads = count_lead_axes(entries, shapes)
    pairs = match_entries(
        list_stored_tensors(folder), entries, ignored, where=str(folder)
    )
    for name, shape in shapes.items():
        writer.declare(name, shape, leads[name])
    total = sum(stored.nbytes for stored, _ in pairs)
    done = 0
    num_bad = 0
    first_bad = ""
    for stored, entry in sorted(pairs, key=lambda pair: (pair[0].path, pair[0].offset)):
        count = _import_one(stored, entry, shapes, writer)
        num_bad += count
        if count and not first_bad:
            first_bad = stored.name
        done += stored.nbytes
        progress("converting", done, total)
    if num_bad:
        line = f"warning: {num_bad:,} values are NaN or infinite"
        warn(f"{line}, the first of them in {first_bad}")
    return TensorDtypes.from_dtypes(
        {entry.theirs: stored.dtype for stored, entry in pairs}
    )


def export_tensors(
    checkpoint: RunCheckpointReader | MergedCheckpointReader,
    entries: Sequence[TensorEntry],
    dtypes: TensorDtypes,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = ignore_progress,
    *,
    lossy: bool = False,
) -> None:
    """Write all parameters of a checkpoint into an empty folder, as safetensors files.

    Args:
        dtypes: the number formats of tensors: those they were imported with, or others.
        shard_bytes: the most that a file holds, unless one tensor is larger.
        lossy: round to these formats; otherwise a value that would change is an error.
    """
    leads = count_lead_axes(entries, checkpoint.shapes)
    kinds = {e.theirs: (dtypes.get_dtype(e.theirs), tuple(e.shape)) for e in entries}
    sizes = {
        name: prod(shape) * NUMPY[dtype].itemsize
        for name, (dtype, shape) in kinds.items()
    }
    total = sum(sizes.values())
    done = 0
    writer = SafetensorsWriter(folder, kinds, shard_bytes)
    # Parameter by parameter, so that each need only be decoded once.
    for names, group in groupby(sorted(entries, key=_names), key=_names):
        with ExitStack() as stack:
            slices: dict[str, ReadSlice] = {}
            for name in set(names):
                opened = checkpoint.open_slice_reader(name, leads[name], writer.folder)
                slices[name] = stack.enter_context(opened)
            for entry in group:
                parts = [slices[place.name](place.index) for place in entry.ours]
                writer.write(entry.theirs, entry.join(parts), lossy=lossy)
                del parts  # before the next tensor is read
                done += sizes[entry.theirs]
                progress("converting", done, total)


def _import_one(
    stored: StoredTensor,
    entry: TensorEntry,
    shapes: Mapping[str, Shape],
    writer: ParamWriter,
) -> int:
    """Write a tensor's parts, and return how many of its values are not finite."""
    # Apart from the loop, so that nothing of this tensor outlives it.
    tensor = read_tensor(stored, np.dtype(np.float32))
    num_bad = 0
    for slab in split_into_slabs(tensor):
        num_bad += slab.size - int(np.isfinite(slab).sum())
    parts = entry.split(tensor)
    del tensor  # where they are copies
    for place, part in zip(entry.ours, parts, strict=True):
        shape = shapes[place.name][len(place.index) :]
        assert part.shape == shape, (
            f"{entry.theirs}: {place} of {part.shape}, not {shape}"
        )
        writer.write(place.name, place.index, part)
    return num_bad


def _names(entry: TensorEntry) -> tuple[str, ...]:
    return tuple(place.name for place in entry.ours)


def match_entries(
    tensors: Mapping[str, StoredTensor],
    entries: Sequence[TensorEntry],
    ignored: Iterable[str],
    where: str,
) -> list[tuple[StoredTensor, TensorEntry]]:
    """Returns the tensor of each entry: by its name or, where the files lack it, by an
    alias."""
    pairs: list[tuple[StoredTensor, TensorEntry]] = []
    again: list[tuple[StoredTensor, StoredTensor]] = []
    missing: list[str] = []
    left = dict(tensors)
    ignored = list(ignored)
    for entry in entries:
        stored = [
            left.pop(name) for name in (entry.theirs, *entry.aliases) if name in left
        ]
        if not stored:
            missing.append(entry.theirs)
            continue
        pairs.append((stored[0], entry))
        for tensor in stored:
            _check_fits(tensor, entry)
        again += [(stored[0], tensor) for tensor in stored[1:]]
    extra = [
        name for name in left if not any(fnmatchcase(name, glob) for glob in ignored)
    ]
    faults: list[str] = []
    if missing:
        faults.append(f"lack {_listed(missing)}")
    if extra:
        listed = _listed(sorted(extra))
        faults.append(f"hold {listed}, which this model does not use")
    if faults:
        raise MaxlmError(
            f"the files {' and '.join(faults)}", where=where, fix=_OTHER_CONFIG
        )
    for one, other in again:
        _check_same(one, other)
    return pairs


def count_lead_axes(
    entries: Iterable[TensorEntry], param_shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """Checks that the table fills every element of every parameter exactly once, and
    returns the number of leading indices at which each is cut."""
    indices: dict[str, list[Shape]] = {name: [] for name in param_shapes}
    for place in (place for entry in entries for place in entry.ours):
        if place.name not in param_shapes:
            raise MaxlmError("this model has no such parameter", where=place.name)
        indices[place.name].append(place.index)
    leads = {
        name: max((len(index) for index in filled), default=0)
        for name, filled in indices.items()
    }
    for name, shape in param_shapes.items():
        filled = Counter(indices[name])
        expected = Counter(np.ndindex(*shape[: leads[name]]))
        for index in sorted((expected - filled) | (filled - expected)):
            at = "".join(f"[{i}]" for i in index)
            is_filled = index in filled
            fault = "filled twice or not there" if is_filled else "nothing fills it"
            raise MaxlmError(fault, where=name + at, fix=_OTHER_CONFIG)
    return leads


def _check_fits(stored: StoredTensor, entry: TensorEntry) -> None:
    where = str(stored.path)
    if stored.shape != tuple(entry.shape):
        message = f"{stored.name} is {list(stored.shape)} there, {list(entry.shape)} in this model"
        raise MaxlmError(message, where=where, fix=_OTHER_CONFIG)
    if not is_floating(stored.dtype):
        message = f"{stored.name} is stored as {stored.dtype}, so quantized"
        raise MaxlmError(
            message, where=where, fix="use the model in bf16, fp16 or fp32"
        )


def _check_same(one: StoredTensor, other: StoredTensor) -> None:
    # Bytes, not values: a NaN is not equal to itself.
    chunks = zip(iterate_flat_chunks(one), iterate_flat_chunks(other), strict=True)
    same = one.dtype == other.dtype and all(
        chunk.tobytes() == other_chunk.tobytes() for chunk, other_chunk in chunks
    )
    if not same:
        message = f"{other.name} differs from {one.name}, which this model ties it to"
        fix = "set tie_word_embeddings to false in config.json if it is an output head of its own"
        raise MaxlmError(message, where=str(other.path), fix=fix)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
