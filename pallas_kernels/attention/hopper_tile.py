"""A tile of scores in a Hopper kernel: products, scores, mask and gradients, in the
registers of a warpgroup."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import BlockVisits
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    combine_masks,
)

ROWS = 64
"""Rows of a warpgroup's tile."""
WARPGROUPS = 2
"""Warpgroups that multiply."""
ACC = plgpu.WGMMAAccumulatorRef
TILE = plgpu.Layout.WGMMA
ALONG_ROWS = plgpu.Layout.WGMMA.reduce(1)
ALONG_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_GPU: Any = plgpu  # whose transforms are abstract to a type checker, in jax 0.12
SWIZZLED = _GPU.TilingTransform((8, 64)), _GPU.SwizzleTransform(128)
"""Layout of 16-bit blocks in shared memory."""
SWIZZLED_FP32 = _GPU.TilingTransform((8, 32)), _GPU.SwizzleTransform(128)

# Before jax 0.11.
_LOAD_TAKES_AN_INDEX = "idx" in signature(plgpu.load).parameters


class HopperStatics(NamedTuple):
    params: AttentionParams
    S: int
    T: int
    group: int
    """Query heads to a kv head."""
    block: int
    """Rows of the blocks that are copied one after the other."""
    stages: int
    """Number of these blocks in shared memory."""
    names: tuple[str, ...]
    """Names of the inputs."""
    own: tuple[str, ...]
    """Inputs of which a warpgroup keeps its own rows."""
    visited: tuple[tuple[str, ...], ...]
    """Inputs whose blocks are copied one after the other: those with one barrier
    together, named by the first."""
    interpret: bool

    @property
    def has_segments(self) -> bool:
        return "q_segments" in self.names

    @property
    def exp2_scale(self) -> float:
        """The factor of scores before exp2."""
        return gpu_blocks.get_exp2_scale(self.params, self.names)


def order_visits(
    visits: BlockVisits | None, blocks: int
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Returns (visits with a mask, which come first; all visits; the block of a
    visit)."""
    if visits is None:
        return 0, blocks, lambda at: at
    masked = visits.num_masked

    def block_of(at):
        return jnp.where(
            at < masked, visits.masked_block(at), visits.full_begin + at - masked
        )

    return masked, masked + visits.full_end - visits.full_begin, block_of


class HopperScoreTile:
    """Scores of queries from ``q_start``, along ``q_axis``, with keys from
    ``k_start``."""

    def __init__(
        self,
        statics: HopperStatics,
        refs,
        shape: tuple[int, int],
        q_axis: int,
        starts,
        row_head,
    ):
        self.statics = statics
        self.refs = refs
        self.params = statics.params
        self.shape, self.q_axis = shape, q_axis
        self.q_start, self.k_start = starts
        self.row, self.head = row_head

    def _iota(self, axis: int) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=TILE)

    def _behind(self) -> jax.Array:
        """int32: how far behind its query each key is."""
        ahead = self.q_start - self.k_start
        for name, sign in (("q_offset", 1), ("k_offset", -1)):
            if name in self.refs:
                ahead += sign * self.refs[name][0]
        return self._iota(self.q_axis) - self._iota(1 - self.q_axis) + ahead

    def scores(self, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns scores, whose exp2 is taken after ``statics.exp2_scale``, and their
        derivative by the product times the scale; None: 1."""
        return gpu_blocks.scale_scores(
            products, self.params, self.refs, self.head, self._behind
        )

    def compute_mask(self, segments: tuple[jax.Array, jax.Array] | None) -> Any:
        """Returns bool; segments of queries and of keys are broadcast along the tile's
        axes."""
        T = self.statics.T
        in_prefix = None
        inside = None
        behind = self._behind() if self.params.causal else None
        if "prefix" in self.refs:
            offset = self.refs["k_offset"][0] if "k_offset" in self.refs else 0
            prefix = self.refs["prefix"][self.row] - offset - self.k_start
            in_prefix = self._iota(1 - self.q_axis) < prefix
        if T % self.shape[1 - self.q_axis]:
            inside = self._iota(1 - self.q_axis) < T - self.k_start
        return combine_masks(self.params, behind, in_prefix, segments, inside)


def multiply_transposed(a, b, overlapped: Callable[[], None]) -> jax.Array:
    """Multiplies a·bᵀ in shared memory; calls ``overlapped`` before it waits for the
    result."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b.transpose((1, 0)))
        overlapped()
        return sums[...]

    return pl.run_scoped(multiply, ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(s: HopperStatics, accumulator: jax.Array, a: jax.Array, b) -> jax.Array:
    """Adds a·b to ``accumulator``, a in registers and b in shared memory."""
    if s.interpret:  # which knows no operand in registers
        return accumulator + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    sums: Any = pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(
        ACC.init(accumulator)
    )
    return sums


def load_shared(ref, layout) -> jax.Array:
    index: Any = ((),) if _LOAD_TAKES_AN_INDEX else ()
    return plgpu.load(ref, *index, layout=layout)


def make_zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), TILE)


def broadcast_rows(x: jax.Array, columns: int) -> jax.Array:
    """Broadcasts a value a row over a tile."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def broadcast_columns(x: jax.Array, rows: int) -> jax.Array:
    """Broadcasts a value a column over a tile."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def store_tile(staged, target, x: jax.Array) -> None:
    """Copies a tile to global memory through shared memory, as many columns at a time
    as fit; rows past the last are dropped."""
    columns = staged.shape[1]
    for begin in range(0, x.shape[1], columns):
        piece = x if columns == x.shape[1] else x[:, begin : begin + columns]
        staged[...] = piece.astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target.at[:, pl.ds(begin, columns)])
        plgpu.wait_smem_to_gmem(0)


def run_warpgroups(
    s: HopperStatics, refs, copy: Callable, multiply: Callable, *, last_first: bool
) -> None:
    """Calls, in a kernel, ``copy(visits, row, head)`` in the warpgroup that copies, and
    in the others ``multiply(visits, row, head, start, me)``, of 64 rows from ``start``.
    ``last_first``: start with the last tiles of queries, with a causal mask the
    longest."""
    head, row, tile = (lax.axis_index(name) for name in ("head", "row", "tile"))
    if last_first:
        tile = pl.cdiv(s.S, ROWS * WARPGROUPS) - 1 - tile
    me = lax.axis_index("warpgroup")
    visits = None
    table = refs.get("visits")
    if table is not None:  # else every block, without a mask
        visits = BlockVisits.read(table, 0 if table.shape[0] == 1 else row, tile)

    @pl.when(me == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        copy(visits, row, head)

    @pl.when(me < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        multiply(visits, row, head, (tile * WARPGROUPS + me) * ROWS, me)


def visit_visible_blocks(
    visits: BlockVisits | None, masked, count, step: Callable, carry
) -> Any:
    """Runs ``step(at, carry, is_masked)`` for the visits of :func:`order_visits`."""
    if visits is not None:
        carry = lax.fori_loop(0, masked, lambda at, carry: step(at, carry, True), carry)
    return lax.fori_loop(masked, count, lambda at, carry: step(at, carry, False), carry)


def cut_rows(ref, row, head, rows):
    """Cuts rows of a sequence from [B, S, N, H], [B, N, S] or [B, S]."""
    return ref.at[
        {4: (row, rows, head), 3: (row, head, rows), 2: (row, rows)}[len(ref.shape)]
    ]


def copy_own_tiles(s: HopperStatics, refs, shared, warpgroup, row, head, rows) -> None:
    """Copies what a warpgroup keeps all the time, and waits for it."""
    ready = shared["own_ready"].at[warpgroup]
    for name in s.own:
        source = cut_rows(refs[name], row, head, rows)
        plgpu.copy_gmem_to_smem(source, shared[name].at[warpgroup], ready)
    plgpu.barrier_wait(ready)


def make_buffers(
    s: HopperStatics, inputs: dict[str, jax.Array], dtype: Any
) -> dict[str, Any]:
    """Returns buffers of what is copied, and of columns of a warpgroup's results, if
    these are not in the operands' ``dtype``; and barriers: "ready" when all has
    arrived, and "free" when all warpgroups that multiply have read it."""

    def buffer(name: str, *rows: int) -> Any:
        x = inputs[name]
        transforms = SWIZZLED if x.ndim == 4 else ()
        return plgpu.SMEM((*rows, *x.shape[3:]), x.dtype, transforms=transforms)

    buffers = {name: buffer(name, WARPGROUPS, ROWS) for name in s.own}
    buffers["own_ready"] = plgpu.Barrier(
        num_barriers=WARPGROUPS, num_arrivals=len(s.own)
    )
    for names in s.visited:
        buffers |= {name: buffer(name, s.stages, s.block) for name in names}
        for state, arrivals in (("ready", len(names)), ("free", WARPGROUPS)):
            barrier = plgpu.Barrier(num_barriers=s.stages, num_arrivals=arrivals)
            buffers[f"{names[0]}_{state}"] = barrier
    if jnp.dtype(dtype) != inputs["q"].dtype:
        wide = jnp.dtype(dtype).itemsize == 4
        columns, swizzled = (32, SWIZZLED_FP32) if wide else (64, SWIZZLED)
        shape = WARPGROUPS, ROWS, columns
        buffers["staged"] = plgpu.SMEM(shape, dtype, transforms=swizzled)
    return buffers


def copy_key_value_blocks(
    s: HopperStatics, refs, shared, visits: BlockVisits | None, row, head
) -> None:
    """Copies blocks of keys and values, in the warpgroup that copies; keys past the
    last are zeros."""
    kv_head = lax.div(head, s.group)
    _, total, block_of = order_visits(visits, pl.cdiv(s.T, s.block))

    @pl.loop(0, total)
    def _(at):
        copy_block(s, refs, shared, at, row, kv_head, block_of(at))


def copy_block(s: HopperStatics, refs, shared, at, row, head, block) -> None:
    """Copies a block to the slot of visit ``at``, when its readers are done with
    that."""
    slot = lax.rem(at, jnp.int32(s.stages))
    rows = pl.ds(block * s.block, s.block)
    for names in s.visited:

        @pl.when(at >= s.stages)
        def _(names=names):
            plgpu.barrier_wait(shared[f"{names[0]}_free"].at[slot])

        for name in names:
            source = cut_rows(refs[name], row, head, rows)
            ready = shared[f"{names[0]}_ready"]
            plgpu.copy_gmem_to_smem(source, shared[name].at[slot], ready.at[slot])


def release_slot(s: HopperStatics, free) -> None:
    """Signals that this warpgroup has read a slot."""
    if (
        s.interpret
    ):  # which takes reads that are not TMA's or wgmma's as unordered with copies
        plgpu.commit_smem()
    plgpu.barrier_arrive(free)


def resolve_interpreter(interpret: Any) -> Any:
    """Returns the interpreter's parameters, where ``interpret`` asks for it. Raises
    ValueError: this JAX has none for these kernels."""
    if interpret is not True:
        return interpret
    parameters = getattr(plgpu, "InterpretGPUParams", None)
    if parameters is None:  # before jax 0.11
        raise ValueError(
            f"jax {jax.__version__} has no interpreter for Hopper's kernels"
        )
    return parameters()


def run_kernel(
    copy: Callable[..., None],
    multiply: Callable[..., None],
    inputs: dict[str, jax.Array],
    operands: AttentionOperands,
    call: AttentionCall,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    *,
    per_query: bool,
    block: int,
    stages: int,
    own: tuple[str, ...],
    visited: tuple[tuple[str, ...], ...],
    scratch: dict[str, Any] | None = None,
) -> Any:
    """Runs warpgroups over a grid (heads, tiles, batch rows).

    Args:
        copy: of (s, inputs, scratch, visits, row, head); see :func:`run_warpgroups`.
        multiply: of (s, inputs, outputs, scratch, visits, row, head, start, me).
        inputs: by name; q, k and v among them.
        per_query: whether tiles are of queries, which visit blocks of keys; or the
            reverse.
        block, stages, own, visited: as in :class:`HopperStatics`; of names without an
            input nothing is copied.
        scratch: beside :func:`make_buffers`.
    """
    params = call.params
    interpret = resolve_interpreter(call.interpret)
    B, S, N, _ = inputs["q"].shape
    T, K = inputs["k"].shape[1:3]
    rows, heads, length = ROWS * WARPGROUPS, *((N, S) if per_query else (K, T))
    q_block, k_block = (rows, block) if per_query else (block, rows)
    # Whole blocks, whose queries past the last have no weight.
    inputs = inputs | gpu_blocks.list_mask_inputs(operands, params)
    for name in ("lse", "delta", "q_segments", "k_segments"):
        if name in inputs:
            x = inputs[name]
            size = k_block if name == "k_segments" else q_block
            pad = *((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % size)
            inputs[name] = jnp.pad(
                x, pad, constant_values=jnp.inf if name == "lse" else 0
            )
    visits = gpu_blocks.plan_visits(
        q_block, k_block, operands, params, per_query=per_query
    )
    if visits is not None:
        inputs["visits"] = visits
    own = tuple(name for name in own if name in inputs)
    visited = tuple(
        tuple(name for name in names if name in inputs) for names in visited
    )
    s = HopperStatics(
        params,
        S,
        T,
        N // K,
        block,
        stages,
        tuple(inputs),
        own,
        visited,
        bool(interpret),
    )
    scratch = make_buffers(s, inputs, call.dtype) | (scratch or {})
    names = tuple(scratch)
    outputs = len(shapes)

    def body(*refs):
        own, rest = refs[: len(s.names)], refs[len(s.names) :]
        given = dict(zip(s.names, own, strict=True))
        shared = dict(zip(names, rest[outputs:], strict=True))
        copies = partial(copy, s, given, shared)
        products = partial(multiply, s, given, rest[:outputs], shared)
        run_warpgroups(
            s, given, copies, products, last_first=per_query and params.causal
        )

    return plgpu.kernel(
        body,
        out_type=shapes,
        scratch_types=tuple(scratch.values()),
        grid=(heads, pl.cdiv(length, rows), B),
        grid_names=("head", "tile", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpret else {}),
    )(*inputs.values())
