"""What the calls of both attention kernels on a TPU have in common."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.how import How, Where, first_position
from pallas_kernels.attention.tpu_blocks import Blocks
from pallas_kernels.attention.tpu_scores import Setting
from pallas_kernels.attention.walk import Walk, plan, table
from pallas_kernels.chips import current_chip

F32 = jnp.float32


class KeyPart(NamedTuple):
    """Of the keys, a run that VMEM holds."""

    index: int
    held: int
    """Rows in VMEM: block ``index`` of so many."""
    keys: int
    """Of them; the rest is padding."""
    where: Where
    how: How


class Call(NamedTuple):
    """One kernel over all queries and a part of the keys."""

    walk: Walk
    setting: Setting
    blocks: Blocks
    part: KeyPart
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
    def of(
        cls,
        shape: tuple[int, int, int, int],
        kv_heads: int,
        part: KeyPart,
        blocks: Blocks,
        joined: bool,
    ) -> "Call":
        """
        Args:
            shape: of the queries.
            joined: see :func:`walk.plan`.
        """
        (B, S, N, _), T, where, how = shape, part.keys, part.where, part.how
        tile = blocks.tile_q, blocks.tile_k
        walk = plan(S, T, how, where, blocks[:2], tile, joined=joined)
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
            kv_heads=kv_heads,
            group=N // kv_heads,
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
            part,
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
            (call.query_row(shared=True), padded(own, call.padded_q, -1)),
            (call.key_row(), padded(keys, part.held, 0)),
        ]
        return call._replace(segments=segments)

    @property
    def padded_q(self) -> int:
        return self.walk.nq * self.walk.bq

    def queries(self, width: int) -> pl.BlockSpec:
        group = self.setting.group
        return pl.BlockSpec(
            (None, self.walk.bq, width), lambda kv, g, i, *_: (kv * group + g, i, 0)
        )

    def keys(self, width: int) -> pl.BlockSpec:
        """Of all parts' keys."""
        index = self.part.index
        return pl.BlockSpec((None, self.part.held, width), lambda kv, g, i, *_: (kv, index, 0))

    def query_row(self, shared: bool = False) -> pl.BlockSpec:
        """A number a query; ``shared``: the same for all heads."""
        group, heads = self.setting.group, self.setting.kv_heads

        def index(kv, g, i, *_):
            return lax.div(kv, heads) if shared else kv * group + g, 0, i

        return pl.BlockSpec((None, 1, self.walk.bq), index)

    def key_row(self) -> pl.BlockSpec:
        heads = self.setting.kv_heads
        return pl.BlockSpec(
            (None, 1, self.part.held), lambda kv, g, i, *_: (lax.div(kv, heads), 0, 0)
        )

    def cost(self, products: int, arrays, results) -> pl.CostEstimate:
        """Of queries with the keys that they see, segments aside; bytes are those of whole arrays,
        too many where keys go in parts.

        Args:
            products: multiplications a pair.
        """
        pairs = self.rows * self.setting.kv_heads * self.setting.group * self.pairs
        read = sum(x.nbytes for x in arrays if x is not None)
        written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in results)
        return pl.CostEstimate(
            flops=2 * products * pairs, bytes_accessed=read + written, transcendentals=pairs
        )

    def run(self, body, operands, results, scratch, vmem, products, interpret, name, continued=()):
        """The kernel over (kv heads of all rows) × (query heads of one) × (blocks of queries).

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


def padded(x: jax.Array, size: int, value: float = 0) -> jax.Array:
    """[..., n] or [n, rows, m] up to ``size`` along the last axis."""
    missing = size - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),), constant_values=value)
