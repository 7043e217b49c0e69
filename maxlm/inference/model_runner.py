"""A model on the devices: its parameters, its caches, and the programs that advance
them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, reshard

from maxlm.config import MaxlmError
from maxlm.inference.adapter_slots import write_columns
from maxlm.inference.generative_model import GenerativeModel
from maxlm.inference.params import check_params, check_shareable, prepare_params
from maxlm.inference.prompt_vectors import encode_items
from maxlm.inference.sequences import PageCopy, RowCopy, RunningSequence
from maxlm.inference.step import run_decoding_step, run_step
from maxlm.inference.step_arrays import (
    EngineSpec,
    EngineState,
    StepInputs,
    StepOutputs,
    StepSizes,
)
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.architectures.transformer import CrossAttentionCache
from maxlm.models.caches.layout import (
    CacheArraySpec,
    CacheLayout,
    allocate_cache_array,
)
from maxlm.models.params import Params, bind
from maxlm.parallel.local import axis_size, get_platform, map_shards

Tree = TypeVar("Tree")
MAX_PAGE_COPIES = 8
"""Pages that one call of :func:`copy_pages` copies."""


class ModelRunner:
    """Holds a model's parameters and caches, and runs its programs on the current
    mesh.

    Args:
        params: in any layout.
        spec: of the engine; the layout of caches is then fitted to the model.
        mesh: the current one.
        adapters: A and B beside the parameters, which change in place.

    Attributes:
        spec: with the model's own layout of caches.
    """

    def __init__(
        self,
        model: GenerativeModel,
        params: Params,
        spec: EngineSpec,
        mesh: Mesh,
        adapters: Mapping[str, list[jax.Array]] | None = None,
    ):
        head_ways = axis_size(model.rules.heads)
        layout = replace(spec.layout, head_ways=head_ways)
        self.model = model
        self.spec = replace(spec, layout=layout)
        self._mesh = mesh
        self._params: Params | None = None
        self.set_params(params)
        self._state: EngineState | None = allocate_state(model, layout, spec.max_length)
        self._adapters = adapters
        # The thread that compiles may not read arrays that steps give up meanwhile:
        # it reads their shapes, which stay.
        self._param_shapes = describe_arrays(self.params)
        self._state_shapes = describe_arrays(self.state)
        self._adapter_shapes = describe_arrays(adapters)

    def set_params(self, params: Params) -> None:
        """Reads other parameters; raises MaxlmError where they are not of the model, or
        cannot be shared."""
        check_params(self.model, params)
        # What steps read so far is freed before its successor is made.
        self._params = None
        if self.spec.shares_params:
            check_shareable(self.model, params, self._mesh)
            self._params = params
        else:
            self._params = prepare_params(
                self.model, params, self._mesh, fuse=not self.spec.batch_invariant
            )

    def release_params(self) -> None:
        """Lets go of the parameters."""
        self._params = None

    def release_state(self) -> None:
        """Frees the caches; the next program has new, empty ones."""
        self._state = None

    @property
    def params(self) -> Params:
        """The parameters as steps read them; raises MaxlmError where they were released,
        or a training step has taken them."""
        params = self._params
        if params is None:
            reason = "were released (Engine.release_params)"
        elif any(array.is_deleted() for array in jax.tree.leaves(params)):
            reason = "were given up to a program since, as a training step does"
        else:
            return params
        message = f"the engine's parameters {reason}"
        fix = "call Engine.set_params with those to generate with"
        raise MaxlmError(message, where="engine", fix=fix)

    @property
    def state(self) -> EngineState:
        """The caches; each program that changes them takes them and returns others."""
        state = self._state
        if state is None:
            layout = self.spec.layout
            state = allocate_state(self.model, layout, self.spec.max_length)
            self._state = state
        return state

    def run(self, shape: StepSizes, inputs: StepInputs) -> StepOutputs:
        """Runs a step."""
        program = _choose_program(shape, self.spec)
        self._state, outputs = program(
            self.model,
            self.spec,
            shape,
            self.params,
            self.state,
            inputs,
            self._adapters,
        )
        return outputs

    def compile(self, shape: StepSizes, inputs: StepInputs) -> None:
        """Compiles a step, so that :meth:`run` finds it; may be called beside a step
        that runs.

        Args:
            inputs: `jax.ShapeDtypeStruct` in place of arrays suffice.
        """
        lowered = _choose_program(shape, self.spec).lower(
            self.model,
            self.spec,
            shape,
            self._param_shapes,
            self._state_shapes,
            inputs,
            self._adapter_shapes,
        )
        lowered.compile()

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copies pages, ``MAX_PAGE_COPIES`` at most: all are read before any is
        written."""
        layout = self.spec.layout
        shape = (layout.num_shards, MAX_PAGE_COPIES)
        copies_by_window = {}
        for group, window in enumerate(self.spec.windows):
            sources = np.zeros(shape, np.int32)
            # Past the last page: no copy.
            destinations = np.full(shape, layout.count_pages(window), np.int32)
            for place, copy in enumerate(copies):
                if copy.group == group:
                    sources[copy.shard, place] = copy.source
                    destinations[copy.shard, place] = copy.destination
            copies_by_window[str(window)] = sources, destinations
        self._state = copy_pages(self.model, layout, self.state, copies_by_window)

    def copy_rows(self, copies: Sequence[RowCopy]) -> None:
        """Copies what caches keep by row."""
        layout = self.spec.layout
        rows = np.arange(layout.num_rows, dtype=np.int32)
        sources = np.tile(rows, (layout.num_shards, 1))
        for shard, source, destination in copies:
            sources[shard, destination] = source
        self._state = copy_rows(
            self.model, layout, self.spec.max_length, self.state, sources
        )

    def encode(self, sequence: RunningSequence) -> None:
        """Runs the encoder over a sequence's input, for its row."""
        layout = self.spec.layout
        num_tokens = len(sequence.encoder_tokens)
        # Powers of two from 16 on: few sizes, hence few compilations.
        width = max(16, 1 << (num_tokens - 1).bit_length())
        width = min(width, self.spec.max_length)
        tokens = np.zeros((layout.num_shards, width), np.int32)
        lengths = np.zeros(layout.num_shards, np.int32)
        # Past the last row: other shards write nothing.
        rows = np.full(layout.num_shards, layout.num_rows, np.int32)
        tokens[sequence.shard, :num_tokens] = sequence.encoder_tokens
        lengths[sequence.shard] = num_tokens
        rows[sequence.shard] = sequence.row
        self._state = encode_row(
            self.model,
            layout,
            self.spec.max_length,
            self.params,
            self.state,
            tokens,
            lengths,
            rows,
        )


def _choose_program(shape: StepSizes, spec: EngineSpec) -> jax.stages.Wrapped:
    """Returns the jitted step for a shape."""
    if spec.batch_invariant:  # compiled as everything else is
        return run_step
    is_decoding_on_cpu = get_platform() == "cpu" and not shape.chunk_tokens
    return run_decoding_step if is_decoding_on_cpu else run_step


def describe_arrays(tree: Tree) -> Tree:
    """Returns shapes, dtypes and, of arrays on devices, shardings."""

    def describe(x: np.ndarray | jax.Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.Array) else None
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

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
        encode_items,
        write_columns,
    )
    return sum(program._cache_size() for program in programs)


def state_specs(
    model: GenerativeModel, layout: CacheLayout, input_length: int
) -> EngineState:
    """Returns the engine's arrays before they are allocated, a
    :class:`~maxlm.models.caches.layout.CacheArraySpec` for each. ``input_length``:
    tokens of an encoder's longest input."""
    cross_cache = None
    if isinstance(model, EncoderDecoder):
        cross_cache = model.cross_cache_specs(layout, input_length)
    return EngineState(model.cache_specs(layout), cross_cache)


@partial(jax.jit, static_argnums=(0, 1, 2))
def allocate_state(
    model: GenerativeModel, layout: CacheLayout, input_length: int
) -> EngineState:
    """Returns empty caches, in their compute layout on the current mesh. Raises
    MaxlmError: dimensions that do not divide over their mesh axes."""
    specs = state_specs(model, layout, input_length)
    return jax.tree.map(
        lambda spec: allocate_cache_array(spec, model.rules, model.dtype), specs
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def copy_pages(
    model: GenerativeModel,
    layout: CacheLayout,
    state: EngineState,
    copies: Mapping[str, tuple[jax.Array, jax.Array]],
) -> EngineState:
    """Copies pages within layers of each window. ``copies``: for each window, as text,
    (sources, destinations), int32 [D, 8]; a destination past the last page is none. All
    are read before any is written."""

    by_shard = model.rules.spec("batch")
    copies = jax.tree.map(lambda x: reshard(x, by_shard), copies)

    def copy_shard(pages, sources, destinations):
        return pages.at[0, destinations[0]].set(pages[0, sources[0]], mode="drop")

    def copy(pages: jax.Array, spec: CacheArraySpec) -> jax.Array:
        if spec.unit != "page":
            return pages
        by_page = model.rules.spec(*spec.axes)
        sources, destinations = copies[str(spec.window)]
        in_specs = (by_page, by_shard, by_shard)
        return map_shards(copy_shard, in_specs, by_page)(pages, sources, destinations)

    caches = jax.tree.map(copy, state.caches, model.cache_specs(layout))
    return state._replace(caches=caches)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def copy_rows(
    model: GenerativeModel,
    layout: CacheLayout,
    input_length: int,
    state: EngineState,
    sources: jax.Array,
) -> EngineState:
    """Gives each row what row ``sources``, int32 [D, R], has of caches that are kept by
    row."""
    by_shard = model.rules.spec("batch")
    sources = reshard(sources, by_shard)

    def copy_array(rows: jax.Array, spec: CacheArraySpec) -> jax.Array:
        if spec.unit == "page":
            return rows
        by_row = model.rules.spec(*spec.axes)

        def select_rows(rows: jax.Array, sources: jax.Array) -> jax.Array:
            return rows[:, sources[0]]

        return map_shards(select_rows, (by_row, by_shard), by_row)(rows, sources)

    return jax.tree.map(copy_array, state, state_specs(model, layout, input_length))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def encode_row(
    model: EncoderDecoder,
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
    by_shard = model.rules.spec("batch")
    tokens, lengths, rows = (reshard(x, by_shard) for x in (tokens, lengths, rows))
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    positions = reshard(positions, by_shard)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    # Padding stands at position 0, as in training: dynamic NTK takes a row's last
    # position for its length.
    encoder_inputs = (tokens, positions * segments, segments)
    keys_values = bind(model, params).project_cross_keys(encoder_inputs)
    encoded = CrossAttentionCache(keys_values, segments)

    def write_row(cache: jax.Array, new: jax.Array, spec: CacheArraySpec) -> jax.Array:
        """Writes new [D, T, ...], padded to the cache's length, over a row of each
        shard of cache [D, R, length, ...]."""
        widths = [(0, 0)] * new.ndim
        widths[1] = (0, cache.shape[2] - new.shape[1])
        padded = jnp.pad(new, widths).astype(cache.dtype)
        # One row of each shard: [D, 1, length, ...].
        by_cache_row = padded[:, None]

        def write_shard(cache, rows, new):
            return cache.at[0, rows[0]].set(new[0, 0], mode="drop")

        by_row = model.rules.spec(*spec.axes)
        in_specs = (by_row, by_shard, by_row)
        return map_shards(write_shard, in_specs, by_row)(cache, rows, by_cache_row)

    specs = model.cross_cache_specs(layout, input_length)
    assert state.cross_cache is not None
    cross_cache = jax.tree.map(write_row, state.cross_cache, encoded, specs)
    return state._replace(cross_cache=cross_cache)
