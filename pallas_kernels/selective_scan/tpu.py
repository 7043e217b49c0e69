"""The selective scan on a TPU: states stay in VMEM while a block of channels walks
through the tokens.

A step of the grid is a chunk of tokens of a block of channels; chunks of a row follow
each other, and the state [N, channels] is in scratch memory between them. Numbers of
state lie along the sublanes and channels along the lanes, so that a token's step size
and input are a row, and its B and C are columns. Columns are taken out of [N, chunk] by
a mask and a sum along the lanes, which costs a few operations a token however many
channels there are.

The backward pass walks through the chunks from the last to the first. It computes a
chunk's states again from that before it, which the forward pass kept, and has them in
VMEM while it walks back.

Shapes: R rows, T tokens, F channels, N numbers of state a channel, here in multiples of
8 tokens, 128 channels and 8 numbers.
"""

from collections.abc import Callable
from functools import partial
from math import log
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import find_largest_divisor, round_up
from pallas_kernels.kernel_types import Index, Interpret, Ref
from pallas_kernels.selective_scan.params import ScanParams
from pallas_kernels.selective_scan.xla import find_still_step

# Tokens of a chunk: as many as lanes, along which a chunk's B and C lie.
CHUNK = 128
_LANES = 128
_SUBLANES = 8
# Lanes of a block of channels, in multiples of 128: with 16 numbers of state, 512
# channels' states are 8 registers, and those of a chunk's tokens 4 MiB.
_MOST_LANE_TILES = 4
_LN_2 = log(2.0)


T = TypeVar("T")
"""An array, the blocks that it is cut into, or a reference to one of these."""


class _Operands(NamedTuple, Generic[T]):
    """A scan's arguments in the kernels' shapes."""

    x: T
    """[R, T, F]."""
    dt: T
    """[R, T, F]."""
    B: T
    """fp32 [R, N, T]."""
    C: T
    """fp32 [R, N, T]."""
    keep: T | None
    """fp32 [R, 1, T], 0 where a document begins, else 1; None: none does."""
    rates: T
    """fp32 [N, F], A / ln 2: decays are powers of two."""
    skip: T
    """fp32 [1, F], D."""
    bias: T | None
    """fp32 [1, F]."""


class _Blocks(NamedTuple):
    """Sizes of a step of the grid."""

    chunk: int
    """Tokens, a multiple of 8."""
    channels: int
    """A multiple of 128."""


def supports(params: ScanParams) -> bool:
    """Whether the kernels take these types."""
    return params.state.dtype == jnp.float32


def scan_forward(
    params: ScanParams,
    chunk_tokens: int,
    *,
    keeps_states: bool,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See ``xla.scan_forward``; the states before each chunk are [R, chunks, N, F], of
    chunks of the kernel's own size."""
    del chunk_tokens
    operands, blocks = _prepare(params)
    num_rows, num_tokens, num_channels = operands.x.shape
    num_states = len(operands.rates)
    num_chunks = num_tokens // blocks.chunk
    state = _pad(params.state.swapaxes(1, 2), (1, num_states), (2, num_channels))

    specs = _make_specs(operands, blocks, lambda k: k)
    state_spec = pl.BlockSpec(
        (None, num_states, blocks.channels), lambda r, f, k: (r, 0, f)
    )
    boundary_spec = pl.BlockSpec(
        (None, None, num_states, blocks.channels), lambda r, f, k: (r, k, 0, f)
    )
    state_shape = jax.ShapeDtypeStruct(state.shape, jnp.float32)
    boundary_shape = jax.ShapeDtypeStruct(
        (num_rows, num_chunks, num_states, num_channels), jnp.float32
    )
    rows = pltpu.VMEM((blocks.chunk, blocks.channels), jnp.float32)
    y, after, states = pl.pallas_call(
        partial(_forward_kernel, num_chunks=num_chunks),
        grid=(num_rows, num_channels // blocks.channels, num_chunks),
        in_specs=(specs, state_spec),
        out_specs=(specs.x, state_spec, boundary_spec if keeps_states else None),
        out_shape=(
            jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype),
            state_shape,
            boundary_shape if keeps_states else None,
        ),
        scratch_shapes=(
            pltpu.VMEM((num_states, blocks.channels), jnp.float32),
            (rows, rows, rows),
        ),
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="selective_scan",
    )(operands, state)
    after = _cut_state(after, params)
    return _cut_tokens(y, params), after, states


def scan_backward(
    params: ScanParams,
    states: jax.Array,
    d_y: jax.Array,
    d_state: jax.Array,
    chunk_tokens: int,
    *,
    interpret: Interpret = False,
) -> ScanParams:
    """See ``xla.scan_backward``; ``states`` are those of :func:`scan_forward`."""
    del chunk_tokens
    operands, blocks = _prepare(params)
    num_rows, num_tokens, num_channels = operands.x.shape
    num_states = len(operands.rates)
    num_chunks = num_tokens // blocks.chunk
    num_blocks = num_channels // blocks.channels
    d_after = _pad(d_state.swapaxes(1, 2), (1, num_states), (2, num_channels))
    padded_d_y = _pad(d_y, (1, num_tokens), (2, num_channels))

    def reverse(k: Index) -> Index:
        return num_chunks - 1 - k

    specs = _make_specs(operands, blocks, reverse)
    state_spec = pl.BlockSpec(
        (None, num_states, blocks.channels), lambda r, f, k: (r, 0, f)
    )
    boundary_spec = pl.BlockSpec(
        (None, None, num_states, blocks.channels), lambda r, f, k: (r, reverse(k), 0, f)
    )
    # Sums over a block's channels; the blocks' are added by XLA.
    column_spec = pl.BlockSpec(
        (None, None, num_states, blocks.chunk), lambda r, f, k: (r, f, 0, reverse(k))
    )
    state_shape = jax.ShapeDtypeStruct(d_after.shape, jnp.float32)
    column_shape = jax.ShapeDtypeStruct(
        (num_rows, num_blocks, num_states, num_tokens), jnp.float32
    )
    rows = pltpu.VMEM((blocks.chunk, blocks.channels), jnp.float32)
    one_state = pltpu.VMEM((num_states, blocks.channels), jnp.float32)
    chunk_states = pltpu.VMEM((blocks.chunk, num_states, blocks.channels), jnp.float32)
    d_x, d_dt, d_B, d_C, d_rates, d_before = pl.pallas_call(
        partial(_backward_kernel, num_chunks=num_chunks),
        grid=(num_rows, num_blocks, num_chunks),
        in_specs=(specs, boundary_spec, specs.x, state_spec),
        out_specs=(
            specs.x,
            specs.dt,
            column_spec,
            column_spec,
            state_spec,
            state_spec,
        ),
        out_shape=(
            jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype),
            jax.ShapeDtypeStruct(operands.dt.shape, operands.dt.dtype),
            column_shape,
            column_shape,
            state_shape,
            state_shape,
        ),
        scratch_shapes=(
            one_state,
            one_state,
            chunk_states,
            (rows, rows, rows, rows, rows),
        ),
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="selective_scan_backward",
    )(operands, states, padded_d_y, d_after)

    def sum_blocks(columns: jax.Array, like: jax.Array) -> jax.Array:
        by_token = jnp.sum(columns, axis=1).swapaxes(1, 2)
        return by_token[:, : like.shape[1], : like.shape[2]].astype(like.dtype)

    channels, real_states = params.A.shape
    d_dt = _cut_tokens(d_dt, params)
    d_bias = None
    if params.dt_bias is not None:
        d_bias = jnp.sum(d_dt.astype(jnp.float32), axis=(0, 1))
        d_bias = d_bias.astype(params.dt_bias.dtype)
    d_skip = jnp.sum(
        d_y.astype(jnp.float32) * params.x.astype(jnp.float32), axis=(0, 1)
    )
    d_A = jnp.sum(d_rates, axis=0)[:real_states, :channels].T
    return ScanParams(
        x=_cut_tokens(d_x, params),
        dt=d_dt,
        A=d_A.astype(params.A.dtype),
        B=sum_blocks(d_B, params.B),
        C=sum_blocks(d_C, params.C),
        D=d_skip.astype(params.D.dtype),
        dt_bias=d_bias,
        starts=None,
        state=_cut_state(d_before, params),
    )


def _forward_kernel(
    operands: _Operands[Ref],
    initial_ref: Ref,
    y_ref: Ref,
    after_ref: Ref,
    boundary_ref: Ref | None,
    state_ref: Ref,
    row_refs: tuple[Ref, Ref, Ref],
    *,
    num_chunks: int,
):
    """One chunk of a block of channels.

    Args:
        operands: references to its parts of them.
        initial_ref: [N, channels], before the row.
        y_ref: [chunk, channels].
        after_ref: [N, channels], after the row.
        boundary_ref: [N, channels], before the chunk.
        state_ref: [N, channels], between chunks.
        row_refs: [chunk, channels]: step sizes, their products with x, and y.
    """
    step_ref, drive_ref, sum_ref = row_refs
    chunk_index = pl.program_id(2)

    @pl.when(chunk_index == 0)
    def read_initial_state():
        state_ref[...] = initial_ref[...]

    if boundary_ref is not None:
        boundary_ref[...] = state_ref[...]
    _write_steps(operands, step_ref, drive_ref)
    columns = _Columns(operands)
    rates = operands.rates[...]

    def run_group(group: jax.Array, state: jax.Array) -> jax.Array:
        rows = pl.ds(group * _SUBLANES, _SUBLANES)
        steps = step_ref[rows, :]
        drives = drive_ref[rows, :]
        sums = jnp.zeros_like(steps)
        for j in range(_SUBLANES):
            token = columns.select(group * _SUBLANES + j)
            decay = token.compute_decay(steps[j : j + 1], rates)
            state = decay * state + drives[j : j + 1] * token.B
            y = jnp.sum(state * token.C, axis=0, keepdims=True)
            sums = _put_row(sums, j, y)
        sum_ref[rows, :] = sums
        return state

    num_groups = len(y_ref) // _SUBLANES
    state_ref[...] = lax.fori_loop(0, num_groups, run_group, state_ref[...])
    x = operands.x[...].astype(jnp.float32)
    y = sum_ref[...] + operands.skip[...] * x
    y_ref[...] = y.astype(y_ref.dtype)

    @pl.when(chunk_index == num_chunks - 1)
    def write_last_state():
        after_ref[...] = state_ref[...]


def _backward_kernel(
    operands: _Operands[Ref],
    boundary_ref: Ref,
    d_y_ref: Ref,
    d_after_ref: Ref,
    d_x_ref: Ref,
    d_dt_ref: Ref,
    d_B_ref: Ref,
    d_C_ref: Ref,
    d_rates_ref: Ref,
    d_before_ref: Ref,
    d_state_ref: Ref,
    rate_sum_ref: Ref,
    states_ref: Ref,
    row_refs: tuple[Ref, Ref, Ref, Ref, Ref],
    *,
    num_chunks: int,
):
    """One chunk of a block of channels, from its last token to its first.

    Args:
        operands: references to its parts of them.
        boundary_ref: [N, channels], the state before the chunk.
        d_y_ref: [chunk, channels].
        d_after_ref: [N, channels], gradient of the state after the row.
        d_x_ref, d_dt_ref: [chunk, channels].
        d_B_ref, d_C_ref: [N, chunk], of these channels.
        d_rates_ref: [N, channels], gradient of A, not of A / ln 2.
        d_before_ref: [N, channels], gradient of the state before the row.
        d_state_ref, rate_sum_ref: [N, channels], between chunks.
        states_ref: [chunk, N, channels], before each token.
        row_refs: [chunk, channels]: step sizes, their products with x, d_y, and the
            gradients of steps by way of decays and of these products.
    """
    step_ref, drive_ref, wide_d_y_ref, d_step_ref, d_drive_ref = row_refs
    chunk_index = pl.program_id(2)

    @pl.when(chunk_index == 0)
    def start_at_the_end():
        d_state_ref[...] = d_after_ref[...]
        rate_sum_ref[...] = jnp.zeros_like(rate_sum_ref)

    _write_steps(operands, step_ref, drive_ref)
    wide_d_y_ref[...] = d_y_ref[...].astype(jnp.float32)
    columns = _Columns(operands)
    rates = operands.rates[...]
    num_groups = len(d_y_ref) // _SUBLANES

    def recompute_group(group: jax.Array, state: jax.Array) -> jax.Array:
        rows = pl.ds(group * _SUBLANES, _SUBLANES)
        steps = step_ref[rows, :]
        drives = drive_ref[rows, :]
        for j in range(_SUBLANES):
            index = group * _SUBLANES + j
            states_ref[index] = state
            token = columns.select(index)
            decay = token.compute_decay(steps[j : j + 1], rates)
            state = decay * state + drives[j : j + 1] * token.B
        return state

    last = lax.fori_loop(0, num_groups, recompute_group, boundary_ref[...])

    def reverse_group(count: jax.Array, carry: _ReverseCarry) -> _ReverseCarry:
        group = num_groups - 1 - count
        rows = pl.ds(group * _SUBLANES, _SUBLANES)
        steps = step_ref[rows, :]
        drives = drive_ref[rows, :]
        d_ys = wide_d_y_ref[rows, :]
        d_steps = jnp.zeros_like(steps)
        d_drives = jnp.zeros_like(steps)
        d_state, rate_sum, after, d_B, d_C = carry
        for j in reversed(range(_SUBLANES)):
            index = group * _SUBLANES + j
            token = columns.select(index)
            step = steps[j : j + 1]
            d_y = d_ys[j : j + 1]
            before = states_ref[index]
            # y = Σ_n C · h; h = decay · before + B · drive.
            d_C = token.put_column(d_C, after * d_y)
            d_state = d_state + d_y * token.C
            d_B = token.put_column(d_B, d_state * drives[j : j + 1])
            d_drive = jnp.sum(d_state * token.B, axis=0, keepdims=True)
            d_drives = _put_row(d_drives, j, d_drive)
            d_state = d_state * token.compute_decay(step, rates)
            # decay = exp(dt · A), and so d decay · decay = d_state · before.
            d_exponent = d_state * before
            rate_sum = rate_sum + d_exponent * step
            d_step = jnp.sum(d_exponent * rates, axis=0, keepdims=True)
            d_steps = _put_row(d_steps, j, d_step)
            after = before
        d_step_ref[rows, :] = d_steps
        d_drive_ref[rows, :] = d_drives
        return _ReverseCarry(d_state, rate_sum, after, d_B, d_C)

    zeros = jnp.zeros(d_B_ref.shape, jnp.float32)
    carry = _ReverseCarry(d_state_ref[...], rate_sum_ref[...], last, zeros, zeros)
    carry = lax.fori_loop(0, num_groups, reverse_group, carry)
    d_state_ref[...] = carry.d_state
    rate_sum_ref[...] = carry.rate_sum
    d_B_ref[...] = carry.d_B
    d_C_ref[...] = carry.d_C

    x = operands.x[...].astype(jnp.float32)
    steps = step_ref[...]
    d_drive = d_drive_ref[...]
    d_x = d_drive * steps + operands.skip[...] * wide_d_y_ref[...]
    d_x_ref[...] = d_x.astype(d_x_ref.dtype)
    # The rates are A / ln 2.
    d_dt = d_step_ref[...] * _LN_2 + d_drive * x
    if operands.bias is not None:
        raw = operands.dt[...].astype(jnp.float32) + operands.bias[...]
        d_dt = d_dt / (1 + jnp.exp(-raw))
    d_dt_ref[...] = d_dt.astype(d_dt_ref.dtype)

    @pl.when(chunk_index == num_chunks - 1)
    def write_sums():
        d_rates_ref[...] = rate_sum_ref[...]
        d_before_ref[...] = d_state_ref[...]


class _ReverseCarry(NamedTuple):
    """What goes from one token to the one before it."""

    d_state: jax.Array
    """[N, channels]."""
    rate_sum: jax.Array
    """[N, channels]: gradient of A so far."""
    after: jax.Array
    """[N, channels]: the state after the token."""
    d_B: jax.Array
    """[N, chunk]."""
    d_C: jax.Array
    """[N, chunk]."""


class _TokenColumns(NamedTuple):
    """One token's numbers that all channels share."""

    B: jax.Array
    """[N, 1]."""
    C: jax.Array
    """[N, 1]."""
    keep: jax.Array | None
    """[1, 1]."""
    mask: jax.Array
    """bool [N, chunk]: the token's column."""

    def compute_decay(self, step: jax.Array, rates: jax.Array) -> jax.Array:
        """Returns [N, channels] of a step [1, channels]."""
        decay = jnp.exp2(step * rates)
        return decay if self.keep is None else decay * self.keep

    def put_column(self, columns: jax.Array, terms: jax.Array) -> jax.Array:
        """Returns columns [N, chunk] with the token's set to the sum of terms [N,
        channels]."""
        return jnp.where(self.mask, jnp.sum(terms, axis=1, keepdims=True), columns)


class _Columns:
    """A chunk's columns in registers."""

    def __init__(self, operands: _Operands[Ref]):
        self.B = operands.B[...]
        self.C = operands.C[...]
        self.keep = None if operands.keep is None else operands.keep[...]
        self.index = lax.broadcasted_iota(jnp.int32, self.B.shape, 1)

    def select(self, token: jax.Array) -> _TokenColumns:
        mask = self.index == token

        def take(columns: jax.Array, mask: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask, columns, 0.0), axis=1, keepdims=True)

        keep = None
        if self.keep is not None:
            keep = take(self.keep, self.index[:1] == token)
        return _TokenColumns(take(self.B, mask), take(self.C, mask), keep, mask)


def _write_steps(operands: _Operands[Ref], step_ref: Ref, drive_ref: Ref) -> None:
    """Writes step sizes, and their products with x, for all tokens of a chunk."""
    steps = operands.dt[...].astype(jnp.float32)
    if operands.bias is not None:
        raw = steps + operands.bias[...]
        # softplus, without overflow.
        steps = jnp.maximum(raw, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(raw)))
    step_ref[...] = steps
    drive_ref[...] = steps * operands.x[...].astype(jnp.float32)


def _put_row(rows: jax.Array, index: int, row: jax.Array) -> jax.Array:
    """Returns rows [8, channels] with one set to a row [1, channels]."""
    place = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return jnp.where(place == index, row, rows)


def _prepare(params: ScanParams) -> tuple[_Operands[jax.Array], _Blocks]:
    """Returns the arguments in the kernels' shapes, and the sizes of their blocks.
    Tokens, channels and numbers of state that fill these up change nothing."""
    num_tokens = params.x.shape[1]
    channels, num_states = params.A.shape
    chunk = min(CHUNK, round_up(num_tokens, _SUBLANES))
    tokens = round_up(num_tokens, chunk)
    lane_tiles = -(-channels // _LANES)
    blocks = _Blocks(chunk, find_largest_divisor(lane_tiles, _MOST_LANE_TILES) * _LANES)
    padded_channels = lane_tiles * _LANES
    states = round_up(num_states, _SUBLANES)

    def make_columns(array: jax.Array) -> jax.Array:
        turned = array.astype(jnp.float32).swapaxes(1, 2)
        return _pad(turned, (1, states), (2, tokens))

    def make_row(array: jax.Array) -> jax.Array:
        return _pad(array.astype(jnp.float32)[None], (1, padded_channels))

    keep = None
    if params.starts is not None:
        starts = _pad(params.starts.astype(jnp.float32)[:, None], (2, tokens))
        keep = 1.0 - starts
    still = find_still_step(params.dt_bias)
    dt = _pad(params.dt, (1, tokens), fill_value=still)
    operands = _Operands(
        x=_pad(params.x, (1, tokens), (2, padded_channels)),
        dt=_pad(dt, (2, padded_channels)),
        B=make_columns(params.B),
        C=make_columns(params.C),
        keep=keep,
        rates=_pad(
            params.A.T.astype(jnp.float32) / _LN_2, (0, states), (1, padded_channels)
        ),
        skip=make_row(params.D),
        bias=None if params.dt_bias is None else make_row(params.dt_bias),
    )
    return operands, blocks


def _make_specs(
    operands: _Operands[jax.Array],
    blocks: _Blocks,
    find_chunk: Callable[[Index], Index],
) -> _Operands[pl.BlockSpec]:
    """Returns blocks of the operands; ``find_chunk`` maps the grid's last index to a
    chunk."""
    chunk, channels = blocks
    num_states = len(operands.rates)
    tokens = pl.BlockSpec(
        (None, chunk, channels), lambda r, f, k: (r, find_chunk(k), f)
    )
    columns = pl.BlockSpec(
        (None, num_states, chunk), lambda r, f, k: (r, 0, find_chunk(k))
    )
    keep = pl.BlockSpec((None, 1, chunk), lambda r, f, k: (r, 0, find_chunk(k)))
    vector = pl.BlockSpec((1, channels), lambda r, f, k: (0, f))
    return _Operands(
        x=tokens,
        dt=tokens,
        B=columns,
        C=columns,
        keep=None if operands.keep is None else keep,
        rates=pl.BlockSpec((num_states, channels), lambda r, f, k: (0, f)),
        skip=vector,
        bias=None if operands.bias is None else vector,
    )


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
    )


def _pad(
    array: jax.Array, *sizes: tuple[int, int], fill_value: float = 0.0
) -> jax.Array:
    """Fills dimensions up to sizes, (dimension, size) each."""
    widths = [(0, 0)] * array.ndim
    for dim, size in sizes:
        widths[dim] = (0, size - array.shape[dim])
    return jnp.pad(array, widths, constant_values=fill_value)


def _cut_tokens(array: jax.Array, params: ScanParams) -> jax.Array:
    """Returns [R, T, F] without what :func:`_prepare` added."""
    _, num_tokens, channels = params.x.shape
    return array[:, :num_tokens, :channels]


def _cut_state(state: jax.Array, params: ScanParams) -> jax.Array:
    """Returns [R, F, N] of a state in the kernels' shape."""
    channels, num_states = params.A.shape
    return state[:, :num_states, :channels].swapaxes(1, 2)
