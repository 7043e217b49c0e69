"""Pairs of documents: candidates, which agree in a band of their MinHash signatures,
and clusters of verified ones, of which some documents are kept.

A pair of members is one 64-bit number, the smaller member in the upper half: so pairs
sort by it, and a corpus may have 2^32 members.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maxlm.corpus.dedup.columns import (
    get_shard_path,
    make_equal_range_starts,
    map_columns,
    mark_run_starts,
    read_columns,
    read_range,
    write_columns,
)
from maxlm.corpus.dedup.members import SelectedDocuments

_HALF_BITS = np.uint64(32)
_LOW_HALF = np.uint64(2**32 - 1)
_PAIRS_AT_A_TIME = 1 << 20
_SAMPLES = 1000  # Pairs looked at for each range, to cut ranges of about the same size.


def pack_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Packs pairs of members into numbers: uint64, the smaller member in the upper
    half."""
    a = a.astype(np.uint64)
    b = b.astype(np.uint64)
    return np.minimum(a, b) << _HALF_BITS | np.maximum(a, b)


def unpack_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smaller and the larger member of each pair: int64."""
    low = (pairs >> _HALF_BITS).astype(np.int64)
    high = (pairs & _LOW_HALF).astype(np.int64)
    return low, high


def write_band_keys(
    scratch: Path, shard: str, keys: np.ndarray, has_words: np.ndarray
) -> None:
    """Writes keys (uint64 [bands, members]) of the members that have words (bool
    [members]), as columns key1 (sorted), member1 (within the shard), key2, ..."""
    places = np.flatnonzero(has_words).astype(np.int32)
    columns = {}
    for band, band_keys in enumerate(keys[:, has_words], 1):
        order = np.argsort(band_keys, kind="stable")
        columns[f"key{band}"] = band_keys[order]
        columns[f"member{band}"] = places[order]
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
    keys, member = _read_band_keys(members, band, num_ranges, range_index)
    if copy_marks:
        is_copy = np.concatenate([read_columns(path)["is_copy"] for path in copy_marks])
        is_single = is_copy[member] == 0
        keys = keys[is_single]
        member = member[is_single]
    keys, member = _sort_shared_keys(keys, member)

    # A group is members[start : start + size] of one key. Groups of one size are
    # paired together, by array operations.
    group_starts = np.flatnonzero(mark_run_starts(keys))
    group_sizes = np.diff(group_starts, append=len(keys))
    for size in np.unique(group_sizes):
        starts = group_starts[group_sizes == size]
        if size > max_group_size:
            for start in starts.tolist():
                group = member[start : start + size]
                yield from _pair_large_group(members, group, max_group_size)
        else:
            yield from _pair_small_groups(member, starts, size)


def _read_band_keys(
    members: SelectedDocuments, band: int, num_ranges: int, range_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a band's keys in one of equal ranges, shard after shard, and the members
    that have them: uint64 and int64, [keys] both."""
    paths = [get_shard_path(members.folder, "bands", name) for name in members.shards]
    names = (f"key{band}", f"member{band}")
    range_starts = make_equal_range_starts(num_ranges)
    columns, shard_of_key = read_range(paths, names, range_starts, range_index)
    keys, places = (columns[name] for name in names)
    return keys, places + np.array(members.shard_offsets)[shard_of_key]


def _sort_shared_keys(
    keys: np.ndarray, member: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts keys and the members that have them by key, and drops keys that one member
    alone has: there is no pair of it."""
    order = np.argsort(keys, kind="stable")
    is_first = mark_run_starts(keys[order])
    is_last = np.append(is_first[1:], True)
    is_shared = ~(is_first & is_last)
    order = order[is_shared]
    return keys[order], member[order]


def _pair_small_groups(
    member: np.ndarray, starts: np.ndarray, size: int
) -> Iterator[np.ndarray]:
    """Yields all pairs within each of the groups member[start : start + size]."""
    # Places in a group of both ends of each of its pairs: [size · (size - 1) / 2].
    one, other = np.triu_indices(size, 1)
    groups_at_a_time = max(1, _PAIRS_AT_A_TIME // len(one))
    for first in range(0, len(starts), groups_at_a_time):
        piece_starts = starts[first : first + groups_at_a_time]
        groups = member[piece_starts[:, None] + np.arange(size)]  # [groups, size]
        yield pack_pairs(groups[:, one].ravel(), groups[:, other].ravel())


def _pair_large_group(
    members: SelectedDocuments, group: np.ndarray, max_group_size: int
) -> Iterator[np.ndarray]:
    """Yields pairs of each member of a group with the best ones and with as many after
    it, in order of rank."""
    num_partners = max(1, max_group_size // 4)
    ranks = members.take("rank", group).to_numpy()
    group = group[np.argsort(-ranks, kind="stable")]
    # Each member is paired with as many of the best as of those after it.
    members_at_a_time = max(1, _PAIRS_AT_A_TIME // (2 * num_partners))
    for first in range(0, len(group), members_at_a_time):
        stop = min(first + members_at_a_time, len(group))
        # Places in the group, the best first: of members, [members, 1], and of the
        # partners of each, [members, num_partners].
        places = np.arange(first, stop)[:, None]
        best = np.broadcast_to(np.arange(num_partners), (len(places), num_partners))
        following = places + np.arange(1, num_partners + 1)
        # Past the end of the group it is the last one again.
        following = np.minimum(following, len(group) - 1)
        partners = np.concatenate([best, following], axis=1)
        one, other = np.broadcast_arrays(places, partners)
        differ = one != other
        pairs = pack_pairs(group[one[differ]], group[other[differ]])
        yield np.unique(pairs)


def count_pairs(files: Sequence[Path]) -> int:
    """Counts the pairs in the files, each as often as it is there."""
    return sum(map_columns(path).num_rows for path in files)


def find_pair_range_starts(files: Sequence[Path], num_ranges: int) -> np.ndarray:
    """Finds where ranges with about as many pairs in each begin: uint64 [num_ranges].

    Members have very different numbers of pairs: the best of a template has one with
    every page of it. So the ranges are quantiles of a sample, every nth pair of the
    files. Each file is sorted, and so puts a range wrong by n pairs at most.
    """
    step = max(1, count_pairs(files) // (num_ranges * _SAMPLES))
    samples = [np.zeros(1, np.uint64)]
    # The count goes on from file to file: most may have fewer pairs than a step.
    skip = step // 2
    for path in files:
        pairs = read_columns(path)["pair"]
        sample = pairs[skip::step]
        samples.append(sample)
        skip += len(sample) * step - len(pairs)
    all_samples = np.sort(np.concatenate(samples))
    quantiles = np.arange(num_ranges) * len(all_samples) // num_ranges
    return all_samples[quantiles]


@dataclass(frozen=True)
class DuplicateMarks:
    """What is said of the members that are like others; arrays have an entry for
    each."""

    member: np.ndarray
    """Their numbers, rising: int64."""
    duplicate_of: np.ndarray
    """The kept member of which each is a duplicate, or -1: it is kept; int64."""
    jaccard: np.ndarray
    """Its similarity to that member: float64."""
    cluster: np.ndarray
    """Its connected component of the verified pairs, numbered by their first members:
    int64."""
    cluster_size: np.ndarray
    """The members of that component: int64."""

    def select(self, first: int, stop: int) -> "DuplicateMarks":
        """Returns those of members from `first` up to `stop`."""
        bounds = np.searchsorted(self.member, [first, stop])
        span = slice(*bounds.tolist())
        return DuplicateMarks(
            self.member[span],
            self.duplicate_of[span],
            self.jaccard[span],
            self.cluster[span],
            self.cluster_size[span],
        )


def resolve_duplicates(
    low: np.ndarray,
    high: np.ndarray,
    jaccard: np.ndarray,
    get_ranks: Callable[[np.ndarray], np.ndarray],
) -> DuplicateMarks:
    """Decides which documents are kept.

    Likeness does not carry over: with A like B and B like C, A and C may have little in
    common, and a long enough chain connects anything. So a cluster is not reduced to
    one document. Its documents are visited from the best to the worst, and one is a
    duplicate only if it is itself like a document that is kept. Of any two that are
    alike one at least is then a duplicate.

    Memory is about 110 bytes for each pair and 90 for each document in one.

    Args:
        low, high, jaccard: pairs of members verified to be alike: int64, int64, float64
            [pairs].
        get_ranks: returns how good each of some members is, the higher the better:
            float64.
    """
    from scipy.sparse import coo_array

    member = np.unique(np.concatenate([low, high]))
    # The indices in `member` of both ends of each pair: [2, pairs].
    ends = np.searchsorted(member, [low, high]).reshape(2, -1)

    # Copies are one node, since what is wholly alike does carry over. The best of them
    # stands for the node.
    is_copy = jaccard == 1
    node = _label_components(ends[:, is_copy], len(member))
    rank = get_ranks(member)
    order = np.lexsort((member, -rank, node))
    best_of_node = order[mark_run_starts(node[order])]
    node_member = member[best_of_node]
    node_rank = rank[best_of_node]
    num_nodes = len(best_of_node)

    # Pairs of nodes, each once (copies have the same similarity to a third), as a
    # sparse matrix that has each seen from both.
    one, other = node[ends[:, ~is_copy]]
    node_pairs, first_of_pair = np.unique(pack_pairs(one, other), return_index=True)
    similarity = jaccard[~is_copy][first_of_pair]
    one_way = coo_array(
        (similarity, unpack_pairs(node_pairs)), shape=(num_nodes, num_nodes)
    ).tocsr()
    graph = one_way + one_way.T

    visiting_order = np.lexsort((node_member, -node_rank))
    kept_node, likeness = _find_kept_nodes(
        visiting_order, graph.indptr, graph.indices, graph.data
    )

    # From nodes back to members. A member is a duplicate of the best copy in its own
    # node, where that is kept; else of what its node is a duplicate of.
    node_is_kept = kept_node[node] < 0
    is_copy_of_kept = node_is_kept & (member != node_member[node])
    node_duplicate_of = np.where(kept_node >= 0, node_member[kept_node], -1)
    duplicate_of = np.where(is_copy_of_kept, node_member[node], node_duplicate_of[node])
    member_jaccard = np.where(is_copy_of_kept, 1.0, likeness[node])
    cluster = _label_components(ends, len(member))
    cluster_size = np.bincount(cluster)[cluster]
    return DuplicateMarks(member, duplicate_of, member_jaccard, cluster, cluster_size)


def _label_components(ends: np.ndarray, num_nodes: int) -> np.ndarray:
    """Returns each node's connected component, numbered as they first appear: int64
    [num_nodes]. `ends`: the nodes at both ends of each edge, int64 [2, edges]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if num_nodes == 0:
        return np.empty(0, np.int64)
    ones = np.ones(ends.shape[1], np.int8)
    graph = coo_array((ones, tuple(ends)), shape=(num_nodes, num_nodes))
    _, components = connected_components(graph, directed=False)
    return components.astype(np.int64)


def _find_kept_nodes(
    visiting_order: np.ndarray,
    starts: np.ndarray,
    neighbours: np.ndarray,
    similarity: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Decides which nodes are kept, visited from the best to the worst.

    Args:
        starts, neighbours, similarity: node i is like neighbours[starts[i] : starts[i +
            1]], as much as the same of `similarity` says.

    Returns:
        For each node the kept one that it is most like (of equals the better), or -1:
        it is kept; and how much it is like that.
    """
    num_nodes = len(visiting_order)
    # Each node's place in the order.
    visited_as = np.empty(num_nodes, np.int64)
    visited_as[visiting_order] = np.arange(num_nodes)
    kept_node = np.full(num_nodes, -1, np.int64)
    likeness = np.zeros(num_nodes)
    has_neighbours = np.diff(starts)[visiting_order] > 0
    for node in visiting_order[has_neighbours].tolist():
        edges = slice(starts[node], starts[node + 1])
        others = neighbours[edges]
        # Neighbours that are kept already.
        is_visited = visited_as[others] < visited_as[node]
        is_kept = is_visited & (kept_node[others] < 0)
        if not is_kept.any():
            continue
        others = others[is_kept]
        other_similarity = similarity[edges][is_kept]
        best_first = np.lexsort((visited_as[others], -other_similarity))
        best = best_first[0]
        kept_node[node] = others[best]
        likeness[node] = other_similarity[best]
    return kept_node, likeness


class SimilarityGraph:
    """Documents that are alike, and which of them are kept so far.

    What is wholly alike carries over, so documents with equal sets of n-grams are one
    node.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, jaccard: np.ndarray):
        """`low`, `high`, `jaccard`: pairs of documents verified to be alike, by their
        numbers: int64, int64, float64 [pairs]."""
        self.documents = np.unique(np.concatenate([low, high]))
        ends = np.searchsorted(self.documents, [low, high]).reshape(2, -1)
        is_copy = jaccard == 1
        self._nodes = _label_components(ends[:, is_copy], len(self.documents))
        num_nodes = int(self._nodes.max(initial=-1)) + 1

        # Each pair of nodes once, seen from both. Those of node i are from starts[i] up
        # to starts[i + 1].
        one, other = self._nodes[ends[:, ~is_copy]]
        node_pairs, first_of_pair = np.unique(pack_pairs(one, other), return_index=True)
        one, other = unpack_pairs(node_pairs)
        similarity = np.tile(jaccard[~is_copy][first_of_pair], 2)
        seen_from = np.concatenate([one, other])
        order = np.argsort(seen_from, kind="stable")
        self._neighbours = np.concatenate([other, one])[order]
        self._similarity = similarity[order]
        self._starts = np.searchsorted(seen_from[order], np.arange(num_nodes + 1))

        # The kept document of each node, and how many were marked before it; -1: there
        # is none.
        self._kept = np.full(num_nodes, -1, np.int64)
        self._times = np.full(num_nodes, -1, np.int64)
        self._num_kept = 0

    def find_kept(self, document: int) -> tuple[int, float] | None:
        """Finds the kept document that a document is most like, of equals the one that
        was marked first, and how alike they are; None: it is like none."""
        node = self._find_node(document)
        if node is None:
            return None
        if self._kept[node] >= 0:  # It or a copy of it is kept.
            return int(self._kept[node]), 1.0
        edges = slice(self._starts[node], self._starts[node + 1])
        neighbours = self._neighbours[edges]
        is_kept = self._kept[neighbours] >= 0
        if not is_kept.any():
            return None
        neighbours = neighbours[is_kept]
        similarity = self._similarity[edges][is_kept]
        best_first = np.lexsort((self._times[neighbours], -similarity))
        best = best_first[0]
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
