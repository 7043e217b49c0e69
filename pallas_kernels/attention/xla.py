"""Attention in a form that any XLA backend compiles, a tile of queries at a time, and a
part of the batch and of the heads.

Where a causal mask and positions are known when the program is compiled, a tile of
queries reads only the keys between its first row's window and its own end: causal, 5/8
of the work at 4 tiles, 1/2 in the limit. Elsewhere every tile reads all keys, and tiles
are a loop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    OutputArrays,
    accumulation_dtype,
)
from pallas_kernels.attention.tiles import (
    MASKED,
    ScoreTile,
    einsum,
    is_mask_static,
    list_score_tiles,
    reshape_by_head,
    tile_size,
)
from pallas_kernels.chips import find_largest_divisor

# Scores that exist at once, of which there are a few copies; what has more goes a part
# at a time.
SCORE_BYTES = 1 << 26


def forward(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.attention.attention_forward`."""
    (q, k, v, *_) = operands
    params = call.params
    dtype = call.dtype
    B, S, N, H = q.shape
    K, Hv = v.shape[2:]
    if part := _part(q, k):

        def one_part(out, i):
            return part.put(i, out, forward(part.cut_operands(i, operands), call)), None

        out = (
            jnp.zeros((B, S, N, Hv), dtype),
            jnp.zeros((B, S, N), accumulation_dtype(q)),
        )
        (o, lse), _ = lax.scan(one_part, out, jnp.arange(part.num_parts))
        return o, lse
    if count := _loop_length(S, operands, params):

        def one(rows):
            return forward(operands._replace(**rows), call)

        return _joined(lax.map(one, _rows(operands, count)))

    operands = operands._replace(q=q.reshape(B, S, K, N // K, H))
    sinks = None if operands.sinks is None else reshape_by_head(operands.sinks, K)

    def block(tile: ScoreTile):
        if tile.keys.start >= tile.keys.stop:
            shape = (B, K, N // K, tile.rows.stop - tile.rows.start)
            lse = jnp.full((*shape, 1), -jnp.inf, accumulation_dtype(q))
            return jnp.zeros((*shape, Hv), dtype), lse if sinks is None else lse.at[
                :
            ].set(sinks)
        scores, _ = tile.scores()
        top = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            top = jnp.maximum(top, sinks)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total += jnp.exp(sinks - top)
        o = einsum("bkgst,btkh->bkgsh", weights.astype(v.dtype), v[:, tile.keys])
        some = top > MASKED / 2  # rows with a key or a sink
        o = jnp.where(some, o / total, 0.0)
        return o.astype(dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)

    blocks = [block(tile) for tile in list_score_tiles(operands, params)]
    o, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*blocks, strict=True))
    o = o.transpose(0, 3, 1, 2, 4).reshape(B, S, N, Hv)
    return o, lse[..., 0].transpose(0, 3, 1, 2).reshape(B, S, N)


def backward(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, ...]:
    """See :func:`~pallas_kernels.attention.attention_backward`: weights are recomputed
    from scores and log-sum-exps."""
    (q, k, v, *_) = operands
    params = call.params
    dtype = call.dtype
    B, S, N, H = q.shape
    K, Hv = v.shape[2:]
    if part := _part(q, k):
        like = q, k, v

        def one_part(carry, i):
            places, sums = carry
            q, k, v = places
            own = part.cut_operands(i, operands._replace(q=q, k=k, v=v))
            q, k, v = (x.astype(y.dtype) for x, y in zip(own[:3], like, strict=True))
            own = own._replace(q=q, k=k, v=v)
            d_q, d_k, d_v, *terms = backward(own, part.cut(i, saved), call)
            terms = jax.tree.map(jnp.add, tuple(terms), part.cut(i, sums, BY_HEAD))
            return (
                part.put(i, places, (d_q, d_k, d_v)),
                part.put(i, sums, terms, BY_HEAD),
            ), None

        # A part's gradients take the places of its q, k and v, which nobody reads
        # again.
        places = tuple(x.astype(jnp.promote_types(x.dtype, dtype)) for x in like)
        carry = places, _no_biases(operands)
        (grads, d_biases), _ = lax.scan(one_part, carry, jnp.arange(part.num_parts))
        return *(x.astype(dtype) for x in grads), *d_biases
    wide = accumulation_dtype(q)
    zeros = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide), *_no_biases(operands)
    if count := _loop_length(S, operands, params):

        def add(sums, rows):
            own, saved = rows
            own = operands._replace(**own)
            d_q, *terms = backward(own, saved, call._replace(dtype=wide))
            return tuple(x + y for x, y in zip(sums, terms, strict=True)), d_q.astype(
                dtype
            )

        rows = _rows(operands, count), _split(saved, count)
        (d_k, d_v, *d_biases), d_q = lax.scan(add, zeros, rows)
        return _joined(d_q), d_k.astype(dtype), d_v.astype(dtype), *d_biases

    lse, delta, d_o = saved
    heads = (B, S, K, N // K)
    q = q.reshape(*heads, H)
    d_o = d_o.reshape(*heads, Hv)
    # +inf where no key is left: then exp(scores − lse) is 0 there.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    lse, delta = (
        x.reshape(heads).transpose(0, 2, 3, 1)[..., None] for x in (lse, delta)
    )
    d_q = []
    (d_k, d_v, *d_biases) = zeros

    for tile in list_score_tiles(operands._replace(q=q), params):
        rows, keys, *_ = tile
        # One tile after the other: a compiler that sees no order makes all tiles'
        # scores at once.
        sums = d_k, d_v, d_biases
        read = q, d_o, operands.biases
        (q, d_o, biases), (d_k, d_v, d_biases) = lax.optimization_barrier((read, sums))
        operands = operands._replace(q=q, biases=biases)
        if keys.start >= keys.stop:
            d_q.append(jnp.zeros(q[:, rows].shape, dtype))
            continue
        tile = tile._replace(operands=operands)
        scores, derivatives = tile.scores()
        weights = jnp.exp(scores - lse[..., rows, :])
        d_weights = einsum("bskgh,btkh->bkgst", d_o[:, rows], v[:, keys])
        d_scores = weights * (d_weights - delta[..., rows, :])
        if d_biases:
            own = tile.bias_gradient(jnp.where(weights > 0, d_scores, 0.0))
            d_biases = [d_biases[0] + own]
        d_scores *= params.scale
        if derivatives is not None:
            d_scores *= derivatives
        # What is masked may overflow: infinity times a weight of 0 is NaN.
        d_scores = jnp.where(weights > 0, d_scores, 0.0).astype(q.dtype)
        own = einsum("bkgst,btkh->bskgh", d_scores, k[:, keys])
        d_q.append(own.astype(dtype))
        own = einsum("bkgst,bskgh->btkh", d_scores, q[:, rows])
        d_k = d_k.at[:, keys].add(own)
        own = einsum("bkgst,bskgh->btkh", weights.astype(d_o.dtype), d_o[:, rows])
        d_v = d_v.at[:, keys].add(own)
    d_q = jnp.concatenate(d_q, axis=1).reshape(B, S, N, H)
    return d_q, d_k.astype(dtype), d_v.astype(dtype), *d_biases


def _no_biases(operands: AttentionOperands) -> tuple[jax.Array, ...]:
    """Returns zeros for the sum of the biases' gradient; none where there are no
    biases."""
    return () if operands.biases is None else (jnp.zeros_like(operands.biases),)


# Axes of the batch's rows and of heads: of arrays [B, S, N or K, ...], [B or 1, ...]
# and [N, ...].
BY_TOKEN, BY_ROW, BY_HEAD = (0, 2), (0, None), (None, 0)


class BatchPartition(NamedTuple):
    """Rows of the batch and kv heads, with their query heads, that are attended to at
    once. They are cut from arrays as they lie, and put back in place: no copy in
    another order."""

    row_parts: int
    head_parts: int

    @classmethod
    def of(cls, batch: int, kv_heads: int, max_pairs: int) -> "BatchPartition":
        """Makes parts of at most ``max_pairs`` pairs of a row and a kv head, or one:
        whole rows where these fit."""
        if max_pairs >= kv_heads:
            return cls(batch // find_largest_divisor(batch, max_pairs // kv_heads), 1)
        return cls(batch, kv_heads // find_largest_divisor(kv_heads, max_pairs))

    @property
    def num_parts(self) -> int:
        return self.row_parts * self.head_parts

    def cut(
        self, i: jax.Array, tree: Any, axes: tuple[int | None, int | None] = BY_TOKEN
    ) -> Any:
        """Cuts part i of arrays; of a single row, which all share, it is whole."""
        return jax.tree.map(
            lambda x: lax.dynamic_slice(x, *self._place(i, x, axes)), tree
        )

    def cut_operands(
        self, i: jax.Array, operands: AttentionOperands
    ) -> AttentionOperands:
        """Cuts the operands of part i."""
        by_row = ("q_positions", "k_positions", "q_segments", "k_segments", "prefix")
        by_head = ("slopes", "sinks", "biases")
        own = {}
        for names, axes in (
            (("q", "k", "v"), BY_TOKEN),
            (by_row, BY_ROW),
            (by_head, BY_HEAD),
        ):
            own |= self.cut(i, {name: getattr(operands, name) for name in names}, axes)
        return operands._replace(**own)

    def put(
        self,
        i: jax.Array,
        tree: Any,
        parts: Any,
        axes: tuple[int | None, int | None] = BY_TOKEN,
    ) -> Any:
        """Puts these parts in their places in the arrays."""

        def put_array(x, own):
            return lax.dynamic_update_slice(
                x, own.astype(x.dtype), self._place(i, x, axes)[0]
            )

        return jax.tree.map(put_array, tree, parts)

    def _place(
        self, i: jax.Array, x: jax.Array, axes: tuple[int | None, int | None]
    ) -> Any:
        """Where part i starts, and its sizes."""
        starts: list[Any] = [0] * x.ndim
        sizes = list(x.shape)
        numbers = (i // self.head_parts, i % self.head_parts)
        for axis, number, count in zip(axes, numbers, self, strict=True):
            if axis is not None and x.shape[axis] > 1:
                sizes[axis] //= count
                starts[axis] = number * sizes[axis]
        return starts, sizes


def _part(q, k) -> BatchPartition | None:
    """Returns the part attended to at once, so that a tile's scores stay in bounds;
    None: all."""
    B, S, N, _ = q.shape
    T, K = k.shape[1:3]
    score_bytes = 4 * (N // K) * min(tile_size(S), S) * T
    part = BatchPartition.of(B, K, SCORE_BYTES // score_bytes)
    return part if part.num_parts > 1 else None


# Where every tile reads all keys, tiles of one size are a loop: the program is one
# tile's.


def _loop_length(S: int, operands: AttentionOperands, params: AttentionParams) -> int:
    """Tiles to loop over; 0: none."""
    size = tile_size(S)
    same = not is_mask_static(operands, params)
    return S // size if same and size < S and S % size == 0 else 0


def _rows(operands: AttentionOperands, count: int) -> dict[str, Any]:
    """Returns the operands that belong to each tile's queries, [count, B, S / count,
    ...]."""
    own = _split(
        {x: getattr(operands, x) for x in ("q", "q_positions", "q_segments")}, count
    )
    if operands.q_positions is None:
        first = operands.q_offset
        S = operands.q.shape[1]
        first = 0 if first is None else first
        own["q_offset"] = first + jnp.arange(0, S, S // count, dtype=jnp.int32)
    return own


def _split(tree: Any, count: int) -> Any:
    """[B, S, ...] → [count, B, S / count, ...]"""

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _joined(tree: Any) -> Any:
    """[count, B, S / count, ...] → [B, S, ...]"""

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(join, tree)
