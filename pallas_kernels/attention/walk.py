"""Plans which blocks of keys each block of queries visits, and which of them need a
mask.

Both passes of the TPU kernels walk the same way. A block of queries visits a run of key
blocks in loops, three of them at most: masked, plain, masked; where each begins is an
integer that the kernel reads (:func:`make_walk_table`). What the causal diagonal and
the far edge of a window cut is the same for every block of queries, if these stand at
multiples of the blocks: then it is no loop but a fixed list of tiles
(:class:`EdgeKeyBlock`), without tiles that the mask empties.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.gpu_blocks import compare_block_segments
from pallas_kernels.attention.params import (
    AttentionOperands,
    AttentionParams,
    sum_offsets,
)
from pallas_kernels.kernel_types import Index

COLUMNS = 8
"""Integers of a block of queries in the table: where the masked, the plain and the
second masked loop begin, where that ends; the first visited block of keys with a
segment in common, and one past the last; and of those that are of one and the same
segment as all of its queries."""


class WalkTile(NamedTuple):
    """Queries [q0, q1) of a block of queries with keys [k0, k1) of a block of keys."""

    q0: int
    q1: int
    k0: int
    k1: int
    masked: bool
    """Whether positions mask it."""
    compares_segments: bool = False
    """Whether segments are compared."""


class EdgeKeyBlock(NamedTuple):
    """Tiles of the key block that stands ``offset`` blocks after the queries' first
    position."""

    offset: int
    tiles: tuple[WalkTile, ...]


class KeyWalk(NamedTuple):
    """Static part of a block's way through the keys."""

    bq: int
    """Queries of a block."""
    bk: int
    """Keys of a block."""
    nq: int
    """Blocks of queries."""
    nk: int
    """Blocks of keys."""
    inner: tuple[WalkTile, ...]
    """The tiles of a block that is visited as a whole."""
    edges: tuple[EdgeKeyBlock, ...]
    first: int | None
    """Blocks after the queries' first position at which the plain loop begins, with
    edges; None: at the first block of all."""
    masked: bool
    """Whether the loops around the plain one exist."""
    compares_segments: bool
    lead: EdgeKeyBlock | None
    """The edge that has every query in a single tile, if tiles are joined: it begins
    what the others go on with."""


def plan_walk(
    S: int,
    T: int,
    params: AttentionParams,
    operands: AttentionOperands,
    blocks: tuple[int, int],
    tile: tuple[int, int],
    *,
    join_tiles: bool,
) -> KeyWalk:
    """Returns the walk over blocks of (queries, keys), in tiles of that many (queries,
    keys).

    Args:
        tile: divides ``blocks``.
        join_tiles: tiles of the same queries become one, as wide as their keys reach.
    """
    bq, bk = blocks
    tq, tk = tile
    nq = -(-S // bq)
    nk = -(-T // bk)
    packed = operands.q_segments is not None
    unmasked = [
        WalkTile(q, q + tq, k, k + tk, masked=False)
        for q in range(0, bq, tq)
        for k in range(0, bk, tk)
    ]
    join = _join_tiles if join_tiles else tuple
    inner = join(unmasked)
    if not _has_fixed_edges(S, T, params, operands, bq, bk):
        return KeyWalk(
            bq,
            bk,
            nq,
            nk,
            inner,
            edges=(),
            first=None,
            masked=params.causal or packed or T % bk > 0,
            compares_segments=packed,
            lead=None,
        )
    # Blocks behind: those of the window, as far as the last queries find the first key.
    last_query = (nq - 1) * bq + params.q_offset - params.k_offset
    most_behind = max(last_query // bk, 0)
    behind = 0
    if params.window is not None:
        behind = min(-(-(params.window - 1) // bk), most_behind)
    # Tiles of the blocks that the mask cuts, by the block's offset.
    cut_blocks: dict[int, tuple[WalkTile, ...]] = {}
    for offset in range(-behind, bq // bk):
        tiles = [_mask_tile(tile, offset * bk, params.window) for tile in unmasked]
        if all(tile is not None and not tile.masked for tile in tiles):
            continue
        visible = [tile for tile in tiles if tile is not None]
        if join_tiles or offset >= 0:
            cut_blocks[offset] = join(visible)
        else:
            # A window's far edge ends in a run of tiles with the same keys.
            cut_blocks[offset] = _spread_keys(visible)
    edges = tuple(
        EdgeKeyBlock(offset, tiles) for offset, tiles in cut_blocks.items() if tiles
    )
    first = None
    if params.window is not None:
        # The plain loop begins behind the window's far edge.
        far_edge = max((n for n in cut_blocks if n < 0), default=-behind - 1)
        first = far_edge + 1
    return KeyWalk(
        bq,
        bk,
        nq,
        nk,
        inner,
        edges,
        first,
        masked=packed,
        compares_segments=packed,
        lead=_find_lead(edges, bq, tq) if join_tiles else None,
    )


def _find_lead(
    edges: tuple[EdgeKeyBlock, ...], bq: int, tq: int
) -> EdgeKeyBlock | None:
    """The first edge with every query in a single tile."""
    all_queries = [(q, q + tq) for q in range(0, bq, tq)]
    for edge in edges:
        if [(tile.q0, tile.q1) for tile in edge.tiles] == all_queries:
            return edge
    return None


def _spread_keys(tiles: list[WalkTile]) -> tuple[WalkTile, ...]:
    """Orders tiles so that no two neighbours have the same keys, as far as that is
    possible: what one adds to their gradients would wait in registers for the next."""
    tiles_left: dict[int, list[WalkTile]] = {}
    for tile in tiles:
        tiles_left.setdefault(tile.k0, []).append(tile)
    order: list[WalkTile] = []
    for _ in tiles:
        other_keys = [k0 for k0 in tiles_left if not order or k0 != order[-1].k0]
        candidates = other_keys or list(tiles_left)
        # Of the keys with most tiles left: their own neighbours are hardest to part.
        k0 = max(candidates, key=lambda k0: len(tiles_left[k0]))
        order.append(tiles_left[k0].pop(0))
        if not tiles_left[k0]:
            del tiles_left[k0]
    return tuple(order)


def _join_tiles(tiles: list[WalkTile]) -> tuple[WalkTile, ...]:
    """Makes tiles of the same queries one, as wide as their keys reach."""
    by_queries: dict[tuple[int, int], list[WalkTile]] = {}
    for tile in tiles:
        by_queries.setdefault((tile.q0, tile.q1), []).append(tile)
    joined = []
    for (q0, q1), row in by_queries.items():
        k0 = min(tile.k0 for tile in row)
        k1 = max(tile.k1 for tile in row)
        joined.append(WalkTile(q0, q1, k0, k1, any(tile.masked for tile in row)))
    return tuple(joined)


def _has_fixed_edges(
    S: int,
    T: int,
    params: AttentionParams,
    operands: AttentionOperands,
    bq: int,
    bk: int,
) -> bool:
    """Whether a causal mask cuts the same tiles for every block of queries."""
    is_static = (
        operands.q_offset is None
        and operands.k_offset is None
        and operands.prefix is None
    )
    shift = params.q_offset - params.k_offset
    # Causality may hide the padding of keys too.
    no_padding_seen = T % bk == 0 or shift + S <= T
    is_aligned = shift % bk == 0 and bq % bk == 0
    return params.causal and is_static and is_aligned and no_padding_seen


def _mask_tile(tile: WalkTile, start: int, window: int | None) -> WalkTile | None:
    """A tile of a key block that begins ``start`` after the queries' first position, or
    None where the mask empties it."""
    first_key = start + tile.k0
    last_key = start + tile.k1 - 1
    last_query = tile.q1 - 1
    if first_key > last_query:
        return None
    if window is not None and last_key <= tile.q0 - window:
        return None
    sees_all = last_key <= tile.q0
    if window is not None:
        sees_all = sees_all and first_key > last_query - window
    return tile._replace(masked=not sees_all)


def make_walk_table(
    walk: KeyWalk, S: int, T: int, params: AttentionParams, operands: AttentionOperands
) -> jax.Array:
    """Returns the walk's table, int32 [B or 1, nq, COLUMNS]; see there."""
    bq = walk.bq
    bk = walk.bk
    nq = walk.nq
    nk = walk.nk
    # Positions of each block's first and last query, counted from the first key's.
    k_offset = sum_offsets(params.k_offset, operands.k_offset)
    shift = sum_offsets(params.q_offset, operands.q_offset) - k_offset
    first = jnp.arange(nq, dtype=jnp.int32)[None] * bq + shift
    last = first + bq - 1
    zero = jnp.zeros_like(first)

    # Key blocks [low, high) that the loops visit, and those [plain_low, plain_high) of
    # them that need no mask. Without causality: all, but for a last one with padding.
    low = zero
    high = zero + nk
    plain_low = zero
    plain_high = zero + T // bk
    if walk.edges:
        # Loops end where the edges begin, which have the masks.
        diagonal = first // bk
        plain_begin = walk.first or 0
        offsets = [edge.offset for edge in walk.edges if edge.offset >= plain_begin]
        low = zero if walk.first is None else diagonal + walk.first
        high = diagonal + min(offsets)
        plain_low = low
        plain_high = high
    elif params.causal:
        # To the last query's own position; without a mask, as far as the first query
        # sees whole blocks.
        high = last // bk + 1
        plain_high = jnp.minimum(plain_high, (first + 1) // bk)
        if params.window is not None:
            # From the first query's window; without a mask, from the last query's.
            low = (first - params.window + 1) // bk
            plain_low = -(-(last - params.window + 1) // bk)
        if operands.prefix is not None:
            # All queries see it, window or not.
            prefix = operands.prefix[:, None] - k_offset
            high = jnp.maximum(high, -(-prefix // bk))
            low = jnp.where(prefix > 0, 0, low)
            if params.window is None:
                plain_high = jnp.maximum(plain_high, jnp.minimum(prefix, T) // bk)

    # Key blocks [begin, end) with a segment in common with the queries, and those
    # [one_low, one_high) of the queries' only segment.
    begin = zero
    end = zero + nk
    one_low = zero
    one_high = zero
    if operands.q_segments is not None and operands.k_segments is not None:
        begin, end, one_low, one_high = _segment_blocks(
            walk, operands.q_segments, operands.k_segments
        )
        if walk.edges:
            diagonal = first // bk
            offsets = [edge.offset for edge in walk.edges]
            end = jnp.minimum(end, diagonal + max(offsets) + 1)
            if walk.first is not None:
                first_offset = min(*offsets, walk.first)
                begin = jnp.maximum(begin, diagonal + first_offset)
        low = jnp.maximum(low, begin)
        high = jnp.minimum(high, end)
        plain_low = jnp.maximum(plain_low, one_low)
        plain_high = jnp.minimum(plain_high, one_high)

    # An empty run begins and ends at the same block, in order.
    low = jnp.clip(low, 0, nk)
    high = jnp.clip(high, low, nk)
    plain_low = jnp.clip(plain_low, low, high)
    plain_high = jnp.clip(plain_high, plain_low, high)
    # As COLUMNS says.
    columns = low, plain_low, plain_high, high, begin, end, one_low, one_high
    return jnp.stack(jnp.broadcast_arrays(*columns), axis=-1).astype(jnp.int32)


def _segment_blocks(
    walk: KeyWalk, q_segments: jax.Array, k_segments: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Finds, for each block of queries [B, nq], the run of key blocks that may share a
    segment with it, and within it the first run of those of the same one segment as all
    of its queries."""
    may_share, is_one = compare_block_segments(q_segments, k_segments, walk.bq, walk.bk)
    index = jnp.arange(walk.nk)
    begin = jnp.where(may_share, index, walk.nk).min(-1)
    end = jnp.where(may_share, index + 1, 0).max(-1)
    one_begin = jnp.where(is_one, index, walk.nk).min(-1)
    ends_run = (index >= one_begin[..., None]) & ~is_one
    one_end = jnp.where(ends_run, index, walk.nk).min(-1)
    return jnp.minimum(begin, end), end, one_begin, one_end


VisitTiles = Callable[[tuple[WalkTile, ...], jax.Array, Index, bool, bool], None]
"""(tiles, key block, distance, first, last) -> None; see :func:`visit_key_blocks`."""


def visit_key_blocks(
    walk: KeyWalk,
    row: list[jax.Array],
    i: jax.Array,
    qk_offset: Index,
    start: Callable[[], None],
    visit_tiles: VisitTiles,
    finish: Callable[[], None],
) -> None:
    """Calls, in a kernel, ``visit_tiles`` for every key block that block i of the
    queries visits.

    Args:
        row: its integers of the :func:`make_walk_table`.
        qk_offset: position of the first query less that of the first key.
        start: makes the state that ``visit_tiles`` goes on with; called before, if at
            all.
        visit_tiles: of (tiles, key block, distance, first, last): the distance is the
            position of the block of queries less that of the block of keys, a Python
            int at an edge. ``first``: these are the first for their queries, each one's
            only; there was no ``start``. ``last``: they are also the last; there will
            be no ``finish``.
        finish: makes results of the state; called after, if at all.
    """
    masked_from, plain_from, plain_to, masked_to, begin, end, one_from, one_to = row

    def loop(low, high, tiles):
        def body(j, _):
            distance = i * walk.bq + qk_offset - j * walk.bk
            visit_tiles(tiles, j, distance, False, False)
            return 0

        lax.fori_loop(low, high, body, 0)

    def get_key_block(edge):
        return i * (walk.bq // walk.bk) + qk_offset // walk.bk + edge.offset

    def visit_edge(edge, is_lead):
        j = get_key_block(edge)
        distance = -edge.offset * walk.bk
        is_visited = (j >= begin) & (j < end)

        def visit(tiles):
            visit_tiles(tiles, j, distance, is_lead, False)

        if walk.compares_segments:
            is_one = (j >= one_from) & (j < one_to)
            comparing = tuple(
                tile._replace(compares_segments=True) for tile in edge.tiles
            )
            in_one_segment = is_visited & is_one
            in_several = is_visited & ~is_one
            pl.when(in_one_segment)(lambda: visit(edge.tiles))
            pl.when(in_several)(lambda: visit(comparing))
        else:
            pl.when(is_visited)(lambda: visit(edge.tiles))
        if is_lead:
            pl.when(~is_visited)(start)

    def visit_all():
        if walk.lead is None:
            start()
        else:
            visit_edge(walk.lead, True)
        if walk.masked:
            # Where there are edges, positions mask no block before them.
            masked = tuple(
                tile._replace(
                    masked=not walk.edges, compares_segments=walk.compares_segments
                )
                for tile in walk.inner
            )
            loop(masked_from, plain_from, masked)
            loop(plain_to, masked_to, masked)
        loop(plain_from, plain_to, walk.inner)
        for edge in walk.edges:
            if edge is not walk.lead:
                visit_edge(edge, False)
        finish()

    if walk.lead is None or not walk.compares_segments:
        visit_all()
        return
    # One segment, and no other block to visit: short documents.
    lead = walk.lead
    j = get_key_block(lead)
    is_alone = (begin == j) & (end == j + 1) & (one_from <= j) & (one_to > j)
    lead_distance = -lead.offset * walk.bk
    pl.when(is_alone)(lambda: visit_tiles(lead.tiles, j, lead_distance, True, True))
    pl.when(~is_alone)(visit_all)
