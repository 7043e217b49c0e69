"""Checks that a family's table, the files and our parameters agree, before anything is written."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.dtypes import is_floating
from maxlm.huggingface.files import StoredTensor, iterate_pieces
from maxlm.models.families.entries import TensorEntry

_OTHER_CONFIG = "check that the config is this model's"
_SHOWN = 4


def match_entries(
    tensors: Mapping[str, StoredTensor],
    entries: Sequence[TensorEntry],
    ignored: Iterable[str],
    where: str,
) -> list[tuple[StoredTensor, TensorEntry]]:
    """Returns the tensor of each entry: by its name or, where the files lack it, by an alias.

    Args:
        ignored: patterns (``*.inv_freq``) of names that may be in the files without being used.

    Raises:
        MaxlmError: a tensor that the files lack, one that no entry uses, one of another shape, one
            that does not hold floating-point numbers, or two that should be the same and are not.
    """
    pairs: list[tuple[StoredTensor, TensorEntry]] = []
    again: list[tuple[StoredTensor, StoredTensor]] = []
    missing: list[str] = []
    left = dict(tensors)
    for entry in entries:
        stored = [left.pop(name) for name in (entry.theirs, *entry.aliases) if name in left]
        if not stored:
            missing.append(entry.theirs)
            continue
        pairs.append((stored[0], entry))
        for tensor in stored:
            _check_fits(tensor, entry)
        again += [(stored[0], tensor) for tensor in stored[1:]]
    ignored = list(ignored)
    extra = [name for name in left if not any(fnmatchcase(name, glob) for glob in ignored)]
    faults = [f"lack {_listed(missing)}"] if missing else []
    faults += [f"hold {_listed(sorted(extra))}, which this model does not use"] if extra else []
    if faults:
        raise MaxlmError(f"the files {' and '.join(faults)}", where=where, fix=_OTHER_CONFIG)
    for one, other in again:
        _check_same(one, other)
    return pairs


def check_coverage(
    entries: Iterable[TensorEntry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Checks that the table fills every element of every parameter exactly once.

    Returns:
        The number of leading indices at which each parameter is cut.

    Raises:
        MaxlmError: naming a parameter, and the index, that is filled never or twice, or that does
            not exist.
    """
    indices: dict[str, list[tuple[int, ...]]] = {name: [] for name in shapes}
    for place in (place for entry in entries for place in entry.ours):
        if place.name not in shapes:
            raise MaxlmError("this model has no such parameter", where=place.name)
        indices[place.name].append(place.index)
    leads = {}
    for name, shape in shapes.items():
        leads[name] = lead = max(map(len, indices[name]), default=0)
        counts = np.zeros(shape[:lead], int)
        for index in indices[name]:
            if len(index) > len(shape) or any(
                not 0 <= i < n for i, n in zip(index, shape, strict=False)
            ):
                what = f"no index {list(index)} in {list(shape)}"
                raise MaxlmError(what, where=name, fix=_OTHER_CONFIG)
            counts[index] += 1
        for count, fault in ((counts == 0, "nothing fills it"), (counts > 1, "filled twice")):
            if count.any():
                at = "".join(f"[{i}]" for i in np.argwhere(count)[0])
                raise MaxlmError(fault, where=name + at, fix=_OTHER_CONFIG)
    return leads


def _check_fits(stored: StoredTensor, entry: TensorEntry) -> None:
    where = str(stored.path)
    if stored.shape != tuple(entry.shape):
        there, here = list(stored.shape), list(entry.shape)
        what = f"{stored.name} is {there} there, {here} in this model"
        raise MaxlmError(what, where=where, fix=_OTHER_CONFIG)
    if not is_floating(stored.dtype):
        what = f"{stored.name} is stored as {stored.dtype}, so quantized"
        raise MaxlmError(what, where=where, fix="use the model in bf16, fp16 or fp32")


def _check_same(one: StoredTensor, other: StoredTensor) -> None:
    same = one.dtype == other.dtype and all(
        a.tobytes() == b.tobytes()
        for a, b in zip(iterate_pieces(one), iterate_pieces(other), strict=True)
    )
    if not same:
        what = f"{other.name} differs from {one.name}, which this model ties it to"
        fix = "set tie_word_embeddings to false in config.json if it is an output head of its own"
        raise MaxlmError(what, where=str(other.path), fix=fix)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
