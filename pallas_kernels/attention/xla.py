"""Attention in a form that any XLA backend compiles, a tile of queries at a time, and a
part of the batch and of the heads.

Where a causal mask and positions are known when the program is compiled, a tile of
queries reads only the keys between its first row's window and its own end: causal, 5/8
of the work at 4 tiles, 1/2 in the limit. Elsewhere every tile reads all keys, and tiles
are a loop.
"""

from typing import NamedTuple, TypeVar

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

# Bytes of scores that exist at once, of which there are a few copies; what has more
# goes a part at a time.
SCORE_BYTES = 1 << 26


def forward(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.attention.attention_forward`."""
    if _choose_partition(operands) is not None:
        return _forward_in_parts(operands, call)
    if _count_loop_tiles(operands, call.params):
        return _forward_in_loop(operands, call)
    return _forward_unrolled(operands, call)


def _forward_in_parts(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """A part of the batch and of the heads after the other."""
    partition = _choose_partition(operands)
    assert partition is not None
    B, S, N, _ = operands.q.shape
    Hv = operands.v.shape[3]

    def run_part(out, i):
        results = forward(partition.cut_operands(i, operands), call)
        return partition.put(i, out, results), None

    out = (
        jnp.zeros((B, S, N, Hv), call.dtype),
        jnp.zeros((B, S, N), accumulation_dtype(operands.q)),
    )
    (o, lse), _ = lax.scan(run_part, out, jnp.arange(partition.num_parts))
    return o, lse


def _forward_in_loop(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """A tile of queries after the other, by one program."""
    count = _count_loop_tiles(operands, call.params)

    def run_tile(rows):
        return forward(operands._replace(**rows), call)

    return _join_rows(lax.map(run_tile, _split_operands(operands, count)))


def _forward_unrolled(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """All tiles of queries, each with the keys that it may see."""
    q = operands.q
    v = operands.v
    params = call.params
    dtype = call.dtype
    B, S, N, H = q.shape
    K, Hv = v.shape[2:]
    group = N // K
    operands = operands._replace(q=q.reshape(B, S, K, group, H))
    sinks = None if operands.sinks is None else reshape_by_head(operands.sinks, K)

    def attend_tile(tile: ScoreTile) -> tuple[jax.Array, jax.Array]:
        if tile.keys.start >= tile.keys.stop:
            # No query sees a key: zeros, and of sinks alone the log-sum-exps.
            shape = (B, K, group, tile.rows.stop - tile.rows.start)
            lse = jnp.full((*shape, 1), -jnp.inf, accumulation_dtype(q))
            o = jnp.zeros((*shape, Hv), dtype)
            if sinks is not None:
                lse = lse.at[:].set(sinks)
            return o, lse

        # Softmax over the keys, and the sink if there is one: [B, K, G, rows, keys].
        scores, _ = tile.scores()
        top = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            top = jnp.maximum(top, sinks)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total += jnp.exp(sinks - top)

        # A query without a key gives zeros and −inf. A score that is masked is far below
        # any other.
        o = einsum("bkgst,btkh->bkgsh", weights.astype(v.dtype), v[:, tile.keys])
        has_key_or_sink = top > MASKED / 2
        o = jnp.where(has_key_or_sink, o / total, 0.0).astype(dtype)
        lse = jnp.where(has_key_or_sink, top + jnp.log(total), -jnp.inf)
        return o, lse

    results = [attend_tile(tile) for tile in list_score_tiles(operands, params)]
    o_tiles, lse_tiles = zip(*results, strict=True)
    o = jnp.concatenate(o_tiles, axis=3)
    lse = jnp.concatenate(lse_tiles, axis=3)
    # [B, K, G, S, ...] → [B, S, N, ...].
    o = o.transpose(0, 3, 1, 2, 4)
    o = o.reshape(B, S, N, Hv)
    lse = lse[..., 0].transpose(0, 3, 1, 2)
    lse = lse.reshape(B, S, N)
    return o, lse


def backward(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, ...]:
    """See :func:`~pallas_kernels.attention.attention_backward`: weights are recomputed
    from scores and log-sum-exps."""
    if _choose_partition(operands) is not None:
        return _backward_in_parts(operands, saved, call)
    if _count_loop_tiles(operands, call.params):
        return _backward_in_loop(operands, saved, call)
    return _backward_unrolled(operands, saved, call)


def _backward_in_parts(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, ...]:
    """A part of the batch and of the heads after the other."""
    partition = _choose_partition(operands)
    assert partition is not None
    dtype = call.dtype
    q_dtype = operands.q.dtype
    k_dtype = operands.k.dtype
    v_dtype = operands.v.dtype

    def run_part(carry, i):
        # Arrays hold gradients of the parts so far, and q, k and v of the others.
        arrays, d_biases = carry
        q, k, v = arrays
        part = partition.cut_operands(i, operands._replace(q=q, k=k, v=v))
        part = part._replace(
            q=part.q.astype(q_dtype),
            k=part.k.astype(k_dtype),
            v=part.v.astype(v_dtype),
        )
        d_q, d_k, d_v, *terms = backward(part, partition.cut(i, saved), call)
        # Every row of the batch adds to its heads' biases.
        earlier = partition.cut(i, d_biases, BY_HEAD)
        terms = jax.tree.map(jnp.add, tuple(terms), earlier)
        arrays = partition.put(i, arrays, (d_q, d_k, d_v))
        return (arrays, partition.put(i, d_biases, terms, BY_HEAD)), None

    # A part's gradients take the places of its q, k and v, which nobody reads again: in
    # a type that holds both.
    def widen(x: jax.Array) -> jax.Array:
        return x.astype(jnp.promote_types(x.dtype, dtype))

    arrays = (widen(operands.q), widen(operands.k), widen(operands.v))
    carry = arrays, _make_zero_biases(operands)
    parts = jnp.arange(partition.num_parts)
    (gradients, d_biases), _ = lax.scan(run_part, carry, parts)
    return *(gradient.astype(dtype) for gradient in gradients), *d_biases


def _backward_in_loop(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, ...]:
    """A tile of queries after the other, by one program, which sums dK and dV."""
    dtype = call.dtype
    wide = accumulation_dtype(operands.q)
    count = _count_loop_tiles(operands, call.params)

    def add_tile(sums, tile):
        rows, saved = tile
        tile_operands = operands._replace(**rows)
        d_q, *terms = backward(tile_operands, saved, call._replace(dtype=wide))
        sums = tuple(x + term for x, term in zip(sums, terms, strict=True))
        return sums, d_q.astype(dtype)

    zeros = _make_zero_sums(operands)
    tiles = _split_operands(operands, count), _split_rows(saved, count)
    (d_k, d_v, *d_biases), d_q = lax.scan(add_tile, zeros, tiles)
    return _join_rows(d_q), d_k.astype(dtype), d_v.astype(dtype), *d_biases


def _backward_unrolled(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, ...]:
    """All tiles of queries, each with the keys that it may see."""
    q = operands.q
    k = operands.k
    v = operands.v
    params = call.params
    dtype = call.dtype
    B, S, N, H = q.shape
    K, Hv = v.shape[2:]
    d_k, d_v, *d_biases = _make_zero_sums(operands)
    lse, delta, d_o = saved

    # Query heads by their kv head: q and d_o [B, S, K, G, ...], as scores have them lse
    # and delta [B, K, G, S, 1].
    heads = (B, S, K, N // K)
    q = q.reshape(*heads, H)
    d_o = d_o.reshape(*heads, Hv)
    # +inf where no key is left: then exp(scores − lse) is 0 there.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    lse = lse.reshape(heads).transpose(0, 2, 3, 1)[..., None]
    delta = delta.reshape(heads).transpose(0, 2, 3, 1)[..., None]
    d_q_tiles = []

    for tile in list_score_tiles(operands._replace(q=q), params):
        rows = tile.rows
        keys = tile.keys
        # One tile after the other: a compiler that sees no order makes all tiles'
        # scores at once.
        sums = d_k, d_v, d_biases
        tile_inputs = q, d_o, operands.biases
        tile_inputs, sums = lax.optimization_barrier((tile_inputs, sums))
        q, d_o, biases = tile_inputs
        d_k, d_v, d_biases = sums
        operands = operands._replace(q=q, biases=biases)
        if keys.start >= keys.stop:
            d_q_tiles.append(jnp.zeros(q[:, rows].shape, dtype))
            continue

        # Softmax's Jacobian: dS = P · (dP − delta), with dP = dO·Vᵀ.
        tile = tile._replace(operands=operands)
        scores, derivatives = tile.scores()
        weights = jnp.exp(scores - lse[..., rows, :])
        d_weights = einsum("bskgh,btkh->bkgst", d_o[:, rows], v[:, keys])
        d_scores = weights * (d_weights - delta[..., rows, :])
        if d_biases:
            term = tile.bias_gradient(jnp.where(weights > 0, d_scores, 0.0))
            d_biases = [d_biases[0] + term]
        d_scores *= params.scale
        if derivatives is not None:
            d_scores *= derivatives
        # What is masked may overflow: infinity times a weight of 0 is NaN.
        d_scores = jnp.where(weights > 0, d_scores, 0.0).astype(q.dtype)

        # dQ = dS·K, dK = dSᵀ·Q and dV = Pᵀ·dO.
        d_q_tile = einsum("bkgst,btkh->bskgh", d_scores, k[:, keys])
        d_q_tiles.append(d_q_tile.astype(dtype))
        term = einsum("bkgst,bskgh->btkh", d_scores, q[:, rows])
        d_k = d_k.at[:, keys].add(term)
        term = einsum("bkgst,bskgh->btkh", weights.astype(d_o.dtype), d_o[:, rows])
        d_v = d_v.at[:, keys].add(term)
    d_q = jnp.concatenate(d_q_tiles, axis=1).reshape(B, S, N, H)
    return d_q, d_k.astype(dtype), d_v.astype(dtype), *d_biases


def _make_zero_sums(operands: AttentionOperands) -> tuple[jax.Array, ...]:
    """Returns zeros for the sums of dK, dV and, where there are biases, theirs."""
    wide = accumulation_dtype(operands.q)
    return (
        jnp.zeros(operands.k.shape, wide),
        jnp.zeros(operands.v.shape, wide),
        *_make_zero_biases(operands),
    )


def _make_zero_biases(operands: AttentionOperands) -> tuple[jax.Array, ...]:
    """Returns zeros for the sum of the biases' gradient; none where there are no
    biases."""
    return () if operands.biases is None else (jnp.zeros_like(operands.biases),)


Arrays = TypeVar("Arrays")
"""An array or a tree of arrays."""

BatchAxes = tuple[int | None, int | None]
"""Axis of the batch's rows, and of heads; None: the array has no such axis."""

# Of arrays [B, S, N or K, ...].
BY_TOKEN: BatchAxes = (0, 2)
# Of arrays [B or 1, ...].
BY_ROW: BatchAxes = (0, None)
# Of arrays [N, ...].
BY_HEAD: BatchAxes = (None, 0)


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
            rows_per_part = find_largest_divisor(batch, max_pairs // kv_heads)
            return cls(batch // rows_per_part, head_parts=1)
        heads_per_part = find_largest_divisor(kv_heads, max_pairs)
        return cls(batch, kv_heads // heads_per_part)

    @property
    def num_parts(self) -> int:
        return self.row_parts * self.head_parts

    def cut(self, i: jax.Array, tree: Arrays, axes: BatchAxes = BY_TOKEN) -> Arrays:
        """Cuts part i of arrays; of a single row, which all share, it is whole."""

        def cut_array(x: jax.Array) -> jax.Array:
            starts, sizes = self._place(i, x, axes)
            return lax.dynamic_slice(x, starts, sizes)

        return jax.tree.map(cut_array, tree)

    def cut_operands(
        self, i: jax.Array, operands: AttentionOperands
    ) -> AttentionOperands:
        """Cuts the operands of part i."""
        return operands._replace(
            q=self.cut(i, operands.q),
            k=self.cut(i, operands.k),
            v=self.cut(i, operands.v),
            q_positions=self.cut(i, operands.q_positions, BY_ROW),
            k_positions=self.cut(i, operands.k_positions, BY_ROW),
            q_segments=self.cut(i, operands.q_segments, BY_ROW),
            k_segments=self.cut(i, operands.k_segments, BY_ROW),
            prefix=self.cut(i, operands.prefix, BY_ROW),
            slopes=self.cut(i, operands.slopes, BY_HEAD),
            sinks=self.cut(i, operands.sinks, BY_HEAD),
            biases=self.cut(i, operands.biases, BY_HEAD),
        )

    def put(
        self,
        i: jax.Array,
        tree: Arrays,
        parts: Arrays,
        axes: BatchAxes = BY_TOKEN,
    ) -> Arrays:
        """Puts these parts in their places in the arrays."""

        def put_array(x: jax.Array, part: jax.Array) -> jax.Array:
            part = part.astype(x.dtype)
            starts, _ = self._place(i, x, axes)
            return lax.dynamic_update_slice(x, part, starts)

        return jax.tree.map(put_array, tree, parts)

    def _place(
        self, i: jax.Array, x: jax.Array, axes: BatchAxes
    ) -> tuple[list[jax.Array | int], list[int]]:
        """Where part i starts, and its sizes."""
        starts: list[jax.Array | int] = [0] * x.ndim
        sizes = list(x.shape)
        row_part = i // self.head_parts
        head_part = i % self.head_parts
        row_axis, head_axis = axes
        if row_axis is not None and x.shape[row_axis] > 1:
            sizes[row_axis] //= self.row_parts
            starts[row_axis] = row_part * sizes[row_axis]
        if head_axis is not None and x.shape[head_axis] > 1:
            sizes[head_axis] //= self.head_parts
            starts[head_axis] = head_part * sizes[head_axis]
        return starts, sizes


def _choose_partition(operands: AttentionOperands) -> BatchPartition | None:
    """Returns the parts attended to at once, so that a tile's scores stay in bounds;
    None: all are."""
    B, S, N, _ = operands.q.shape
    T, K = operands.k.shape[1:3]
    tile_rows = min(tile_size(S), S)
    # fp32 scores of one row of the batch and one kv head.
    score_bytes = 4 * (N // K) * tile_rows * T
    max_pairs = SCORE_BYTES // score_bytes
    partition = BatchPartition.of(B, K, max_pairs)
    return partition if partition.num_parts > 1 else None


# Where every tile reads all keys, tiles of one size are a loop: the program is one
# tile's.


def _count_loop_tiles(operands: AttentionOperands, params: AttentionParams) -> int:
    """Tiles to loop over; 0: none."""
    S = operands.q.shape[1]
    size = tile_size(S)
    if is_mask_static(operands, params) or size >= S or S % size:
        return 0
    return S // size


def _split_operands(
    operands: AttentionOperands, count: int
) -> dict[str, jax.Array | None]:
    """Returns the operands that belong to each tile's queries, [count, B, S / count,
    ...]."""
    rows = {
        "q": operands.q,
        "q_positions": operands.q_positions,
        "q_segments": operands.q_segments,
    }
    rows = _split_rows(rows, count)
    if operands.q_positions is None:
        # Tiles at positions in order begin one after the other.
        S = operands.q.shape[1]
        first = 0 if operands.q_offset is None else operands.q_offset
        rows["q_offset"] = first + jnp.arange(0, S, S // count, dtype=jnp.int32)
    return rows


def _split_rows(tree: Arrays, count: int) -> Arrays:
    """[B, S, ...] → [count, B, S / count, ...]"""

    def split(x):
        B, _, *features = x.shape
        tiles = x.reshape(B, count, -1, *features)
        return jnp.moveaxis(tiles, 1, 0)

    return jax.tree.map(split, tree)


def _join_rows(tree: Arrays) -> Arrays:
    """[count, B, S / count, ...] → [B, S, ...]"""

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(join, tree)
