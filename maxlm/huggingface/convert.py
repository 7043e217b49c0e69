"""Published weights to a checkpoint and back, one tensor in memory at a time.

That a family's table, the files and our parameters agree is checked before anything is
written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from itertools import groupby
from math import prod
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.checkpoint import CheckpointReader, ParamWriter, ReadSlice
from maxlm.huggingface.families.names import TensorEntry
from maxlm.huggingface.files import (
    NUMPY,
    SHARD_BYTES,
    Kind,
    SafetensorsWriter,
    StoredTensor,
    TensorDtypes,
    is_floating,
    iterate_flat_chunks,
    split_into_slabs,
)
from maxlm.huggingface.quantized import read_model_tensor
from maxlm.runtime.progress import Progress, ignore_progress

_OTHER_CONFIG = "check that the config is this model's"
_SHOWN = 4


def import_tensors(
    stored_tensors: Mapping[str, StoredTensor],
    entries: Sequence[TensorEntry],
    shapes: Mapping[str, Shape],
    writer: ParamWriter,
    progress: Progress = ignore_progress,
    *,
    where: str,
    ignored: Iterable[str] = (),
    warn: Callable[[str], object] = lambda line: None,
) -> TensorDtypes:
    """Write all parameters of a published model to ``writer``, as fp32, and return the
    number formats they had, for its metadata; of tensors that are stored quantized, the
    format that they are read in. Files of another model are refused before anything is
    written.

    Args:
        stored_tensors: the model's, by their names there.
        where: the folder or file that they are of, for messages.
        shapes: of all parameters, by canonical name.
        ignored: patterns of tensors that may be there without being used
            (``*.inv_freq``).
        progress: is told of the bytes of tensors that are done, and of all.
        warn: called with a line if values are NaN or infinite, and for each copy that
            differs from its tensor.
    """
    num_lead_axes = count_lead_axes(entries, shapes)
    pairs = match_entries(stored_tensors, entries, ignored, where=where)
    for line in _describe_unlike_copies(stored_tensors, pairs):
        warn(line)
    for name, shape in shapes.items():
        writer.declare(name, shape, num_lead_axes[name])

    def get_place_on_disk(pair: tuple[StoredTensor, TensorEntry]) -> tuple[Path, int]:
        stored, _ = pair
        return stored.path, stored.offset

    total_bytes = sum(stored.nbytes for stored, _ in pairs)
    bytes_done = 0
    num_bad = 0
    first_bad = ""
    for stored, entry in sorted(pairs, key=get_place_on_disk):
        num_bad_here = _import_one(stored, entry, shapes, writer)
        num_bad += num_bad_here
        if num_bad_here and not first_bad:
            first_bad = stored.name
        bytes_done += stored.nbytes
        progress("converting", bytes_done, total_bytes)
    if num_bad:
        line = f"warning: {num_bad:,} values are NaN or infinite"
        warn(f"{line}, the first of them in {first_bad}")
    return TensorDtypes.from_dtypes(
        {entry.theirs: stored.dtype for stored, entry in pairs}
    )


def export_tensors(
    checkpoint: CheckpointReader,
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
        entries: their copies are written too.
        dtypes: the number formats of tensors: those they were imported with, or others.
        shard_bytes: the most that a file holds, unless one tensor is larger.
        lossy: round to these formats; otherwise a value that would change is an error.
    """
    kinds: dict[str, Kind] = {}
    num_bytes: dict[str, int] = {}
    for entry in entries:
        dtype = dtypes.get_dtype(entry.theirs)
        for name in (entry.theirs, *entry.copies):
            kinds[name] = (dtype, tuple(entry.shape))
            num_bytes[name] = prod(entry.shape) * NUMPY[dtype].itemsize
    total_bytes = sum(num_bytes.values())
    bytes_done = 0
    writer = SafetensorsWriter(folder, kinds, shard_bytes)
    for entry, tensor in iterate_exported_tensors(checkpoint, entries, writer.folder):
        for name in (entry.theirs, *entry.copies):
            writer.write(name, tensor, lossy=lossy)
            bytes_done += num_bytes[name]
            progress("converting", bytes_done, total_bytes)
        del tensor  # before the next is read


def iterate_exported_tensors(
    checkpoint: CheckpointReader,
    entries: Sequence[TensorEntry],
    scratch_folder: Path,
) -> Iterator[tuple[TensorEntry, np.ndarray]]:
    """Yields the published tensors of a checkpoint, fp32, one in memory at a time.

    Args:
        scratch_folder: for files of decoded parameters, which are gone afterwards.
    """
    num_lead_axes = count_lead_axes(entries, checkpoint.shapes)
    # Parameter by parameter, so that each need only be decoded once.
    by_params = sorted(entries, key=_list_param_names)
    for names, group in groupby(by_params, key=_list_param_names):
        with ExitStack() as stack:
            readers: dict[str, ReadSlice] = {}
            for name in set(names):
                opened = checkpoint.open_slice_reader(
                    name, num_lead_axes[name], scratch_folder
                )
                readers[name] = stack.enter_context(opened)
            for entry in group:
                parts = [readers[place.name](place.index) for place in entry.ours]
                tensor = entry.join(parts)
                del parts
                yield entry, tensor
                del tensor  # before the next is read


def _import_one(
    stored: StoredTensor,
    entry: TensorEntry,
    shapes: Mapping[str, Shape],
    writer: ParamWriter,
) -> int:
    """Write a tensor's parts, and return how many of its values are not finite."""
    # Apart from the loop, so that nothing of this tensor outlives it.
    tensor = read_model_tensor(stored)
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


def _list_param_names(entry: TensorEntry) -> tuple[str, ...]:
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
    copies: list[tuple[StoredTensor, StoredTensor]] = []
    missing: list[str] = []
    left_over = dict(tensors)
    for entry in entries:
        # The tensor, and again under other names where a tied one is stored twice.
        stored = [
            left_over.pop(name)
            for name in (entry.theirs, *entry.aliases)
            if name in left_over
        ]
        if not stored:
            missing.append(entry.theirs)
            continue
        for tensor in stored:
            _check_fits(tensor, entry)
        first, *others = stored
        pairs.append((first, entry))
        copies += [(first, other) for other in others]
        for name in entry.copies:
            left_over.pop(name, None)

    patterns = list(ignored)
    extra = [
        name
        for name in left_over
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
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
    for first, other in copies:
        _check_same(first, other)
    return pairs


def count_lead_axes(
    entries: Iterable[TensorEntry], param_shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """Checks that the table fills every element of every parameter exactly once, and
    returns the number of leading indices at which each is cut."""
    indices: dict[str, list[Shape]] = {name: [] for name in param_shapes}
    for entry in entries:
        for place in entry.ours:
            if place.name not in param_shapes:
                raise MaxlmError("this model has no such parameter", where=place.name)
            indices[place.name].append(place.index)
    num_lead_axes = {
        name: max((len(index) for index in filled), default=0)
        for name, filled in indices.items()
    }
    for name, shape in param_shapes.items():
        # How often each index is filled, and how often it has to be: once.
        filled = Counter(indices[name])
        expected = Counter(np.ndindex(*shape[: num_lead_axes[name]]))
        wrong_indices = sorted((expected - filled) | (filled - expected))
        if wrong_indices:
            index = wrong_indices[0]
            subscript = "".join(f"[{i}]" for i in index)
            is_filled = index in filled
            fault = "filled twice or not there" if is_filled else "nothing fills it"
            raise MaxlmError(fault, where=name + subscript, fix=_OTHER_CONFIG)
    return num_lead_axes


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


def _describe_unlike_copies(
    tensors: Mapping[str, StoredTensor],
    pairs: Iterable[tuple[StoredTensor, TensorEntry]],
) -> Iterator[str]:
    """Describes, a line each, copies that are not what they are copies of."""
    for stored, entry in pairs:
        for name in entry.copies:
            other = tensors.get(name)
            if other is not None and not _are_same(stored, other):
                line = f"{name} differs from {stored.name}, which stands for it here"
                yield f"warning: {line}"


def _are_same(first: StoredTensor, other: StoredTensor) -> bool:
    if (first.dtype, first.shape) != (other.dtype, other.shape):
        return False
    # Bytes, not values: a NaN is not equal to itself.
    chunks = zip(iterate_flat_chunks(first), iterate_flat_chunks(other), strict=True)
    return all(
        chunk.tobytes() == other_chunk.tobytes() for chunk, other_chunk in chunks
    )


def _check_same(first: StoredTensor, other: StoredTensor) -> None:
    if not _are_same(first, other):
        message = f"{other.name} differs from {first.name}, which this model ties it to"
        fix = "set tie_word_embeddings to false in config.json if it is an output head of its own"
        raise MaxlmError(message, where=str(other.path), fix=fix)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
