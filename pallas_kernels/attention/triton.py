"""Attention for any NVIDIA card: Pallas kernels that Triton compiles.

Three kernels, each of one block of rows a program: the output (Dao 2023, FlashAttention-2,
algorithm 1), dQ, and dK with dV (algorithm 2, split in two so that no sum is atomic and results
repeat bit for bit). A program visits the blocks that ``gpu_blocks`` finds for it: first those that
need a mask, then those that need none.

Scores are kept in base 2: exp2 is an instruction. Head sizes are cut into powers of two, 192 into
128 and 64, which is what Triton's tiles may be.
"""

from math import log, log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import Visits
from pallas_kernels.attention.how import How, Where

LOG2E = log2(2.718281828459045)
LN2 = log(2)
# Compute capabilities with about 100 KB of shared memory for a block, not 163 or 227.
_SMALL = ("8.6", "8.7", "8.9", "11.0", "12.0", "12.1")


class Tiles(NamedTuple):
    """Of one kernel."""

    q: int
    """Queries of a block; a power of two, 16 at least."""
    k: int
    """Keys of a block; likewise."""
    warps: int
    stages: int
    """Blocks in flight in the pipelined loop."""


class BlockSizes(NamedTuple):
    """Of the three kernels."""

    forward: Tiles
    d_q: Tiles
    d_kv: Tiles


def default_block_sizes(H: int, Hv: int, dtype: Any) -> BlockSizes:
    """By rule: what keeps accumulators in registers and blocks in shared memory."""
    small = getattr(jax.local_devices()[0], "compute_capability", "") in _SMALL
    if jnp.dtype(dtype).itemsize > 2:
        rows = 64 if max(H, Hv) <= 128 else 32
        return BlockSizes(Tiles(rows, 32, 4, 1), Tiles(rows, 32, 4, 1), Tiles(32, rows, 4, 1))
    if max(H, Hv) <= 64:
        return BlockSizes(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2))
    if max(H, Hv) <= 128:
        stages = 2 if small else 3
        return BlockSizes(Tiles(128, 64, 8, stages), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2))
    stages = 1 if small else 2
    return BlockSizes(Tiles(128, 32, 8, stages), Tiles(64, 32, 8, stages), Tiles(32, 64, 8, stages))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Where,
    how: How,
    dtype: Any,
    *,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention's output and log-sum-exps.

    Args:
        q: [B, S, N, H]; k: [B, T, K, H]; v: [B, T, K, Hv]; N a multiple of K. One dtype.
        where, how: the mask and what is added to scores.
        dtype: of the output.
        block_sizes: default :func:`default_block_sizes`.
        interpret: run by the interpreter, on any device.

    Returns:
        o [B, S, N, Hv], zeros where a query has no key; the log-sum-exp of each query's scores,
        its sink included, fp32 [B, S, N], −inf where it has none.
    """
    (B, S, N, H), (T, K, Hv) = q.shape, v.shape[1:]
    tiles = (block_sizes or default_block_sizes(H, Hv, q.dtype)).forward
    blocks = pl.cdiv(S, tiles.q)
    table = gpu_blocks.visits_of_queries(S, T, tiles.q, tiles.k, where, how)
    call = _Call(where, how, tiles, (S, T, H, Hv), N // K, interpret, per_query=True, table=table)
    call.add("q", q, call.heads(tiles.q))
    call.add("k", k, call.shared_heads(tiles.k))
    call.add("v", v, call.shared_heads(tiles.k))
    call.add("sinks", where.sinks, call.whole)
    shapes = (
        jax.ShapeDtypeStruct((B, S, N, Hv), dtype),
        jax.ShapeDtypeStruct((B, N, S), jnp.float32),
    )
    specs = call.heads(tiles.q)(shapes[0]), call.rows(tiles.q)(shapes[1])
    o, lse = call(_forward_kernel, (blocks, N, B), shapes, specs)
    return o, lse.transpose(0, 2, 1)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_o: jax.Array,
    where: Where,
    how: How,
    dtype: Any,
    *,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients that pass through these keys, which may be a block of all that queries see.

    Args:
        q, k, v, where, how, block_sizes, interpret: as :func:`forward`'s.
        lse: fp32 [B, S, N], over all the keys that the queries see.
        delta: fp32 [B, S, N], d_o · o.
        d_o: [B, S, N, Hv], the output's cotangent.
        dtype: of the results, which are summed in fp32.

    Returns:
        dQ, dK, dV, shaped as q, k and v.
    """
    (B, S, N, H), (T, K, Hv) = q.shape, v.shape[1:]
    sizes = block_sizes or default_block_sizes(H, Hv, q.dtype)
    # +inf where no key is left: its weights are then exp2(score − inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E).transpose(0, 2, 1)
    delta, d_o = delta.transpose(0, 2, 1), d_o.astype(v.dtype)

    tiles = sizes.d_q
    table = gpu_blocks.visits_of_queries(S, T, tiles.q, tiles.k, where, how)
    call = _Call(where, how, tiles, (S, T, H, Hv), N // K, interpret, per_query=True, table=table)
    for name, x in (("q", q), ("d_o", d_o)):
        call.add(name, x, call.heads(tiles.q))
    for name, x in (("k", k), ("v", v)):
        call.add(name, x, call.shared_heads(tiles.k))
    for name, x in (("lse", lse), ("delta", delta)):
        call.add(name, x, call.rows(tiles.q))
    shape = jax.ShapeDtypeStruct(q.shape, dtype)
    grid = pl.cdiv(S, tiles.q), N, B
    (d_q,) = call(_d_q_kernel, grid, (shape,), (call.heads(tiles.q)(shape),))

    tiles = sizes.d_kv
    table = gpu_blocks.visits_of_keys(S, T, tiles.q, tiles.k, where, how)
    call = _Call(where, how, tiles, (S, T, H, Hv), N // K, interpret, per_query=False, table=table)
    for name, x in (("q", q), ("d_o", d_o)):
        call.add(name, x, call.groups(tiles.q))
    for name, x in (("k", k), ("v", v)):
        call.add(name, x, call.heads(tiles.k))
    for name, x in (("lse", lse), ("delta", delta)):
        call.add(name, x, call.group_rows(tiles.q))
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in (k, v))
    specs = tuple(call.heads(tiles.k)(shape) for shape in shapes)
    d_k, d_v = call(_d_kv_kernel, (pl.cdiv(T, tiles.k), K, B), shapes, specs)
    return d_q, d_k, d_v


class _Call:
    """A kernel's named inputs and their specs. Each program's window is whole sequences of its own
    row of the batch and head, with their last block filled up; kernels mask what lies outside."""

    def __init__(
        self, where: Where, how: How, tiles: Tiles, sizes, group, interpret, *, per_query, table
    ):
        S, T, H, Hv = sizes
        self.inputs: dict[str, jax.Array] = {}
        self.specs: list[pl.BlockSpec] = []
        self.group = group
        masked = gpu_blocks.needs_mask(how, where, T if per_query else tiles.k, tiles.k)
        self.statics = _Statics(how, tiles, S, T, H, Hv, group, masked, interpret)
        if masked:
            self.add("visits", table, lambda x: self._per_row(x, x.shape[1:]))
        if how.causal or where.slopes is not None:
            for name, offset, block in (
                ("q", where.q_offset, tiles.q),
                ("k", where.k_offset, tiles.k),
            ):
                positions = getattr(where, f"{name}_positions")
                self.add(f"{name}_positions", positions, self.tokens(block))
                if positions is None and offset is not None:
                    self.add(f"{name}_offset", jnp.asarray(offset, jnp.int32)[None], self.whole)
        if where.q_segments is not None:
            self.add("q_segments", where.q_segments, self.tokens(tiles.q))
            self.add("k_segments", where.k_segments, self.tokens(tiles.k))
        if how.prefix:
            self.add("prefix", where.prefix, self.whole)
        self.add("slopes", where.slopes, self.whole)

    def add(self, name: str, x: jax.Array | None, spec) -> None:
        if x is not None:
            self.inputs[name] = x
            self.specs.append(spec(x))

    def __call__(self, kernel, grid, shapes, specs):
        names = tuple(self.inputs)
        tiles = self.statics.tiles

        def body(*refs):
            inputs = dict(zip(names, refs[: len(names)], strict=True))
            kernel(_Program(inputs, self.statics), *refs[len(names) :])

        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=self.specs,
            out_specs=specs,
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=self.statics.interpret,
            name=kernel.__name__.strip("_"),
        )(*self.inputs.values())

    # Specs by what an array is, of grids (blocks, heads, rows of the batch).

    def whole(self, x) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda i, n, b: (0,) * len(x.shape))

    def _per_row(self, x, shape) -> pl.BlockSpec:
        rest = (0,) * len(shape)
        shared = x.shape[0] == 1
        return pl.BlockSpec((None, *shape), lambda i, n, b: (0 if shared else b, *rest))

    def tokens(self, block: int):
        """[B or 1, length]"""
        return lambda x: self._per_row(x, (_filled(x.shape[1], block),))

    def heads(self, block: int):
        """[B, length, heads, H], of the program's head."""
        return lambda x: self._head_spec(x, block, 1)

    def shared_heads(self, block: int):
        """Likewise, of the kv head that the program's query head reads."""
        return lambda x: self._head_spec(x, block, self.group)

    def _head_spec(self, x, block: int, share: int) -> pl.BlockSpec:
        shape = None, _filled(x.shape[1], block), None, _filled_head(x.shape[3])
        return pl.BlockSpec(shape, lambda i, n, b: (b, 0, lax.div(n, share), 0))

    def groups(self, block: int):
        """[B, length, N, H] → [length, group, H] of the program's kv head."""

        def spec(x):
            shape = None, _filled(x.shape[1], block), self.group, _filled_head(x.shape[3])
            return pl.BlockSpec(shape, lambda i, n, b: (b, 0, n, 0))

        return spec

    def rows(self, block: int):
        """[B, N, S]"""

        def spec(x):
            shape = None, None, _filled(x.shape[2], block)
            return pl.BlockSpec(shape, lambda i, n, b: (b, n, 0))

        return spec

    def group_rows(self, block: int):
        """[B, N, S] → [group, S]"""

        def spec(x):
            shape = None, self.group, _filled(x.shape[2], block)
            return pl.BlockSpec(shape, lambda i, n, b: (b, n, 0))

        return spec


class _Statics(NamedTuple):
    how: How
    tiles: Tiles
    S: int
    T: int
    H: int
    Hv: int
    group: int
    masked: bool
    """Whether blocks are visited as a table says, some with a mask."""
    interpret: bool

    @property
    def plain(self) -> bool:
        """Scores are q·k times a positive number: products are kept, and scaled in the exponent."""
        return self.how.soft_cap is None and self.how.scale > 0


class _Tokens(NamedTuple):
    """A block's queries, as a column, or keys, as a row; or the reverse."""

    index: jax.Array
    position: jax.Array | None
    segment: jax.Array | None


class _Program:
    """What the kernels share: how a program reads its inputs, scores and masks."""

    def __init__(self, refs: dict[str, Any], statics: _Statics):
        self.refs, self.statics = refs, statics
        self.how, self.tiles = statics.how, statics.tiles

    def rows(self, name: str, start, block: int, length: int | None, *at) -> tuple[jax.Array, ...]:
        """[block, width] of each part of a head: zeros past its size and, where ``length`` is
        given, past that many rows."""
        ref = self.refs[name]
        H = {"q": self.statics.H, "k": self.statics.H}.get(name, self.statics.Hv)
        parts = []
        for begin, width in _head_parts(H):
            part = ref.at[(pl.ds(start, block), *at, pl.ds(begin, width))]
            mask = _inside(start, block, length, begin, width, H)
            parts.append(part[...] if mask is None else plgpu.load(part, mask=mask, other=0.0))
        return tuple(parts)

    def row_scalars(self, name: str, start, *at, other: float) -> jax.Array:
        """fp32 [block] of queries."""
        block, S = self.tiles.q, self.statics.S
        part = self.refs[name].at[(*at, pl.ds(start, block))]
        if S % block == 0:
            return part[...]
        return plgpu.load(part, mask=start + jnp.arange(block) < S, other=other)

    def tokens(self, side: str, start, axis: int) -> _Tokens:
        """Queries (``side`` q) or keys (k), along ``axis`` of a tile of scores."""
        block, length = (
            (self.tiles.q, self.statics.S) if side == "q" else (self.tiles.k, self.statics.T)
        )
        index = start + jnp.arange(block, dtype=jnp.int32)

        def read(name):
            if name not in self.refs:
                return None
            part = self.refs[name].at[pl.ds(start, block)]
            if length % block == 0:
                return part[...]
            return plgpu.load(part, mask=index < length, other=0)

        position = read(f"{side}_positions")
        if position is None:
            offset = self.refs.get(f"{side}_offset")
            position = index if offset is None else index + offset[0]
        segment = read(f"{side}_segments")
        return _Tokens(
            *(None if x is None else jnp.expand_dims(x, axis) for x in (index, position, segment))
        )

    def visible(self, queries: _Tokens, keys: _Tokens) -> jax.Array:
        """bool, broadcast over a tile."""
        how, T = self.how, self.statics.T
        seen = None
        if how.causal:
            behind = queries.position - keys.position
            seen = behind >= 0
            if how.window is not None:
                seen &= behind < how.window
            if how.prefix:
                seen |= keys.position < self.refs["prefix"][pl.program_id(2)]
        if queries.segment is not None:
            same = (queries.segment == keys.segment) & (queries.segment != 0)
            seen = same if seen is None else seen & same
        if T % self.tiles.k:
            inside = keys.index < T
            seen = inside if seen is None else seen & inside
        assert seen is not None
        return seen

    def scores(self, products: jax.Array, queries, keys, head) -> tuple[jax.Array, Any]:
        """From q·k: the scores, of which exp2 is to be taken after :attr:`unit`; and their slope
        by scale·q·k, 1 if that is None."""
        how, slope = self.how, None
        if self.statics.plain and "slopes" not in self.refs:
            return products, None
        scores = products * (how.scale * LOG2E)
        if how.soft_cap is not None:
            # tanh(x) = 1 − 2 / (e^2x + 1): exact to fp32's step at 1, all that scores need.
            tanh = 1 - 2 / (self.exp2(products * (2 * LOG2E * how.scale / how.soft_cap)) + 1)
            scores, slope = (how.soft_cap * LOG2E) * tanh, 1 - tanh * tanh
        if "slopes" in self.refs:
            distance = jnp.abs(queries.position - keys.position).astype(jnp.float32)
            scores -= (self.refs["slopes"][head] * LOG2E) * distance
        return scores, slope

    @property
    def unit(self) -> float:
        """What scores are multiplied by before exp2."""
        return self.how.scale * LOG2E if self.statics.plain and "slopes" not in self.refs else 1.0

    def gradients(self, scores, slope, lse, d_weights, delta, seen) -> tuple[jax.Array, jax.Array]:
        """Weights, and the gradient by scale·q·k (softmax's Jacobian). Masked keys and values may
        hold anything finite: d_weights may then not be."""
        scores *= self.unit
        if seen is not None:
            scores = jnp.where(seen, scores, -jnp.inf)
        weights = self.exp2(scores - lse)
        d_scores = weights * (d_weights - delta)
        if slope is not None:
            d_scores *= slope
        return weights, d_scores if seen is None else jnp.where(seen, d_scores, 0.0)

    def exp2(self, x: jax.Array) -> jax.Array:
        """One instruction: JAX's own, exact below 2^-126 too, is four."""
        if self.statics.interpret:
            return jnp.exp2(x)
        (y,) = plgpu.elementwise_inline_asm(
            "ex2.approx.ftz.f32 $0, $1;",
            args=[x],
            constraints="=f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        )
        return y

    def visit(self, i, blocks: int, body, carry, repeats: int = 1):
        """``body(block, repeat, masked, carry)`` over the blocks that block i visits, each block
        ``repeats`` times."""

        def loop(begin, count, block_of, masked, carry):
            def step(t, carry):
                repeat = 0 if repeats == 1 else lax.div(t, count)
                at = begin + (t if repeats == 1 else t - repeat * count)
                return body(block_of(at), repeat, masked, carry)

            return lax.fori_loop(0, repeats * count, step, carry)

        if not self.statics.masked:
            return loop(0, blocks, lambda at: at, False, carry)
        visits = Visits(*(self.refs["visits"][i, field] for field in range(gpu_blocks.FIELDS)))
        carry = loop(0, visits.count, visits.masked, True, carry)
        full = visits.full_end - visits.full_begin
        return loop(visits.full_begin, full, lambda at: at, False, carry)


def _forward_kernel(p: _Program, o_ref, lse_ref):
    """One block of queries of one head."""
    s, how, (block_q, block_k, *_) = p.statics, p.how, p.tiles
    i, head = _last_first(how), pl.program_id(1)
    start = i * block_q
    q = p.rows("q", start, block_q, s.S if s.S % block_q else None)
    queries = p.tokens("q", start, 1)

    def body(j, _, masked, carry):
        o, top, total = carry
        length = s.T if masked and s.T % block_k else None
        keys = p.tokens("k", j * block_k, 0)
        k = p.rows("k", j * block_k, block_k, length)
        scores, _ = p.scores(_dot_parts(q, k), queries, keys, head)
        if masked:
            scores = jnp.where(p.visible(queries, keys), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * p.unit)
        # Rows that have seen no key: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        weights = p.exp2(scores * p.unit - base[:, None])
        decay = p.exp2(top - base)
        v = p.rows("v", j * block_k, block_k, length)
        o = tuple(
            x * decay[:, None] + _dot(weights.astype(y.dtype), y) for x, y in zip(o, v, strict=True)
        )
        return o, new_top, total * decay + jnp.sum(weights, axis=1)

    zeros = tuple(jnp.zeros((block_q, width), jnp.float32) for _, width in _head_parts(s.Hv))
    if "sinks" in p.refs:
        top = jnp.full((block_q,), p.refs["sinks"][head] * LOG2E, jnp.float32)
        carry = zeros, top, jnp.ones((block_q,), jnp.float32)
    else:
        carry = zeros, jnp.full((block_q,), -jnp.inf), jnp.zeros((block_q,), jnp.float32)
    o, top, total = p.visit(i, pl.cdiv(s.T, block_k), body, carry)
    some = total > 0
    inverse = 1 / jnp.where(some, total, 1.0)
    lse = jnp.where(some, top * LN2 + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    _store(o_ref, tuple(x * inverse[:, None] for x in o), start, block_q, s.S, s.Hv)
    _store_row(lse_ref, lse, start, block_q, s.S)


def _d_q_kernel(p: _Program, d_q_ref):
    """One block of queries of one head."""
    s, how, (block_q, block_k, *_) = p.statics, p.how, p.tiles
    i, head = _last_first(how), pl.program_id(1)
    start = i * block_q
    bound = s.S if s.S % block_q else None
    q, d_o = p.rows("q", start, block_q, bound), p.rows("d_o", start, block_q, bound)
    lse = p.row_scalars("lse", start, other=jnp.inf)[:, None]
    delta = p.row_scalars("delta", start, other=0.0)[:, None]
    queries = p.tokens("q", start, 1)

    def body(j, _, masked, d_q):
        length = s.T if masked and s.T % block_k else None
        keys = p.tokens("k", j * block_k, 0)
        k = p.rows("k", j * block_k, block_k, length)
        scores, slope = p.scores(_dot_parts(q, k), queries, keys, head)
        v = p.rows("v", j * block_k, block_k, length)
        seen = p.visible(queries, keys) if masked else None
        d_weights = _dot_parts(d_o, v)
        _, d_scores = p.gradients(scores, slope, lse, d_weights, delta, seen)
        return tuple(x + _dot(d_scores.astype(y.dtype), y) for x, y in zip(d_q, k, strict=True))

    zeros = tuple(jnp.zeros((block_q, width), jnp.float32) for _, width in _head_parts(s.H))
    d_q = p.visit(i, pl.cdiv(s.T, block_k), body, zeros)
    _store(d_q_ref, tuple(x * how.scale for x in d_q), start, block_q, s.S, s.H)


def _d_kv_kernel(p: _Program, d_k_ref, d_v_ref):
    """One block of keys of one kv head: its group's query heads are summed here. Tiles of scores
    are transposed, [keys, queries], so that the weights are a product's left operand as they lie.
    """
    s, how, (block_q, block_k, *_) = p.statics, p.how, p.tiles
    j, kv_head = pl.program_id(0), pl.program_id(1)
    start = j * block_k
    bound = s.T if s.T % block_k else None
    k, v = p.rows("k", start, block_k, bound), p.rows("v", start, block_k, bound)
    keys = p.tokens("k", start, 1)
    q_bound = s.S if s.S % block_q else None

    def body(i, member, masked, carry):
        d_k, d_v = carry
        at = i * block_q
        queries = p.tokens("q", at, 0)
        q = p.rows("q", at, block_q, q_bound, member)
        head = kv_head * s.group + member
        scores, slope = p.scores(_dot_parts(k, q), queries, keys, head)
        d_o = p.rows("d_o", at, block_q, q_bound, member)
        lse = p.row_scalars("lse", at, member, other=jnp.inf)[None]
        delta = p.row_scalars("delta", at, member, other=0.0)[None]
        seen = p.visible(queries, keys) if masked else None
        d_weights = _dot_parts(v, d_o)
        weights, d_scores = p.gradients(scores, slope, lse, d_weights, delta, seen)
        d_v = tuple(x + _dot(weights.astype(y.dtype), y) for x, y in zip(d_v, d_o, strict=True))
        d_k = tuple(x + _dot(d_scores.astype(y.dtype), y) for x, y in zip(d_k, q, strict=True))
        return d_k, d_v

    zeros = tuple(
        tuple(jnp.zeros((block_k, width), jnp.float32) for _, width in _head_parts(size))
        for size in (s.H, s.Hv)
    )
    d_k, d_v = p.visit(j, pl.cdiv(s.S, block_q), body, zeros, repeats=s.group)
    _store(d_k_ref, tuple(x * how.scale for x in d_k), start, block_k, s.T, s.H)
    _store(d_v_ref, d_v, start, block_k, s.T, s.Hv)


def _last_first(how: How):
    """The block of a program: with a causal mask the last blocks, the longest, start first."""
    i = pl.program_id(0)
    return pl.num_programs(0) - 1 - i if how.causal else i


def _head_parts(H: int) -> list[tuple[int, int]]:
    """(begin, width) of parts that are powers of two, 16 at least: 80 = 64 + 16."""
    parts, begin = [], 0
    while begin < H:
        width = max(16, 1 << ((H - begin).bit_length() - 1))
        parts.append((begin, width))
        begin += width
    return parts


def _filled_head(H: int) -> int:
    return sum(_head_parts(H)[-1])


def _filled(length: int, block: int) -> int:
    return pl.cdiv(length, block) * block


def _inside(start, block: int, length: int | None, begin: int, width: int, H: int):
    """bool, broadcast over [block, width]: what lies in the array; None: all."""
    masks = []
    if length is not None:
        masks.append((start + jnp.arange(block) < length)[:, None])
    if begin + width > H:
        masks.append((begin + jnp.arange(width) < H)[None])
    return jnp.broadcast_to(masks[0] & masks[-1], (block, width)) if masks else None


def _store(ref, parts, start, block: int, length: int, H: int) -> None:
    bound = length if length % block else None
    for (begin, width), x in zip(_head_parts(H), parts, strict=True):
        at = ref.at[pl.ds(start, block), pl.ds(begin, width)]
        mask = _inside(start, block, bound, begin, width, H)
        plgpu.store(at, x.astype(ref.dtype), mask=mask)


def _store_row(ref, x, start, block: int, length: int) -> None:
    mask = start + jnp.arange(block) < length if length % block else None
    plgpu.store(ref.at[pl.ds(start, block)], x, mask=mask)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return plgpu.dot(a, b, precision=_precision(a))


def _dot_parts(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    """a·bᵀ, summed over the parts of a head."""
    return sum(
        plgpu.dot(x, y, trans_b=True, precision=_precision(x)) for x, y in zip(a, b, strict=True)
    )


def _precision(x: jax.Array):
    """fp32 operands are not rounded to TF32."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
