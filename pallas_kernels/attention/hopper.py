"""Attention for Hopper (sm_90): a Pallas Mosaic-GPU kernel with warp specialisation.

After Shah et al. 2024 (FlashAttention-3): of a program's three warpgroups one only copies blocks of
K and V to shared memory (TMA), two each hold 64 queries and multiply (wgmma). These two take turns:
while one has the tensor cores, the other takes its softmax. What is not supported here, a card of
another kind included, is for ``triton``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import Visits
from pallas_kernels.attention.how import How, Where
from pallas_kernels.attention.triton_program import LN2, LOG2E

ROWS = 64
"""Queries of a warpgroup."""
_WARPGROUPS = 2
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class BlockSizes(NamedTuple):
    k: int
    """Keys of a block, a multiple of 64."""
    stages: int
    """Blocks of keys, and of values, in shared memory."""


def supports(q: jax.Array, k: jax.Array, v: jax.Array, where: Where, how: How) -> bool:
    """Whether :func:`forward` computes this, on a card of compute capability 9.0: by shapes,
    dtypes and which arrays are given, not by values."""
    return (
        q.shape[-1] in (64, 128, 256)
        and v.shape[-1] == q.shape[-1]
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k.dtype == v.dtype
        and where.q_positions is None
        and where.k_positions is None
        and how.scale > 0
        and 0 not in (q.size, k.size)
        and q.shape[1] % 8 == k.shape[1] % 8 == 0
    )


def default_block_sizes(H: int) -> BlockSizes:
    """What fits in 227 KB of shared memory."""
    return BlockSizes(64 if H > 128 else 128, 2)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Where,
    how: How,
    dtype: Any,
    *,
    block_sizes: BlockSizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention's output and log-sum-exps, where :func:`supports`.

    Args:
        q: [B, S, N, H]; k: [B, T, K, H]; v: [B, T, K, H]; N a multiple of K.
        where, how: the mask and what is added to scores.
        dtype: of the output.
        interpret: parameters of Pallas's GPU interpreter, to run on a CPU.

    Returns:
        o [B, S, N, H], zeros where a query has no key; the log-sum-exp of each query's scores, its
        sink included, fp32 [B, S, N], −inf where it has none.

    Raises:
        ValueError: not supported.
    """
    if not supports(q, k, v, where, how):
        raise ValueError(
            f"q {q.shape} {q.dtype}, k {k.shape} {k.dtype}, v {v.shape} {v.dtype}: the Hopper "
            "kernel takes bf16 or fp16, heads of 64, 128 or 256, and positions in order"
        )
    (B, S, N, H), T = q.shape, k.shape[1]
    sizes = block_sizes or default_block_sizes(H)
    block_q = ROWS * _WARPGROUPS
    tiles = pl.cdiv(S, block_q)
    inputs = {"q": q, "k": k, "v": v, **_mask_inputs(where, how, S, T, block_q, sizes.k)}
    statics = _Statics(how, sizes, S, T, N // k.shape[2], tuple(inputs))
    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    fp32 = jnp.dtype(dtype).itemsize == 4
    o_tiled = (plgpu.TilingTransform((8, 32)), swizzled[1]) if fp32 else swizzled
    blocks = plgpu.SMEM((sizes.stages, sizes.k, H), q.dtype, transforms=swizzled)
    scratch = {
        "q": plgpu.SMEM((_WARPGROUPS, ROWS, H), q.dtype, transforms=swizzled),
        "k": blocks,
        "v": blocks,
        "lse": plgpu.SMEM((_WARPGROUPS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=_WARPGROUPS, num_arrivals=1 + statics.segments),
        "k_ready": plgpu.Barrier(num_barriers=sizes.stages, num_arrivals=1 + statics.segments),
        "v_ready": plgpu.Barrier(num_barriers=sizes.stages),
        "k_free": plgpu.Barrier(num_barriers=sizes.stages, num_arrivals=_WARPGROUPS),
        "v_free": plgpu.Barrier(num_barriers=sizes.stages, num_arrivals=_WARPGROUPS),
        "turn": plgpu.Barrier(num_arrivals=_WARPGROUPS),
    }
    if jnp.dtype(dtype) != q.dtype:
        scratch["o"] = plgpu.SMEM((_WARPGROUPS, ROWS, H), dtype, transforms=o_tiled)
    if statics.segments:
        scratch["q_segments"] = plgpu.SMEM((_WARPGROUPS, ROWS), jnp.int32)
        scratch["k_segments"] = plgpu.SMEM((sizes.stages, sizes.k), jnp.int32)
    names = tuple(scratch)

    def body(*refs):
        inputs, (o, lse) = refs[: len(statics.names)], refs[len(statics.names) :][:2]
        named = dict(zip(statics.names, inputs, strict=True))
        shared = dict(zip(names, refs[len(statics.names) + 2 :], strict=True))
        _forward_kernel(statics, named, o, lse, shared)

    o, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((B, N, tiles * block_q), jnp.float32),
        ),
        scratch_types=tuple(scratch.values()),
        grid=(N, tiles, B),
        grid_names=("head", "tile", "row"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpret else {}),
    )(*inputs.values())
    return o, lse[..., :S].transpose(0, 2, 1)


class _Statics(NamedTuple):
    how: How
    sizes: BlockSizes
    S: int
    T: int
    group: int
    names: tuple[str, ...]
    """Of the inputs."""

    @property
    def segments(self) -> bool:
        return "q_segments" in self.names

    @property
    def plain(self) -> bool:
        """Products are scaled in the exponent alone."""
        return self.how.soft_cap is None and "slopes" not in self.names

    @property
    def unit(self) -> float:
        """What scores are multiplied by before exp2."""
        return self.how.scale * LOG2E if self.plain else 1.0


def _mask_inputs(where: Where, how: How, S: int, T: int, block_q: int, block_k: int) -> dict:
    """By name, what a kernel reads beside its operands. Segments fill up whole blocks."""
    inputs = {}
    if gpu_blocks.needs_mask(how, where, T, block_k):
        inputs["visits"] = gpu_blocks.visits_of_queries(S, T, block_q, block_k, where, how)
    if where.q_segments is not None:
        for name, x, block in (
            ("q_segments", where.q_segments, block_q),
            ("k_segments", where.k_segments, block_k),
        ):
            inputs[name] = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)))
    if how.causal or where.slopes is not None:
        for name in ("q_offset", "k_offset"):
            offset = getattr(where, name)
            if offset is not None:
                inputs[name] = jnp.asarray(offset, jnp.int32)[None]
    if how.prefix:
        inputs["prefix"] = where.prefix
    return inputs | {
        name: x for name in ("slopes", "sinks") if (x := getattr(where, name)) is not None
    }


def _forward_kernel(s: _Statics, refs, o_ref, lse_ref, shared) -> None:
    head, row = lax.axis_index("head"), lax.axis_index("row")
    tile = lax.axis_index("tile")
    if s.how.causal:  # the last tiles, the longest, start first
        tile = pl.cdiv(s.S, ROWS * _WARPGROUPS) - 1 - tile
    me = lax.axis_index("warpgroup")
    visits = None
    if "visits" in refs:
        line = 0 if refs["visits"].shape[0] == 1 else row
        visits = Visits(*(refs["visits"][line, tile, i] for i in range(gpu_blocks.FIELDS)))

    @pl.when(me == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _copy_blocks(s, refs, shared, visits, row, lax.div(head, s.group))

    @pl.when(me < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        start = (tile * _WARPGROUPS + me) * ROWS
        _attend(s, refs, o_ref, lse_ref, shared, visits, row, head, start, me)


def _bounds(s: _Statics, visits: Visits | None):
    """(visits with a mask, all visits, the block of a visit)"""
    if visits is None:
        return 0, pl.cdiv(s.T, s.sizes.k), lambda at: at
    masked = visits.count

    def block_of(at):
        return jnp.where(at < masked, visits.masked(at), visits.full_begin + at - masked)

    return masked, masked + visits.full_end - visits.full_begin, block_of


def _copy_blocks(s: _Statics, refs, shared, visits, row, kv_head) -> None:
    """The warpgroup that copies: rows past the last come as zeros."""
    _, total, block_of = _bounds(s, visits)
    stages, block_k = s.sizes.stages, s.sizes.k

    @pl.loop(0, total)
    def _(at):
        slot = lax.rem(at, jnp.int32(stages))
        keys = pl.ds(block_of(at) * block_k, block_k)
        for name in ("k", "v"):

            @pl.when(at >= stages)
            def _(name=name):
                plgpu.barrier_wait(shared[f"{name}_free"].at[slot])

            ready = shared[f"{name}_ready"].at[slot]
            source = refs[name].at[row, keys, kv_head]
            plgpu.copy_gmem_to_smem(source, shared[name].at[slot], ready)
            if name == "k" and s.segments:
                plgpu.copy_gmem_to_smem(
                    refs["k_segments"].at[row, keys], shared["k_segments"].at[slot], ready
                )


def _attend(s: _Statics, refs, o_ref, lse_ref, shared, visits, row, head, start, me) -> None:
    """A warpgroup that multiplies: queries ``start`` and the 63 after it."""
    stages, block_k = s.sizes.stages, s.sizes.k
    q, H = shared["q"].at[me], shared["q"].shape[-1]
    mine = pl.ds(start, ROWS)
    plgpu.copy_gmem_to_smem(refs["q"].at[row, mine, head], q, shared["q_ready"].at[me])
    if s.segments:
        plgpu.copy_gmem_to_smem(
            refs["q_segments"].at[row, mine], shared["q_segments"].at[me], shared["q_ready"].at[me]
        )
    plgpu.barrier_wait(shared["q_ready"].at[me])
    own_segments = plgpu.load(shared["q_segments"].at[me], layout=_ROW) if s.segments else None

    def take_turn():
        """The other warpgroup goes on where it waits, and this one when the other comes here."""
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["turn"])

    def step(at, carry, masked):
        o, top, total = carry
        slot = lax.rem(at, jnp.int32(stages))
        plgpu.barrier_wait(shared["k_ready"].at[slot])

        def multiply(products):
            plgpu.wgmma(products, q, shared["k"].at[slot].transpose((1, 0)))
            take_turn()
            return products[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, block_k), jnp.float32))
        segments = None
        if masked and s.segments:
            other = plgpu.load(shared["k_segments"].at[slot], layout=_COLUMN)
            segments = _wide(own_segments, block_k), _tall(other, ROWS)
        plgpu.barrier_arrive(shared["k_free"].at[slot])
        scores = _scores(s, refs, scores, start, block_of(at) * block_k, head)
        if masked:
            seen = _visible(s, refs, segments, start, block_of(at) * block_k, row)
            scores = jnp.where(seen, scores, -jnp.inf)

        new_top = jnp.maximum(top, scores.max(axis=1) * s.unit)
        # Rows that have seen no key: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        weights = jnp.exp2(scores * s.unit - _wide(base, block_k))
        decay = jnp.exp2(top - base)
        total = total * decay + weights.sum(axis=1)
        o = o * _wide(decay, H)
        weights = weights.astype(shared["v"].dtype)
        take_turn()
        plgpu.barrier_wait(shared["v_ready"].at[slot])

        def add(o):
            plgpu.wgmma(o, weights, shared["v"].at[slot])

        o = pl.run_state(add)(plgpu.ACC.init(o))
        plgpu.barrier_arrive(shared["v_free"].at[slot])
        return o, new_top, total

    masked, count, block_of = _bounds(s, visits)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
    if "sinks" in refs:
        top, total = refs["sinks"][head] * LOG2E, 1.0
    else:
        top, total = -jnp.inf, 0.0
    top, total = (
        plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), _ROW) for x in (top, total)
    )
    pl.when(me == 1)(take_turn)
    carry = zeros, top, total
    if visits is not None:
        carry = lax.fori_loop(0, masked, lambda at, carry: step(at, carry, True), carry)
    carry = lax.fori_loop(masked, count, lambda at, carry: step(at, carry, False), carry)
    pl.when(me == 0)(take_turn)

    o, top, total = carry
    safe = jnp.where(total > 0, total, 1.0)
    o = o * _wide(1 / safe, H)
    out = shared.get("o", shared["q"]).at[me]
    out[...] = o.astype(out.dtype)
    shared["lse"].at[me][...] = jnp.where(total > 0, top * LN2 + jnp.log(safe), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, o_ref.at[row, mine, head])
    plgpu.copy_smem_to_gmem(shared["lse"].at[me], lse_ref.at[row, head, mine])
    plgpu.wait_smem_to_gmem(0)


def _wide(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def _tall(x: jax.Array, rows: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def _iota(s: _Statics, axis: int) -> jax.Array:
    shape = ROWS, s.sizes.k
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _behind(s: _Statics, refs, q_start, k_start) -> jax.Array:
    """int32: how far behind its query each key is."""
    ahead = q_start - k_start
    for name, sign in (("q_offset", 1), ("k_offset", -1)):
        if name in refs:
            ahead += sign * refs[name][0]
    return _iota(s, 0) - _iota(s, 1) + ahead


def _scores(s: _Statics, refs, products, q_start, k_start, head) -> jax.Array:
    """Of which exp2 is to be taken, after ``s.unit``."""
    if s.plain:
        return products
    how = s.how
    if how.soft_cap is None:
        scores = products * (how.scale * LOG2E)
    else:
        # tanh(x) = 1 − 2 / (e^2x + 1): exact to fp32's step at 1, all that scores need.
        exp = jnp.exp2(products * (2 * LOG2E * how.scale / how.soft_cap))
        scores = (how.soft_cap * LOG2E) * (1 - 2 / (exp + 1))
    if "slopes" in refs:
        distance = jnp.abs(_behind(s, refs, q_start, k_start)).astype(jnp.float32)
        scores -= distance * (refs["slopes"][head] * LOG2E)
    return scores


def _visible(s: _Statics, refs, segments, q_start, k_start, row) -> jax.Array:
    """bool, of a tile of scores."""
    how, seen = s.how, None
    if how.causal:
        behind = _behind(s, refs, q_start, k_start)
        seen = behind >= 0
        if how.window is not None:
            seen &= behind < how.window
        if how.prefix:
            offset = refs["k_offset"][0] if "k_offset" in refs else 0
            seen |= _iota(s, 1) < refs["prefix"][row] - offset - k_start
    if segments is not None:
        own, other = segments
        same = (own == other) & (own != 0)
        seen = same if seen is None else seen & same
    if s.T % s.sizes.k:
        inside = _iota(s, 1) < s.T - k_start
        seen = inside if seen is None else seen & inside
    assert seen is not None
    return seen
