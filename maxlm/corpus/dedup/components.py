"""Makes clusters of verified pairs, and decides which documents of each are kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

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


@dataclass(frozen=True)
class SimilarPairs:
    """Pairs verified to be alike, by numbers of members or of documents."""

    low: np.ndarray
    high: np.ndarray
    jaccard: np.ndarray
    """float64 [pairs], as the two before (int64)."""
    copy: np.ndarray = field(default_factory=partial(np.empty, 0, np.int64))
    best: np.ndarray = field(default_factory=partial(np.empty, 0, np.int64))
    """int64 [copies]: those with the same text as a better one, which are in no other pair."""


def resolve_duplicates(
    pairs: SimilarPairs,
    rank_fn: Callable[[np.ndarray], np.ndarray],
    may_keep: np.ndarray | None = None,
) -> DuplicateClusters:
    """Decide which documents are kept.

    Likeness does not carry over: with A like B and B like C, A and C may have little in common,
    and a long enough chain connects anything. So a cluster is not reduced to one document. Its
    documents are visited from the best to the worst, and one is a duplicate only if it is itself
    like a document that is kept. Of any two that are alike one at least is then a duplicate.

    Memory is about 110 bytes for each pair, 90 for each document in one, and 130 for each copy.

    Args:
        rank_fn: how good each of some members is, the higher the better; float64.
        may_keep: bool, by member: which may be kept; None: all. The others are duplicates only of
            a copy that is kept, or where the best of their copies is a duplicate.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes = np.unique(np.concatenate([pairs.low, pairs.high, pairs.best]))
    ends = np.searchsorted(nodes, [pairs.low, pairs.high]).reshape(2, -1)

    def connect(ends: np.ndarray) -> np.ndarray:
        graph = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(len(nodes),) * 2)
        return connected_components(graph, directed=False)[1] if len(nodes) else nodes

    member = np.concatenate([nodes, pairs.copy])
    place = np.concatenate([np.arange(len(nodes)), np.searchsorted(nodes, pairs.best)])
    component = connect(ends)[place]
    # Copies (what is wholly alike carries over) are one node: the best that may be kept of them.
    is_copy = pairs.jaccard == 1
    text = connect(ends[:, is_copy])
    node, ends, jaccard = text[place], text[ends[:, ~is_copy]], pairs.jaccard[~is_copy]
    rank = rank_fn(member)
    may = np.ones(len(member), np.bool_) if may_keep is None else may_keep[member]
    order = np.lexsort((member, -rank, ~may, node))
    first = order[mark_run_starts(node[order])]
    stands, rank, may = member[first], rank[first], may[first]
    both = may[ends].all(0)
    neighbours = _neighbours(ends[:, both], jaccard[both], len(first))
    of, likeness = _keep_best(np.lexsort((stands, -rank)), *neighbours)

    sort = np.argsort(member)
    member, node, component = member[sort], node[sort], component[sort]
    copy = may[node] & (of[node] < 0) & (member != stands[node])
    cluster, size = _number(component)
    return DuplicateClusters(
        member=member,
        duplicate_of=np.where(copy, stands[node], np.where(of >= 0, stands[of], -1)[node]),
        jaccard=np.where(copy, 1.0, likeness[node]),
        cluster=cluster,
        cluster_size=size,
    )


def _neighbours(
    ends: np.ndarray, jaccard: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the graph whose edges are pairs of `number` nodes (int64 [2, pairs]) as starts,
    neighbours, likeness: node i is like neighbours[starts[i]:starts[i + 1]]."""
    by_source = np.argsort(ends.ravel(), kind="stable")
    starts = np.zeros(number + 1, np.int64)
    np.cumsum(np.bincount(ends.ravel(), minlength=number), out=starts[1:])
    neighbours = ends[::-1].ravel()[by_source]
    by_source %= max(1, len(jaccard))  # From now on which pair, whatever its direction.
    return starts, neighbours, jaccard[by_source]


def _keep_best(
    order: np.ndarray, starts: np.ndarray, neighbours: np.ndarray, similarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses what is kept of nodes in `order`, the best first. Returns for each node the kept one
    that it is most like (of equals the better), or -1: it is kept; and how much it is like it."""
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
