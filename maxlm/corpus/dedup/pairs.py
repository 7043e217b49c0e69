"""Pairs of documents: candidates, which agree in a band of their MinHash signatures,
and clusters of verified ones, of which some documents are kept.

A pair of members is one 64-bit number, the smaller member in the upper half: so pairs
sort by it, and a corpus may have 2^32 members.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.corpus.dedup.columns import (
    get_shard_path,
    make_equal_range_starts,
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
    """Packs pairs of members into numbers: uint64, the smaller member in the upper
    half."""
    a = a.astype(np.uint64)
    b = b.astype(np.uint64)
    return np.minimum(a, b) << _HALF | np.maximum(a, b)


def unpack_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smaller and the larger member of each pair: int64."""
    return (pairs >> _HALF).astype(np.int64), (pairs & _LOW).astype(np.int64)


def write_band_keys(
    scratch: Path, shard: str, keys: np.ndarray, has_words: np.ndarray
) -> None:
    """Write keys (uint64 [bands, members]) of the members that have words (bool
    [members]), as columns key1 (sorted), member1 (within the shard), key2, ..."""
    places = np.flatnonzero(has_words).astype(np.int32)
    columns = {}
    for band, row in enumerate(keys[:, has_words], 1):
        order = np.argsort(row, kind="stable")
        columns |= {f"key{band}": row[order], f"member{band}": places[order]}
    write_columns(get_shard_path(scratch, "bands", shard), columns)


def find_candidate_pairs(
    members: SelectedDocuments,
    band: int,
    num_ranges: int,
    range_index: int,
    max_group_size: int,
    copy_marks: Sequence[Path] = (),
) -> Iterator[np.ndarray]:
    """Yields pairs that share a key of a band (from 1) in a range of keys, in pieces.

    `copy_marks`: for each shard a file whose column is_copy (uint8) marks members to
    leave out, since they are copies of others.

    In a group of up to `max_group_size` members all are paired. In a larger one, such
    as copies of a text or pages of a template, each is paired with the `max_group_size`
    / 4 best and as many after it, which is what a group of that size has for a member:
    the pairs stay in proportion to the members.

    The members of one key are in one range, however many they are: about 80 bytes each.
    """
    files = [get_shard_path(members.folder, "bands", name) for name in members.shards]
    names = (f"key{band}", f"member{band}")
    starts = make_equal_range_starts(num_ranges)
    columns, shard = read_range(files, names, starts, range_index)
    key = columns[f"key{band}"]
    member = columns[f"member{band}"] + np.array(members.shard_offsets)[shard]
    if copy_marks:
        is_copy = np.concatenate([read_columns(path)["is_copy"] for path in copy_marks])
        is_single = is_copy[member] == 0
        key = key[is_single]
        member = member[is_single]
    del columns, shard
    order = np.argsort(key, kind="stable")
    first = mark_run_starts(key[order])
    order = order[
        ~(first & np.append(first[1:], True))
    ]  # Those whose key occurs more than once.
    key, member = key[order], member[order]
    starts = np.flatnonzero(mark_run_starts(key))
    sizes = np.diff(starts, append=len(key))
    for size in np.unique(sizes):
        groups = starts[sizes == size]
        if size > max_group_size:
            for start in groups.tolist():
                yield from _pair_large(
                    members, member[start : start + size], max_group_size
                )
            continue
        a, b = np.triu_indices(size, 1)
        step = max(1, _PIECE // len(a))
        for i in range(0, len(groups), step):
            rows = member[groups[i : i + step, None] + np.arange(size)]
            yield pack_pairs(rows[:, a].ravel(), rows[:, b].ravel())


def _pair_large(
    members: SelectedDocuments, group: np.ndarray, limit: int
) -> Iterator[np.ndarray]:
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

    Members have very different numbers of pairs: the best of a template has one with
    every page of it. So the ranges are quantiles of a sample, every nth pair of the
    files. Each file is sorted, and so puts a range wrong by n pairs at most.
    """
    step = max(1, count_pairs(files) // (num_ranges * _SAMPLES))
    samples = [np.zeros(1, np.uint64)]
    skip = step // 2
    for path in (
        files
    ):  # the count goes on from file to file: most may have fewer pairs than a step
        pairs = read_columns(path)["pair"]
        samples.append(pairs[skip::step])
        skip += len(samples[-1]) * step - len(pairs)
    sample = np.sort(np.concatenate(samples))
    return sample[np.arange(num_ranges) * len(sample) // num_ranges]


def resolve_duplicates(
    low: np.ndarray,
    high: np.ndarray,
    jaccard: np.ndarray,
    rank_fn: Callable[[np.ndarray], np.ndarray],
) -> np.recarray:
    """Decide which documents are kept.

    Likeness does not carry over: with A like B and B like C, A and C may have little in
    common, and a long enough chain connects anything. So a cluster is not reduced to
    one document. Its documents are visited from the best to the worst, and one is a
    duplicate only if it is itself like a document that is kept. Of any two that are
    alike one at least is then a duplicate.

    Memory is about 110 bytes for each pair and 90 for each document in one.

    Args:
        low, high, jaccard: pairs of members verified to be alike: int64, int64, float64
            [pairs].
        rank_fn: how good each of some members is, the higher the better; float64.

    Returns:
        A record of each member that is like another one, in order: `member`, int64;
        `duplicate_of`, the kept member of which it is a duplicate, or -1: it is kept;
        `jaccard`, its similarity to that member, float64; `cluster`, its connected
        component of the verified pairs, numbered by their first members;
        `cluster_size`, the members of that component.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    member = np.unique(np.concatenate([low, high]))
    ends = np.searchsorted(member, [low, high]).reshape(2, -1)

    def connect(ends: np.ndarray) -> np.ndarray:
        size = len(member)
        graph = coo_array(
            (np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(size, size)
        )
        return connected_components(graph, directed=False)[1] if size else member

    # Copies (what is wholly alike carries over) are one node: the best of them.
    is_copy = jaccard == 1
    node = connect(ends[:, is_copy])
    rank = rank_fn(member)
    order = np.lexsort((member, -rank, node))
    first = order[mark_run_starts(node[order])]
    stands, rank = member[first], rank[first]
    pairs, which = np.unique(pack_pairs(*node[ends[:, ~is_copy]]), return_index=True)
    shape = (len(first), len(first))
    graph = coo_array(
        (jaccard[~is_copy][which], unpack_pairs(pairs)), shape=shape
    ).tocsr()
    graph = graph + graph.T
    of, likeness = _keep_best(np.lexsort((stands, -rank)), graph)
    copy = (of[node] < 0) & (member != stands[node])
    cluster = connect(ends)  # Numbered as they first appear.
    size = np.bincount(cluster)[cluster]
    duplicate_of = np.where(copy, stands[node], np.where(of >= 0, stands[of], -1)[node])
    columns = [member, duplicate_of, np.where(copy, 1.0, likeness[node]), cluster, size]
    names = "member, duplicate_of, jaccard, cluster, cluster_size"
    return np.rec.fromarrays(columns, formats="i8, i8, f8, i8, i8", names=names)


def _keep_best(order: np.ndarray, graph: Any) -> tuple[np.ndarray, np.ndarray]:
    """Chooses what is kept of nodes in `order`, the best first. Returns for each node
    the kept one that it is most like (of equals the better), or -1: it is kept; and how
    much it is like it.

    In `graph`, a sparse matrix by rows, node i is like neighbours[starts[i]:starts[i +
    1]], as much as the same of `similarity` says.
    """
    starts, neighbours, similarity = graph.indptr, graph.indices, graph.data
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    of = np.full(len(order), -1, np.int64)
    likeness = np.zeros(len(order))
    for node in order[np.diff(starts)[order] > 0].tolist():
        edges = slice(starts[node], starts[node + 1])
        others = neighbours[edges]
        kept = np.flatnonzero((rank[others] < rank[node]) & (of[others] < 0))
        if len(kept):
            best = kept[np.lexsort((rank[others[kept]], -similarity[edges][kept]))[0]]
            of[node], likeness[node] = others[best], similarity[edges][best]
    return of, likeness


class SimilarityGraph:
    """Documents that are alike, and which of them are kept so far.

    What is wholly alike carries over, so documents with equal sets of n-grams are one
    node.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, jaccard: np.ndarray):
        """`low`, `high`, `jaccard`: pairs of documents verified to be alike, by their
        numbers: int64, int64, float64 [pairs]."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        self.documents = np.unique(np.concatenate([low, high]))
        size = len(self.documents)
        ends = np.searchsorted(self.documents, [low, high]).reshape(2, -1)
        is_copy = jaccard == 1
        self._nodes = np.empty(0, np.int64)
        if size:
            ones = np.ones(np.count_nonzero(is_copy), np.int8)
            copies = coo_array((ones, tuple(ends[:, is_copy])), shape=(size, size))
            self._nodes = connected_components(copies, directed=False)[1].astype(
                np.int64
            )
        num_nodes = int(self._nodes.max()) + 1 if size else 0
        one, other = self._nodes[ends[:, ~is_copy]]
        # Each pair of nodes once, seen from both.
        pairs, first = np.unique(pack_pairs(one, other), return_index=True)
        one, other = unpack_pairs(pairs)
        similarity = np.tile(jaccard[~is_copy][first], 2)
        rows = np.concatenate([one, other])
        order = np.argsort(rows, kind="stable")
        self._neighbours = np.concatenate([other, one])[order]
        self._similarity = similarity[order]
        self._starts = np.searchsorted(rows[order], np.arange(num_nodes + 1))
        # The kept document of each node, and when it was marked; -1: there is none.
        self._kept = np.full(num_nodes, -1, np.int64)
        self._times = np.full(num_nodes, -1, np.int64)
        self._num_kept = 0

    def find_kept(self, document: int) -> tuple[int, float] | None:
        """Finds the kept document that a document is most like, of equals the one that
        was marked first, and how alike they are; None: it is like none."""
        node = self._find_node(document)
        if node is None:
            return None
        if self._kept[node] >= 0:
            return int(self._kept[node]), 1.0
        edges = slice(self._starts[node], self._starts[node + 1])
        neighbours = self._neighbours[edges]
        is_kept = self._kept[neighbours] >= 0
        if not is_kept.any():
            return None
        neighbours = neighbours[is_kept]
        similarity = self._similarity[edges][is_kept]
        best = np.lexsort((self._times[neighbours], -similarity))[0]
        return int(self._kept[neighbours[best]]), float(similarity[best])

    def mark_kept(self, document: int) -> None:
        """Takes note that a document is kept."""
        node = self._find_node(document)
        if node is not None and self._kept[node] < 0:
            self._kept[node] = document
            self._times[node] = self._num_kept
            self._num_kept += 1

    def _find_node(self, document: int) -> int | None:
        index = int(np.searchsorted(self.documents, document))
        if index == len(self.documents) or self.documents[index] != document:
            return None
        return int(self._nodes[index])
