"""A tile of scores in a Hopper kernel: products, scores, mask and gradients, in the registers of a
warpgroup."""

from collections.abc import Callable
from functools import reduce
from inspect import signature
from operator import and_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import BlockVisits
from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.attention.triton_program import LOG2E

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
    interpret: bool

    @property
    def has_segments(self) -> bool:
        return "q_segments" in self.names

    @property
    def scales_in_exponent(self) -> bool:
        """Whether products are scaled in the exponent alone."""
        return self.params.soft_cap is None and "slopes" not in self.names

    @property
    def exp2_scale(self) -> float:
        """The factor of scores before exp2."""
        return self.params.scale * LOG2E if self.scales_in_exponent else 1.0


def list_mask_inputs(
    operands: AttentionOperands, params: AttentionParams, q_block: int, k_block: int
) -> dict[str, jax.Array]:
    """Lists by name what kernels read beside operands. Segments fill up whole blocks."""
    inputs = {}
    if operands.q_segments is not None:
        for name, x, block in (
            ("q_segments", operands.q_segments, q_block),
            ("k_segments", operands.k_segments, k_block),
        ):
            assert x is not None
            inputs[name] = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)))
    if params.causal or operands.slopes is not None:
        for name in ("q_offset", "k_offset"):
            offset = getattr(operands, name)
            if offset is not None:
                inputs[name] = jnp.asarray(offset, jnp.int32)[None]
    for name in ("prefix", "slopes"):
        if getattr(operands, name) is not None:
            inputs[name] = getattr(operands, name)
    return inputs


def read_visits(refs: dict[str, Any], row, i) -> BlockVisits | None:
    """Reads the visits of block i; None: every block, without a mask."""
    if "visits" not in refs:
        return None
    line = 0 if refs["visits"].shape[0] == 1 else row
    return BlockVisits(*(refs["visits"][line, i, field] for field in range(gpu_blocks.FIELDS)))


def order_visits(visits: BlockVisits | None, blocks: int) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Returns (visits with a mask, which come first; all visits; the block of a visit)."""
    if visits is None:
        return 0, blocks, lambda at: at
    masked = visits.num_masked

    def block_of(at):
        return jnp.where(at < masked, visits.masked_block(at), visits.full_begin + at - masked)

    return masked, masked + visits.full_end - visits.full_begin, block_of


class HopperScoreTile:
    """Scores of queries from ``q_start``, along ``q_axis``, with keys from ``k_start``."""

    def __init__(
        self, statics: HopperStatics, refs, shape: tuple[int, int], q_axis: int, starts, row_head
    ):
        self.statics, self.refs, self.params = statics, refs, statics.params
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
        """Returns scores, whose exp2 is taken after ``statics.exp2_scale``, and their derivative
        by the product times the scale; None: 1."""
        params, slope = self.params, None
        if self.statics.scales_in_exponent:
            return products, slope
        if params.soft_cap is None:
            scores = products * (params.scale * LOG2E)
        else:
            # tanh(x) = 1 − 2 / (e^2x + 1): exact to fp32's step at 1, all that scores need.
            exp = jnp.exp2(products * (2 * LOG2E * params.scale / params.soft_cap))
            tanh = 1 - 2 / (exp + 1)
            scores, slope = tanh * (params.soft_cap * LOG2E), 1 - tanh * tanh
        if "slopes" in self.refs:
            distance = jnp.abs(self._behind()).astype(jnp.float32)
            scores -= distance * (self.refs["slopes"][self.head] * LOG2E)
        return scores, slope

    def compute_mask(self, q_segments=None, k_segments=None) -> jax.Array:
        """Returns bool; segments are broadcast along the tile's axes."""
        params, T, seen = self.params, self.statics.T, []
        if params.causal:
            behind = self._behind()
            near = behind >= 0
            if params.window is not None:
                near &= behind < params.window
            if "prefix" in self.refs:
                offset = self.refs["k_offset"][0] if "k_offset" in self.refs else 0
                prefix = self.refs["prefix"][self.row] - offset - self.k_start
                near |= self._iota(1 - self.q_axis) < prefix
            seen.append(near)
        if q_segments is not None:
            seen.append((q_segments == k_segments) & (q_segments != 0))
        if T % self.shape[1 - self.q_axis]:
            seen.append(self._iota(1 - self.q_axis) < T - self.k_start)
        return reduce(and_, seen)


def multiply_transposed(a, b, overlapped: Callable[[], None]) -> jax.Array:
    """Multiplies a·bᵀ in shared memory; calls ``overlapped`` before it waits for the result."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b.transpose((1, 0)))
        overlapped()
        return sums[...]

    return pl.run_scoped(multiply, ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(s: HopperStatics, accumulator: jax.Array, a: jax.Array, b) -> jax.Array:
    """Adds a·b to ``accumulator``, a in registers and b in shared memory."""
    if s.interpret:  # which knows no operand in registers
        return accumulator + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    sums: Any = pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(ACC.init(accumulator))
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
    """Copies a tile to global memory through shared memory, as many columns at a time as fit;
    rows past the last are dropped."""
    columns = staged.shape[1]
    for begin in range(0, x.shape[1], columns):
        piece = x if columns == x.shape[1] else x[:, begin : begin + columns]
        staged[...] = piece.astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target.at[:, pl.ds(begin, columns)])
        plgpu.wait_smem_to_gmem(0)


def make_staging_buffer(name: str, dtype: Any, operand_dtype: Any) -> dict[str, Any]:
    """Returns the buffer for columns of a warpgroup's results, if not of the operands' dtype."""
    if jnp.dtype(dtype) == operand_dtype:
        return {}
    columns, swizzled = (32, SWIZZLED_FP32) if jnp.dtype(dtype).itemsize == 4 else (64, SWIZZLED)
    return {name: plgpu.SMEM((WARPGROUPS, ROWS, columns), dtype, transforms=swizzled)}


def run_warpgroups(
    s: HopperStatics, refs, copy: Callable, multiply: Callable, *, last_first: bool
) -> None:
    """Calls, in a kernel, ``copy(visits, row, head)`` in the warpgroup that copies, and in the
    others ``multiply(visits, row, head, start, me)``, of 64 rows from ``start``.

    Args:
        last_first: start with the last tiles of queries, with a causal mask the longest.
    """
    head, row, tile = (lax.axis_index(name) for name in ("head", "row", "tile"))
    if last_first:
        tile = pl.cdiv(s.S, ROWS * WARPGROUPS) - 1 - tile
    me = lax.axis_index("warpgroup")
    visits = read_visits(refs, row, tile)

    @pl.when(me == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        copy(visits, row, head)

    @pl.when(me < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        multiply(visits, row, head, (tile * WARPGROUPS + me) * ROWS, me)


def visit_visible_blocks(visits: BlockVisits | None, masked, count, step: Callable, carry) -> Any:
    """Runs ``step(at, carry, is_masked)`` for the visits of :func:`order_visits`."""
    if visits is not None:
        carry = lax.fori_loop(0, masked, lambda at, carry: step(at, carry, True), carry)
    return lax.fori_loop(masked, count, lambda at, carry: step(at, carry, False), carry)


def copy_own_tiles(shared, ready: str, warpgroup, sources: dict[str, Any]) -> None:
    """Copies what a warpgroup keeps all the time, and waits for it."""
    for name, source in sources.items():
        plgpu.copy_gmem_to_smem(source, shared[name].at[warpgroup], shared[ready].at[warpgroup])
    plgpu.barrier_wait(shared[ready].at[warpgroup])


def make_barriers(s: HopperStatics, **arrivals: int) -> dict[str, Any]:
    """Returns barriers of blocks that are copied together: "ready" after so many arrivals, and
    "free" when all warpgroups that multiply have read them."""
    ready = {
        f"{name}_ready": plgpu.Barrier(num_barriers=s.stages, num_arrivals=number)
        for name, number in arrivals.items()
    }
    free = {
        f"{name}_free": plgpu.Barrier(num_barriers=s.stages, num_arrivals=WARPGROUPS)
        for name in arrivals
    }
    return ready | free


def make_segment_buffers(s: HopperStatics, own: str, visited: str) -> dict[str, Any]:
    """Returns the buffers of segments, if there are any: a warpgroup's own, and the blocks'."""
    if not s.has_segments:
        return {}
    return {
        f"{own}_segments": plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
        f"{visited}_segments": plgpu.SMEM((s.stages, s.block), jnp.int32),
    }


def copy_key_value_blocks(
    s: HopperStatics, refs, shared, visits: BlockVisits | None, row, head
) -> None:
    """Copies blocks of keys and values, in the warpgroup that copies; keys past the last are
    zeros."""
    kv_head = lax.div(head, s.group)
    _, total, block_of = order_visits(visits, pl.cdiv(s.T, s.block))

    @pl.loop(0, total)
    def _(at):
        slot = lax.rem(at, jnp.int32(s.stages))
        keys = pl.ds(block_of(at) * s.block, s.block)
        for name in ("k", "v"):
            copies = [(refs[name].at[row, keys, kv_head], shared[name])]
            if name == "k" and s.has_segments:
                copies.append((refs["k_segments"].at[row, keys], shared["k_segments"]))
            copy_block(s, shared, name, at, slot, copies)


def copy_block(s: HopperStatics, shared, name: str, at, slot, copies) -> None:
    """Copies (source, target) to a slot of the targets, when its readers are done with it."""

    @pl.when(at >= s.stages)
    def _():
        plgpu.barrier_wait(shared[f"{name}_free"].at[slot])

    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[slot], shared[f"{name}_ready"].at[slot])


def release_slot(s: HopperStatics, free) -> None:
    """Signals that this warpgroup has read a slot."""
    if s.interpret:  # which takes reads that are not TMA's or wgmma's as unordered with copies
        plgpu.commit_smem()
    plgpu.barrier_arrive(free)


def resolve_interpreter(interpret: Any) -> Any:
    """Returns the interpreter's parameters, where ``interpret`` asks for it.

    Raises:
        ValueError: this JAX has none for these kernels.
    """
    if interpret is not True:
        return interpret
    parameters = getattr(plgpu, "InterpretGPUParams", None)
    if parameters is None:  # before jax 0.11
        raise ValueError(f"jax {jax.__version__} has no interpreter for Hopper's kernels")
    return parameters()


def run_kernel(kernel, s: HopperStatics, inputs, shapes, scratch, grid, interpret) -> Any:
    """Runs ``kernel(s, inputs, outputs, scratch)`` over a grid (heads, tiles, batch rows)."""
    names, outputs = tuple(scratch), len(shapes)

    def body(*refs):
        own, rest = refs[: len(s.names)], refs[len(s.names) :]
        shared = dict(zip(names, rest[outputs:], strict=True))
        kernel(s, dict(zip(s.names, own, strict=True)), rest[:outputs], shared)

    return plgpu.kernel(
        body,
        out_type=shapes,
        scratch_types=tuple(scratch.values()),
        grid=grid,
        grid_names=("head", "tile", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpret else {}),
    )(*inputs.values())
