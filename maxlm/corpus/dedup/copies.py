"""Groups all that has the same hash, over a whole corpus: the best of it, and its
copies.

A *position* is a number of 64 bits: the index of a file in the upper half, a place in
it below.
"""

from collections.abc import Sequence
from pathlib import Path

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
    """Write the position, rising, of all in one of equal ranges of hashes that occurs
    several times; the position of the best with the same hash and check as `source`;
    and how many there are of it as `copies`.

    All of one hash are in one range, however many they are.

    Args:
        hashed: files with the columns hash (sorted) and check, uint64, and place,
            uint32;
        has_ranks: and rank, of which the highest is the best. Else, and among equals,
            the first.
    """
    path = _range_file(folder, num_ranges, range_index)
    if path.exists():
        return
    names = ("hash", "check", "place", *(["rank"] if has_ranks else []))
    columns, files = read_range(
        hashed, names, make_equal_range_starts(num_ranges), range_index
    )
    keys = [columns["check"], columns["hash"]]
    # The sort keeps the order of files among equals.
    order = np.lexsort([-columns["rank"], *keys] if has_ranks else keys)
    leads = mark_run_starts(keys[0][order]) | mark_run_starts(keys[1][order])
    positions = (files << _HALF | columns["place"])[order]
    group = np.cumsum(leads) - 1
    copies = np.bincount(group)[group]
    found = {"position": positions, "source": positions[leads][group], "copies": copies}
    order = np.argsort(positions)
    order = order[copies[order] > 1]
    write_columns(path, {name: values[order] for name, values in found.items()})


def read_copies(
    folder: Path, num_ranges: int, file_index: int
) -> dict[str, np.ndarray]:
    """Reads what `write_copies` wrote of a file, as int64 by rising place: place,
    copies, source_file and source_place."""
    starts = np.array([file_index, file_index + 1], np.uint64) << _HALF
    files = [_range_file(folder, num_ranges, i) for i in range(num_ranges)]
    columns, _ = read_range(files, ("position", "source", "copies"), starts, 0)
    position, source, copies = columns.values()
    found = {"place": position & _LOW, "copies": copies}
    found |= {"source_file": source >> _HALF, "source_place": source & _LOW}
    order = np.argsort(position)
    return {name: values.astype(np.int64)[order] for name, values in found.items()}


def _range_file(folder: Path, num_ranges: int, range_index: int) -> Path:
    # By the number of ranges, since a killed run may have had others.
    return folder / "copies" / f"{num_ranges}-{range_index}.arrow"
