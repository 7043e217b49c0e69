"""Makes clusters of verified pairs, and decides which documents of each are kept."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maxlm.corpus.dedup.candidates import pack_pairs, unpack_pairs
from maxlm.corpus.dedup.columns import mark_run_starts


@dataclass(frozen=True)
class DuplicateClusters:
    """Every member that is like another one, in order."""

    member: np.ndarray
    """Numbers of the members: int64 [marks], rising."""
    duplicate_of: np.ndarray
    """The kept member of which each is a duplicate, or -1: it is kept."""
    jaccard: np.ndarray
    """Jaccard similarity to that member; float64."""
    cluster: np.ndarray
    """Connected component of the verified pairs; numbered by their first members."""
    cluster_size: np.ndarray
    """Members of that component."""


def resolve_duplicates(
    low: np.ndarray,
    high: np.ndarray,
    jaccard: np.ndarray,
    rank_fn: Callable[[np.ndarray], np.ndarray],
) -> DuplicateClusters:
    """Decide which documents are kept.

    Likeness does not carry over: with A like B and B like C, A and C may have little in common,
    and a long enough chain connects anything. So a cluster is not reduced to one document. Its
    documents are visited from the best to the worst, and one is a duplicate only if it is itself
    like a document that is kept. Of any two that are alike one at least is then a duplicate.

    Memory is about 110 bytes for each pair and 90 for each document in one.

    Args:
        low, high, jaccard: pairs of members verified to be alike: int64, int64, float64 [pairs].
        rank_fn: how good each of some members is, the higher the better; float64.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    member = np.unique(np.concatenate([low, high]))
    ends = np.searchsorted(member, [low, high]).reshape(2, -1)

    def connect(ends: np.ndarray) -> np.ndarray:
        size = len(member)
        graph = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(size, size))
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
    graph = coo_array((jaccard[~is_copy][which], unpack_pairs(pairs)), shape=shape).tocsr()
    graph = graph + graph.T
    neighbours = graph.indptr, graph.indices, graph.data
    of, likeness = _keep_best(np.lexsort((stands, -rank)), *neighbours)
    copy = (of[node] < 0) & (member != stands[node])
    cluster, size = _number(connect(ends))
    return DuplicateClusters(
        member=member,
        duplicate_of=np.where(copy, stands[node], np.where(of >= 0, stands[of], -1)[node]),
        jaccard=np.where(copy, 1.0, likeness[node]),
        cluster=cluster,
        cluster_size=size,
    )


def _keep_best(
    order: np.ndarray, starts: np.ndarray, neighbours: np.ndarray, similarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses what is kept of nodes in `order`, the best first. Returns for each node the kept one
    that it is most like (of equals the better), or -1: it is kept; and how much it is like it.

    Node i is like neighbours[starts[i]:starts[i + 1]], as much as the same of `similarity` says.
    """
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    of, likeness = np.full(len(order), -1, np.int64), np.zeros(len(order))
    for node in order[np.diff(starts)[order] > 0].tolist():
        edges = slice(starts[node], starts[node + 1])
        others = neighbours[edges]
        kept = np.flatnonzero((rank[others] < rank[node]) & (of[others] < 0))
        if len(kept):
            best = kept[np.lexsort((rank[others[kept]], -similarity[edges][kept]))[0]]
            of[node], likeness[node] = others[best], similarity[edges][best]
    return of, likeness


def _number(component: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components numbered as they first appear, and how many of each there are."""
    _, first, which, counts = np.unique(
        component, return_index=True, return_inverse=True, return_counts=True
    )
    return np.argsort(np.argsort(first))[which], counts[which]
