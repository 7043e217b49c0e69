"""Groups all that has the same hash, over a whole corpus: the best of it, and its
copies.

A *position* is a number of 64 bits: the index of a file in the upper half, a place in
it below.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxlm.corpus.dedup.columns import (
    make_equal_range_starts,
    mark_run_starts,
    read_range,
    write_columns,
)

_HALF = np.uint64(32)
_LOW = np.uint64(2**32 - 1)


def write_copies(
    folder: Path,
    hashed: Sequence[Path],
    num_ranges: int,
    has_ranks: bool,
    range_index: int,
) -> None:
    """Writes the position, rising, of all in one of equal ranges of hashes that occurs
    several times; the position of the best with the same hash and check as `source`;
    and how many there are of it as `copies`.

    All of one hash are in one range, however many they are.

    Args:
        hashed: files with the columns hash (sorted) and check, uint64, and place,
            uint32;
        has_ranks: and rank, of which the highest is the best. Else, and among equals,
            the first.
    """
    path = _get_range_path(folder, num_ranges, range_index)
    if path.exists():
        return
    names = ["hash", "check", "place"]
    if has_ranks:
        names.append("rank")
    columns, file_indices = read_range(
        hashed, names, make_equal_range_starts(num_ranges), range_index
    )
    # What is the same side by side, the best of it first. The sort keeps the order of
    # files among equals.
    sort_keys = [columns["check"], columns["hash"]]
    if has_ranks:
        sort_keys.insert(0, -columns["rank"])
    order = np.lexsort(sort_keys)
    check = columns["check"][order]
    hash_ = columns["hash"][order]
    is_best = mark_run_starts(check) | mark_run_starts(hash_)
    position = (file_indices << _HALF | columns["place"])[order]
    group = np.cumsum(is_best) - 1
    source = position[is_best][group]
    copies = np.bincount(group)[group]

    by_position = np.argsort(position)
    repeated = by_position[copies[by_position] > 1]
    write_columns(
        path,
        {
            "position": position[repeated],
            "source": source[repeated],
            "copies": copies[repeated],
        },
    )


class Copies(NamedTuple):
    """What occurs several times of one file: int64 [copies] each, by rising place."""

    place: np.ndarray
    copies: np.ndarray
    """How many there are of it in all files, this one included."""
    source_file: np.ndarray
    """The index of the file with the best of them."""
    source_place: np.ndarray
    """The best one's place in that file."""


def read_copies(folder: Path, num_ranges: int, file_index: int) -> Copies:
    """Reads what `write_copies` wrote of a file."""
    # The positions of one file are a range themselves.
    file_starts = np.array([file_index, file_index + 1], np.uint64) << _HALF
    paths = [_get_range_path(folder, num_ranges, i) for i in range(num_ranges)]
    columns, _ = read_range(paths, ("position", "source", "copies"), file_starts, 0)
    position = columns["position"]
    source = columns["source"]
    order = np.argsort(position)
    return Copies(
        place=(position & _LOW).astype(np.int64)[order],
        copies=columns["copies"].astype(np.int64)[order],
        source_file=(source >> _HALF).astype(np.int64)[order],
        source_place=(source & _LOW).astype(np.int64)[order],
    )


def _get_range_path(folder: Path, num_ranges: int, range_index: int) -> Path:
    # By the number of ranges, since a killed run may have had others.
    return folder / "copies" / f"{num_ranges}-{range_index}.arrow"
