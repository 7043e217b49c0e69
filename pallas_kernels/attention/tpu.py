"""Attention on a TPU: operands laid out for the kernels, and results laid back."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_backward, tpu_forward
from pallas_kernels.attention.how import How, Where
from pallas_kernels.attention.tpu_blocks import Blocks, backward_blocks, forward_blocks
from pallas_kernels.attention.tpu_scores import LANES, Setting
from pallas_kernels.attention.walk import Walk, plan, table

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
    block_sizes: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """o [B, S, N, Hv] in ``dtype`` and the log-sum-exps, fp32 [B, S, N], −inf without a key."""
    (B, S, N, H), (T, K, Hv) = q.shape, v.shape[1:]
    blocks = block_sizes or forward_blocks(q, k, v)
    walk = plan(S, T, how, where, blocks[:2], blocks[2:], joined=True)
    call = _Call.of(q, k, v, where, how, walk)
    padded_q, padded_k = walk.nq * walk.bq, walk.nk * walk.bk
    tq, width = blocks.tile_q, walk.bk
    o, lse = pl.pallas_call(
        call.kernel(tpu_forward.kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=call.grid,
            in_specs=[
                call.queries(H),
                call.keys(H),
                call.keys(Hv),
                call.query_row(shared=True) if call.packed else None,
                call.key_row() if call.packed else None,
            ],
            out_specs=[call.queries(Hv), call.query_row()],
            scratch_shapes=[
                pltpu.VMEM((walk.bq, LANES), F32),
                pltpu.VMEM((walk.bq, LANES), F32),
                pltpu.VMEM((walk.bq, Hv), F32),
                pltpu.VMEM((1 + tpu_forward.AHEAD, tq, width), F32),
                pltpu.VMEM((1 + tpu_forward.AHEAD, tq, LANES), F32),
                pltpu.VMEM((1 + tpu_forward.AHEAD, tq, width), v.dtype),
                pltpu.VMEM((walk.bq, LANES), jnp.int32) if call.packed else None,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B * N, padded_q, Hv), dtype),
            jax.ShapeDtypeStruct((B * N, 1, padded_q), F32),
        ],
        compiler_params=call.compiler_params(),
        interpret=interpret,
        name="attention_forward",
    )(
        *call.scalars,
        _heads_first(q, padded_q),
        _heads_first(k, padded_k),
        _heads_first(v, padded_k),
        *call.segments,
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
    block_sizes: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ, dK and dV in ``dtype``."""
    (B, S, N, H), (T, K, Hv) = q.shape, v.shape[1:]
    blocks = block_sizes or backward_blocks(q, k, v)
    walk = plan(S, T, how, where, blocks[:2], blocks[2:], joined=False)
    call = _Call.of(q, k, v, where, how, walk)
    padded_q, padded_k = walk.nq * walk.bq, walk.nk * walk.bk
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    d_q, d_k, d_v = pl.pallas_call(
        call.kernel(tpu_backward.kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=call.grid,
            in_specs=[
                call.queries(H),
                call.keys(H),
                call.keys(Hv),
                call.queries(Hv),
                call.query_row(),
                call.query_row(),
                call.query_row(shared=True) if call.packed else None,
                call.key_row() if call.packed else None,
                None,
            ],
            out_specs=[call.queries(H), call.keys(H), call.keys(Hv)],
            scratch_shapes=[
                pltpu.VMEM((H, walk.bq), F32),
                pltpu.VMEM((padded_k, H), F32),
                pltpu.VMEM((padded_k, Hv), F32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B * N, padded_q, H), dtype),
            jax.ShapeDtypeStruct((B * K, padded_k, H), dtype),
            jax.ShapeDtypeStruct((B * K, padded_k, Hv), dtype),
        ],
        compiler_params=call.compiler_params(),
        interpret=interpret,
        name="attention_backward",
    )(
        *call.scalars,
        _heads_first(q, padded_q),
        _heads_first(k, padded_k),
        _heads_first(v, padded_k),
        _heads_first(d_o, padded_q),
        _rows_first(lse, padded_q, jnp.inf),
        _rows_first(delta, padded_q, 0.0),
        *call.segments,
        None,
    )
    return _heads_last(d_q, B, S), _heads_last(d_k, B, T), _heads_last(d_v, B, T)


class _Call(NamedTuple):
    """What both kernels' calls have in common."""

    walk: Walk
    setting: Setting
    grid: tuple[int, int, int]
    scalars: tuple[jax.Array, jax.Array, jax.Array]
    segments: tuple[jax.Array | None, jax.Array | None]
    """int32 [B, 1, queries], [B, 1, keys]; −1 for queries that see nothing."""

    @classmethod
    def of(cls, q, k, v, where: Where, how: How, walk: Walk) -> "_Call":
        (B, S, N, _), (T, K) = q.shape, k.shape[1:3]
        shift = None
        if where.q_offset is None and where.k_offset is None:
            shift = how.q_offset - how.k_offset
        rows = table(walk, S, T, how, where)
        ints = jnp.zeros(1 + B, jnp.int32)
        k_offset = how.k_offset if where.k_offset is None else where.k_offset
        if shift is None:
            q_offset = how.q_offset if where.q_offset is None else where.q_offset
            ints = ints.at[0].set(q_offset - k_offset)
        if where.prefix is not None:
            ints = ints.at[1:].set(where.prefix - k_offset)
        floats = jnp.stack(
            [jnp.zeros(N, F32) if x is None else x.astype(F32) for x in (where.slopes, where.sinks)]
        )
        setting = Setting(
            how=how,
            kv_heads=K,
            group=N // K,
            shift=shift,
            keys=T if T % walk.bk and not walk.edges else None,
            tables=len(rows),
            prefix=where.prefix is not None,
            slopes=where.slopes is not None,
            sinks=where.sinks is not None,
        )
        segments = None, None
        if where.q_segments is not None and where.k_segments is not None:
            own = jnp.where(where.q_segments == 0, -1, where.q_segments)
            segments = (
                _padded(own[:, None], walk.nq * walk.bq, -1),
                _padded(where.k_segments[:, None], walk.nk * walk.bk, 0),
            )
        return cls(walk, setting, (B * K, N // K, walk.nq), (rows, ints, floats), segments)

    @property
    def packed(self) -> bool:
        return self.segments[0] is not None

    def kernel(self, body):
        return partial(body, walk=self.walk, setting=self.setting)

    def queries(self, width: int) -> pl.BlockSpec:
        group = self.setting.group
        return pl.BlockSpec(
            (None, self.walk.bq, width), lambda kv, g, i, *_: (kv * group + g, i, 0)
        )

    def keys(self, width: int) -> pl.BlockSpec:
        size = self.walk.nk * self.walk.bk
        return pl.BlockSpec((None, size, width), lambda kv, g, i, *_: (kv, 0, 0))

    def query_row(self, shared: bool = False) -> pl.BlockSpec:
        """A number a query; ``shared``: the same for all heads."""
        group, heads = self.setting.group, self.setting.kv_heads

        def index(kv, g, i, *_):
            return lax.div(kv, heads) if shared else kv * group + g, 0, i

        return pl.BlockSpec((None, 1, self.walk.bq), index)

    def key_row(self) -> pl.BlockSpec:
        heads, size = self.setting.kv_heads, self.walk.nk * self.walk.bk
        return pl.BlockSpec((None, 1, size), lambda kv, g, i, *_: (lax.div(kv, heads), 0, 0))

    def compiler_params(self):
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=60 << 20,
        )


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
