"""Exact attention, tiled, in a form that any XLA backend compiles.

Shapes: q [B, S, N, H]; k, v [B, T, K, H] with N a multiple of K (grouped queries: query head n
reads kv head n // (N / K)). Query s has index ``q_positions[b, s]`` (default s) in its sequence,
key t ``k_positions[b, t]`` (default t).

:func:`attention` is differentiable. :func:`attention_forward` and :func:`attention_backward` are
its two halves, for a caller that holds the keys in blocks (a ring of devices): log-sum-exps join
the blocks' outputs (:func:`merge`), and each block's gradients need nothing of the others.
"""

import math
from functools import partial, reduce
from operator import and_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.parts import Part

# Finite, so that rows with every key masked give no NaN on the way to their zeros.
MASKED = -1e30
MIN_TILE, MAX_TILES = 128, 16
# Scores that exist at once, of which there are a few copies; what has more goes a part at a time.
SCORE_BYTES = 1 << 26

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

Segments = tuple[jax.Array, jax.Array]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(q·kᵀ·scale + mask)·v, softmax in fp32, a tile of queries at a time.

    Where positions are the default, a tile of queries reads only the keys between its first row's
    window and its own end: causal, 5/8 of the work at 4 tiles, 1/2 in the limit. The backward pass
    computes the weights again, so that nothing of size S × T is kept.

    Args:
        causal: a query sees keys of its own index and below.
        window: of those, only the last ``window`` (1: itself alone); None: all. Causal only.
        q_positions, k_positions: int [B, S] and [B, T], or [1, S] and [1, T] for all rows alike:
            the indices that ``causal`` and ``window`` compare; default 0..S-1 and 0..T-1.
        segment_ids: int [B, S] and [B, T]; tokens attend within their own segment, 0 is padding.
            A query with no key left gives zeros. Masked keys and values may hold anything finite.
        scale: default H ** -0.5.

    Returns:
        [B, S, N, H] in v's dtype.

    Raises:
        ValueError: shapes that do not belong together; a window below 1 or without ``causal``.
    """
    _check(q, k, v, causal, window)
    where = _Where(q_positions, k_positions, *(segment_ids or (None, None)))
    o: Any = _attention(q, k, v, where, _How(causal, window, _scale(q, scale)))
    return o


def attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`attention` and what its backward pass needs; not to be differentiated by JAX.

    Args: as there; and ``dtype``, the output's (default v's).

    Returns:
        o [B, S, N, H] in ``dtype``; the log-sum-exp of each query's scores, fp32 [B, S, N], −inf
        where it has no key.
    """
    _check(q, k, v, causal, window)
    where = _Where(q_positions, k_positions, *(segment_ids or (None, None)))
    return _forward(q, k, v, where, _How(causal, window, _scale(q, scale)), dtype or v.dtype)


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_o: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients that pass through these keys (Dao et al. 2022, appendix B).

    The keys may be a block of all those that the queries see: ``lse`` and ``delta`` are of all of
    them, dK and dV are then this block's, and dQ is a term of the sum over blocks.

    Args:
        lse: fp32 [B, S, N], the log-sum-exp of every score of each query.
        delta: fp32 [B, S, N], :func:`row_delta` of the whole output.
        d_o: [B, S, N, H], the output's cotangent.
        dtype: of the results; they are summed in fp32.

    Returns:
        dQ, dK, dV, shaped as q, k and v.
    """
    _check(q, k, v, causal, window)
    where = _Where(q_positions, k_positions, *(segment_ids or (None, None)))
    how = _How(causal, window, _scale(q, scale))
    return _backward(q, k, v, lse, delta, d_o, where, how, dtype)


def row_delta(o: jax.Array, d_o: jax.Array) -> jax.Array:
    """fp32 [B, S, N]: d_o · o for each query and head, what softmax's gradient subtracts."""
    return _einsum("bsnh,bsnh->bsn", d_o, o)


def merge(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(o, lse) over two blocks of keys from those over each, all fp32 (Milakov & Gimelshein 2018).

    Args:
        first, second: o [B, S, N, H] and log-sum-exp [B, S, N], −inf where no key was seen.
    """
    (o_1, lse_1), (o_2, lse_2) = first, second
    top = jnp.maximum(lse_1, lse_2)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # −inf − −inf is NaN
    weight_1, weight_2 = jnp.exp(lse_1 - top), jnp.exp(lse_2 - top)
    total = weight_1 + weight_2
    o = o_1 * weight_1[..., None] + o_2 * weight_2[..., None]
    return o / jnp.where(total > 0, total, 1.0)[..., None], top + jnp.log(total)


class _Where(NamedTuple):
    """Index and segment of each query and key, or None."""

    q_positions: jax.Array | None
    k_positions: jax.Array | None
    q_segments: jax.Array | None
    k_segments: jax.Array | None


class _How(NamedTuple):
    causal: bool
    window: int | None
    scale: float


def _check(q, k, v, causal, window) -> None:
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} kv heads")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window} with causal={causal}: windows look back, 1 key or more")


def _scale(q: jax.Array, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, where, how):
    return _forward(q, k, v, where, how, v.dtype)[0]


def _attention_forward(q, k, v, where, how):
    o, lse = _forward(q, k, v, where, how, v.dtype)
    return o, (q, k, v, where, o, lse)


def _attention_backward(how, saved, d_o):
    q, k, v, where, o, lse = saved
    return *_backward(q, k, v, lse, row_delta(o, d_o), d_o, where, how, q.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(q, k, v, where, how, dtype):
    if part := _part(q, k):

        def one_part(out, i):
            own_q, own_k, own_v = part.cut(i, (q, k, v))
            own = _forward(own_q, own_k, own_v, part.cut_rows(i, where), how, dtype)
            return part.put(i, out, own), None

        out = jnp.zeros(q.shape, dtype), jnp.zeros(q.shape[:3], jnp.float32)
        (o, lse), _ = lax.scan(one_part, out, jnp.arange(part.count))
        return o, lse
    if count := _loop_length(q.shape[1], where, how):
        rows = _rows_of((q, *_query_side(where, q.shape[1])), count)

        def one(rows):
            q, positions, segments = rows
            part = where._replace(q_positions=positions, q_segments=segments)
            return _forward(q, k, v, part, how, dtype)

        return _joined(lax.map(one, rows))

    (B, S, N, H), K = q.shape, k.shape[2]
    q = q.reshape(B, S, K, N // K, H)

    def block(tile: _Tile):
        if tile.begin >= tile.end:
            shape = (B, K, N // K, tile.stop - tile.start)
            return jnp.zeros((*shape, H), dtype), jnp.full((*shape, 1), -jnp.inf, jnp.float32)
        scores = tile.scores(q, k, where, how)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        values = v[:, tile.begin : tile.end]
        o = _einsum("bkgst,btkh->bkgsh", weights.astype(v.dtype), values)
        some = top > MASKED / 2  # rows with a key left
        o = jnp.where(some, o / total, 0.0)
        return o.astype(dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)

    tiles = [block(tile) for tile in _tiles(S, k.shape[1], where, how)]
    o, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*tiles, strict=True))
    o = o.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)
    return o, lse[..., 0].transpose(0, 3, 1, 2).reshape(B, S, N)


def _backward(q, k, v, lse, delta, d_o, where, how, dtype):
    """Weights are recomputed from scores and log-sum-exp."""
    if part := _part(q, k):
        like = q, k, v

        def one_part(places, i):
            read = zip(part.cut(i, places), like, strict=True)
            own_q, own_k, own_v = (x.astype(whole.dtype) for x, whole in read)
            own_lse, own_delta, own_d_o = part.cut(i, (lse, delta, d_o))
            at = part.cut_rows(i, where)
            grads = _backward(own_q, own_k, own_v, own_lse, own_delta, own_d_o, at, how, dtype)
            return part.put(i, places, grads), None

        # A part's gradients take the places of its q, k and v, which nobody reads again.
        places = tuple(x.astype(jnp.promote_types(x.dtype, dtype)) for x in like)
        (d_q, d_k, d_v), _ = lax.scan(one_part, places, jnp.arange(part.count))
        return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype)
    if count := _loop_length(q.shape[1], where, how):
        rows = _rows_of((q, lse, delta, d_o, *_query_side(where, q.shape[1])), count)

        def add(sums, rows):
            q, lse, delta, d_o, positions, segments = rows
            part = where._replace(q_positions=positions, q_segments=segments)
            d_q, *terms = _backward(q, k, v, lse, delta, d_o, part, how, jnp.float32)
            return tuple(x + y for x, y in zip(sums, terms, strict=True)), d_q.astype(dtype)

        zeros = jnp.zeros(k.shape, jnp.float32)
        (d_k, d_v), d_q = lax.scan(add, (zeros, zeros), rows)
        return _joined(d_q), d_k.astype(dtype), d_v.astype(dtype)

    (B, S, N, H), (T, K) = q.shape, k.shape[1:3]
    heads = (B, S, K, N // K)
    q, d_o = q.reshape(*heads, H), d_o.reshape(*heads, H)
    # +inf where no key is left: then exp(scores − lse) is 0 there.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    lse, delta = (x.reshape(heads).transpose(0, 2, 3, 1)[..., None] for x in (lse, delta))
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)

    for tile in _tiles(S, T, where, how):
        rows, keys = slice(tile.start, tile.stop), slice(tile.begin, tile.end)
        # One tile after the other: a compiler that sees no order makes all tiles' scores at once.
        q, d_o, d_k, d_v = lax.optimization_barrier((q, d_o, d_k, d_v))
        if tile.begin >= tile.end:
            d_q.append(jnp.zeros(q[:, rows].shape, dtype))
            continue
        weights = jnp.exp(tile.scores(q, k, where, how) - lse[..., rows, :])
        d_weights = _einsum("bskgh,btkh->bkgst", d_o[:, rows], v[:, keys])
        d_scores = (weights * (d_weights - delta[..., rows, :]) * how.scale).astype(q.dtype)
        own = _einsum("bkgst,btkh->bskgh", d_scores, k[:, keys])
        d_q.append(own.astype(dtype))
        own = _einsum("bkgst,bskgh->btkh", d_scores, q[:, rows])
        d_k = d_k.at[:, keys].add(own)
        own = _einsum("bkgst,bskgh->btkh", weights.astype(d_o.dtype), d_o[:, rows])
        d_v = d_v.at[:, keys].add(own)
    d_q = jnp.concatenate(d_q, axis=1).reshape(B, S, N, H)
    return d_q, d_k.astype(dtype), d_v.astype(dtype)


def _part(q, k) -> Part | None:
    """What is attended to at once, so that a tile's scores stay in bounds; None: everything."""
    (B, S, N, _), (T, K) = q.shape, k.shape[1:3]
    score_bytes = 4 * (N // K) * min(_tile_size(S), S) * T
    part = Part.of(B, K, SCORE_BYTES // score_bytes)
    return part if part.count > 1 else None


class _Tile(NamedTuple):
    """Queries [start, stop) and the keys [begin, end) that they may see; none where begin ≥ end."""

    start: int
    stop: int
    begin: int
    end: int

    def scores(self, q, k, where: _Where, how: _How):
        """fp32 [B, K, G, stop − start, end − begin], MASKED where a query may not see a key."""
        rows, keys = slice(self.start, self.stop), slice(self.begin, self.end)
        mask = _mask(
            jnp.arange(self.start, self.stop)[None]
            if where.q_positions is None
            else where.q_positions[:, rows],
            jnp.arange(self.begin, self.end)[None]
            if where.k_positions is None
            else where.k_positions[:, keys],
            None if where.q_segments is None else where.q_segments[:, rows],
            None if where.k_segments is None else where.k_segments[:, keys],
            how,
        )
        scores = _einsum("bskgh,btkh->bkgst", q[:, rows], k[:, keys]) * how.scale
        return scores if mask is None else jnp.where(mask[:, None, None], scores, MASKED)


def _mask(q_positions, k_positions, q_segments, k_segments, how: _How):
    """bool [B or 1, s, t]: which keys each query may see; None: all."""
    parts = []
    if how.causal:
        q_positions, k_positions = q_positions[..., :, None], k_positions[..., None, :]
        parts.append(q_positions >= k_positions)
        if how.window is not None:
            parts.append(q_positions - k_positions < how.window)
    if q_segments is not None:
        parts.append(q_segments[..., :, None] == k_segments[..., None, :])
        parts.append(q_segments[..., :, None] != 0)
    return reduce(and_, parts) if parts else None


def _tile_size(S: int) -> int:
    return max(MIN_TILE, -(-S // MAX_TILES))


def _default_positions(where: _Where) -> bool:
    return where.q_positions is None and where.k_positions is None


def _tiles(S: int, T: int, where: _Where, how: _How) -> list[_Tile]:
    """At most MAX_TILES runs of queries: the program grows with their number."""
    size = _tile_size(S)
    bounds = [(start, min(start + size, S)) for start in range(0, S, size)]
    if not how.causal or not _default_positions(where):
        return [_Tile(start, stop, 0, T) for start, stop in bounds]
    window = S if how.window is None else how.window
    return [_Tile(start, stop, max(start - window + 1, 0), min(stop, T)) for start, stop in bounds]


# Where every tile reads all keys, tiles of one size are a loop: the program is one tile's.


def _loop_length(S: int, where: _Where, how: _How) -> int:
    """Tiles to loop over; 0: none."""
    size = _tile_size(S)
    same = not how.causal or not _default_positions(where)
    return S // size if same and size < S and S % size == 0 else 0


def _query_side(where: _Where, S: int) -> tuple[jax.Array, jax.Array | None]:
    """Positions and segments of the queries."""
    default = jnp.arange(S, dtype=jnp.int32)[None]
    return default if where.q_positions is None else where.q_positions, where.q_segments


def _rows_of(tree: Any, count: int) -> Any:
    """[B, S, ...] → [count, B, S / count, ...]"""

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def _joined(tree: Any) -> Any:
    """The inverse of :func:`_rows_of`."""

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(join, tree)
