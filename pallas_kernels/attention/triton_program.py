"""Shared parts of the Triton kernels: how arrays come to one, how a program reads and
scores, what it masks and visits."""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import BlockVisits
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    combine_masks,
)
from pallas_kernels.chips import round_up


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
    interpret: bool


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
        self.exp2_scale = gpu_blocks.get_exp2_scale(statics.params, refs)
        # Read once, outside all loops: the interpreter knows them nowhere else.
        self.block, self.head, self.row = (pl.program_id(axis) for axis in range(3))

    def load_rows(
        self, name: str, start, block: int, length: int | None, *at
    ) -> tuple[jax.Array, ...]:
        """Reads [block, width] of each part of a head: zeros past its size and, where
        ``length`` is given, past that many rows."""
        ref = self.refs[name]
        H = {"q": self.statics.H, "k": self.statics.H}.get(name, self.statics.Hv)
        parts = []
        for begin, width in split_head_dim(H):
            part = ref.at[(pl.ds(start, block), *at, pl.ds(begin, width))]
            mask = _inside(start, block, length, begin, width, H)
            parts.append(
                part[...] if mask is None else plgpu.load(part, mask=mask, other=0.0)
            )
        return tuple(parts)

    def load_row_scalars(self, name: str, start, *at, other: float) -> jax.Array:
        """Reads fp32 [block] of queries."""
        block, S = self.tiles.q, self.statics.S
        part = self.refs[name].at[(*at, pl.ds(start, block))]
        if S % block == 0:
            return part[...]
        return plgpu.load(part, mask=start + jnp.arange(block) < S, other=other)

    def load_token_block(self, side: str, start, axis: int) -> TokenBlock:
        """Reads queries (``side`` q) or keys (k), along ``axis`` of a tile of
        scores."""
        tiles, s = self.tiles, self.statics
        block, length = (tiles.q, s.S) if side == "q" else (tiles.k, s.T)
        index = start + jnp.arange(block, dtype=jnp.int32)
        offset, segments = (
            self.refs.get(f"{side}_{x}") for x in ("offset", "segments")
        )
        position = index if offset is None else index + offset[0]
        if segments is not None:
            part = segments.at[pl.ds(start, block)]
            mask = None if length % block == 0 else index < length
            segments = (
                part[...] if mask is None else plgpu.load(part, mask=mask, other=0)
            )
        tokens = TokenBlock(index, position, segments)
        return jax.tree.map(lambda x: jnp.expand_dims(x, axis), tokens)

    def compute_mask(self, queries: TokenBlock, keys: TokenBlock) -> Any:
        """Returns the mask, bool, broadcast over a tile."""
        T = self.statics.T
        prefix = self.refs.get("prefix")
        return combine_masks(
            self.params,
            queries.position - keys.position if self.params.causal else None,
            None if prefix is None else keys.position < prefix[self.row],
            None if queries.segment is None else (queries.segment, keys.segment),
            keys.index < T if T % self.tiles.k else None,
        )

    def scores(self, products: jax.Array, queries, keys, head) -> tuple[jax.Array, Any]:
        """Returns what :func:`~pallas_kernels.attention.gpu_blocks.scale_scores`
        does."""

        def behind():
            return queries.position - keys.position

        return gpu_blocks.scale_scores(
            products, self.params, self.refs, head, behind, self.exp2
        )

    def exp2(self, x: jax.Array) -> jax.Array:
        """Computes exp2 in one instruction: JAX's own, exact below 2^-126 too, is
        four."""
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

    def visit_visible_blocks(self, i, blocks: int, body, carry, repeats: int = 1):
        """Runs ``body(block, repeat, masked, carry)`` over the blocks that block i
        visits, each block ``repeats`` times: as a table says, some with a mask, or all
        of them."""

        def loop(begin, count, block_of, masked, carry):
            def step(t, carry):
                # An array: JAX's interpreter takes no Python int beside a mask.
                repeat = jnp.int32(0) if repeats == 1 else lax.div(t, count)
                at = begin + (t if repeats == 1 else t - repeat * count)
                return body(block_of(at), repeat, masked, carry)

            return lax.fori_loop(0, repeats * count, step, carry)

        if "visits" not in self.refs:
            return loop(0, blocks, lambda at: at, False, carry)
        visits = BlockVisits.read(self.refs["visits"], i)
        carry = loop(0, visits.num_masked, visits.masked_block, True, carry)
        full = visits.full_end - visits.full_begin
        return loop(visits.full_begin, full, lambda at: at, False, carry)


class TritonKernelCall:
    """A kernel's named inputs and their specs, over a grid (blocks, heads, rows of the
    batch): q, k and v, what masks read, and what is added. Blocks are of queries, which
    visit blocks of keys (``per_query``), or the reverse. Each program's window is whole
    sequences of its own row and head, with their last block filled up; kernels mask
    what lies outside."""

    def __init__(
        self,
        operands: AttentionOperands,
        call: AttentionCall,
        tiles: TritonTiles,
        *,
        per_query: bool,
    ):
        (q, k, v, *_) = operands
        params = call.params
        B, S, N, H = q.shape
        T, K, Hv = v.shape[1:]
        self.inputs: dict[str, jax.Array] = {}
        self.specs: list[pl.BlockSpec] = []
        group = N // K
        visits = gpu_blocks.plan_visits(
            tiles.q, tiles.k, operands, params, per_query=per_query
        )
        self.statics = TritonStatics(params, tiles, S, T, H, Hv, group, call.interpret)
        rows, heads = (
            (pl.cdiv(S, tiles.q), N) if per_query else (pl.cdiv(T, tiles.k), K)
        )
        self.grid = rows, heads, B
        self.query_spec = self._head_spec(tiles.q, group=None if per_query else group)
        self.query_row_spec = self._query_row_spec(
            tiles.q, None if per_query else group
        )
        self.key_spec = self._head_spec(tiles.k, group if per_query else 1)
        self.add(lambda x: self._per_row(x, x.shape[1:]), visits=visits)
        for name, x in gpu_blocks.list_mask_inputs(operands, params).items():
            spec = full_spec
            if name.endswith("segments"):
                spec = self._token_spec(tiles.q if name.startswith("q") else tiles.k)
            self.add(spec, **{name: x})
        self.add(self.query_spec, q=q)
        self.add(self.key_spec, k=k, v=v)

    def add(self, spec, **arrays: jax.Array | None) -> None:
        for name, x in arrays.items():
            if x is not None:
                self.inputs[name] = x
                self.specs.append(spec(x))

    def __call__(self, kernel, *outputs):
        """Runs a kernel; ``outputs``: (shape, dtype, spec by what has these) of each
        result."""
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
        names = tuple(self.inputs)
        tiles = self.statics.tiles

        def body(*refs):
            inputs = dict(zip(names, refs[: len(names)], strict=True))
            kernel(TritonProgram(inputs, self.statics), *refs[len(names) :])

        return pl.pallas_call(
            body,
            grid=self.grid,
            in_specs=self.specs,
            out_specs=[spec(x) for (*_, spec), x in zip(outputs, shapes, strict=True)],
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(
                num_warps=tiles.warps, num_stages=tiles.stages
            ),
            interpret=self.statics.interpret,
            name=kernel.__name__.strip("_"),
        )(*self.inputs.values())

    # Specs by what an array is.

    def _per_row(self, x, shape) -> pl.BlockSpec:
        rest = (0,) * len(shape)
        shared = x.shape[0] == 1
        return pl.BlockSpec((None, *shape), lambda i, n, b: (0 if shared else b, *rest))

    def _token_spec(self, block: int):
        """Returns the spec of [B or 1, length]."""
        return lambda x: self._per_row(x, (round_up(x.shape[1], block),))

    def _head_spec(self, block: int, share: int = 1, group: int | None = None):
        """Returns the spec of [B, length, heads, H], of one head, which ``share`` heads
        read; or [length, group, H] of the program's kv head."""

        def spec(x):
            shape = None, round_up(x.shape[1], block), group, pad_head_size(x.shape[3])
            return pl.BlockSpec(shape, lambda i, n, b: (b, 0, lax.div(n, share), 0))

        return spec

    def _query_row_spec(
        self, block: int, group: int | None
    ) -> Callable[[Any], pl.BlockSpec]:
        """Returns the spec of [B, N, S], of the program's head; or [group, S] of its kv
        head."""

        def spec(x):
            shape = None, group, round_up(x.shape[2], block)
            return pl.BlockSpec(shape, lambda i, n, b: (b, n, 0))

        return spec


def full_spec(x) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i, n, b: (0,) * len(x.shape))


def split_head_dim(H: int) -> list[tuple[int, int]]:
    """Splits into (begin, width) of parts that are powers of two, 16 at least: 80 = 64
    + 16."""
    parts = []
    begin = 0
    while begin < H:
        width = max(16, 1 << ((H - begin).bit_length() - 1))
        parts.append((begin, width))
        begin += width
    return parts


def pad_head_size(H: int) -> int:
    return sum(split_head_dim(H)[-1])


def _inside(start, block: int, length: int | None, begin: int, width: int, H: int):
    """bool [block, width]: what lies in the array; None: all."""
    masks = []
    if length is not None:
        masks.append((start + jnp.arange(block) < length)[:, None])
    if begin + width > H:
        masks.append((begin + jnp.arange(width) < H)[None])
    return jnp.broadcast_to(masks[0] & masks[-1], (block, width)) if masks else None


def store_tile(ref, parts, start, block: int, length: int, H: int) -> None:
    """Stores the part of a block of rows that lies in the array, in the parts of a
    head."""
    bound = length if length % block else None
    for (begin, width), x in zip(split_head_dim(H), parts, strict=True):
        at = ref.at[pl.ds(start, block), pl.ds(begin, width)]
        mask = _inside(start, block, bound, begin, width, H)
        plgpu.store(at, x.astype(ref.dtype), mask=mask)


def store_row(ref, x, start, block: int, length: int) -> None:
    mask = start + jnp.arange(block) < length if length % block else None
    plgpu.store(ref.at[pl.ds(start, block)], x, mask=mask)


def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return plgpu.dot(a, b, precision=_precision(a))


def multiply_transposed(
    a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
) -> jax.Array:
    """Multiplies a·bᵀ, summed over the parts of a head."""
    products = (
        plgpu.dot(x, y, trans_b=True, precision=_precision(x))
        for x, y in zip(a, b, strict=True)
    )
    return reduce(add, products)


def _precision(x: jax.Array):
    """fp32 operands are not rounded to TF32."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
