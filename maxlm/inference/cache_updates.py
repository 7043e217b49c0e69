"""Updates of caches between steps: copies of pages and rows, encoders' outputs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard

from maxlm.inference.step import EngineState
from maxlm.models.caches import CacheLayout, allocate_cache_array
from maxlm.models.params import Params, bind
from maxlm.parallel.local import map_shards

MAX_PAGE_COPIES = 8


def state_specs(model: Any, layout: CacheLayout, input_length: int) -> EngineState:
    """Returns the engine's arrays before they are allocated.

    Args:
        input_length: tokens of an encoder's longest input.
    """
    cross = None
    if model.config.architecture == "encoder_decoder":
        cross = model.cross_cache_specs(layout, input_length)
    return EngineState(model.cache_specs(layout), cross)


@partial(jax.jit, static_argnums=(0, 1, 2))
def allocate_state(model: Any, layout: CacheLayout, input_length: int) -> EngineState:
    """Returns empty caches, in their compute layout on the current mesh.

    Raises:
        MaxlmError: kv heads that do not divide over their mesh axes.
    """
    specs = state_specs(model, layout, input_length)
    return jax.tree.map(lambda spec: allocate_cache_array(spec, model.rules, model.dtype), specs)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def copy_pages(
    model: Any,
    layout: CacheLayout,
    state: EngineState,
    copies: Mapping[str, tuple[jax.Array, jax.Array]],
) -> EngineState:
    """Copies pages within layers of each window.

    Args:
        copies: for each window, as text, (sources, destinations), int32 [D, 8]; a destination past
            the last page is none. All are read before any is written.
    """

    def local(pages, sources, destinations):
        return pages.at[0, destinations[0]].set(pages[0, sources[0]], mode="drop")

    def copy_layer(cache: Any, specs: Any, window: int | None) -> Any:
        def copy(pages: jax.Array, spec: Any) -> jax.Array:
            paged = spec.unit == "page"
            return _map(model, local, spec)(pages, *copies[str(window)]) if paged else pages

        return jax.tree.map(copy, cache, specs)

    caches, specs = {}, model.cache_specs(layout)
    for stack in model.config.layer_stacks:
        own = state.caches[stack.name]
        kinds = stack.kinds * (len(own) // len(stack.kinds))
        layers = zip(own, specs[stack.name], kinds, strict=True)
        caches[stack.name] = tuple(copy_layer(a, s, kind.window) for a, s, kind in layers)
    return state._replace(caches=caches)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def copy_rows(
    model: Any, layout: CacheLayout, input_length: int, state: EngineState, sources: jax.Array
) -> EngineState:
    """Gives each row what row ``sources``, int32 [D, R], has of caches that are kept by row."""

    def copy(rows: jax.Array, spec: Any) -> jax.Array:
        if spec.unit == "page":
            return rows
        return _map(model, lambda rows, sources: rows[:, sources[0]], spec)(rows, sources)

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
    tokens, lengths = (reshard(x, model.rules.spec("batch")) for x in (tokens, lengths))
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    positions = reshard(positions, model.rules.spec("batch"))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    # Padding at 0, as in training: a row is as long as its last position says (dynamic NTK).
    inputs = tokens, positions * segments, segments
    new = bind(model, params).project_cross_keys(inputs), segments

    def write(held: jax.Array, new: jax.Array, spec: Any) -> jax.Array:
        room = held.shape[2] - new.shape[1]
        new = jnp.pad(new, ((0, 0), (0, room), *((0, 0),) * (new.ndim - 2)))
        new = new.astype(held.dtype)[:, None]

        def local(held, rows, new):
            return held.at[0, rows[0]].set(new[0, 0], mode="drop")

        return _map(model, local, spec, spec)(held, rows, new)

    specs = model.cross_cache_specs(layout, input_length)
    old: Any = state.cross_cache
    return state._replace(cross_cache=jax.tree.map(write, old, type(old)(*new), specs))


def _map(model: Any, local: Any, spec: Any, *more: Any) -> Any:
    """Maps a function of an array, small ones by shard, and further arrays over devices."""
    layout, batch = model.rules.spec(*spec.axes), model.rules.spec("batch")

    def run(x: jax.Array, *rest: jax.Array) -> jax.Array:
        small = rest[: len(rest) - len(more)]
        small = tuple(reshard(a, PartitionSpec(*batch)) for a in small)
        wide = tuple(model.rules.spec(*each.axes) for each in more)
        specs = layout, *(batch,) * len(small), *wide
        return map_shards(local, specs, layout)(x, *small, *rest[len(small) :])

    return run
