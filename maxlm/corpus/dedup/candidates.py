"""Candidates: pairs of documents that agree in a band of their MinHash signatures.

A pair of members is one 64-bit number, the smaller member in the upper half: so pairs sort by it,
and a corpus may have 2^32 members.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maxlm.corpus.dedup.columns import (
    find_range,
    mark_run_starts,
    read_batch,
    read_columns,
    read_range,
    write_columns,
)
from maxlm.corpus.dedup.members import SelectedDocuments

_HALF = np.uint64(32)
_LOW = np.uint64(2**32 - 1)
_PIECE = 1 << 20  # Pairs made at a time.
_SAMPLES = 1000  # Pairs looked at for each range, to cut ranges of about the same size.


def pack_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Packs pairs of members into numbers: uint64, the smaller member in the upper half."""
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    return np.minimum(a, b) << _HALF | np.maximum(a, b)


def unpack_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smaller and the larger member of each pair: int64."""
    return (pairs >> _HALF).astype(np.int64), (pairs & _LOW).astype(np.int64)


def _band_file(scratch: Path, shard: str) -> Path:
    """A shard's keys of each band: columns key1 (sorted), member1 (within the shard), key2, ..."""
    return scratch / "bands" / f"{shard}.arrow"


def write_band_keys(scratch: Path, shard: str, keys: np.ndarray, has_words: np.ndarray) -> None:
    """Write keys (uint64 [bands, members]) of the members that have words (bool [members])."""
    places = np.flatnonzero(has_words).astype(np.int32)
    columns = {}
    for band, row in enumerate(keys[:, has_words], 1):
        order = np.argsort(row, kind="stable")
        columns |= {f"key{band}": row[order], f"member{band}": places[order]}
    write_columns(_band_file(scratch, shard), columns)


def find_candidate_pairs(
    members: SelectedDocuments, band: int, num_ranges: int, range_index: int, max_group_size: int
) -> Iterator[np.ndarray]:
    """Yields pairs that share a key of a band (from 1) in a range of keys, in pieces.

    In a group of up to `max_group_size` members all are paired. In a larger one, such as copies of
    a text or pages of a template, each is paired with the `max_group_size` / 4 best and as many
    after it, which is what a group of that size has for a member: the pairs stay in proportion to
    the members.

    The members of one key are in one range, however many they are: about 80 bytes each.
    """
    files = [_band_file(members.folder, name) for name in members.shards]
    columns, shard = read_range(files, f"key{band}", [f"member{band}"], num_ranges, range_index)
    key = columns[f"key{band}"]
    member = columns[f"member{band}"] + np.array(members.shard_offsets)[shard]
    del columns, shard
    order = np.argsort(key, kind="stable")
    first = mark_run_starts(key[order])
    order = order[~(first & np.append(first[1:], True))]  # Those whose key occurs more than once.
    key, member = key[order], member[order]
    starts = np.flatnonzero(mark_run_starts(key))
    sizes = np.diff(starts, append=len(key))
    for size in np.unique(sizes):
        groups = starts[sizes == size]
        if size > max_group_size:
            for start in groups.tolist():
                yield from _pair_large(members, member[start : start + size], max_group_size)
            continue
        a, b = np.triu_indices(size, 1)
        step = max(1, _PIECE // len(a))
        for i in range(0, len(groups), step):
            rows = member[groups[i : i + step, None] + np.arange(size)]
            yield pack_pairs(rows[:, a].ravel(), rows[:, b].ravel())


def _pair_large(members: SelectedDocuments, group: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    few = max(1, limit // 4)
    group = group[np.argsort(-members.take("rank", group).to_numpy(), kind="stable")]
    step = max(1, _PIECE // (2 * few))
    for i in range(0, len(group), step):
        here = np.arange(i, min(i + step, len(group)))[:, None]
        best = np.broadcast_to(np.arange(few), (len(here), few))
        following = np.minimum(here + np.arange(1, few + 1), len(group) - 1)
        a, b = np.broadcast_arrays(here, np.concatenate([best, following], axis=1))
        yield np.unique(pack_pairs(group[a[a != b]], group[b[a != b]]))


def count_pairs(files: Sequence[Path]) -> int:
    """Counts the pairs in the files, each as often as it is there."""
    return sum(read_batch(path).num_rows for path in files)


def find_pair_range_starts(files: Sequence[Path], num_ranges: int) -> np.ndarray:
    """Finds where ranges with about as many pairs in each begin: uint64 [num_ranges].

    Members have very different numbers of pairs: the best of a template has one with every page of
    it. So the ranges are quantiles of a sample, every nth pair of each file. Each file is sorted,
    and so puts a range wrong by n pairs at most.
    """
    step = max(1, count_pairs(files) // (num_ranges * _SAMPLES))
    samples = [read_columns(path)["pair"][::step] for path in files]
    sample = np.sort(np.concatenate([np.zeros(1, np.uint64), *samples]))
    return sample[np.arange(num_ranges) * len(sample) // num_ranges]


def read_unique_pairs_in_range(
    files: Sequence[Path], range_starts: np.ndarray, range_index: int
) -> np.ndarray:
    """Reads the pairs, each once, in one of the ranges of `find_pair_range_starts`."""
    pairs = [np.empty(0, np.uint64), *(read_columns(path)["pair"] for path in files)]
    parts = [each[find_range(each, range_starts, range_index)] for each in pairs]
    return np.unique(np.concatenate(parts))
