"""Programs that run tokens in order, from a state: convolutions over earlier tokens and
linear recurrences, on a mesh.

Each device runs its own rows and features. Where the rules split the sequence
(**context parallelism**), a device holds one run of neighbouring tokens, or in balanced
order an early and a late one (:mod:`maxlm.parallel.context`), and states pass between
runs:

1. each run is summarized: what it does to a state before it;
2. the summaries of all runs are all-gathered, and each device applies them in the order
   of the sequence, from zeros;
3. each run is run from the state before it.

Traffic and memory are those of one state for each run, whatever the length of the
sequence. A document that goes on from the run before is not reset: starts come from
segment ids, with the last id of the run before. The backward pass goes the same way
back: gradients of states before runs become, by a reduce-scatter, those of summaries.

What is run is a :class:`SequenceOperator`; those of ``pallas_kernels`` are in
:mod:`maxlm.parallel.recurrence_kinds`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from maxlm.parallel.context import SequenceSplit, sequence_order_indices
from maxlm.parallel.layers import PyTree
from maxlm.parallel.local import (
    Axes,
    axis_indices,
    axis_size,
    make_spec,
    map_shards,
)
from maxlm.sharding import AxisRules
from pallas_kernels.linear_recurrence import find_segment_starts

LogicalAxes = tuple[str | None, ...]
Arrays = tuple[jax.Array, ...]


class SplitArray(NamedTuple):
    """An array, and how its dimensions are split over devices."""

    value: jax.Array
    axes: LogicalAxes
    """Logical axes: of all dimensions of a parameter; of those behind the first two of
    tokens, [B, S] or [D, S]."""


class SequenceOperator(Protocol):
    """Something that maps tokens in order, and passes a state from each to the next.

    All of it runs on one device's shards, for R rows of T neighbouring tokens: tokens
    are arrays [R, T, ...], states and summaries trees of floating-point arrays [R, ...].
    It has no collectives. Hashable, for it is a static argument.
    """

    mixes_features: ClassVar[bool]
    """Whether every output depends on every token array and parameter, so that the
    gradient of an array that is whole on devices which split others' features is a sum
    over these devices. Otherwise output i depends on token array i alone, and is split
    as that is."""
    saved_as: ClassVar[str | None]
    """The name by which remat policies keep outputs and residuals
    (``models/remat.py``); None: they compute them again."""

    @property
    def residual_axes(self) -> tuple[LogicalAxes, ...]:
        """Logical axes of each residual; ``batch`` for the dimension of rows."""
        ...

    def forward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: PyTree | None,
    ) -> tuple[Arrays, Arrays]:
        """Runs tokens from a state (None: zeros).

        Args:
            starts: bool [R, T], tokens before which the state is zero; None: none.

        Returns:
            Outputs [R, T, ...], and residuals: what :meth:`backward` wants of it beside
            its arguments.
        """
        ...

    def backward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: PyTree | None,
        residuals: Arrays,
        d_outputs: Arrays,
    ) -> tuple[Arrays, Arrays, PyTree | None]:
        """Returns gradients of tokens, params and state, of their dtypes."""
        ...

    def make_state(self, tokens: Arrays, params: Arrays, num_rows: int) -> PyTree:
        """Returns the state before any token, zeros."""
        ...

    def summarize(
        self, tokens: Arrays, params: Arrays, starts: jax.Array | None
    ) -> PyTree:
        """Returns what the tokens do to a state before them; JAX differentiates it."""
        ...

    def advance(self, summary: PyTree, state: PyTree) -> PyTree:
        """Returns the state behind tokens from the one before; JAX differentiates
        it."""
        ...


def run_sharded(
    operator: SequenceOperator,
    tokens: Sequence[SplitArray],
    *,
    params: Sequence[SplitArray] = (),
    output_axes: Sequence[LogicalAxes],
    rules: AxisRules,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
) -> Arrays:
    """Runs an operator over whole rows on a mesh, from zeros; differentiable by tokens
    and params.

    Args:
        tokens: arrays [B, S, ...], with rows and tokens laid out by ``rules``.
        params: arrays that all tokens read.
        output_axes: logical axes of each output's dimensions behind [B, S].
        segment_ids: int [B, S]; tokens that differ from the one before start from zero.
            None: each row is one document.
        balanced: whether rows stand in the balanced order of
            ``context.sequence_order_indices`` for the number of shards.

    Returns:
        Outputs [B, S, ...], laid out as tokens are.

    Raises:
        MaxlmError: a sequence that does not divide over its devices.
        ValueError: shapes that do not belong together.
    """
    seq_len = tokens[0].value.shape[1]
    layout = _Layout(
        rules,
        tuple(array.axes for array in tokens),
        tuple(array.axes for array in params),
        tuple(output_axes),
        balanced,
    )
    # Raises where the length does not divide.
    sequence_order_indices(seq_len, layout.num_shards, layout.num_runs > 1)
    return _run(
        tuple(array.value for array in tokens),
        tuple(array.value for array in params),
        segment_ids,
        operator,
        layout,
    )


class _Layout(NamedTuple):
    """How arrays lie on devices, and which runs of the sequence each device has."""

    rules: AxisRules
    token_axes: tuple[LogicalAxes, ...]
    param_axes: tuple[LogicalAxes, ...]
    output_axes: tuple[LogicalAxes, ...]
    balanced: bool

    @property
    def seq_axes(self) -> Axes:
        return self.rules.mesh_axes("seq")

    @property
    def num_shards(self) -> int:
        """Devices that share a row."""
        return axis_size(self.seq_axes)

    @property
    def num_runs(self) -> int:
        """Runs of neighbouring tokens that a device holds of a row."""
        return 2 if self.balanced and self.num_shards > 1 else 1

    @property
    def row_axes(self) -> Axes:
        """Mesh axes along which devices have different tokens."""
        return self.rules.mesh_axes("batch") + self.seq_axes

    def specs_of_tokens(self, axes: Sequence[LogicalAxes]) -> tuple[PartitionSpec, ...]:
        return tuple(self.rules.spec("batch", "seq", *names) for names in axes)

    @property
    def param_specs(self) -> tuple[PartitionSpec, ...]:
        return tuple(self.rules.spec(*names) for names in self.param_axes)

    def residual_specs(self, operator: SequenceOperator) -> tuple[PartitionSpec, ...]:
        """Returns specs of residuals, whose rows are those of all runs."""
        specs = []
        for names in operator.residual_axes:
            dims = [
                self.row_axes if name == "batch" else self.rules.mesh_axes(name)
                for name in names
            ]
            specs.append(make_spec(dims))
        return tuple(specs)

    def feature_axes(self, axes: LogicalAxes) -> set[str]:
        """Returns the mesh axes that split an array's features."""
        return {mesh_axis for name in axes for mesh_axis in self.rules.mesh_axes(name)}

    def sum_gradients(
        self, operator: SequenceOperator, d_tokens: Arrays, d_params: Arrays
    ) -> tuple[Arrays, Arrays]:
        """Sums gradients, on shards, over devices that have a part of each."""
        shared_axes: set[str] = set()
        if operator.mixes_features:
            for axes in (*self.token_axes, *self.param_axes, *self.output_axes):
                shared_axes |= self.feature_axes(axes)

        def sum_gradient(x: jax.Array, axes: LogicalAxes, row_axes: Axes) -> jax.Array:
            other_axes = shared_axes - self.feature_axes(axes)
            summed_axes = (*row_axes, *sorted(other_axes))
            return lax.psum(x, summed_axes) if summed_axes else x

        summed_tokens = tuple(
            sum_gradient(x, axes, ())
            for x, axes in zip(d_tokens, self.token_axes, strict=True)
        )
        summed_params = tuple(
            sum_gradient(x, axes, self.row_axes)
            for x, axes in zip(d_params, self.param_axes, strict=True)
        )
        return summed_tokens, summed_params


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _run(
    tokens: Arrays,
    params: Arrays,
    segment_ids: jax.Array | None,
    operator: SequenceOperator,
    layout: _Layout,
) -> Arrays:
    return _forward(tokens, params, segment_ids, operator, layout)[0]


def _forward(tokens, params, segment_ids, operator, layout):
    def local(tokens, params, segment_ids, shard_index):
        runs = _Runs(layout, shard_index)
        starts = runs.find_starts(segment_ids)
        run_tokens = runs.split(tokens)
        state = None
        if layout.num_shards > 1:
            summary = operator.summarize(run_tokens, params, starts)
            zeros = operator.make_state(run_tokens, params, len(tokens[0]))
            gathered = runs.gather(summary)
            state = runs.find_states(operator.advance, zeros, gathered)
        outputs, residuals = operator.forward(run_tokens, params, starts, state)
        return runs.join(outputs), residuals

    outputs, residuals = map_shards(
        local,
        in_specs=_operand_specs(layout, segment_ids),
        out_specs=(
            layout.specs_of_tokens(layout.output_axes),
            layout.residual_specs(operator),
        ),
    )(tokens, params, segment_ids, axis_indices(layout.seq_axes))
    if operator.saved_as is not None:
        # Named here and not outside: the backward pass wants the residuals, or all of
        # it is computed again.
        name = partial(checkpoint_name, name=operator.saved_as)
        outputs = tuple(map(name, outputs))
        residuals = tuple(map(name, residuals))
    return outputs, (tokens, params, segment_ids, residuals)


def _backward(operator, layout, saved, d_outputs):
    tokens, params, segment_ids, residuals = saved

    def local(tokens, params, segment_ids, shard_index, residuals, d_outputs):
        runs = _Runs(layout, shard_index)
        starts = runs.find_starts(segment_ids)
        run_tokens = runs.split(tokens)
        d_run_outputs = runs.split(d_outputs)
        if layout.num_shards == 1:
            d_tokens, d_params, _ = operator.backward(
                run_tokens, params, starts, None, residuals, d_run_outputs
            )
        else:

            def summarize(run_tokens, params):
                return operator.summarize(run_tokens, params, starts)

            summary, pull_summary = jax.vjp(summarize, run_tokens, params)
            zeros = operator.make_state(run_tokens, params, len(tokens[0]))
            gathered = runs.gather(summary)
            find_states = partial(runs.find_states, operator.advance, zeros)
            state, pull_states = jax.vjp(find_states, gathered)
            d_run_tokens, d_run_params, d_state = operator.backward(
                run_tokens, params, starts, state, residuals, d_run_outputs
            )
            (d_gathered,) = pull_states(d_state)
            d_summary = runs.scatter(d_gathered)
            d_summarized = pull_summary(d_summary)
            d_tokens, d_params = jax.tree.map(
                jnp.add, (d_run_tokens, d_run_params), d_summarized
            )
        d_tokens = runs.join(d_tokens)
        return layout.sum_gradients(operator, d_tokens, d_params)

    gradients = map_shards(
        local,
        in_specs=(
            *_operand_specs(layout, segment_ids),
            layout.residual_specs(operator),
            layout.specs_of_tokens(layout.output_axes),
        ),
        out_specs=(layout.specs_of_tokens(layout.token_axes), layout.param_specs),
    )(
        tokens,
        params,
        segment_ids,
        axis_indices(layout.seq_axes),
        residuals,
        d_outputs,
    )
    return *gradients, None


_run.defvjp(_forward, _backward)


def _operand_specs(
    layout: _Layout, segment_ids: jax.Array | None
) -> tuple[PyTree, ...]:
    """Returns the specs of tokens, params, segment ids and the devices' numbers."""
    segment_spec = None if segment_ids is None else layout.rules.spec("batch", "seq")
    return (
        layout.specs_of_tokens(layout.token_axes),
        layout.param_specs,
        segment_spec,
        make_spec((layout.seq_axes,)),
    )


class _Runs:
    """A device's runs of neighbouring tokens, and those of all devices in order.

    Rows of what an operator sees are [B · runs]: a device's runs of a row follow each
    other, for that is how its tokens lie.
    """

    def __init__(self, layout: _Layout, shard_index: jax.Array):
        self.axes = layout.seq_axes
        self.num_shards = layout.num_shards
        self.num_runs = layout.num_runs
        split = SequenceSplit(
            self.axes, "all_gather", self.num_runs > 1, causal=True, window=None
        )
        if self.num_shards > 1:
            self.numbers = jnp.stack(split.chunk_starts(shard_index[0], 1))
            """int32 [runs]: places in the sequence of this device's runs."""
        run_at_place = sequence_order_indices(
            self.num_shards * self.num_runs, self.num_shards, self.num_runs > 1
        )
        self.place_of_run: np.ndarray = np.argsort(run_at_place)

    def split(self, arrays: Arrays) -> Arrays:
        """[B, S, ...] → [B · runs, T, ...]."""

        def split_array(x: jax.Array) -> jax.Array:
            num_rows = x.shape[0] * self.num_runs
            return x.reshape(num_rows, x.shape[1] // self.num_runs, *x.shape[2:])

        return tuple(map(split_array, arrays))

    def join(self, arrays: Arrays) -> Arrays:
        """[B · runs, T, ...] → [B, S, ...]."""

        def join_array(x: jax.Array) -> jax.Array:
            num_rows = x.shape[0] // self.num_runs
            return x.reshape(num_rows, x.shape[1] * self.num_runs, *x.shape[2:])

        return tuple(map(join_array, arrays))

    def find_starts(self, segment_ids: jax.Array | None) -> jax.Array | None:
        """Returns where documents start, bool [B · runs, T]."""
        if segment_ids is None:
            return None
        (ids,) = self.split((segment_ids,))
        if self.num_shards == 1:
            return find_segment_starts(ids)
        last_ids = self.gather(ids[:, -1])
        # Before the first run is nothing; its state is zero whatever its starts are.
        ids_before = jnp.concatenate([last_ids[:1], last_ids[:-1]])
        return find_segment_starts(ids, self._select(ids_before))

    def gather(self, tree: PyTree) -> PyTree:
        """Gathers arrays of this device's runs, [B · runs, ...], to those of all runs
        in the order of the sequence, [all runs, B, ...]."""

        def gather_array(x: jax.Array) -> jax.Array:
            by_row = x.reshape(-1, self.num_runs, *x.shape[1:])
            by_run = jnp.moveaxis(by_row, 1, 0)
            gathered = lax.all_gather(by_run, self.axes, axis=0, tiled=True)
            return gathered[self.place_of_run]

        return jax.tree.map(gather_array, tree)

    def scatter(self, tree: PyTree) -> PyTree:
        """Sums arrays [all runs, B, ...] over devices, and returns this device's runs,
        [B · runs, ...]; transposes :meth:`gather`."""
        run_at_place = np.argsort(self.place_of_run)

        def scatter_array(x: jax.Array) -> jax.Array:
            summed = lax.psum_scatter(
                x[run_at_place], self.axes, scatter_dimension=0, tiled=True
            )
            by_row = jnp.moveaxis(summed, 0, 1)
            return by_row.reshape(-1, *by_row.shape[2:])

        return jax.tree.map(scatter_array, tree)

    def find_states(
        self,
        advance: Callable[[PyTree, PyTree], PyTree],
        zeros: PyTree,
        summaries: PyTree,
    ) -> PyTree:
        """Returns the states before this device's runs, [B · runs, ...].

        Args:
            advance: :meth:`SequenceOperator.advance`.
            zeros: the state before the first run.
            summaries: of all runs, [all runs, B, ...].
        """

        def step(state: PyTree, summary: PyTree) -> tuple[PyTree, PyTree]:
            return advance(summary, state), state

        _, states = lax.scan(step, zeros, summaries)
        return jax.tree.map(self._select, states)

    def _select(self, by_run: jax.Array) -> jax.Array:
        """Selects this device's of all runs: [all runs, B, ...] → [B · runs, ...]."""
        by_row = jnp.moveaxis(by_run[self.numbers], 0, 1)
        return by_row.reshape(-1, *by_row.shape[2:])
