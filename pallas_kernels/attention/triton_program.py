"""Shared parts of the Triton kernels: how arrays come to one, how a program reads and
scores, what it masks and visits."""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import BlockVisits
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    combine_masks,
)
from pallas_kernels.chips import round_up
from pallas_kernels.kernel_types import Carry, Index, Interpret, Ref


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
    """The values that a kernel is compiled for."""

    params: AttentionParams
    tiles: TritonTiles
    S: int
    T: int
    H: int
    Hv: int
    group: int
    """Query heads to a kv head."""
    interpret: Interpret


class TokenBlock(NamedTuple):
    """A block's queries, as a column, or keys, as a row; or the reverse."""

    index: jax.Array
    position: jax.Array
    segment: jax.Array | None


class TritonProgram:
    """Methods of a program: reading inputs, scores, masks, visits."""

    def __init__(self, refs: dict[str, Ref], statics: TritonStatics):
        self.refs = refs
        self.statics = statics
        self.params = statics.params
        self.tiles = statics.tiles
        self.exp2_scale = gpu_blocks.get_exp2_scale(statics.params, refs)
        # Read once, outside all loops: the interpreter knows them nowhere else.
        self.block = pl.program_id(0)
        self.head = pl.program_id(1)
        self.row = pl.program_id(2)

    def load_rows(
        self, name: str, start: Index, block: int, length: int | None, *index: Index
    ) -> tuple[jax.Array, ...]:
        """Reads [block, width] of each part of a head: zeros past its size and, where
        ``length`` is given, past that many rows. ``index``: of dimensions between."""
        ref = self.refs[name]
        H = self.statics.H if name in ("q", "k") else self.statics.Hv
        parts = []
        for begin, width in split_head_dim(H):
            part = ref.at[(pl.ds(start, block), *index, pl.ds(begin, width))]
            mask = _inside(start, block, length, begin, width, H)
            if mask is None:
                parts.append(part[...])
            else:
                parts.append(plgpu.load(part, mask=mask, other=0.0))
        return tuple(parts)

    def load_row_scalars(
        self, name: str, start: Index, *index: Index, other: float
    ) -> jax.Array:
        """Reads fp32 [block] of queries; ``index``: of dimensions before."""
        block = self.tiles.q
        S = self.statics.S
        part = self.refs[name].at[(*index, pl.ds(start, block))]
        if S % block == 0:
            return part[...]
        return plgpu.load(part, mask=start + jnp.arange(block) < S, other=other)

    def load_token_block(self, side: str, start: Index, axis: int) -> TokenBlock:
        """Reads queries (``side`` q) or keys (k), along ``axis`` of a tile of
        scores."""
        if side == "q":
            block = self.tiles.q
            length = self.statics.S
        else:
            block = self.tiles.k
            length = self.statics.T
        index = start + jnp.arange(block, dtype=jnp.int32)
        offset = self.refs.get(f"{side}_offset")
        position = index if offset is None else index + offset[0]
        segments_ref = self.refs.get(f"{side}_segments")
        segments = None
        if segments_ref is not None:
            part = segments_ref.at[pl.ds(start, block)]
            if length % block == 0:
                segments = part[...]
            else:
                segments = plgpu.load(part, mask=index < length, other=0)
        tokens = TokenBlock(index, position, segments)
        return jax.tree.map(lambda x: jnp.expand_dims(x, axis), tokens)

    def compute_mask(self, queries: TokenBlock, keys: TokenBlock) -> jax.Array:
        """Returns the mask, bool, broadcast over a tile."""
        T = self.statics.T
        behind = None
        in_prefix = None
        segments = None
        inside = None
        if self.params.causal:
            behind = queries.position - keys.position
        if "prefix" in self.refs:
            in_prefix = keys.position < self.refs["prefix"][self.row]
        if queries.segment is not None and keys.segment is not None:
            segments = queries.segment, keys.segment
        if T % self.tiles.k:
            inside = keys.index < T
        mask = combine_masks(self.params, behind, in_prefix, segments, inside)
        # Blocks are visited with a mask only where one of these may empty a score.
        assert mask is not None
        return mask

    def scores(
        self,
        products: jax.Array,
        queries: TokenBlock,
        keys: TokenBlock,
        head: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None]:
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

    def visit_visible_blocks(
        self,
        i: jax.Array,
        num_blocks: int,
        body: Callable[[jax.Array, jax.Array, bool, Carry], Carry],
        carry: Carry,
        repeats: int = 1,
    ) -> Carry:
        """Runs ``body(block, repeat, masked, carry)`` over the blocks that block i
        visits, each block ``repeats`` times: as a table says, some with a mask, or all
        of them."""

        def loop(begin, count, block_of, masked, carry):
            def step(t, carry):
                if repeats == 1:
                    # An array: JAX's interpreter takes no Python int beside a mask.
                    repeat = jnp.int32(0)
                    visit = begin + t
                else:
                    repeat = lax.div(t, count)
                    visit = begin + (t - repeat * count)
                return body(block_of(visit), repeat, masked, carry)

            return lax.fori_loop(0, repeats * count, step, carry)

        if "visits" not in self.refs:
            return loop(0, num_blocks, lambda visit: visit, False, carry)
        visits = BlockVisits.read(self.refs["visits"], i)
        # Blocks with a mask first, then the run of those that need none.
        carry = loop(0, visits.num_masked, visits.masked_block, True, carry)
        num_full = visits.full_end - visits.full_begin
        return loop(visits.full_begin, num_full, lambda visit: visit, False, carry)


ShapedArray = jax.Array | jax.ShapeDtypeStruct

MakeSpec = Callable[[ShapedArray], pl.BlockSpec]
"""Makes the spec of an array, or of what has its shape."""


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
        # By name, in the order in which the kernel has them.
        self.inputs: dict[str, jax.Array] = {}
        self.specs: list[pl.BlockSpec] = []
        group = N // K
        visits = gpu_blocks.plan_visits(
            tiles.q, tiles.k, operands, params, per_query=per_query
        )
        self.statics = TritonStatics(params, tiles, S, T, H, Hv, group, call.interpret)
        if per_query:
            self.grid = (pl.cdiv(S, tiles.q), N, B)
            self.query_spec = self._head_spec(tiles.q)
            self.query_row_spec = self._query_row_spec(tiles.q, None)
            self.key_spec = self._head_spec(tiles.k, share=group)
        else:
            self.grid = (pl.cdiv(T, tiles.k), K, B)
            self.query_spec = self._head_spec(tiles.q, group=group)
            self.query_row_spec = self._query_row_spec(tiles.q, group)
            self.key_spec = self._head_spec(tiles.k)
        self.add(lambda x: self._per_row(x, x.shape[1:]), visits=visits)
        for name, array in gpu_blocks.list_mask_inputs(operands, params).items():
            make_spec = full_spec
            if name == "q_segments":
                make_spec = self._token_spec(tiles.q)
            elif name == "k_segments":
                make_spec = self._token_spec(tiles.k)
            self.add(make_spec, **{name: array})
        self.add(self.query_spec, q=q)
        self.add(self.key_spec, k=k, v=v)

    def add(self, make_spec: MakeSpec, **arrays: jax.Array | None) -> None:
        """Adds inputs of these names, but those that are None."""
        for name, array in arrays.items():
            if array is not None:
                self.inputs[name] = array
                self.specs.append(make_spec(array))

    def __call__(
        self,
        kernel: Callable[..., None],
        *outputs: tuple[tuple[int, ...], DTypeLike, MakeSpec],
    ) -> list[jax.Array]:
        """Runs a kernel; ``outputs``: (shape, dtype, spec by what has these) of each
        result."""
        out_shapes = []
        out_specs = []
        for shape, dtype, make_spec in outputs:
            out_shape = jax.ShapeDtypeStruct(shape, dtype)
            out_shapes.append(out_shape)
            out_specs.append(make_spec(out_shape))
        names = tuple(self.inputs)
        tiles = self.statics.tiles

        def body(*refs):
            input_refs = refs[: len(names)]
            output_refs = refs[len(names) :]
            inputs = dict(zip(names, input_refs, strict=True))
            kernel(TritonProgram(inputs, self.statics), *output_refs)

        return pl.pallas_call(
            body,
            grid=self.grid,
            in_specs=self.specs,
            out_specs=out_specs,
            out_shape=out_shapes,
            compiler_params=plgpu.CompilerParams(
                num_warps=tiles.warps, num_stages=tiles.stages
            ),
            interpret=self.statics.interpret,
            name=kernel.__name__.strip("_"),
        )(*self.inputs.values())

    # Specs by what an array is.

    def _per_row(self, x: ShapedArray, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Returns the spec of [B or 1, ...], of the program's row."""
        is_shared = x.shape[0] == 1
        others = (0,) * len(shape)

        def index(i, n, b):
            return (0 if is_shared else b, *others)

        return pl.BlockSpec((None, *shape), index)

    def _token_spec(self, block: int) -> MakeSpec:
        """Returns the spec of [B or 1, length]."""
        return lambda x: self._per_row(x, (round_up(x.shape[1], block),))

    def _head_spec(
        self, block: int, share: int = 1, group: int | None = None
    ) -> MakeSpec:
        """Returns the spec of [B, length, heads, H], of one head, which ``share`` heads
        read; or [length, group, H] of the program's kv head."""

        def make_spec(x: ShapedArray) -> pl.BlockSpec:
            length = round_up(x.shape[1], block)
            shape = (None, length, group, pad_head_size(x.shape[3]))
            return pl.BlockSpec(shape, lambda i, n, b: (b, 0, lax.div(n, share), 0))

        return make_spec

    def _query_row_spec(self, block: int, group: int | None) -> MakeSpec:
        """Returns the spec of [B, N, S], of the program's head; or [group, S] of its kv
        head."""

        def make_spec(x: ShapedArray) -> pl.BlockSpec:
            shape = (None, group, round_up(x.shape[2], block))
            return pl.BlockSpec(shape, lambda i, n, b: (b, n, 0))

        return make_spec


def full_spec(x: ShapedArray) -> pl.BlockSpec:
    """Returns the spec of a whole array."""
    return pl.BlockSpec(x.shape, lambda i, n, b: (0,) * len(x.shape))


def split_head_dim(H: int) -> list[tuple[int, int]]:
    """Splits into (begin, width) of parts that are powers of two, 16 at least: 80 = 64
    + 16."""
    parts = []
    begin = 0
    while begin < H:
        largest_power = 1 << ((H - begin).bit_length() - 1)
        width = max(16, largest_power)
        parts.append((begin, width))
        begin += width
    return parts


def pad_head_size(H: int) -> int:
    """Returns where the last of the parts of a head ends."""
    begin, width = split_head_dim(H)[-1]
    return begin + width


def _inside(
    start: Index, block: int, length: int | None, begin: int, width: int, H: int
) -> jax.Array | None:
    """bool [block, width]: what lies in the array; None: all."""
    masks = []
    if length is not None:
        row_is_inside = start + jnp.arange(block) < length
        masks.append(row_is_inside[:, None])
    if begin + width > H:
        feature_is_inside = begin + jnp.arange(width) < H
        masks.append(feature_is_inside[None])
    if not masks:
        return None
    # One of them, or both.
    return jnp.broadcast_to(masks[0] & masks[-1], (block, width))


def store_tile(
    ref: Ref,
    parts: tuple[jax.Array, ...],
    start: Index,
    block: int,
    length: int,
    H: int,
) -> None:
    """Stores the part of a block of rows that lies in the array, in the parts of a
    head."""
    bound = length if length % block else None
    for (begin, width), part in zip(split_head_dim(H), parts, strict=True):
        target = ref.at[pl.ds(start, block), pl.ds(begin, width)]
        mask = _inside(start, block, bound, begin, width, H)
        plgpu.store(target, part.astype(ref.dtype), mask=mask)


def store_row(ref: Ref, x: jax.Array, start: Index, block: int, length: int) -> None:
    """Stores the part of one number a row that lies in the array."""
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
