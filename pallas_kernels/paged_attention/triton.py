"""Paged attention for any NVIDIA card: a Pallas kernel that Triton compiles.

A program is a block of queries of one row, a kv head with its group of query heads, and
a share of the row's keys: few rows are split over many programs (Dao et al. 2023,
Flash-Decoding), whose parts are joined by their log-sum-exps.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.attention.gpu_blocks import LN2, LOG2E
from pallas_kernels.attention.triton_program import (
    multiply,
    multiply_transposed,
    pad_head_size,
    split_head_dim,
)
from pallas_kernels.kernel_types import Ref
from pallas_kernels.paged_attention.params import PagedOperands, PagedParams
from pallas_kernels.paged_attention.query_blocks import (
    QueryBlock,
    QueryBlocks,
    attend_in_blocks,
    is_chunk_long_enough,
    is_in_chunk,
)

# Programs that keep a large card busy.
_PROGRAMS = 256
# Rows of a tile of queries: of chunks, and at least, as Triton's products want.
_ROWS = 64
_MIN_ROWS = 16
# Keys of a tile.
_KEYS = 64
# Features of the widest head: DeepSeek's latent keys have 576.
_MAX_HEAD = 640
# Integers of a block in the table of blocks.
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
    """The values that a program is compiled for."""

    params: PagedParams
    queries: int
    """Queries of a block, a power of two."""
    keys: int
    """Keys of a tile."""
    num_kv_heads: int
    splits: int
    table_width: int
    """Pages of a row in the table."""
    H: int
    Hv: int
    rows: int
    """Rows of a tile of queries, a power of two."""


class _KeyTile(NamedTuple):
    """Where a tile's keys lie, int32 [keys] each."""

    slab: jax.Array
    """Which kv head of which page, counted as they lie: page · K + head."""
    place: jax.Array
    """Which token of its page."""
    inside: jax.Array
    """bool: whether there is such a key."""


def supports(operands: PagedOperands, params: PagedParams) -> bool:
    """Returns whether operands are bf16, fp16 or fp32, pages alike or quantized, and a
    tile of 16 queries, heads and all, is not too large for registers."""
    q = operands.q
    for pages in (operands.keys, operands.values):
        if isinstance(pages, jax.Array) and pages.dtype != q.dtype:
            return False
    group = q.shape[1] // operands.num_kv_heads
    padded_queries = pl.next_power_of_2(params.queries_each)
    rows = pl.next_power_of_2(group * padded_queries)
    override = cast(TritonPagedBlocks | None, params.block_sizes)
    most_queries = override.queries if override else _ROWS
    return (
        q.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        and max(q.shape[2], params.value_dim) <= _MAX_HEAD
        and rows <= 4 * _ROWS
        and operands.biases is None
        and is_chunk_long_enough(params, most_queries)
        and min(q.size, operands.page_tables.size) > 0
    )


def choose_blocks(operands: PagedOperands, params: PagedParams) -> TritonPagedBlocks:
    """Chooses tiles by rule: those of wide heads and of fp32 are smaller, for
    registers' sake."""
    N = operands.q.shape[1]
    K = operands.num_kv_heads
    head_dim = max(operands.q.shape[2], params.value_dim)
    head_bytes = head_dim * operands.q.dtype.itemsize
    if head_bytes <= 256:
        rows = _ROWS
        keys = _KEYS
        warps = 4
    elif head_bytes <= 512:
        rows = _MIN_ROWS
        keys = 32
        warps = 4
    else:
        rows = _MIN_ROWS
        keys = 16
        warps = 8
    # Enough programs for the card, each with four tiles of keys or more.
    longest = operands.page_tables.shape[1] * params.page_size
    programs = max(1, params.num_uniform * K)
    wanted_splits = max(1, _PROGRAMS // programs)
    most_splits = max(1, longest // (4 * keys))
    splits = min(wanted_splits, most_splits)
    # A tile's rows are its queries, once for each query head of the group.
    padded_group = pl.next_power_of_2(N // K)
    queries = max(1, rows // padded_group)
    return TritonPagedBlocks(queries, keys, splits, warps)


def forward(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.paged_attention.paged_attention`."""
    override = cast(TritonPagedBlocks | None, params.block_sizes)
    sizes = override or choose_blocks(operands, params)

    def attend(blocks: QueryBlocks, uniform: bool) -> tuple[jax.Array, jax.Array]:
        # Other rows have many blocks of queries each: programs enough.
        splits = sizes.splits if uniform else 1
        return _run(blocks, operands, params, sizes, splits)

    return attend_in_blocks(operands, params, sizes.queries, 1, attend)


def _run(
    blocks: QueryBlocks,
    operands: PagedOperands,
    params: PagedParams,
    sizes: TritonPagedBlocks,
    splits: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns o fp32 [n, K, M, Hv] and lse [n, K, M] of blocks of queries."""
    n, K, M, H = blocks.q.shape
    Hv = params.value_dim
    rows = max(_MIN_ROWS, pl.next_power_of_2(M))
    padded_H = pad_head_size(H)
    padded_Hv = pad_head_size(Hv)
    q = jnp.pad(blocks.q, ((0, 0), (0, 0), (0, rows - M), (0, padded_H - H)))
    block_table = jnp.stack(blocks.places, axis=1)  # [n, _COLUMNS]
    inputs: dict[str, jax.Array] = {
        "blocks": block_table.reshape(-1),
        "tables": operands.page_tables.reshape(-1),
        "q": q,
    }
    # A row a token: codes [P · K · page, H], and a number a token of values' scales; a
    # row a page of keys' scales, [P · K, H].
    for name, array in operands.page_arrays.items():
        if name in ("v_scale", "v_zero"):
            inputs[name] = array.reshape(-1)
        else:
            inputs[name] = array.reshape(-1, array.shape[-1])
    for name, terms in blocks.repeat_by_row(operands).items():
        inputs[name] = jnp.pad(terms, ((0, 0), (0, rows - M)))
    statics = _Statics(
        params,
        queries=blocks.queries,
        keys=sizes.keys,
        num_kv_heads=K,
        splits=splits,
        table_width=operands.page_tables.shape[1],
        H=H,
        Hv=Hv,
        rows=rows,
    )
    # Programs read and write whole arrays: which pages are read the tables say.
    whole = pl.BlockSpec(memory_space=pl.ANY)
    o, lse = pl.pallas_call(
        partial(_attend_block, statics=statics),
        grid=(n, K, splits),
        in_specs=[dict.fromkeys(inputs, whole)],
        out_specs=[whole, whole],
        out_shape=[
            jax.ShapeDtypeStruct((splits, n, K, rows, padded_Hv), jnp.float32),
            jax.ShapeDtypeStruct((splits, n, K, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=sizes.warps, num_stages=sizes.stages
        ),
        interpret=params.interpret,
        name="paged_attention",
    )(inputs)
    o = o[..., :M, :Hv]
    lse = lse[..., :M]
    if splits == 1:
        return o[0], lse[0]

    # Join the shares of the keys, each weighted by its own sum of weights (Milakov &
    # Gimelshein 2018).
    top = lse.max(axis=0)
    # No share has a key: −inf − −inf is NaN.
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - base)  # [splits, n, K, M]
    total = weights.sum(axis=0)
    o = jnp.einsum("snkmh,snkm->nkmh", o, weights)
    o /= jnp.where(total > 0, total, 1.0)[..., None]
    return o, top + jnp.log(total)


def _attend_block(
    refs: dict[str, Ref], o_ref: Ref, lse_ref: Ref, *, statics: _Statics
) -> None:
    """One block of queries, one kv head, one share of the keys. Scores are powers of
    two: the hardware has no other exponential.

    Args:
        refs: by name, in global memory: "blocks" and "tables", flat; "q" [n, K, rows,
            H]; arrays of pages, a row a token or a page (:func:`_run`); "slopes" and
            "sinks" [K, rows], where there are such.
        o_ref, lse_ref: fp32 [splits, n, K, rows, Hv] and [splits, n, K, rows].
    """
    item = pl.program_id(0)
    head = pl.program_id(1)
    split = pl.program_id(2)
    s = statics
    params = s.params

    # The keys that the block sees, in tiles, and this program's share of these.
    row, position, limit, first_page, end_page = QueryBlock.read(
        refs["blocks"], item, _COLUMNS
    )
    first = first_page * params.page_size
    last_key = jnp.minimum(end_page * params.page_size, limit)
    tiles = pl.cdiv(last_key - first, s.keys)
    share = pl.cdiv(tiles, s.splits)
    begin = jnp.minimum(split * share, tiles)
    end = jnp.minimum(begin + share, tiles)

    # The block's queries, [rows, width] of each part of a head.
    head_parts = split_head_dim(s.H)
    q = tuple(
        refs["q"][item, head, :, pl.ds(start, width)] for start, width in head_parts
    )
    # Rows are (query head of the group, query), and queries a power of two.
    member = jnp.arange(s.rows, dtype=jnp.int32)
    row_offset = member & (s.queries - 1)
    row_position = position + row_offset
    slopes = refs["slopes"][head, :] * LOG2E if "slopes" in refs else None

    def attend_tile(j, carry):
        o, top, total = carry

        # Where the tile's keys lie: each one's page by the row's table.
        key = first + j * s.keys + jnp.arange(s.keys, dtype=jnp.int32)
        inside = key < limit
        entry = row * s.table_width + lax.div(key, params.page_size)
        entry = jnp.where(inside, entry, 0)
        page = plgpu.load(refs["tables"].at[entry], mask=inside, other=0)
        slab = page * s.num_kv_heads + head
        tile = _KeyTile(slab, lax.rem(key, params.page_size), inside)
        k = _load_keys(refs, tile, q[0].dtype, s)

        # Scores [rows, keys], in units of log2.
        scores = multiply_transposed(q, k) * (params.scale * LOG2E)
        if params.soft_cap is not None:
            # cap · tanh(score / cap), by tanh(x) = 1 − 2 / (e^2x + 1).
            cap = params.soft_cap * LOG2E
            exp_2x = jnp.exp2(scores * (2 * LOG2E / cap))
            tanh = 1 - 2 / (exp_2x + 1)
            scores = cap * tanh
        distance = row_position[:, None] - key[None]
        if slopes is not None:
            scores -= slopes[:, None] * distance.astype(jnp.float32)
        seen = inside[None] & (distance >= 0)
        if params.window is not None:
            seen &= distance < params.window
        if params.chunk is not None:
            seen &= is_in_chunk(distance, position, row_offset[:, None], params.chunk)
        scores = jnp.where(seen, scores, -jnp.inf)

        # Weights by the largest score so far; earlier sums were by an earlier one, and
        # decay.
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # No key yet: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp2(scores - base[:, None])
        decay = jnp.exp2(top - base)
        total = total * decay + jnp.sum(weights, axis=1)
        tile_o = _multiply_values(refs, weights, tile, k, q[0].dtype, s)
        o = tuple(x * decay[:, None] + y for x, y in zip(o, tile_o, strict=True))
        return o, new_top, total

    value_parts = split_head_dim(s.Hv)
    zeros = tuple(jnp.zeros((s.rows, width), jnp.float32) for _, width in value_parts)
    top = jnp.full((s.rows,), -jnp.inf)
    total = jnp.zeros((s.rows,), jnp.float32)
    if "sinks" in refs:
        # The first share of the keys has the sink.
        sinks = refs["sinks"][head, :] * LOG2E
        has_sink = (split == 0) & (sinks > -jnp.inf)
        top = jnp.where(has_sink, sinks, top)
        total = jnp.where(has_sink, 1.0, total)
    o, top, total = lax.fori_loop(begin, end, attend_tile, (zeros, top, total))

    # This share's results: zeros and −inf where it has no key.
    has_weight = total > 0
    inverse = 1 / jnp.where(has_weight, total, 1.0)
    for (start, width), part in zip(value_parts, o, strict=True):
        o_ref[split, item, head, :, pl.ds(start, width)] = part * inverse[:, None]
    lse = top * LN2 + jnp.log(jnp.where(has_weight, total, 1.0))
    lse_ref[split, item, head, :] = jnp.where(has_weight, lse, -jnp.inf)


def _load_codes(
    ref: Ref, tile: _KeyTile, feature: jax.Array, s: _Statics, H: int
) -> jax.Array:
    """Reads tokens' codes or numbers, [keys, width]: the features ``feature`` int32
    [width] of heads of H."""
    page = s.params.page_size
    half = page // 2
    is_packed = ref.dtype == jnp.uint8
    # Rows of the array: of int4 a byte has two tokens, half a page apart.
    rows_per_page = half if is_packed else page
    row = tile.slab * rows_per_page
    row_in_page = lax.rem(tile.place, half) if is_packed else tile.place
    row = row + row_in_page
    # What a mask leaves out is addressed in range all the same.
    mask = tile.inside[:, None] & (feature < H)[None]
    row = jnp.where(tile.inside, row, 0)[:, None]
    column = jnp.where(feature < H, feature, 0)[None]
    x = plgpu.load(ref.at[row, column], mask=mask, other=0)
    if not is_packed:
        return x
    x = x.astype(jnp.int32)
    # The page's second half is in the bytes' high bits.
    in_high_half = (tile.place >= half)[:, None]
    return jnp.where(in_high_half, x >> 4, x & 15)


def _load_keys(
    refs: dict[str, Ref], tile: _KeyTile, dtype: DTypeLike, s: _Statics
) -> tuple[jax.Array, ...]:
    """Reads a tile of keys, [keys, width] of each part of a head."""
    parts = []
    for begin, width in split_head_dim(s.H):
        feature = begin + jnp.arange(width, dtype=jnp.int32)
        x = _load_codes(refs["k_codes"], tile, feature, s, s.H)
        if "k_scale" in refs:
            # x = codes · scale + zero, of a channel over the key's page.
            mask = tile.inside[:, None] & (feature < s.H)[None]
            row = jnp.where(tile.inside, tile.slab, 0)[:, None]
            column = jnp.where(feature < s.H, feature, 0)[None]
            x = x.astype(jnp.float32)
            scale = plgpu.load(refs["k_scale"].at[row, column], mask=mask, other=0.0)
            x = x * scale.astype(jnp.float32)
            if "k_zero" in refs:
                zero = plgpu.load(refs["k_zero"].at[row, column], mask=mask, other=0.0)
                x = x + zero.astype(jnp.float32)
            x = x.astype(dtype)
        parts.append(x)
    return tuple(parts)


def _multiply_values(
    refs: dict[str, Ref],
    weights: jax.Array,
    tile: _KeyTile,
    k: tuple[jax.Array, ...],
    dtype: DTypeLike,
    s: _Statics,
) -> tuple[jax.Array, ...]:
    """Multiplies weights [rows, keys] by a tile of values, in parts of a head."""
    if "v_codes" not in refs:
        # Values are the first features of the keys. The parts of both end at the same
        # places, but for the last.
        parts = split_head_dim(s.Hv)
        values = k[: len(parts)]
        if parts != split_head_dim(s.H)[: len(parts)]:
            values = _load_keys(refs, tile, dtype, s._replace(H=s.Hv))
        return tuple(multiply(weights.astype(dtype), value) for value in values)
    zeros = None
    if "v_scale" in refs:
        # A token's scale and zero go into its weight: values are multiplied as codes.
        token = tile.slab * s.params.page_size + tile.place
        token = jnp.where(tile.inside, token, 0)

        def load(name: str) -> jax.Array:
            x = plgpu.load(refs[name].at[token], mask=tile.inside, other=0.0)
            return x.astype(jnp.float32)[None]

        if "v_zero" in refs:
            weighted_zeros = weights * load("v_zero")
            zeros = jnp.sum(weighted_zeros, axis=1)[:, None]
        weights = weights * load("v_scale")
    products = []
    for begin, width in split_head_dim(s.Hv):
        feature = begin + jnp.arange(width, dtype=jnp.int32)
        codes = _load_codes(refs["v_codes"], tile, feature, s, s.Hv)
        product = multiply(weights.astype(dtype), codes.astype(dtype))
        if zeros is not None:
            product = product + zeros
        products.append(product)
    return tuple(products)
