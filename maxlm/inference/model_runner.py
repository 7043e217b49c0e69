"""A model on the devices: its parameters, its caches, and the programs that advance
them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard

from maxlm.inference.adapter_slots import write_columns
from maxlm.inference.cpu import choose_decode_kernels
from maxlm.inference.params import prepare_params
from maxlm.inference.sequences import PageCopy, RunningSequence
from maxlm.inference.step import (
    EngineState,
    StepInputs,
    StepOutputs,
    StepSizes,
    run_decoding_step,
    run_step,
)
from maxlm.models.caches.layout import CacheLayout, allocate_cache_array
from maxlm.models.params import Params, bind
from maxlm.parallel.local import axis_size, get_platform, map_shards

MAX_PAGE_COPIES = 8
"""Pages that one call of :func:`copy_pages` copies."""


@dataclass(eq=False)
class ModelRunner:
    """Holds a model's parameters and caches, and runs its programs on the current
    mesh."""

    model: Any
    params: Params
    """In any layout as they are given; then as steps read them."""
    layout: CacheLayout
    windows: tuple[int | None, ...]
    """Windows of the page tables that steps are given."""
    max_length: int
    """Tokens of the longest sequence."""
    vocab_size: int
    """Ids that may be drawn."""
    adapters: Mapping[str, list[jax.Array]] | None = None
    """A and B beside the parameters, which change in place."""

    def __post_init__(self) -> None:
        self.layout = replace(self.layout, head_ways=axis_size(self.model.rules.heads))
        self.params = prepare_params(self.model, self.params)
        self._kernels = choose_decode_kernels()
        self.state = allocate_state(self.model, self.layout, self.max_length)
        # What compiling needs of arrays that steps give up and put others in place of.
        self._state_shapes = describe_arrays(self.state)
        self._adapter_shapes = describe_arrays(self.adapters)

    def run(self, shape: StepSizes, inputs: StepInputs) -> StepOutputs:
        """Runs a step."""
        program = _choose_program(shape)
        sizes = shape, self.layout, self.windows, self.vocab_size
        arrays = self.params, self.state, inputs, self.adapters
        self.state, outputs = program(
            self.model, *sizes, *arrays, kernels=self._kernels
        )
        return outputs

    def compile(self, shape: StepSizes, inputs: StepInputs) -> None:
        """Compiles a step, so that :meth:`run` finds it; may be called beside a step
        that runs.

        Args:
            inputs: `jax.ShapeDtypeStruct` in place of arrays suffice.
        """
        program: Any = _choose_program(shape)
        sizes = shape, self.layout, self.windows, self.vocab_size
        arrays = self.params, self._state_shapes, inputs, self._adapter_shapes
        program.lower(self.model, *sizes, *arrays, kernels=self._kernels).compile()

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copies pages, ``MAX_PAGE_COPIES`` at most: all are read before any is
        written."""
        shape = (self.layout.num_shards, MAX_PAGE_COPIES)
        stacked = {}
        for group, window in enumerate(self.windows):
            sources = np.zeros(shape, np.int32)
            destinations = np.full(shape, self.layout.count_pages(window), np.int32)
            for place, copy in enumerate(copies):
                if copy.group == group:
                    sources[copy.shard, place] = copy.source
                    destinations[copy.shard, place] = copy.destination
            stacked[str(window)] = sources, destinations
        self.state = copy_pages(self.model, self.layout, self.state, stacked)

    def copy_rows(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copies what caches keep by row, of each (shard, source, destination)."""
        rows = np.arange(self.layout.num_rows, dtype=np.int32)
        sources = np.tile(rows, (self.layout.num_shards, 1))
        for shard, source, destination in copies:
            sources[shard, destination] = source
        self.state = copy_rows(
            self.model, self.layout, self.max_length, self.state, sources
        )

    def encode(self, sequence: RunningSequence) -> None:
        """Runs the encoder over a sequence's input, for its row."""
        D = self.layout.num_shards
        size = len(sequence.encoder_tokens)
        # Powers of two from 16 on: few sizes, hence few compilations.
        width = min(max(16, 1 << (size - 1).bit_length()), self.max_length)
        tokens, lengths = np.zeros((D, width), np.int32), np.zeros(D, np.int32)
        rows = np.full(D, self.layout.num_rows, np.int32)
        tokens[sequence.shard, :size] = sequence.encoder_tokens
        lengths[sequence.shard], rows[sequence.shard] = size, sequence.row
        own = self.params, self.state, tokens, lengths, rows
        self.state = encode_row(self.model, self.layout, self.max_length, *own)


def _choose_program(shape: StepSizes) -> Callable[..., tuple[EngineState, StepOutputs]]:
    few_tokens = get_platform() == "cpu" and not shape.chunk_tokens
    return run_decoding_step if few_tokens else run_step


def describe_arrays(tree: Any) -> Any:
    """Returns shapes, dtypes and, of arrays on devices, shardings."""

    def describe(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            np.shape(x), x.dtype, sharding=getattr(x, "sharding", None)
        )

    return jax.tree.map(describe, tree)


def count_compilations() -> int:
    """Returns how many programs steps have been compiled to, by all runners of this
    process."""
    programs: Any = (
        run_step,
        run_decoding_step,
        copy_pages,
        copy_rows,
        encode_row,
        write_columns,
    )
    return sum(program._cache_size() for program in programs)


def state_specs(model: Any, layout: CacheLayout, input_length: int) -> EngineState:
    """Returns the engine's arrays before they are allocated. ``input_length``: tokens
    of an encoder's longest input."""
    cross = None
    if model.config.architecture == "encoder_decoder":
        cross = model.cross_cache_specs(layout, input_length)
    return EngineState(model.cache_specs(layout), cross)


@partial(jax.jit, static_argnums=(0, 1, 2))
def allocate_state(model: Any, layout: CacheLayout, input_length: int) -> EngineState:
    """Returns empty caches, in their compute layout on the current mesh. Raises
    MaxlmError: dimensions that do not divide over their mesh axes."""
    specs = state_specs(model, layout, input_length)
    return jax.tree.map(
        lambda spec: allocate_cache_array(spec, model.rules, model.dtype), specs
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def copy_pages(
    model: Any,
    layout: CacheLayout,
    state: EngineState,
    copies: Mapping[str, tuple[jax.Array, jax.Array]],
) -> EngineState:
    """Copies pages within layers of each window. ``copies``: for each window, as text,
    (sources, destinations), int32 [D, 8]; a destination past the last page is none. All
    are read before any is written."""

    batch = model.rules.spec("batch")
    copies = jax.tree.map(lambda x: reshard(x, batch), copies)

    def local(pages, sources, destinations):
        return pages.at[0, destinations[0]].set(pages[0, sources[0]], mode="drop")

    def copy(pages: jax.Array, spec: Any) -> jax.Array:
        if spec.unit != "page":
            return pages
        layout = model.rules.spec(*spec.axes)
        return map_shards(local, (layout, batch, batch), layout)(
            pages, *copies[str(spec.window)]
        )

    return state._replace(
        caches=jax.tree.map(copy, state.caches, model.cache_specs(layout))
    )


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def copy_rows(
    model: Any,
    layout: CacheLayout,
    input_length: int,
    state: EngineState,
    sources: jax.Array,
) -> EngineState:
    """Gives each row what row ``sources``, int32 [D, R], has of caches that are kept by
    row."""
    batch = model.rules.spec("batch")
    sources = reshard(sources, batch)

    def copy(rows: jax.Array, spec: Any) -> jax.Array:
        if spec.unit == "page":
            return rows
        layout = model.rules.spec(*spec.axes)

        def select_rows(rows: jax.Array, sources: jax.Array) -> jax.Array:
            return rows[:, sources[0]]

        return map_shards(select_rows, (layout, batch), layout)(rows, sources)

    return jax.tree.map(copy, state, state_specs(model, layout, input_length))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def encode_row(
    model: Any,
    layout: CacheLayout,
    input_length: int,
    params: Params,
    state: EngineState,
    tokens: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
) -> EngineState:
    """Runs the encoder over one input of each shard, for one row each.

    Args:
        tokens: int32 [D, T], padded on the right.
        lengths: int32 [D], tokens of each; 0: there is none.
        rows: int32 [D]; past the last row: none.
    """
    batch = model.rules.spec("batch")
    tokens, lengths, rows = (reshard(x, batch) for x in (tokens, lengths, rows))
    positions = reshard(jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1), batch)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    # Padding at 0, as in training: a row is as long as its last position says (dynamic
    # NTK).
    new = (
        bind(model, params).project_cross_keys(
            (tokens, positions * segments, segments)
        ),
        segments,
    )

    def write(held: jax.Array, new: jax.Array, spec: Any) -> jax.Array:
        room = held.shape[2] - new.shape[1]
        new = jnp.pad(new, ((0, 0), (0, room), *((0, 0),) * (new.ndim - 2)))
        new = new.astype(held.dtype)[:, None]

        def local(held, rows, new):
            return held.at[0, rows[0]].set(new[0, 0], mode="drop")

        layout = model.rules.spec(*spec.axes)
        return map_shards(local, (layout, batch, layout), layout)(held, rows, new)

    specs = model.cross_cache_specs(layout, input_length)
    old: Any = state.cross_cache
    return state._replace(cross_cache=jax.tree.map(write, old, type(old)(*new), specs))
