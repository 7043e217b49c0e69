"""The Pallas TPU kernels of a linear head's cross-entropy; see :mod:`.tpu` for what they are for.

Both walk over blocks [tokens, D] of the hidden states and [vocab, D] of the head's table, whose
product, a block of logits, is used where it is made.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TpuChip
from pallas_kernels.linear_cross_entropy.blocks import LANES, CrossEntropyBlocks, part_rows_size
from pallas_kernels.linear_cross_entropy.parts import apply_soft_cap, soft_cap_gradient

# exp of what stays below this is far from fp32's end, also summed over a vocabulary.
_HIGHEST = 60.0
_LOWEST = -1e30
# Rows that are worked on at once where no matrix product sets the size.
_ROWS = 64
_BY_ROWS = (((1,), (1,)), ((), ()))


def forward(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    blocks: CrossEntropyBlocks,
    gradient: bool,
    soft_cap: float | None,
    chip: TpuChip,
    interpret: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Softmax over the vocabulary without each token's target.

    A grid step (t, v) makes the logits of its blocks, and uses those of block v − 1: exponentials
    wait for nothing, and the vector units work under the matrix unit. So there is one step more
    than blocks, and a block of the table is read twice.

        step      0    1    2   ...  n
        logits    0    1    2
        weights        0    1        n − 1

    Args:
        hidden: [T, D], T a multiple of ``blocks.tokens``.
        table: [V, D].
        targets: int32 [T], −1 for none.

    Returns:
        fp32 [T], the log-sum-exp of the logits; fp32 [T, D], the mean of the table's rows by their
        softmax (times the cap's slope), or None.
    """
    (T, D), V = hidden.shape, len(table)
    tokens, vocab = blocks
    last = pl.cdiv(V, vocab) - 1
    column = pl.BlockSpec((tokens, 1), lambda t, v: (t, 0))
    rows = pl.BlockSpec((tokens, D), lambda t, v: (t, 0), pipeline_mode=pl.Buffered(1))
    own = pl.BlockSpec((vocab, D), lambda t, v: (jnp.minimum(v, last), 0))
    before = pl.BlockSpec((vocab, D), lambda t, v: (jnp.maximum(v - 1, 0), 0))
    fp32 = partial(pltpu.VMEM, dtype=jnp.float32)
    results = pl.pallas_call(
        partial(
            _forward,
            vocab=V,
            part=part_rows_size(tokens, chip),
            soft_cap=soft_cap,
            gradient=gradient,
        ),
        grid=(T // tokens, last + 2),
        in_specs=[column, rows, own, *[before] * gradient],
        out_specs=[column, *[rows] * gradient],
        out_shape=[
            jax.ShapeDtypeStruct((T, 1), jnp.float32),
            *[jax.ShapeDtypeStruct((T, D), jnp.float32)] * gradient,
        ],
        scratch_shapes=[
            fp32((tokens, vocab)),
            fp32((tokens, 1)),
            fp32((tokens, LANES)),
            fp32((tokens, LANES)),
            fp32((8, LANES)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=chip.vmem
        ),
        cost_estimate=_cost(hidden, table, products=1 + gradient),
        name="linear_cross_entropy_forward",
        interpret=interpret,
    )(targets[:, None], hidden, table, *[table] * gradient)
    return results[0][:, 0], results[1] if gradient else None


def _forward(targets, hidden, table, *refs, vocab, part, soft_cap, gradient):
    before: Any = refs[0] if gradient else None
    logsumexp, *mean = refs[gradient : 1 + 2 * gradient]
    logits, shift, total, top, highest = refs[1 + 2 * gradient :]
    sums = [total, *mean]
    tokens, size = logits.shape
    v, end = pl.program_id(1), pl.num_programs(1) - 1
    tail = vocab % size

    @pl.when(v == 0)
    def _():
        shift[...] = jnp.zeros_like(shift)
        highest[...] = jnp.zeros_like(highest)

        @_by_rows(tokens)
        def _(r):
            logits[r, :] = jnp.full((_ROWS, size), -jnp.inf, jnp.float32)
            for ref in sums:
                ref[r, :] = jnp.zeros((_ROWS, ref.shape[1]), jnp.float32)

    # The logits held are relative to ``shift``: exactly each token's highest in the first block,
    # later whatever keeps exp finite, so that sums are hardly ever scaled again.
    @pl.when((v == 1) | (jnp.max(highest[...]) > _HIGHEST))
    def _():
        @_by_rows(tokens)
        def _(r):
            rise = jnp.maximum(jnp.max(top[r, :], axis=1, keepdims=True), _LOWEST)
            rise = jnp.where(v == 1, rise, jnp.maximum(rise, 0.0))
            shift[r, :] += rise
            logits[r, :] -= rise
            for ref in sums:
                ref[r, :] *= jnp.where(v == 1, 0.0, jnp.exp(-rise))

    if gradient and tail:  # what lies past the vocabulary's end may be NaN, which 0 does not undo

        @pl.when(jnp.maximum(v, 1) == end)
        def _():
            within = lax.broadcasted_iota(jnp.int32, (_ROWS, 1), 0)

            @_by_rows(size)
            def _(r):
                before[r, :] = jnp.where(within + r.start < tail, before[r, :], 0)

    highest[...] = jnp.full_like(highest, -jnp.inf)

    @_by_rows(tokens, part)
    def _(r):
        weight = jnp.exp(logits[r, :])
        total[r, :] += _fold(jnp.add, weight)
        if soft_cap is not None:
            # What is left out is −∞ here, and its weight 0.
            weight *= soft_cap_gradient(
                jnp.maximum(logits[r, :] + shift[r, :], -soft_cap), soft_cap
            )
        score = lax.dot_general(
            hidden[r, :], table[...], _BY_ROWS, preferred_element_type=jnp.float32
        )
        score = apply_soft_cap(score, soft_cap) - shift[r, :]
        index = lax.broadcasted_iota(jnp.int32, score.shape, 1)
        left_out = index == targets[r, :] - v * size
        if tail:
            left_out |= index >= vocab - v * size
        score = jnp.where(left_out, -jnp.inf, score)
        logits[r, :] = score
        score = _fold(jnp.maximum, score)
        top[r, :] = score
        highest[...] = jnp.maximum(highest[...], jnp.max(score.reshape(-1, 8, LANES), axis=0))
        if gradient:
            mean[0][r, :] += jnp.dot(
                weight.astype(before.dtype), before[...], preferred_element_type=jnp.float32
            )

    @pl.when(v == end)
    def _():
        @_by_rows(tokens)
        def _(r):
            whole = jnp.sum(total[r, :], axis=1, keepdims=True)
            logsumexp[r, :] = shift[r, :] + jnp.log(whole)
            if gradient:
                mean[0][r, :] /= jnp.where(whole > 0, whole, 1.0)


def head_gradient(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    logsumexp: jax.Array,
    d_logsumexp: jax.Array,
    d_target: jax.Array,
    *,
    blocks: CrossEntropyBlocks,
    soft_cap: float | None,
    chip: TpuChip,
    interpret: Any,
) -> jax.Array:
    """Gradient of the head's table: Σ of hidden · (d_logsumexp · softmax + d_target · onehot).

    Logits are made transposed, so that nothing is turned over.

    Args:
        hidden: [T, D], T a multiple of ``blocks.tokens``.
        table: [V, D].
        targets: int32 [T], −1 for none.
        logsumexp, d_logsumexp, d_target: fp32 [T], over the whole vocabulary.

    Returns:
        [V, D] in the table's dtype, summed in fp32.
    """
    (T, D), V = hidden.shape, len(table)
    tokens, vocab = blocks
    row = pl.BlockSpec((1, tokens), lambda v, t: (0, t))
    entries = pl.BlockSpec((vocab, D), lambda v, t: (v, 0))
    return pl.pallas_call(
        partial(_head_gradient, part=part_rows_size(vocab, chip), soft_cap=soft_cap),
        grid=(pl.cdiv(V, vocab), T // tokens),
        in_specs=[*[row] * 4, pl.BlockSpec((tokens, D), lambda v, t: (t, 0)), entries],
        out_specs=entries,
        out_shape=jax.ShapeDtypeStruct((V, D), table.dtype),
        scratch_shapes=[pltpu.VMEM((vocab, D), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=chip.vmem
        ),
        cost_estimate=_cost(hidden, table, products=2),
        name="linear_cross_entropy_head_gradient",
        interpret=interpret,
    )(*(x[None] for x in (targets, logsumexp, d_logsumexp, d_target)), hidden, table)


def _head_gradient(
    targets, logsumexp, d_logsumexp, d_target, hidden, table, d_table, total, *, part, soft_cap
):
    size = len(total)
    v, t = pl.program_id(0), pl.program_id(1)

    @pl.when(t == 0)
    def _():
        @_by_rows(size)
        def _(r):
            total[r, :] = jnp.zeros((_ROWS, total.shape[1]), jnp.float32)

    @_by_rows(size, part)
    def _(r):
        logits = lax.dot_general(
            table[r, :], hidden[...], _BY_ROWS, preferred_element_type=jnp.float32
        )
        logits = apply_soft_cap(logits, soft_cap)
        index = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        is_target = index == targets[...] - (v * size + r.start)
        d_logits = jnp.exp(logits - logsumexp[...]) * d_logsumexp[...]
        d_logits += jnp.where(is_target, d_target[...], 0.0)
        d_logits *= soft_cap_gradient(logits, soft_cap)
        total[r, :] += jnp.dot(
            d_logits.astype(hidden.dtype), hidden[...], preferred_element_type=jnp.float32
        )

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        @_by_rows(size)
        def _(r):
            d_table[r, :] = total[r, :].astype(d_table.dtype)


def _cost(hidden, table, products):
    """For XLA's schedule of what runs beside a kernel; bytes are those read once."""
    (T, D), V = hidden.shape, len(table)
    return pl.CostEstimate(
        flops=2 * products * T * D * V,
        transcendentals=T * V,
        bytes_accessed=(T + V) * D * hidden.dtype.itemsize,
    )


def _by_rows(count, size=_ROWS):
    """Calls a function with each slice of so many rows, in a loop."""

    def run(function):
        def body(i, _):
            function(pl.ds(pl.multiple_of(i * size, size), size))
            return 0

        lax.fori_loop(0, count // size, body, 0)

    return run


def _fold(function, x):
    """[r, n · LANES] → [r, LANES]."""
    out = x[:, :LANES]
    for start in range(LANES, x.shape[1], LANES):
        out = function(out, x[:, start : start + LANES])
    return out
