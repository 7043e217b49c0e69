"""Candidates: pairs of documents that agree in a band of their MinHash signatures.

A pair of members is one 64-bit number, the smaller member in the upper half: so pairs sort by it,
and a corpus may have 2^32 members.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maxlm.data.corpus.dedup.columns import (
    concatenate,
    cut,
    first_of_runs,
    open_columns,
    ranges,
    write_columns,
)
from maxlm.data.corpus.dedup.members import Members

_HALF = np.uint64(32)
_LOW = np.uint64(2**32 - 1)


def join_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pairs of members as numbers: uint64."""
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    return np.minimum(a, b) << _HALF | np.maximum(a, b)


def split_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smaller and the larger member of each pair: int64."""
    return (pairs >> _HALF).astype(np.int64), (pairs & _LOW).astype(np.int64)


def _band_file(scratch: Path, shard: str) -> Path:
    """A shard's keys of each band: columns key0 (sorted), member0 (within the shard), key1, ..."""
    return scratch / "bands" / f"{shard}.arrow"


def write_bands(scratch: Path, shard: str, keys: np.ndarray, worded: np.ndarray) -> None:
    """Write keys (uint64 [bands, members]) of the members that have words (bool [members])."""
    places = np.flatnonzero(worded).astype(np.int32)
    columns = {}
    for band, row in enumerate(keys[:, worded]):
        order = np.argsort(row, kind="stable")
        columns |= {f"key{band}": row[order], f"member{band}": places[order]}
    write_columns(_band_file(scratch, shard), columns)


def read_band(
    members: Members, band: int, number: int, which: int
) -> tuple[np.ndarray, np.ndarray]:
    """The keys of one band in one of `number` ranges, sorted, and their members, rising in each."""
    starts, keys, found = ranges(number), [], []
    for shard, name in enumerate(members.shards):
        with open_columns(_band_file(members.folder, name)) as columns:
            part = cut(columns[f"key{band}"], starts, which)
            keys.append(columns[f"key{band}"][part])
            found.append(columns[f"member{band}"][part] + np.int64(members.first[shard]))
    key, member = concatenate(keys, np.uint64), concatenate(found, np.int64)
    order = np.argsort(key, kind="stable")
    return key[order], member[order]


def find_copies(members: Members, number: int, which: int) -> tuple[np.ndarray, np.ndarray]:
    """Members with the same words in the same order as a better one: (member, the best)."""
    key, member = read_band(members, 0, number, which)
    shared = _in_groups(key)
    key, member = key[shared], member[shared]
    group = np.cumsum(first_of_runs(key)) - 1
    rank = members.take("rank", member).to_numpy()
    order = np.lexsort((member, -rank, group))
    first = first_of_runs(group[order])
    best = member[order][first][group]
    return member[member != best], best[member != best]


def find_pairs(
    members: Members, band: int, number: int, which: int, copies: np.ndarray, limit: int
) -> Iterator[np.ndarray]:
    """Pairs that share a key of a band, in pieces; `copies` (sorted) take no part.

    In a group of up to `limit` members all are paired. In a larger one, such as the pages of a
    template, each is paired with the limit / 4 best and the limit / 4 that follow it, which is as
    many as a group of the limit has for a member: the pairs stay in proportion to the members.
    """
    key, member = read_band(members, band, number, which)
    if len(copies):
        there = copies[np.minimum(np.searchsorted(copies, member), len(copies) - 1)] == member
        key, member = key[~there], member[~there]
    shared = _in_groups(key)
    key, member = key[shared], member[shared]
    starts = np.flatnonzero(first_of_runs(key))
    sizes = np.diff(starts, append=len(key))
    for size in np.unique(sizes):
        groups = starts[sizes == size]
        if size > limit:
            for start in groups.tolist():
                yield from _pair_large(members, member[start : start + size], limit)
            continue
        a, b = np.triu_indices(size, 1)
        step = max(1, _PIECE // len(a))
        for i in range(0, len(groups), step):
            rows = member[groups[i : i + step, None] + np.arange(size)]
            yield join_pairs(rows[:, a].ravel(), rows[:, b].ravel())


_PIECE = 1 << 20  # Pairs made at a time.


def _pair_large(members: Members, group: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    few = max(1, limit // 4)
    group = group[np.argsort(-members.take("rank", group).to_numpy(), kind="stable")]
    step = max(1, _PIECE // (2 * few))
    for i in range(0, len(group), step):
        here = np.arange(i, min(i + step, len(group)))[:, None]
        others = np.concatenate(
            [
                np.broadcast_to(np.arange(few), (len(here), few)),
                np.minimum(here + np.arange(1, few + 1), len(group) - 1),
            ],
            axis=1,
        )
        a, b = np.broadcast_arrays(here, others)
        yield np.unique(join_pairs(group[a[a != b]], group[b[a != b]]))


def _in_groups(keys: np.ndarray) -> np.ndarray:
    """Which sorted keys occur more than once."""
    first = first_of_runs(keys)
    return ~(first & np.append(first[1:], True))


def read_pairs(files: Sequence[Path], total: int, number: int, which: int) -> np.ndarray:
    """The pairs, each once, whose smaller member is in one of `number` ranges of all members."""
    starts = np.arange(number, dtype=np.uint64) * np.uint64(-(-total // number)) << _HALF
    parts = []
    for path in files:
        with open_columns(path) as columns:
            parts.append(columns["pair"][cut(columns["pair"], starts, which)])
    return np.unique(concatenate(parts, np.uint64))
