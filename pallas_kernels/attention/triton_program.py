"""Shared parts of the Triton kernels: how a program reads, scores, masks and visits."""

from functools import reduce
from math import log, log2
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import BlockVisits
from pallas_kernels.attention.params import AttentionParams

LOG2E = log2(2.718281828459045)
LN2 = log(2)


class TritonTiles(NamedTuple):
    """Tiles of one kernel."""

    q: int
    """Queries of a block; a power of two, 16 at least."""
    k: int
    """Keys of a block; likewise."""
    warps: int
    stages: int
    """Blocks in flight in the pipelined loop."""


class TritonStatics(NamedTuple):
    params: AttentionParams
    tiles: TritonTiles
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
        return self.params.soft_cap is None and self.params.scale > 0


class TokenBlock(NamedTuple):
    """A block's queries, as a column, or keys, as a row; or the reverse."""

    index: jax.Array
    position: jax.Array
    segment: jax.Array | None


class TritonProgram:
    """Methods of a program: reading inputs, scores, masks, visits."""

    def __init__(self, refs: dict[str, Any], statics: TritonStatics):
        self.refs, self.statics = refs, statics
        self.params, self.tiles = statics.params, statics.tiles
        # Read once, outside all loops: the interpreter knows them nowhere else.
        self.block, self.head, self.row = (pl.program_id(axis) for axis in range(3))

    def rows(self, name: str, start, block: int, length: int | None, *at) -> tuple[jax.Array, ...]:
        """[block, width] of each part of a head: zeros past its size and, where ``length`` is
        given, past that many rows."""
        ref = self.refs[name]
        H = {"q": self.statics.H, "k": self.statics.H}.get(name, self.statics.Hv)
        parts = []
        for begin, width in split_head(H):
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

    def tokens(self, side: str, start, axis: int) -> TokenBlock:
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
        index, position = jnp.expand_dims(index, axis), jnp.expand_dims(position, axis)
        return TokenBlock(
            index, position, None if segment is None else jnp.expand_dims(segment, axis)
        )

    def visible(self, queries: TokenBlock, keys: TokenBlock) -> jax.Array:
        """bool, broadcast over a tile."""
        params, T = self.params, self.statics.T
        seen = None
        if params.causal:
            behind = queries.position - keys.position
            seen = behind >= 0
            if params.window is not None:
                seen &= behind < params.window
            if "prefix" in self.refs:
                seen |= keys.position < self.refs["prefix"][self.row]
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
        params, slope = self.params, None
        if self.statics.plain and "slopes" not in self.refs:
            return products, None
        scores = products * (params.scale * LOG2E)
        if params.soft_cap is not None:
            # tanh(x) = 1 − 2 / (e^2x + 1): exact to fp32's step at 1, all that scores need.
            tanh = 1 - 2 / (self.exp2(products * (2 * LOG2E * params.scale / params.soft_cap)) + 1)
            scores, slope = (params.soft_cap * LOG2E) * tanh, 1 - tanh * tanh
        if "slopes" in self.refs:
            distance = jnp.abs(queries.position - keys.position).astype(jnp.float32)
            scores -= (self.refs["slopes"][head] * LOG2E) * distance
        return scores, slope

    @property
    def unit(self) -> float:
        """The factor of scores before exp2."""
        return (
            self.params.scale * LOG2E if self.statics.plain and "slopes" not in self.refs else 1.0
        )

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
        visits = BlockVisits(*(self.refs["visits"][i, field] for field in range(gpu_blocks.FIELDS)))
        carry = loop(0, visits.count, visits.masked, True, carry)
        full = visits.full_end - visits.full_begin
        return loop(visits.full_begin, full, lambda at: at, False, carry)


def split_head(H: int) -> list[tuple[int, int]]:
    """(begin, width) of parts that are powers of two, 16 at least: 80 = 64 + 16."""
    parts, begin = [], 0
    while begin < H:
        width = max(16, 1 << ((H - begin).bit_length() - 1))
        parts.append((begin, width))
        begin += width
    return parts


def pad_head_size(H: int) -> int:
    return sum(split_head(H)[-1])


def round_up(length: int, block: int) -> int:
    return pl.cdiv(length, block) * block


def _inside(start, block: int, length: int | None, begin: int, width: int, H: int):
    """bool [block, width]: what lies in the array; None: all."""
    masks = []
    if length is not None:
        masks.append((start + jnp.arange(block) < length)[:, None])
    if begin + width > H:
        masks.append((begin + jnp.arange(width) < H)[None])
    return jnp.broadcast_to(masks[0] & masks[-1], (block, width)) if masks else None


def store_tile(ref, parts, start, block: int, length: int, H: int) -> None:
    """Stores the part of a block of rows that lies in the array, in the parts of a head."""
    bound = length if length % block else None
    for (begin, width), x in zip(split_head(H), parts, strict=True):
        at = ref.at[pl.ds(start, block), pl.ds(begin, width)]
        mask = _inside(start, block, bound, begin, width, H)
        plgpu.store(at, x.astype(ref.dtype), mask=mask)


def store_row(ref, x, start, block: int, length: int) -> None:
    mask = start + jnp.arange(block) < length if length % block else None
    plgpu.store(ref.at[pl.ds(start, block)], x, mask=mask)


def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return plgpu.dot(a, b, precision=_precision(a))


def multiply_transposed(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    """a·bᵀ, summed over the parts of a head."""
    products = (
        plgpu.dot(x, y, trans_b=True, precision=_precision(x)) for x, y in zip(a, b, strict=True)
    )
    return reduce(add, products)


def _precision(x: jax.Array):
    """fp32 operands are not rounded to TF32."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
