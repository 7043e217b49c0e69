"""Groups all that has the same hash, over a whole corpus: the best of it, and its
copies.

A *position* is a number of 64 bits: the index of a file in the upper half, a place in
it below. What is hashed are texts, sets of n-grams or windows of words; a place is the
number of one in its file.
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

_HALF_BITS = np.uint64(32)
_LOW_HALF = np.uint64(2**32 - 1)


def sort_digests(
    digests: bytes | bytearray, ranks: np.ndarray, places: np.ndarray
) -> dict[str, np.ndarray]:
    """Makes the columns that :func:`write_copies` reads of a file: the first half of a
    digest is its hash, the second its check.

    Args:
        digests: 128 bits each, end to end, of a file's places in their order.
        ranks: float64, of all these.
        places: those to look for copies of, int64.
    """
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    hashes = halves[:, 0]
    checks = halves[:, 1]
    order = places[np.argsort(hashes[places], kind="stable")]
    return {
        "hash": hashes[order],
        "check": checks[order],
        "place": order.astype(np.uint32),
        "rank": ranks[order],
    }


def write_copies(
    folder: Path,
    hashed: Sequence[Path],
    num_ranges: int,
    range_index: int,
    *,
    has_ranks: bool,
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
    range_starts = make_equal_range_starts(num_ranges)
    columns, file_indices = read_range(hashed, names, range_starts, range_index)

    # What is the same side by side, the best of it first: lexsort's last key counts
    # first, and it keeps the order of files among equals.
    sort_keys = [columns["check"], columns["hash"]]
    if has_ranks:
        sort_keys.insert(0, -columns["rank"])
    order = np.lexsort(sort_keys)
    check = columns["check"][order]
    hash_ = columns["hash"][order]
    is_best = mark_run_starts(check) | mark_run_starts(hash_)
    position = (file_indices << _HALF_BITS | columns["place"])[order]

    # All with the same hash and check are a group, numbered in this order.
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
    # The positions of one file are a range themselves, the first of these two.
    file_starts = np.array([file_index, file_index + 1], np.uint64) << _HALF_BITS
    paths = [_get_range_path(folder, num_ranges, i) for i in range(num_ranges)]
    columns, _ = read_range(paths, ("position", "source", "copies"), file_starts, 0)
    position = columns["position"]
    source = columns["source"]
    order = np.argsort(position)
    return Copies(
        place=(position & _LOW_HALF).astype(np.int64)[order],
        copies=columns["copies"].astype(np.int64)[order],
        source_file=(source >> _HALF_BITS).astype(np.int64)[order],
        source_place=(source & _LOW_HALF).astype(np.int64)[order],
    )


def _get_range_path(folder: Path, num_ranges: int, range_index: int) -> Path:
    # By the number of ranges: a killed run that had another, since the stage's `memory`
    # was another, has left files that must not be taken for these.
    return folder / "copies" / f"{num_ranges}-{range_index}.arrow"
