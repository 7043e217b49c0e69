"""A tile of scores in a Hopper kernel: products, scores, mask and gradients, in the
registers of a warpgroup."""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import BlockVisits
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    combine_masks,
)
from pallas_kernels.kernel_types import Carry, Index, Interpret, Ref, Span

SharedMemory = pl.MemoryRef | plgpu.Barrier
"""What a kernel asks for: a buffer in shared memory, or barriers."""

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
    """The values that a kernel is compiled for."""

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
    resident: tuple[str, ...]
    """Inputs of which a warpgroup keeps its own rows in shared memory all the time."""
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


class HopperProgram(NamedTuple):
    """A warpgroup's share of a program, in the kernel: scalars and references."""

    statics: HopperStatics
    inputs: dict[str, Ref]
    """In global memory, by name."""
    outputs: tuple[Ref, ...]
    shared: dict[str, Ref]
    """Buffers and barriers of :func:`make_buffers`, and what a kernel adds."""
    visits: BlockVisits | None
    """None: every block, without a mask."""
    row: jax.Array
    """Of the batch."""
    head: jax.Array
    """A query head, or where tiles are of keys a kv head."""
    warpgroup: jax.Array
    """0 and 1 multiply, 2 copies."""
    start: Index = 0
    """The first of a multiplying warpgroup's ``ROWS`` rows."""

    @property
    def rows(self) -> Span:
        """The slice of a multiplying warpgroup's rows."""
        return pl.ds(self.start, ROWS)


def order_visits(
    visits: BlockVisits | None, blocks: int
) -> tuple[Index, Index, Callable[[jax.Array], jax.Array]]:
    """Returns (visits with a mask, which come first; all visits; the block of a
    visit)."""
    if visits is None:
        return 0, blocks, lambda visit: visit
    masked = visits.num_masked

    def block_of(visit):
        return jnp.where(
            visit < masked,
            visits.masked_block(visit),
            visits.full_begin + visit - masked,
        )

    return masked, masked + visits.full_end - visits.full_begin, block_of


class HopperScoreTile:
    """Scores of queries from ``q_start``, along ``q_axis``, with keys from
    ``k_start``; ``head`` is the query head."""

    def __init__(
        self,
        program: HopperProgram,
        shape: tuple[int, int],
        *,
        q_axis: int,
        q_start: Index,
        k_start: Index,
        head: jax.Array,
    ):
        self.statics = program.statics
        self.inputs = program.inputs
        self.params = program.statics.params
        self.row = program.row
        self.shape = shape
        self.q_axis = q_axis
        self.q_start = q_start
        self.k_start = k_start
        self.head = head

    def _iota(self, axis: int) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=TILE)

    def _behind(self) -> jax.Array:
        """int32: how far behind its query each key is."""
        ahead = self.q_start - self.k_start
        for name, sign in (("q_offset", 1), ("k_offset", -1)):
            if name in self.inputs:
                ahead += sign * self.inputs[name][0]
        return self._iota(self.q_axis) - self._iota(1 - self.q_axis) + ahead

    def scores(self, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns scores, whose exp2 is taken after ``statics.exp2_scale``, and their
        derivative by the product times the scale; None: 1."""
        return gpu_blocks.scale_scores(
            products, self.params, self.inputs, self.head, self._behind
        )

    def compute_mask(self, segments: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """Returns bool; segments of queries and of keys are broadcast along the tile's
        axes."""
        T = self.statics.T
        in_prefix = None
        inside = None
        behind = self._behind() if self.params.causal else None
        if "prefix" in self.inputs:
            offset = self.inputs["k_offset"][0] if "k_offset" in self.inputs else 0
            prefix = self.inputs["prefix"][self.row] - offset - self.k_start
            in_prefix = self._iota(1 - self.q_axis) < prefix
        if T % self.shape[1 - self.q_axis]:
            inside = self._iota(1 - self.q_axis) < T - self.k_start
        mask = combine_masks(self.params, behind, in_prefix, segments, inside)
        # Blocks are visited with a mask only where one of these may empty a score.
        assert mask is not None
        return mask


def multiply_transposed(a: Ref, b: Ref, overlapped: Callable[[], None]) -> jax.Array:
    """Multiplies a·bᵀ in shared memory; calls ``overlapped`` before it waits for the
    result."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b.transpose((1, 0)))
        overlapped()
        # Reading the accumulator waits for the tensor cores.
        return sums[...]

    return pl.run_scoped(multiply, ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(
    s: HopperStatics, accumulator: jax.Array, a: jax.Array, b: Ref
) -> jax.Array:
    """Adds a·b to ``accumulator``, a in registers and b in shared memory."""
    if s.interpret:
        # The interpreter knows no operand in registers.
        return accumulator + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    multiply = pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))
    return cast(jax.Array, multiply(ACC.init(accumulator)))


def load_shared(ref: Ref, layout: Any) -> jax.Array:
    """Reads shared memory into registers, in ``ALONG_ROWS`` or ``ALONG_COLUMNS``, whose
    type JAX does not export."""
    index: tuple[()] | tuple[tuple[()]] = ((),) if _LOAD_TAKES_AN_INDEX else ()
    return plgpu.load(ref, *index, layout=layout)


def make_zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), TILE)


def broadcast_rows(x: jax.Array, columns: int) -> jax.Array:
    """Broadcasts a value a row over a tile."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def broadcast_columns(x: jax.Array, rows: int) -> jax.Array:
    """Broadcasts a value a column over a tile."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def store_tile(staged: Ref, target: Ref, x: jax.Array) -> None:
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
    s: HopperStatics,
    inputs: dict[str, Ref],
    outputs: tuple[Ref, ...],
    shared: dict[str, Ref],
    copy: Callable[[HopperProgram], None],
    multiply: Callable[[HopperProgram], None],
    *,
    last_first: bool,
) -> None:
    """Calls, in a kernel, ``copy`` in the warpgroup that copies, and ``multiply`` in
    the others. ``last_first``: start with the last tiles of queries, with a causal mask
    the longest."""
    head = lax.axis_index("head")
    row = lax.axis_index("row")
    tile = lax.axis_index("tile")
    if last_first:
        tile = pl.cdiv(s.S, ROWS * WARPGROUPS) - 1 - tile
    warpgroup = lax.axis_index("warpgroup")
    visits = None
    table = inputs.get("visits")
    if table is not None:
        visits = BlockVisits.read(table, 0 if table.shape[0] == 1 else row, tile)
    program = HopperProgram(s, inputs, outputs, shared, visits, row, head, warpgroup)

    # An SM's 65,536 registers are 512 for each of a warpgroup's 128 threads; the two
    # warpgroups that multiply take what the third does not need: 24 + 2 · 240.
    @pl.when(warpgroup == WARPGROUPS)
    def run_copies():
        plgpu.set_max_registers(24, action="decrease")
        copy(program)

    @pl.when(warpgroup < WARPGROUPS)
    def run_products():
        plgpu.set_max_registers(240, action="increase")
        multiply(program._replace(start=(tile * WARPGROUPS + warpgroup) * ROWS))


def visit_visible_blocks(
    visits: BlockVisits | None,
    masked: Index,
    count: Index,
    step: Callable[[jax.Array, Carry, bool], Carry],
    carry: Carry,
) -> Carry:
    """Runs ``step(visit, carry, is_masked)`` for the visits of
    :func:`order_visits`."""
    if visits is not None:
        carry = lax.fori_loop(
            0, masked, lambda visit, carry: step(visit, carry, True), carry
        )
    return lax.fori_loop(
        masked, count, lambda visit, carry: step(visit, carry, False), carry
    )


def cut_rows(ref: Ref, row: jax.Array, head: jax.Array, rows: Span) -> Ref:
    """Cuts rows of a sequence from [B, S, N, H], [B, N, S] or [B, S]."""
    ndim = len(ref.shape)
    if ndim == 4:
        return ref.at[row, rows, head]
    if ndim == 3:
        return ref.at[row, head, rows]
    return ref.at[row, rows]


def copy_resident_tiles(program: HopperProgram) -> None:
    """Copies what a warpgroup keeps all the time, and waits for it."""
    p = program
    ready = p.shared["resident_ready"].at[p.warpgroup]
    for name in p.statics.resident:
        source = cut_rows(p.inputs[name], p.row, p.head, p.rows)
        plgpu.copy_gmem_to_smem(source, p.shared[name].at[p.warpgroup], ready)
    plgpu.barrier_wait(ready)


def make_buffers(
    s: HopperStatics, inputs: dict[str, jax.Array], dtype: DTypeLike
) -> dict[str, SharedMemory]:
    """Returns buffers of what is copied, and of columns of a warpgroup's results, if
    these are not in the operands' ``dtype``; and barriers: "ready" when all has
    arrived, and "free" when all warpgroups that multiply have read it."""

    def make_buffer(name: str, *rows: int) -> SharedMemory:
        array = inputs[name]
        transforms = SWIZZLED if array.ndim == 4 else ()
        shape = (*rows, *array.shape[3:])
        return plgpu.SMEM(shape, array.dtype, transforms=transforms)

    buffers = {name: make_buffer(name, WARPGROUPS, ROWS) for name in s.resident}
    buffers["resident_ready"] = plgpu.Barrier(
        num_barriers=WARPGROUPS, num_arrivals=len(s.resident)
    )
    for names in s.visited:
        for name in names:
            buffers[name] = make_buffer(name, s.stages, s.block)
        buffers[f"{names[0]}_ready"] = plgpu.Barrier(
            num_barriers=s.stages, num_arrivals=len(names)
        )
        buffers[f"{names[0]}_free"] = plgpu.Barrier(
            num_barriers=s.stages, num_arrivals=WARPGROUPS
        )
    if jnp.dtype(dtype) != inputs["q"].dtype:
        # Columns of 128 bytes, which is what a swizzled tile has.
        is_fp32 = jnp.dtype(dtype).itemsize == 4
        columns = 32 if is_fp32 else 64
        swizzled = SWIZZLED_FP32 if is_fp32 else SWIZZLED
        shape = (WARPGROUPS, ROWS, columns)
        buffers["staged"] = plgpu.SMEM(shape, dtype, transforms=swizzled)
    return buffers


def copy_key_value_blocks(program: HopperProgram) -> None:
    """Copies blocks of keys and values, in the warpgroup that copies; keys past the
    last are zeros."""
    s = program.statics
    kv_head = lax.div(program.head, s.group)
    _, total, block_of = order_visits(program.visits, pl.cdiv(s.T, s.block))

    @pl.loop(0, total)
    def copy_visited(visit):
        copy_block(program, visit, kv_head, block_of(visit))


def copy_block(
    program: HopperProgram, visit: jax.Array, head: jax.Array, block: jax.Array
) -> None:
    """Copies a block to the slot of a visit, when its readers are done with that."""
    s = program.statics
    shared = program.shared
    slot = lax.rem(visit, jnp.int32(s.stages))
    rows = pl.ds(block * s.block, s.block)
    for names in s.visited:

        @pl.when(visit >= s.stages)
        def wait_for_readers(names=names):
            plgpu.barrier_wait(shared[f"{names[0]}_free"].at[slot])

        for name in names:
            source = cut_rows(program.inputs[name], program.row, head, rows)
            ready = shared[f"{names[0]}_ready"]
            plgpu.copy_gmem_to_smem(source, shared[name].at[slot], ready.at[slot])


def release_slot(s: HopperStatics, free: Ref) -> None:
    """Signals that this warpgroup has read a slot."""
    if s.interpret:
        # The interpreter takes reads that are not TMA's or wgmma's as unordered with
        # copies.
        plgpu.commit_smem()
    plgpu.barrier_arrive(free)


def resolve_interpreter(interpret: Interpret) -> Interpret:
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
    copy: Callable[[HopperProgram], None],
    multiply: Callable[[HopperProgram], None],
    inputs: dict[str, jax.Array],
    operands: AttentionOperands,
    call: AttentionCall,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    *,
    per_query: bool,
    block: int,
    stages: int,
    resident: tuple[str, ...],
    visited: tuple[tuple[str, ...], ...],
    scratch: dict[str, SharedMemory] | None = None,
) -> tuple[jax.Array, ...]:
    """Runs warpgroups over a grid (heads, tiles, batch rows).

    Args:
        copy, multiply: what the warpgroups do; see :func:`run_warpgroups`.
        inputs: by name; q, k and v among them.
        shapes: of the outputs.
        per_query: whether tiles are of queries, which visit blocks of keys; or the
            reverse.
        block, stages, resident, visited: as in :class:`HopperStatics`; of names without an
            input nothing is copied.
        scratch: beside :func:`make_buffers`.
    """
    params = call.params
    interpret = resolve_interpreter(call.interpret)
    B, S, N, _ = inputs["q"].shape
    T, K = inputs["k"].shape[1:3]
    rows = ROWS * WARPGROUPS
    if per_query:
        num_heads = N
        length = S
        q_block = rows
        k_block = block
    else:
        num_heads = K
        length = T
        q_block = block
        k_block = rows
    # Whole blocks, whose queries past the last have no weight.
    inputs = inputs | gpu_blocks.list_mask_inputs(operands, params)
    for name in ("lse", "delta", "q_segments", "k_segments"):
        if name in inputs:
            array = inputs[name]
            size = k_block if name == "k_segments" else q_block
            missing = -array.shape[-1] % size
            padding = (*((0, 0),) * (array.ndim - 1), (0, missing))
            value = jnp.inf if name == "lse" else 0
            inputs[name] = jnp.pad(array, padding, constant_values=value)
    visits = gpu_blocks.plan_visits(
        q_block, k_block, operands, params, per_query=per_query
    )
    if visits is not None:
        inputs["visits"] = visits
    # Names that this call has no input for are left out.
    resident = tuple(name for name in resident if name in inputs)
    visited = tuple(
        tuple(name for name in names if name in inputs) for names in visited
    )
    s = HopperStatics(
        params,
        S=S,
        T=T,
        group=N // K,
        block=block,
        stages=stages,
        names=tuple(inputs),
        resident=resident,
        visited=visited,
        interpret=bool(interpret),
    )
    scratch = make_buffers(s, inputs, call.dtype) | (scratch or {})
    num_inputs = len(inputs)
    num_outputs = len(shapes)

    def body(*refs):
        # Inputs, outputs and scratch memory follow each other.
        outputs_end = num_inputs + num_outputs
        input_refs = dict(zip(s.names, refs[:num_inputs], strict=True))
        output_refs = refs[num_inputs:outputs_end]
        shared = dict(zip(scratch, refs[outputs_end:], strict=True))
        run_warpgroups(
            s,
            input_refs,
            output_refs,
            shared,
            copy,
            multiply,
            last_first=per_query and params.causal,
        )

    # Before jax 0.11 there is no such parameter.
    interpreter: dict[str, Any] = {"interpret": interpret} if interpret else {}
    return plgpu.kernel(
        body,
        out_type=shapes,
        scratch_types=tuple(scratch.values()),
        grid=(num_heads, pl.cdiv(length, rows), B),
        grid_names=("head", "tile", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **interpreter,
    )(*inputs.values())
