"""Mamba's selective scan along sequences on a mesh: each device has its own rows,
channels, and runs of a split sequence.

Shapes: B batch, S sequence, F channels, N numbers of state a channel. On shards: b rows,
K runs of a row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.differentiable import ShardSpecs, run_on_shards
from maxlm.parallel.local import axis_indices
from maxlm.parallel.runs import (
    SequenceContext,
    SequenceRuns,
    count_device_runs,
    make_context_specs,
    split_runs,
)
from maxlm.sharding import AxisRules
from pallas_kernels.selective_scan import (
    ScanSummary,
    selective_scan,
    summarize_scan,
)


class SelectiveScanInputs(NamedTuple):
    """Arguments of a selective scan (``pallas_kernels.selective_scan``), as Mamba's
    layers have them."""

    x: jax.Array
    """[B, S, F]."""
    dt: jax.Array
    """[B, S, F]: softplus(dt + dt_bias) are the step sizes."""
    B: jax.Array
    """[B, S, N]."""
    C: jax.Array
    """[B, S, N]."""
    A_log: jax.Array
    """fp32 [F, N]: the rates of decay are −exp(A_log)."""
    D: jax.Array
    """fp32 [F]."""
    dt_bias: jax.Array
    """fp32 [F]."""


def sharded_selective_scan(
    inputs: SelectiveScanInputs,
    *,
    rules: AxisRules,
    feature_axis: str,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
) -> jax.Array:
    """Runs ``pallas_kernels.selective_scan`` on a mesh. Devices that share a sequence
    exchange what their runs do to the state, and then scan all at once: those twice,
    for what they do is found by a scan.

    Args:
        feature_axis: logical axis of the channels.
        segment_ids: int [B, S], documents of packed rows; None: a row is one.
        balanced: whether rows are in the balanced order of
            ``context.sequence_order_indices``.

    Returns:
        y [B, S, F] in x's dtype. With what the backward pass needs it has the name
        "attention" for remat policies.
    """
    seq_axes = rules.mesh_axes("seq")
    rows = rules.spec("batch", "seq", feature_axis)
    whole_rows = rules.spec("batch", "seq", None)
    features = rules.spec(feature_axis)
    specs = ShardSpecs(
        SelectiveScanInputs._make(
            (
                rows,  # x
                rows,  # dt
                whole_rows,  # B
                whole_rows,  # C
                rules.spec(feature_axis, None),  # A_log
                features,  # D
                features,  # dt_bias
            )
        ),
        make_context_specs(segment_ids, rules),
        rows,
    )

    num_runs = count_device_runs(seq_axes, balanced)

    def split_inputs(inputs: SelectiveScanInputs) -> SelectiveScanInputs:
        return inputs._replace(
            x=split_runs(inputs.x, num_runs),
            dt=split_runs(inputs.dt, num_runs),
            B=split_runs(inputs.B, num_runs),
            C=split_runs(inputs.C, num_runs),
        )

    def run_shard(inputs: SelectiveScanInputs, context: SequenceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.device_index)
        starts = runs.find_starts(context.segment_ids)
        x, dt, B, C, A_log, D, dt_bias = inputs
        A = -jnp.exp(A_log)
        state = None
        if runs.are_split:
            # One scan from zeros says what a run does to any state, since a state's
            # effect is linear in it: the product of the decays, and what is added.
            # Then all runs are scanned at once, each from the state before it.
            # Its backward pass would keep as many states as that of the runs themselves.
            summarize = jax.checkpoint(
                partial(summarize_scan, starts=starts), prevent_cse=False
            )
            summary = summarize(x, dt, A, B, dt_bias=dt_bias)
            state = runs.pass_on(summary, _find_states_before)
        y, _ = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias=dt_bias,
            starts=starts,
            initial_state=state,
        )
        return runs.join(y)

    context = SequenceContext(segment_ids, axis_indices(seq_axes))
    return run_on_shards(run_shard, inputs, context, specs, "attention", split_inputs)


def _find_states_before(summaries: ScanSummary) -> jax.Array:
    """Returns the state before each run of a row, [K, b, F, N], none before the
    first."""

    def advance(state: jax.Array, summary: ScanSummary) -> tuple[jax.Array, jax.Array]:
        return summary.advance(state), state

    zeros = jnp.zeros_like(summaries.offset[0])
    _, states = lax.scan(advance, zeros, summaries)
    return states
