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
from typing import Any, NamedTuple

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
    bk: int
    nq: int
    nk: int
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
    nq, nk = -(-S // bq), -(-T // bk)
    tq, tk = tile
    packed = operands.q_segments is not None
    corners = [
        (q, q + tq, k, k + tk) for q in range(0, bq, tq) for k in range(0, bk, tk)
    ]
    join = _joined if join_tiles else tuple
    inner = join([WalkTile(*at, False) for at in corners])
    if not _aligned(S, T, params, operands, bq, bk):
        masked = params.causal or packed or T % bk > 0
        return KeyWalk(bq, bk, nq, nk, inner, (), None, masked, packed, None)
    # Blocks behind: those of the window, as far as the last queries find the first key.
    back = max(((nq - 1) * bq + params.q_offset - params.k_offset) // bk, 0)
    reach = 0 if params.window is None else min(-(-(params.window - 1) // bk), back)
    cut = {}
    for offset in range(-reach, bq // bk):
        tiles = [_seen(at, offset * bk, params.window) for at in corners]
        if any(tile is None or tile.masked for tile in tiles):
            seen = [tile for tile in tiles if tile is not None]
            # A window's far edge ends in a run of tiles with the same keys.
            cut[offset] = join(seen) if join_tiles or offset >= 0 else _apart(seen)
    far = max((offset for offset in cut if offset < 0), default=-reach - 1)
    edges = tuple(EdgeKeyBlock(offset, tiles) for offset, tiles in cut.items() if tiles)
    first = None if params.window is None else far + 1
    rows = [(q, q + tq) for q in range(0, bq, tq)]
    whole = (e for e in edges if [(tile.q0, tile.q1) for tile in e.tiles] == rows)
    lead = next(whole, None) if join_tiles else None
    return KeyWalk(bq, bk, nq, nk, inner, edges, first, packed, packed, lead)


def _apart(tiles: list[WalkTile]) -> tuple[WalkTile, ...]:
    """Orders tiles so that no two neighbours have the same keys, as far as that is
    possible: what one adds to their gradients would wait in registers for the next."""
    left = {}
    order = []
    for tile in tiles:
        left.setdefault(tile.k0, []).append(tile)
    for _ in tiles:
        others = [k0 for k0 in left if not order or k0 != order[-1].k0] or list(left)
        most = max(others, key=lambda k0: len(left[k0]))
        order.append(left[most].pop(0))
        if not left[most]:
            del left[most]
    return tuple(order)


def _joined(tiles: list[WalkTile]) -> tuple[WalkTile, ...]:
    rows: dict[tuple[int, int], list[WalkTile]] = {}
    for tile in tiles:
        rows.setdefault((tile.q0, tile.q1), []).append(tile)
    return tuple(
        WalkTile(
            *at,
            min(t.k0 for t in row),
            max(t.k1 for t in row),
            any(t.masked for t in row),
        )
        for at, row in rows.items()
    )


def _aligned(
    S: int,
    T: int,
    params: AttentionParams,
    operands: AttentionOperands,
    bq: int,
    bk: int,
) -> bool:
    shift = params.q_offset - params.k_offset
    static = (
        operands.q_offset is None
        and operands.k_offset is None
        and operands.prefix is None
    )
    whole = T % bk == 0 or shift + S <= T  # or causality hides the padding too
    return params.causal and static and shift % bk == 0 and bq % bk == 0 and whole


def _seen(
    corners: tuple[int, int, int, int], start: int, window: int | None
) -> WalkTile | None:
    """A tile of a key block that begins ``start`` after the queries' first position, or
    None where the mask empties it."""
    q0, q1, k0, k1 = corners
    first, last = start + k0, start + k1 - 1
    if first > q1 - 1 or (window is not None and last <= q0 - window):
        return None
    whole = last <= q0 and (window is None or first > q1 - 1 - window)
    return WalkTile(*corners, not whole)


def make_walk_table(
    walk: KeyWalk, S: int, T: int, params: AttentionParams, operands: AttentionOperands
) -> jax.Array:
    """Returns the walk's table, int32 [B or 1, nq, COLUMNS]; see there."""
    bq, bk, nq, nk = walk.bq, walk.bk, walk.nq, walk.nk
    k_offset = sum_offsets(params.k_offset, operands.k_offset)
    shift = sum_offsets(params.q_offset, operands.q_offset) - k_offset
    first = jnp.arange(nq, dtype=jnp.int32)[None] * bq + shift
    last = first + bq - 1
    zero = jnp.zeros_like(first)
    low = zero
    high = zero + nk
    plain_low = zero
    plain_high = zero + T // bk
    if walk.edges:
        at = first // bk
        offsets = [
            edge.offset for edge in walk.edges if edge.offset >= (walk.first or 0)
        ]
        low = zero if walk.first is None else at + walk.first
        high = at + min(offsets)
        plain_low, plain_high = low, high
    elif params.causal:
        high = last // bk + 1
        plain_high = jnp.minimum(plain_high, (first + 1) // bk)
        if params.window is not None:
            low = (first - params.window + 1) // bk
            plain_low = -(-(last - params.window + 1) // bk)
        if operands.prefix is not None:
            prefix = operands.prefix[:, None] - k_offset
            high = jnp.maximum(high, -(-prefix // bk))
            low = jnp.where(prefix > 0, 0, low)
            if params.window is None:
                plain_high = jnp.maximum(plain_high, jnp.minimum(prefix, T) // bk)
    begin = zero
    end = zero + nk
    one_low, one_high = zero, zero
    if operands.q_segments is not None and operands.k_segments is not None:
        begin, end, one_low, one_high = _segment_blocks(
            walk, operands.q_segments, operands.k_segments
        )
        if walk.edges:
            at = first // bk
            offsets = [edge.offset for edge in walk.edges]
            end = jnp.minimum(end, at + max(offsets) + 1)
            if walk.first is not None:
                begin = jnp.maximum(begin, at + min(*offsets, walk.first))
        low = jnp.maximum(low, begin)
        high = jnp.minimum(high, end)
        plain_low = jnp.maximum(plain_low, one_low)
        plain_high = jnp.minimum(plain_high, one_high)
    low = jnp.clip(low, 0, nk)
    high = jnp.clip(high, low, nk)
    plain_low = jnp.clip(plain_low, low, high)
    plain_high = jnp.clip(plain_high, plain_low, high)
    columns = low, plain_low, plain_high, high, begin, end, one_low, one_high
    return jnp.stack(jnp.broadcast_arrays(*columns), axis=-1).astype(jnp.int32)


def _segment_blocks(
    walk: KeyWalk, q_segments: jax.Array, k_segments: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Finds, for each block of queries [B, nq], the run of key blocks that may share a
    segment with it, and within it the first run of those of the same one segment as all
    of its queries."""
    share, one = compare_block_segments(q_segments, k_segments, walk.bq, walk.bk)
    index = jnp.arange(walk.nk)
    begin = jnp.where(share, index, walk.nk).min(-1)
    end = jnp.where(share, index + 1, 0).max(-1)
    one_begin = jnp.where(one, index, walk.nk).min(-1)
    broken = (index >= one_begin[..., None]) & ~one
    one_end = jnp.where(broken, index, walk.nk).min(-1)
    return jnp.minimum(begin, end), end, one_begin, one_end


def visit_key_blocks(
    walk: KeyWalk,
    row: list[Any],
    i: Any,
    qk_offset: Any,
    start: Callable[[], None],
    visit_tiles: Callable[[tuple[WalkTile, ...], Any, Any, bool, bool], None],
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

    def loop(low, high, these):
        def body(j, _):
            visit_tiles(these, j, i * walk.bq + qk_offset - j * walk.bk, False, False)
            return 0

        lax.fori_loop(low, high, body, 0)

    def block(edge):
        return i * (walk.bq // walk.bk) + qk_offset // walk.bk + edge.offset

    def at_edge(edge, leads):
        j = block(edge)
        visited = (j >= begin) & (j < end)
        ways = [(visited, edge.tiles)]
        if walk.compares_segments:
            one = (j >= one_from) & (j < one_to)
            packed = tuple(tile._replace(compares_segments=True) for tile in edge.tiles)
            ways = [(visited & one, edge.tiles), (visited & ~one, packed)]
        for when, these in ways:

            @pl.when(when)
            def _(these=these):
                visit_tiles(these, j, -edge.offset * walk.bk, leads, False)

        if leads:
            pl.when(~visited)(start)

    def walk_on():
        if walk.lead is None:
            start()
        else:
            at_edge(walk.lead, True)
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
                at_edge(edge, False)
        finish()

    if walk.lead is None or not walk.compares_segments:
        walk_on()
        return
    # One segment, and no other block to visit: short documents.
    lead = walk.lead
    j = block(walk.lead)
    alone = (begin == j) & (end == j + 1) & (one_from <= j) & (one_to > j)
    pl.when(alone)(
        lambda: visit_tiles(lead.tiles, j, -lead.offset * walk.bk, True, True)
    )
    pl.when(~alone)(walk_on)
