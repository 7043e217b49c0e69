"""Paged attention for any NVIDIA card: a Pallas kernel that Triton compiles.

A program is a block of queries of one row, a kv head with its group of query heads, and
a share of the row's keys: few rows are split over many programs (Dao et al. 2023,
Flash-Decoding), whose parts are joined by their log-sum-exps.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.gpu_blocks import LN2, LOG2E
from pallas_kernels.attention.triton_program import (
    multiply,
    multiply_transposed,
    split_head_dim,
)
from pallas_kernels.paged_attention.params import PagedOperands, PagedParams
from pallas_kernels.paged_attention.query_blocks import (
    QueryBlock,
    QueryBlocks,
    attend_in_blocks,
)

# Programs that keep a large card busy.
_PROGRAMS = 256
# Rows of a tile of queries: of chunks, and at least, as Triton's products want.
_ROWS, _MIN_ROWS = 64, 16
_KEYS = 64
_COLUMNS = len(QueryBlock._fields)


class TritonPagedBlocks(NamedTuple):
    """Sizes of tiles."""

    queries: int
    """Queries of a block of a row that is not uniform; a power of two."""
    keys: int
    """Keys of a tile; a power of two."""
    splits: int
    """Programs that share the keys of a uniform row."""
    warps: int = 4
    stages: int = 2


class _Statics(NamedTuple):
    params: PagedParams
    queries: int
    keys: int
    heads: int
    """kv heads."""
    splits: int
    table_width: int
    H: int
    Hv: int
    rows: int
    """Rows of a tile of queries, a power of two."""


def supports(operands: PagedOperands, params: PagedParams) -> bool:
    """Returns whether operands are bf16, fp16 or fp32, pages alike or quantized, and a
    tile of 16 queries, heads and all, is not too large for registers."""
    q = operands.q
    for pages in (operands.keys, operands.values):
        if isinstance(pages, jax.Array) and pages.dtype != q.dtype:
            return False
    group = q.shape[1] // operands.num_kv_heads
    rows = pl.next_power_of_2(group * pl.next_power_of_2(params.queries_each))
    return (
        q.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        and max(q.shape[2], params.value_dim) <= 640
        and rows <= 4 * _ROWS
        and operands.biases is None
        and min(q.size, operands.page_tables.size) > 0
    )


def choose_blocks(operands: PagedOperands, params: PagedParams) -> TritonPagedBlocks:
    """Chooses tiles by rule: those of wide heads and of fp32 are smaller, for
    registers' sake."""
    N = operands.q.shape[1]
    K = operands.num_kv_heads
    wide = max(operands.q.shape[2], params.value_dim) * operands.q.dtype.itemsize
    rows = _ROWS if wide <= 256 else _MIN_ROWS
    keys = _KEYS if wide <= 256 else 32 if wide <= 512 else 16
    longest = operands.page_tables.shape[1] * params.page_size
    programs = max(1, params.num_uniform * K)
    splits = min(max(1, _PROGRAMS // programs), max(1, longest // (4 * keys)))
    queries = max(1, rows // pl.next_power_of_2(N // K))
    return TritonPagedBlocks(queries, keys, splits, 8 if wide > 512 else 4)


def forward(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.paged_attention.paged_attention`."""
    sizes = params.block_sizes or choose_blocks(operands, params)

    def attend(blocks: QueryBlocks, uniform: bool) -> tuple[jax.Array, jax.Array]:
        return _run(blocks, operands, params, sizes, sizes.splits if uniform else 1)

    return attend_in_blocks(operands, params, sizes.queries, 1, attend)


def _run(
    blocks: QueryBlocks,
    operands: PagedOperands,
    params: PagedParams,
    sizes: TritonPagedBlocks,
    splits: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns o fp32 [n, K, M, Hv] and lse [n, K, M] of blocks of queries."""
    (n, K, M, H), Hv = blocks.q.shape, params.value_dim
    rows = max(_MIN_ROWS, pl.next_power_of_2(M))
    wide, wide_v = sum(split_head_dim(H)[-1]), sum(split_head_dim(Hv)[-1])
    q = jnp.pad(blocks.q, ((0, 0), (0, 0), (0, rows - M), (0, wide - H)))
    inputs: dict[str, jax.Array] = {
        "blocks": jnp.stack(blocks.places, axis=1).reshape(-1),
        "tables": operands.page_tables.reshape(-1),
        "q": q,
    }
    # A row a token: codes [P · K · page, H], and a number a token of values' scales; a
    # row a page of keys' scales, [P · K, H].
    for name, x in operands.page_arrays.items():
        by_token = name in ("v_scale", "v_zero")
        inputs[name] = x.reshape(-1) if by_token else x.reshape(-1, x.shape[-1])
    for name, x in blocks.repeat_by_row(operands).items():
        inputs[name] = jnp.pad(x, ((0, 0), (0, rows - M)))
    width = operands.page_tables.shape[1]
    statics = _Statics(
        params, blocks.queries, sizes.keys, K, splits, width, H, Hv, rows
    )
    o, lse = pl.pallas_call(
        partial(_attend_block, s=statics),
        grid=(n, K, splits),
        in_specs=[dict.fromkeys(inputs, pl.BlockSpec(memory_space=pl.ANY))],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((splits, n, K, rows, wide_v), jnp.float32),
            jax.ShapeDtypeStruct((splits, n, K, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=sizes.warps, num_stages=sizes.stages
        ),
        interpret=params.interpret,
        name="paged_attention",
    )(inputs)
    o, lse = o[..., :M, :Hv], lse[..., :M]
    if splits == 1:
        return o[0], lse[0]
    top = lse.max(axis=0)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(axis=0)
    o = jnp.einsum("snkmh,snkm->nkmh", o, weights)
    o /= jnp.where(total > 0, total, 1.0)[..., None]
    return o, top + jnp.log(total)


def _attend_block(
    refs: dict[str, Any], o_ref: Any, lse_ref: Any, *, s: _Statics
) -> None:
    """One block of queries, one kv head, one share of the keys."""
    item, head, split = (pl.program_id(axis) for axis in range(3))
    params = s.params
    row, position, limit, first_page, end_page = QueryBlock.read(
        refs["blocks"], item, _COLUMNS
    )
    first = first_page * params.page_size
    tiles = pl.cdiv(jnp.minimum(end_page * params.page_size, limit) - first, s.keys)
    share = pl.cdiv(tiles, s.splits)
    begin = jnp.minimum(split * share, tiles)
    end = jnp.minimum(begin + share, tiles)
    q = tuple(
        refs["q"][item, head, :, pl.ds(at, width)] for at, width in split_head_dim(s.H)
    )  # fmt: skip
    member = jnp.arange(s.rows, dtype=jnp.int32)
    own_position = position + (member & (s.queries - 1))
    slopes = refs["slopes"][head, :] * LOG2E if "slopes" in refs else None

    def attend_tile(j, carry):
        o, top, total = carry
        key = first + j * s.keys + jnp.arange(s.keys, dtype=jnp.int32)
        inside = key < limit
        at = jnp.where(inside, row * s.table_width + lax.div(key, params.page_size), 0)
        page = plgpu.load(refs["tables"].at[at], mask=inside, other=0)
        slab = page * s.heads + head
        place = lax.rem(key, params.page_size)
        k = _load_keys(refs, slab, place, inside, q[0].dtype, s)
        scores = multiply_transposed(q, k) * (params.scale * LOG2E)
        if params.soft_cap is not None:
            cap = params.soft_cap * LOG2E
            scores = cap * (1 - 2 / (jnp.exp2(scores * (2 * LOG2E / cap)) + 1))
        distance = own_position[:, None] - key[None]
        if slopes is not None:
            scores -= slopes[:, None] * distance.astype(jnp.float32)
        seen = inside[None] & (distance >= 0)
        if params.window is not None:
            seen &= distance < params.window
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights, decay = jnp.exp2(scores - base[:, None]), jnp.exp2(top - base)
        total = total * decay + jnp.sum(weights, axis=1)
        values = _multiply_values(refs, weights, slab, place, inside, k, q[0].dtype, s)
        o = tuple(x * decay[:, None] + y for x, y in zip(o, values, strict=True))
        return o, new_top, total

    zeros = tuple(
        jnp.zeros((s.rows, width), jnp.float32) for _, width in split_head_dim(s.Hv)
    )
    top = jnp.full((s.rows,), -jnp.inf)
    total = jnp.zeros((s.rows,), jnp.float32)
    if "sinks" in refs:
        sinks = refs["sinks"][head, :] * LOG2E
        mine = (split == 0) & (sinks > -jnp.inf)
        top, total = jnp.where(mine, sinks, top), jnp.where(mine, 1.0, total)
    o, top, total = lax.fori_loop(begin, end, attend_tile, (zeros, top, total))
    some = total > 0
    inverse = 1 / jnp.where(some, total, 1.0)
    for (at, width), x in zip(split_head_dim(s.Hv), o, strict=True):
        o_ref[split, item, head, :, pl.ds(at, width)] = x * inverse[:, None]
    lse = jnp.where(some, top * LN2 + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    lse_ref[split, item, head, :] = lse


def _load_codes(
    ref: Any, slab, place, inside, feature, s: _Statics, H: int
) -> jax.Array:
    """Reads tokens' codes or numbers, [keys, width], of features that lie in
    ``feature``."""
    page = s.params.page_size
    packed = ref.dtype == jnp.uint8
    half = page // 2
    row = slab * (half if packed else page) + (
        lax.rem(place, half) if packed else place
    )
    mask = inside[:, None] & (feature < H)[None]
    row = jnp.where(inside, row, 0)
    x = plgpu.load(
        ref.at[row[:, None], jnp.where(feature < H, feature, 0)[None]],
        mask=mask,
        other=0,
    )
    if not packed:
        return x
    x = x.astype(jnp.int32)
    return jnp.where((place >= half)[:, None], x >> 4, x & 15)


def _load_keys(refs, slab, place, inside, dtype, s: _Statics) -> tuple[jax.Array, ...]:
    """Reads a tile of keys, [keys, width] of each part of a head."""
    parts = []
    for begin, width in split_head_dim(s.H):
        feature = begin + jnp.arange(width, dtype=jnp.int32)
        x = _load_codes(refs["k_codes"], slab, place, inside, feature, s, s.H)
        if "k_scale" in refs:
            mask = inside[:, None] & (feature < s.H)[None]
            at = (
                jnp.where(inside, slab, 0)[:, None],
                jnp.where(feature < s.H, feature, 0)[None],
            )
            x = x.astype(jnp.float32)
            for name in ("k_scale", "k_zero"):
                if name in refs:
                    own = plgpu.load(refs[name].at[at], mask=mask, other=0.0).astype(
                        jnp.float32
                    )
                    x = x * own if name == "k_scale" else x + own
            x = x.astype(dtype)
        parts.append(x)
    return tuple(parts)


def _multiply_values(
    refs, weights, slab, place, inside, k, dtype, s: _Statics
) -> tuple[jax.Array, ...]:
    """Multiplies weights [rows, keys] by a tile of values, in parts of a head."""
    if "v_codes" not in refs:
        # The parts of keys and values end at the same places, but for the last.
        parts = split_head_dim(s.Hv)
        values = k[: len(parts)]
        if parts != split_head_dim(s.H)[: len(parts)]:
            values = _load_keys(refs, slab, place, inside, dtype, s._replace(H=s.Hv))
        return tuple(multiply(weights.astype(dtype), x) for x in values)
    shift = None
    if "v_scale" in refs:
        token = jnp.where(inside, slab * s.params.page_size + place, 0)

        def load(name):
            x = plgpu.load(refs[name].at[token], mask=inside, other=0.0)
            return x.astype(jnp.float32)[None]

        if "v_zero" in refs:
            shift = jnp.sum(weights * load("v_zero"), axis=1)[:, None]
        weights = weights * load("v_scale")
    found = []
    for begin, width in split_head_dim(s.Hv):
        feature = begin + jnp.arange(width, dtype=jnp.int32)
        x = _load_codes(refs["v_codes"], slab, place, inside, feature, s, s.Hv)
        y = multiply(weights.astype(dtype), x.astype(dtype))
        found.append(y if shift is None else y + shift)
    return tuple(found)
