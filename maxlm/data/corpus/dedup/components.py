"""From verified pairs to what is kept: clusters, and a decision for each document in one."""

from dataclasses import dataclass

import numpy as np

from maxlm.data.corpus.compiled import compiled
from maxlm.data.corpus.dedup.columns import first_of_runs
from maxlm.data.corpus.dedup.members import Members


@dataclass(frozen=True)
class Marks:
    """Every member that is like another one, in order."""

    member: np.ndarray
    """int64 [marks], rising."""
    of: np.ndarray
    """The kept member that it is a duplicate of, or -1: it is kept."""
    jaccard: np.ndarray
    """How much it is like that one; float64."""
    cluster: np.ndarray
    """Which connected component of the verified pairs; numbered by their first members."""
    size: np.ndarray
    """Members in its cluster."""


def resolve(
    members: Members,
    pairs: tuple[np.ndarray, np.ndarray],
    jaccard: np.ndarray,
    copies: tuple[np.ndarray, np.ndarray],
) -> Marks:
    """Decide which documents are kept.

    Likeness does not carry over: with A like B and B like C, A and C may have little in common,
    and a long enough chain connects anything. So a cluster is not reduced to one document. Its
    documents are visited from the best to the worst, and one is a duplicate only if it is itself
    like a document that is kept. Of any two that are alike one at least is then a duplicate.

    Memory grows with what was found: about 110 bytes for each pair (24 of them the arguments), and
    90 for each document in one; for each copy 130 (40 of them the arguments).

    Args:
        pairs: two members each, verified to be alike; int64 [pairs].
        jaccard: their similarity; float64 [pairs].
        copies: members with the same words as a better one, and that best one; their pairs are
            among `pairs`, and they are in no others.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    low, high = pairs
    copy, best = copies
    alike = {"copy": np.isin(high, copy) | np.isin(low, copy)}
    # A hash of all words may have lied: then they are no copies, and not alike either.
    same = alike["copy"] & (jaccard == 1)
    confirmed = np.isin(copy, np.concatenate([low[same], high[same]]))
    copy, best = copy[confirmed], best[confirmed]
    low, high, jaccard = (each[~alike["copy"]] for each in (low, high, jaccard))

    nodes = np.unique(np.concatenate([low, high, best]))
    ends = np.searchsorted(nodes, [low, high]).reshape(2, -1)
    order = np.lexsort((nodes, -members.take("rank", nodes).to_numpy()))
    of, likeness = compiled("shingles").keep_best(order, *_neighbours(ends, jaccard, len(nodes)))
    graph = coo_array((np.ones(len(low), np.int8), tuple(ends)), shape=(len(nodes),) * 2)
    component = connected_components(graph, directed=False)[1] if len(nodes) else of

    # Copies share the fate of their best: they are just as like whatever that is like.
    place = np.searchsorted(nodes, best)
    of_member = np.where(of >= 0, nodes[of], -1)
    member = np.concatenate([nodes, copy])
    sort = np.argsort(member)
    cluster, size = _number(np.concatenate([component, component[place]])[sort])
    return Marks(
        member=member[sort],
        of=np.concatenate([of_member, np.where(of[place] >= 0, of_member[place], best)])[sort],
        jaccard=np.concatenate([likeness, np.where(of[place] >= 0, likeness[place], 1.0)])[sort],
        cluster=cluster,
        size=size,
    )


def _neighbours(
    ends: np.ndarray, jaccard: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of pairs of `number` nodes (int64 [2, pairs]): starts, neighbours and similarity as
    `keep_best` wants them."""
    by_source = np.argsort(ends.ravel(), kind="stable")
    starts = np.zeros(number + 1, np.int64)
    np.cumsum(np.bincount(ends.ravel(), minlength=number), out=starts[1:])
    neighbours = ends[::-1].ravel()[by_source]
    by_source %= max(1, len(jaccard))  # From now on which pair, whatever its direction.
    return starts, neighbours, jaccard[by_source]


def _number(component: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components numbered as they first appear, and how many of each there are."""
    order = np.argsort(component, kind="stable")
    first = order[first_of_runs(component[order])]
    number = np.empty(len(first), np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    cluster = np.empty(len(component), np.int64)
    cluster[order] = number[np.cumsum(first_of_runs(component[order])) - 1] if len(order) else 0
    return cluster, np.bincount(cluster, minlength=1)[cluster] if len(order) else cluster
