"""Attention on a TPU: operands laid out for the kernels, and results laid back."""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_backward, tpu_forward
from pallas_kernels.attention.combine import merge
from pallas_kernels.attention.how import How, Where, first_position
from pallas_kernels.attention.tpu_blocks import (
    LANES,
    Blocks,
    BlockSizes,
    Sizes,
    backward_bytes,
    checked,
    forward_bytes,
    keys_at_once,
)
from pallas_kernels.attention.tpu_scores import Setting
from pallas_kernels.attention.tuned import BACKWARD, FORWARD, choose, mask_kind
from pallas_kernels.attention.walk import Walk, plan, table
from pallas_kernels.chips import current_chip

F32 = jnp.float32


def supports(q: jax.Array, k: jax.Array, v: jax.Array, where: Where, how: How) -> bool:
    """Everything but queries or keys at arbitrary positions."""
    return where.q_positions is None and where.k_positions is None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Where,
    how: How,
    dtype: Any,
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """o [B, S, N, Hv] in ``dtype`` and the log-sum-exps, fp32 [B, S, N], −inf without a key.

    Keys that VMEM does not hold at once are taken in parts, whose results are merged.

    Raises:
        ValueError: blocks that do not fit.
    """
    sizes = Sizes.of(q, v, dtype)
    kind = mask_kind(how, where)
    blocks = checked(block_sizes, FORWARD) if block_sizes else choose(FORWARD, sizes, kind)
    size = keys_at_once(blocks, sizes, forward_bytes, current_chip())
    parts = _parts(k, v, where, how, size)
    part_dtype = dtype if len(parts) == 1 else F32
    o, lse = reduce(merge, [_forward(q, part, part_dtype, blocks, interpret) for part in parts])
    return o.astype(dtype), lse


def _forward(q, part, dtype, blocks, interpret):
    k, v, where, how = part
    (B, S, N, H), (T, Hv) = q.shape, (v.shape[1], v.shape[3])
    walk = plan(S, T, how, where, blocks[:2], (blocks.tile_q, blocks.tile_k), joined=True)
    call = _Call.of(q, k, where, how, walk, blocks)
    slots = 1 + blocks.ahead
    o, lse = call.run(
        tpu_forward.kernel,
        operands=[
            (call.queries(H), _heads_first(q, call.padded_q)),
            (call.keys(H), _heads_first(k, call.padded_k)),
            (call.keys(Hv), _heads_first(v, call.padded_k)),
            *call.segments,
        ],
        results=[
            (call.queries(Hv), (B * N, call.padded_q, Hv), dtype),
            (call.query_row(), (B * N, 1, call.padded_q), F32),
        ],
        scratch=[
            pltpu.VMEM((walk.bq, LANES), F32),
            pltpu.VMEM((walk.bq, LANES), F32),
            pltpu.VMEM((walk.bq, Hv), F32),
            *_tiles(slots, (blocks.tile_q, walk.bk), F32),
            *_tiles(slots, (blocks.tile_q, LANES), F32, F32),
            *(_tiles(slots, (blocks.tile_q, walk.bk), v.dtype) if blocks.staged else [None]),
            pltpu.VMEM((walk.bq, LANES), jnp.int32) if where.q_segments is not None else None,
        ],
        vmem=forward_bytes(blocks, Sizes.of(q, v, dtype), call.padded_k),
        products=H + Hv,
        interpret=interpret,
        name="attention_forward",
    )
    return _heads_last(o, B, S), _rows_last(lse, B, S)


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
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ, dK and dV in ``dtype``.

    Keys that VMEM does not hold at once are taken in parts: each adds to dQ, in place.

    Raises:
        ValueError: blocks that do not fit.
    """
    B, S = q.shape[:2]
    sizes = Sizes.of(q, v, dtype)
    kind = mask_kind(how, where)
    blocks = checked(block_sizes, BACKWARD) if block_sizes else choose(BACKWARD, sizes, kind)
    size = keys_at_once(blocks, sizes, backward_bytes, current_chip())
    parts = _parts(k, v, where, how, size)
    rows = -(-S // blocks.q) * blocks.q
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    saved = (
        _heads_first(q, rows),
        _heads_first(d_o, rows),
        _rows_first(lse, rows, jnp.inf),
        _rows_first(delta, rows, 0.0),
    )
    d_q: Any = None
    d_k, d_v = [], []
    for n, part in enumerate(parts):
        out = dtype if n == len(parts) - 1 else F32
        d_q, own_k, own_v = _backward(q, part, saved, d_q, (out, dtype), blocks, interpret)
        d_k.append(own_k)
        d_v.append(own_v)
    d_k, d_v = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in (d_k, d_v))
    return _heads_last(d_q, B, S), d_k, d_v


def _backward(q, part, saved, d_q, dtypes, blocks, interpret):
    """dQ as the kernel writes it, dK and dV [B, T, K, ·].

    Args:
        saved: q, d_o, log-sum-exps and deltas as the kernel reads them.
        d_q: what other keys gave, or None.
        dtypes: of dQ, and of dK and dV.
    """
    k, v, where, how = part
    (B, S, N, H), (T, K, Hv) = q.shape, v.shape[1:]
    walk = plan(S, T, how, where, blocks[:2], (blocks.tile_q, blocks.tile_k), joined=False)
    call = _Call.of(q, k, where, how, walk, blocks)
    own_q, own_d_o, lse, delta = saved
    slots, tile = 1 + blocks.ahead + blocks.behind, (blocks.tile_k, blocks.tile_q)
    d_q, d_k, d_v = call.run(
        tpu_backward.kernel,
        operands=[
            (call.queries(H), own_q),
            (call.keys(H), _heads_first(k, call.padded_k)),
            (call.keys(Hv), _heads_first(v, call.padded_k)),
            (call.queries(Hv), own_d_o),
            (call.query_row(), lse),
            (call.query_row(), delta),
            *call.segments,
            (call.queries(H), d_q),
        ],
        results=[
            (call.queries(H), (B * N, call.padded_q, H), dtypes[0]),
            (call.keys(H), (B * K, call.padded_k, H), dtypes[1]),
            (call.keys(Hv), (B * K, call.padded_k, Hv), dtypes[1]),
        ],
        scratch=[
            pltpu.VMEM((H, walk.bq), F32),
            pltpu.VMEM((call.padded_k, H), F32),
            pltpu.VMEM((call.padded_k, Hv), F32),
            *_tiles(slots, tile, F32, F32),
            *(_tiles(slots, tile, F32) if how.soft_cap is not None else [None]),
            *_tiles(slots, tile, q.dtype, q.dtype),
        ],
        vmem=backward_bytes(blocks, Sizes.of(q, v, dtypes[1]), call.padded_k),
        products=3 * H + 2 * Hv,
        interpret=interpret,
        name="attention_backward",
    )
    return d_q, _heads_last(d_k, B, T), _heads_last(d_v, B, T)


def _tiles(slots: int, shape: tuple[int, int], *dtypes: Any) -> list[list[Any]]:
    """Scratch of so many tiles, for each dtype: every tile its own, so that the compiler sees that
    they are apart."""
    return [[pltpu.VMEM((1, *shape), dtype) for _ in range(slots)] for dtype in dtypes]


class _Part(NamedTuple):
    """A run of keys."""

    k: jax.Array
    v: jax.Array
    where: Where
    how: How


def _parts(k: jax.Array, v: jax.Array, where: Where, how: How, size: int) -> list[_Part]:
    """Runs of so many keys; sinks go with the first."""
    parts = []
    for start in range(0, k.shape[1], size):
        keys = slice(start, start + size)
        segments = None if where.k_segments is None else where.k_segments[:, keys]
        sinks = where.sinks if start == 0 else None
        own = where._replace(k_segments=segments, sinks=sinks)
        at = how._replace(k_offset=how.k_offset + start)
        parts.append(_Part(k[:, keys], v[:, keys], own, at))
    return parts


class _Call(NamedTuple):
    """What both kernels' calls have in common."""

    walk: Walk
    setting: Setting
    blocks: Blocks
    rows: int
    """Of the batch."""
    pairs: int
    """Queries and keys of a head that causality and window let meet, as far as that is static."""
    scalars: tuple[jax.Array, jax.Array, jax.Array]
    """The walk's table; int32 [3 + B], the shift where it is traced, two zeros and each row's
    prefix; fp32 [2, N], slopes and sinks."""
    segments: list[tuple[Any, Any]]
    """int32 [B, 1, queries] and [B, 1, keys], with their blocks; −1 for queries that see
    nothing."""

    @classmethod
    def of(cls, q, k, where: Where, how: How, walk: Walk, blocks: Blocks) -> "_Call":
        (B, S, N, _), (T, K) = q.shape, k.shape[1:3]
        q_first = first_position(how.q_offset, where.q_offset)
        k_first = first_position(how.k_offset, where.k_offset)
        shift = q_first - k_first
        static = isinstance(shift, int)
        rows = table(walk, S, T, how, where)
        ints = jnp.zeros(3 + B, jnp.int32)
        if not static:
            ints = ints.at[0].set(shift)
        if where.prefix is not None:
            ints = ints.at[3:].set(where.prefix - k_first)
        floats = jnp.stack(
            [jnp.zeros(N, F32) if x is None else x.astype(F32) for x in (where.slopes, where.sinks)]
        )
        setting = Setting(
            how=how,
            kv_heads=K,
            group=N // K,
            shift=shift if static else None,
            keys=T if T % walk.bk and not walk.edges else None,
            tables=len(rows),
            prefix=where.prefix is not None,
            slopes=where.slopes is not None,
            sinks=where.sinks is not None,
        )
        call = cls(
            walk,
            setting,
            blocks,
            B,
            _pairs(S, T, how, shift),
            (rows, ints, floats),
            [(None, None)] * 2,
        )
        if where.q_segments is None or where.k_segments is None:
            return call
        own = jnp.where(where.q_segments == 0, -1, where.q_segments)[:, None]
        keys = where.k_segments[:, None]
        segments = [
            (call.query_row(shared=True), _padded(own, call.padded_q, -1)),
            (call.key_row(), _padded(keys, call.padded_k, 0)),
        ]
        return call._replace(segments=segments)

    @property
    def padded_q(self) -> int:
        return self.walk.nq * self.walk.bq

    @property
    def padded_k(self) -> int:
        return self.walk.nk * self.walk.bk

    def queries(self, width: int) -> pl.BlockSpec:
        group = self.setting.group
        return pl.BlockSpec(
            (None, self.walk.bq, width), lambda kv, g, i, *_: (kv * group + g, i, 0)
        )

    def keys(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.padded_k, width), lambda kv, g, i, *_: (kv, 0, 0))

    def query_row(self, shared: bool = False) -> pl.BlockSpec:
        """A number a query; ``shared``: the same for all heads."""
        group, heads = self.setting.group, self.setting.kv_heads

        def index(kv, g, i, *_):
            return lax.div(kv, heads) if shared else kv * group + g, 0, i

        return pl.BlockSpec((None, 1, self.walk.bq), index)

    def key_row(self) -> pl.BlockSpec:
        heads = self.setting.kv_heads
        return pl.BlockSpec(
            (None, 1, self.padded_k), lambda kv, g, i, *_: (lax.div(kv, heads), 0, 0)
        )

    def cost(self, products: int, arrays, results) -> pl.CostEstimate:
        """Of queries with the keys that they see, segments aside.

        Args:
            products: multiplications a pair.
        """
        pairs = self.rows * self.setting.kv_heads * self.setting.group * self.pairs
        read = sum(x.nbytes for x in arrays if x is not None)
        written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in results)
        return pl.CostEstimate(
            flops=2 * products * pairs, bytes_accessed=read + written, transcendentals=pairs
        )

    def run(self, body, operands, results, scratch, vmem, products, interpret, name):
        """The kernel over (kv heads of all rows) × (query heads of one) × (blocks of queries).

        Args:
            operands: (block, array) or, for what the kernel is not given, (anything, None).
            results: (block, shape, dtype).
            vmem: bytes that the kernel is known to take.
            products: multiplications for a query and a key.
        """
        specs = [spec if x is not None else None for spec, x in operands]
        arrays = [x for _, x in operands]
        given = [*self.scalars, *arrays]
        # A sum that goes on is written where it was read.
        last, out = arrays[-1], results[0]
        aliases = {}
        if last is not None and (last.shape, last.dtype) == (out[1], jnp.dtype(out[2])):
            aliases = {sum(x is not None for x in given) - 1: 0}
        setting = self.setting._replace(interpreted=bool(interpret))
        limit = min(vmem + vmem // 4 + (4 << 20), current_chip().vmem)
        return pl.pallas_call(
            partial(body, walk=self.walk, setting=setting, blocks=self.blocks),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=(self.rows * setting.kv_heads, setting.group, self.walk.nq),
                in_specs=specs,
                out_specs=[spec for spec, *_ in results],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in results],
            input_output_aliases=aliases,
            cost_estimate=self.cost(products, arrays, results),
            compiler_params=pltpu.CompilerParams(
                # The cores of a chip share out the kv heads. What follows sums up over queries.
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=limit,
            ),
            interpret=interpret,
            name=name,
        )(*given)


def _pairs(S: int, T: int, how: How, shift: Any) -> int:
    if not how.causal or not isinstance(shift, int):
        return S * T
    # Query s sees keys first..last, whose bounds grow by one from query to query.
    last = np.minimum(np.arange(S) + shift, T - 1)
    first = 0 if how.window is None else np.maximum(np.arange(S) + shift - how.window + 1, 0)
    return int(np.maximum(last - first + 1, 0).sum())


def _padded(x: jax.Array, size: int, value: float = 0) -> jax.Array:
    """[..., n] or [n, rows, m] up to ``size`` along the last axis."""
    missing = size - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),), constant_values=value)


def _heads_first(x: jax.Array, size: int) -> jax.Array:
    """[B, S, N, H] → [B · N, size, H], zeros beyond S."""
    B, S, N, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, size - S), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(B * N, size, H)


def _heads_last(x: jax.Array, B: int, S: int) -> jax.Array:
    """[B · N, size, H] → [B, S, N, H]."""
    x = x.reshape(B, -1, *x.shape[1:])[:, :, :S]
    return x.transpose(0, 2, 1, 3)


def _rows_first(x: jax.Array, size: int, value: float) -> jax.Array:
    """[B, S, N] → [B · N, 1, size]."""
    x = _padded(x.transpose(0, 2, 1), size, value)
    return x.reshape(-1, 1, size)


def _rows_last(x: jax.Array, B: int, S: int) -> jax.Array:
    """[B · N, 1, size] → [B, S, N]."""
    return x.reshape(B, -1, x.shape[-1])[:, :, :S].transpose(0, 2, 1)
