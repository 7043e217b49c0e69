"""The TPU kernels' way through the keys: every visible pair once, and no more blocks
than said."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.attention.walk import (
    KeyWalk,
    make_walk_table,
    plan_walk,
    visit_key_blocks,
)
from tests.pallas_kernels import reference

pytestmark = pytest.mark.heavy

LENGTHS = (1, 100, 128, 129, 255, 256, 300, 384, 511, 512, 640)
BLOCKS = ((128, 128), (256, 128), (128, 256), (256, 256), (512, 128), (384, 128))
SHIFTS = (0, 0, 128, -128, 256, 512, 1280, -256, 1, -1, 77, -300, 700)


class WalkCase(NamedTuple):
    S: int
    T: int
    blocks: tuple[int, int]
    tile: tuple[int, int]
    joined: bool
    causal: bool
    window: int | None
    shift: int
    """Position of the first query less that of the first key."""
    traced: bool
    """How the offsets are given."""
    prefix: int | None
    segments: str
    """"none", "packed" (runs of ids that do not fall, then padding) or "mixed"."""
    seed: int

    def options(self) -> dict:
        """Of the reference's mask; a batch of 2."""
        rng = np.random.default_rng(self.seed)
        first = int(rng.integers(0, 500))
        options = {"causal": self.causal, "window": self.window}
        options |= {"q_offset": first + self.shift, "k_offset": first}
        if self.prefix is not None:
            options["prefix"] = np.array([first + self.prefix, first], np.int32)
        if self.segments == "packed":
            q_segments, k_segments = (
                reference.packed(rng, 2, n) for n in (self.S, self.T)
            )
            options["segment_ids"] = (
                q_segments,
                q_segments if self.S == self.T else k_segments,
            )
        elif self.segments == "mixed":
            runs = [rng.integers(0, 3, (2, -(-n // 64))) for n in (self.S, self.T)]
            sizes = zip(runs, (self.S, self.T), strict=True)
            options["segment_ids"] = tuple(
                np.repeat(x, 64, axis=1)[:, :n] for x, n in sizes
            )
        return options


@st.composite
def cases(draw) -> WalkCase:
    S = draw(st.sampled_from(LENGTHS))
    blocks = draw(st.sampled_from(BLOCKS))
    causal = draw(st.sampled_from((True, True, False)))
    windows = st.none() | st.sampled_from((1, 2, 100, 128, 129, 255, 256, 300, 5000))
    return WalkCase(
        S=S,
        T=draw(st.just(S) | st.sampled_from(LENGTHS)),
        blocks=blocks,
        tile=tuple(draw(st.sampled_from((128, n))) for n in blocks),
        joined=draw(st.booleans()),
        causal=causal,
        window=draw(windows) if causal else None,
        shift=draw(st.sampled_from(SHIFTS)),
        traced=draw(st.sampled_from((False, False, True))),
        prefix=draw(st.sampled_from((None, None, 0, 1, 200, 900))) if causal else None,
        segments=draw(st.sampled_from(("none", "packed", "mixed"))),
        seed=draw(st.integers(0, 99)),
    )


class Visited(NamedTuple):
    """Of a row of the batch, by query and key, padding included."""

    walk: KeyWalk
    times: np.ndarray
    masked: np.ndarray
    packed: np.ndarray
    begun: np.ndarray
    """Of a query: how often its state was made."""
    ended: np.ndarray
    """And how often its results were."""
    tiles: list[tuple[int, int, int, int]]
    """Queries [·, ·) and keys [·, ·)."""


def visited(case: WalkCase, options: dict) -> list[Visited]:
    """What the kernel's own loops visit, for each row of the batch."""
    at = (options["q_offset"], options["k_offset"])
    q_ids, k_ids = options.get("segment_ids", (None, None))
    traced = [jnp.int32(x) for x in at] if case.traced else [None, None]
    operands = AttentionOperands(
        *[jnp.zeros(())] * 3,
        q_offset=traced[0],
        k_offset=traced[1],
        q_segments=None if q_ids is None else jnp.asarray(q_ids, jnp.int32),
        k_segments=None if k_ids is None else jnp.asarray(k_ids, jnp.int32),
        prefix=None if case.prefix is None else jnp.asarray(options["prefix"]),
    )
    params = AttentionParams(
        case.causal, case.window, None, 1.0, *((0, 0) if case.traced else at)
    )
    sizes = case.blocks, case.tile
    walk = plan_walk(case.S, case.T, params, operands, *sizes, join_tiles=case.joined)
    rows = np.asarray(make_walk_table(walk, case.S, case.T, params, operands))
    visits = []
    for b in range(2):
        size = (walk.nq * walk.bq, walk.nk * walk.bk)
        flags = np.zeros((2, *size), bool)
        counts = [np.zeros(size[0], int) for _ in range(2)]
        seen = Visited(walk, np.zeros(size, int), *flags, *counts, [])
        for i in range(walk.nq):
            row = list(rows[b % len(rows), i])
            visit_key_blocks(walk, row, i, case.shift, *recorders(case, seen, i))
        visits.append(seen)
    return visits


def recorders(case: WalkCase, seen: Visited, i: int):
    bq, bk = case.blocks

    def start():
        assert not seen.times[i * bq : (i + 1) * bq].any()
        seen.begun[i * bq : (i + 1) * bq] += 1

    def tiles(these, j, distance, first, last):
        j = int(j)
        assert 0 <= j < seen.walk.nk
        assert int(distance) == i * bq + case.shift - j * bk
        for tile in these:
            q0, q1, k0, k1 = (
                i * bq + tile.q0,
                i * bq + tile.q1,
                j * bk + tile.k0,
                j * bk + tile.k1,
            )
            seen.begun[q0:q1] += first
            assert (seen.begun[q0:q1] == 1).all()
            assert not seen.ended[q0:q1].any()
            seen.ended[q0:q1] += last
            seen.times[q0:q1, k0:k1] += 1
            seen.masked[q0:q1, k0:k1] |= tile.masked
            seen.packed[q0:q1, k0:k1] |= tile.compares_segments
            seen.tiles.append((q0, q1, k0, k1))

    def finish():
        seen.ended[i * bq : (i + 1) * bq] += 1

    return start, tiles, finish


def any_in(pairs: np.ndarray, tile: tuple[int, int, int, int]) -> bool:
    return bool(pairs[tile[0] : tile[1], tile[2] : tile[3]].any())


# Few keys, many blocks before the queries, and all of them inside a wide window.
FAR = WalkCase(
    128, 256, (128, 128), (128, 128), False, True, 5000, 1280, False, None, "none", 0
)


# Edges: of a diagonal with whole tiles below it, and of a window that leaves out one
# key of a tile.
EDGES = FAR._replace(S=640, T=640, blocks=(256, 256), window=None, shift=0)


@pytest.mark.more
@settings(max_examples=6)
@given(cases())
@example(FAR)
@example(FAR._replace(window=1400, segments="packed"))
@example(EDGES._replace(segments="packed"))
@example(EDGES._replace(window=255))
@example(EDGES._replace(window=383, blocks=(128, 128), joined=True))
def test_every_visible_pair_is_visited_once_and_no_invisible_one_unmasked(case):
    options = case.options()
    shape = 2, case.S, case.T
    visible = np.broadcast_to(reference.mask(case.S, case.T, **options), shape)
    ids = options.get("segment_ids", (np.ones((1, case.S)), np.ones((1, case.T))))
    one = np.broadcast_to(
        reference.mask(case.S, case.T, causal=False, segment_ids=ids), shape
    )
    near = np.broadcast_to(
        reference.mask(case.S, case.T, **{**options, "segment_ids": None}), shape
    )
    with jax.disable_jit():  # loops of Python's, which the recorder can follow
        visits = visited(case, options)
    for seen, pairs, alike, close in zip(visits, visible, one, near, strict=True):
        assert (seen.begun == 1).all()
        assert (seen.ended == 1).all()
        assert seen.times.max(initial=0) <= 1
        real = slice(0, case.S), slice(0, case.T)
        assert (seen.times[real] >= pairs).all()
        plain = (seen.times > 0) & ~seen.masked
        assert close[plain[real]].all()
        assert alike[((seen.times > 0) & ~seen.packed)[real]].all()
        # Padding among the keys is masked, or behind the diagonal of every real query.
        beyond = (
            np.arange(case.T, seen.times.shape[1])
            - np.arange(case.S)[:, None]
            - case.shift
        )
        hidden = case.causal & (beyond > 0)
        assert not plain[: case.S, case.T :][~hidden].any()
        no_more_than_needed(case, options, seen, pairs)


def no_more_than_needed(
    case: WalkCase, options: dict, seen: Visited, pairs: np.ndarray
) -> None:
    """Visited tiles hold a pair that causality and the window allow (padding counted as
    tokens): each of them at the fixed edges, its block as a whole in the loops. Of
    blocks that a prefix makes visible, those between it and the window are visited too.
    Packed, block and block have a segment in common."""
    bq, bk = case.blocks
    size = seen.times.shape
    prefix = np.zeros(1) if case.prefix is None else np.array([case.prefix])
    behind = np.arange(size[0])[:, None] + case.shift - np.arange(size[1])
    near = (behind >= 0) if case.causal else np.ones(size, bool)
    if case.window is not None and not prefix.any():
        near &= behind < case.window
    near |= np.arange(size[1]) < prefix[:, None]
    for q0, q1, k0, k1 in seen.tiles:
        in_list = seen.walk.edges and not case.joined
        block = (q0 // bq * bq, (q0 // bq + 1) * bq, k0 // bk * bk, (k0 // bk + 1) * bk)
        assert any_in(near, (q0, q1, k0, k1) if in_list else block)
        if case.segments == "packed" and case.S == case.T:
            segments = options["segment_ids"][0]
            rows = [
                set(x[block[0] : block[1]]) & set(x[block[2] : block[3]]) - {0}
                for x in segments
            ]
            assert any(rows)
