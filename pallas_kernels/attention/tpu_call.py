"""The call of an attention kernel on a TPU, for both passes."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.params import AttentionOperands, AttentionParams, sum_offsets
from pallas_kernels.attention.tpu_blocks import TpuBlocks
from pallas_kernels.attention.tpu_scores import KernelStatics
from pallas_kernels.attention.walk import KeyWalk, make_walk_table, plan_walk
from pallas_kernels.chips import get_chip

F32 = jnp.float32


class KeyPart(NamedTuple):
    """A run of keys that VMEM holds."""

    index: int
    num_rows: int
    """Rows in VMEM: block ``index`` of so many."""
    num_keys: int
    """Keys among these rows; the rest is padding."""
    operands: AttentionOperands
    params: AttentionParams


class TpuKernelCall(NamedTuple):
    """One kernel over all queries and a part of the keys."""

    walk: KeyWalk
    statics: KernelStatics
    blocks: TpuBlocks
    part: KeyPart
    batch_size: int
    """Rows of the batch."""
    pairs_per_head: int
    """Pairs of a query and a key of a head that causality and window allow, as far as static."""
    scalars: tuple[jax.Array, jax.Array, jax.Array]
    """The walk's table; int32 [3 + B], the shift where it is traced, two zeros and each row's
    prefix; fp32 [2, N], slopes and sinks."""
    segments: list[tuple[Any, Any]]
    """int32 [B, 1, queries] and [B, 1, keys], with their blocks; −1 for queries that see
    nothing."""

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int, int],
        kv_heads: int,
        part: KeyPart,
        blocks: TpuBlocks,
        join_tiles: bool,
    ) -> "TpuKernelCall":
        """
        Args:
            shape: of the queries.
            join_tiles: see :func:`walk.plan_walk`.
        """
        (B, S, N, _), T, operands, params = shape, part.num_keys, part.operands, part.params
        tile = blocks.tile_q, blocks.tile_k
        walk = plan_walk(S, T, params, operands, blocks[:2], tile, join_tiles=join_tiles)
        q_first = sum_offsets(params.q_offset, operands.q_offset)
        k_first = sum_offsets(params.k_offset, operands.k_offset)
        shift = q_first - k_first
        static = isinstance(shift, int)
        rows = make_walk_table(walk, S, T, params, operands)
        ints = jnp.zeros(3 + B, jnp.int32)
        if not static:
            ints = ints.at[0].set(shift)
        if operands.prefix is not None:
            ints = ints.at[3:].set(operands.prefix - k_first)
        floats = jnp.stack(
            [
                jnp.zeros(N, F32) if x is None else x.astype(F32)
                for x in (operands.slopes, operands.sinks)
            ]
        )
        statics = KernelStatics(
            params=params,
            kv_heads=kv_heads,
            group=N // kv_heads,
            qk_offset=shift if static else None,
            num_keys=T if T % walk.bk and not walk.edges else None,
            num_tables=len(rows),
            has_prefix=operands.prefix is not None,
            has_slopes=operands.slopes is not None,
            has_sinks=operands.sinks is not None,
        )
        call = cls(
            walk,
            statics,
            blocks,
            part,
            B,
            _pairs(S, T, params, shift),
            (rows, ints, floats),
            [(None, None)] * 2,
        )
        if operands.q_segments is None or operands.k_segments is None:
            return call
        own = jnp.where(operands.q_segments == 0, -1, operands.q_segments)[:, None]
        keys = operands.k_segments[:, None]
        segments = [
            (call.query_row_spec(shared=True), pad_last_axis(own, call.padded_q_len, -1)),
            (call.key_row_spec(), pad_last_axis(keys, part.num_rows, 0)),
        ]
        return call._replace(segments=segments)

    @property
    def padded_q_len(self) -> int:
        return self.walk.nq * self.walk.bq

    def query_spec(self, width: int) -> pl.BlockSpec:
        group = self.statics.group
        return pl.BlockSpec(
            (None, self.walk.bq, width), lambda kv, g, i, *_: (kv * group + g, i, 0)
        )

    def key_spec(self, width: int) -> pl.BlockSpec:
        """Returns the spec of all parts' keys."""
        index = self.part.index
        return pl.BlockSpec((None, self.part.num_rows, width), lambda kv, g, i, *_: (kv, index, 0))

    def query_row_spec(self, shared: bool = False) -> pl.BlockSpec:
        """Returns the spec of one number a query; ``shared``: the same for all heads."""
        group, heads = self.statics.group, self.statics.kv_heads

        def index(kv, g, i, *_):
            return lax.div(kv, heads) if shared else kv * group + g, 0, i

        return pl.BlockSpec((None, 1, self.walk.bq), index)

    def key_row_spec(self) -> pl.BlockSpec:
        heads = self.statics.kv_heads
        return pl.BlockSpec(
            (None, 1, self.part.num_rows), lambda kv, g, i, *_: (lax.div(kv, heads), 0, 0)
        )

    def estimate_cost(self, products: int, arrays, results) -> pl.CostEstimate:
        """Estimates the cost of queries with the keys that they see, segments aside; bytes are of
        whole arrays, too many where keys go in parts.

        Args:
            products: multiplications a pair.
        """
        pairs = self.batch_size * self.statics.kv_heads * self.statics.group * self.pairs_per_head
        read = sum(x.nbytes for x in arrays if x is not None)
        written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in results)
        return pl.CostEstimate(
            flops=2 * products * pairs, bytes_accessed=read + written, transcendentals=pairs
        )

    def run(self, body, operands, results, scratch, vmem, products, interpret, name, continued=()):
        """Runs the kernel over (kv heads of all rows) × (query heads of one) × (blocks of queries).

        Args:
            operands: (block, array) or, for what the kernel is not given, (anything, None).
            results: (block, shape, dtype).
            vmem: bytes that the kernel is known to take.
            products: multiplications for a query and a key.
            continued: the last operands, one for each result: what other parts left there.
        """
        operands = [*operands, *continued]
        specs = [spec if x is not None else None for spec, x in operands]
        arrays = [x for _, x in operands]
        given = [*self.scalars, *arrays]
        # What goes on is written where it was read.
        aliases, at = {}, sum(x is not None for x in given[: len(given) - len(continued)])
        for n, ((_, before), (_, _, dtype)) in enumerate(zip(continued, results, strict=False)):
            if before is not None and before.dtype == dtype:
                aliases[at] = n
            at += before is not None
        statics = self.statics._replace(interpret=bool(interpret))
        limit = min(vmem + vmem // 4 + (4 << 20), get_chip().vmem_bytes)
        return pl.pallas_call(
            partial(body, walk=self.walk, statics=statics, blocks=self.blocks),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=(self.batch_size * statics.kv_heads, statics.group, self.walk.nq),
                in_specs=specs,
                out_specs=[spec for spec, *_ in results],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in results],
            input_output_aliases=aliases,
            cost_estimate=self.estimate_cost(products, arrays, results),
            compiler_params=pltpu.CompilerParams(
                # The cores of a chip share out the kv heads. What follows sums up over queries.
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=limit,
            ),
            interpret=interpret,
            name=name,
        )(*given)


def _pairs(S: int, T: int, params: AttentionParams, shift: Any) -> int:
    if not params.causal or not isinstance(shift, int):
        return S * T
    # Query s sees keys first..last, whose bounds grow by one from query to query.
    last = np.minimum(np.arange(S) + shift, T - 1)
    first = 0 if params.window is None else np.maximum(np.arange(S) + shift - params.window + 1, 0)
    return int(np.maximum(last - first + 1, 0).sum())


def pad_last_axis(x: jax.Array, size: int, value: float = 0) -> jax.Array:
    """Pads [..., n] or [n, rows, m] up to ``size`` along the last axis."""
    missing = size - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),), constant_values=value)
