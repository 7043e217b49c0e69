"""Runs blocks whose parameters are stacked, one layer after the other, in a scan.

Shapes: B batch, S sequence, D model, L layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from maxlm.models.aux import Aux
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import KeysValues
from maxlm.models.params import (
    Params,
    ParamSpec,
    StoredParam,
    bind,
    is_leaf,
    param_specs,
)
from maxlm.models.remat import RematPolicy, apply_remat
from maxlm.parallel.layers import (
    CastFn,
    LayerTurn,
    PyTree,
    keep_dtypes,
    scan_layers,
)
from maxlm.parallel.local import LANES, axis_size, get_layout

SharedKeys = Mapping[str, KeysValues]
"""Keys and values that later layers read, by the kind of the layers that make them: of
the last layer of a kind so far."""


class LayerArrays(NamedTuple):
    """Arrays that a layer reads beside the stream."""

    context: PyTree
    """Of all layers, without a gradient."""
    shared: PyTree
    """Of all layers, with a gradient."""
    layer_input: PyTree
    """The layer's own, with a gradient; None: it has none."""
    keys_values: KeysValues | None
    """Of an earlier layer of the scan; None: the layer reads none."""
    routes: jax.Array | None = None
    """int [B, S, k]: experts of the layer's tokens; None: its router chooses."""


class LayerResult(NamedTuple):
    """What a layer hands on."""

    x: PyTree
    aux: Aux
    keys_values: KeysValues | None
    routes: jax.Array | None = None
    """int32 [B, S, k]: the experts that each token met; None: they are not
    recorded."""


# Any: the block is whichever module a stack is made of.
Body = Callable[[Any, PyTree, LayerArrays], LayerResult]
"""``(block, x, arrays) -> result`` for one layer."""


class BlockTurn(NamedTuple):
    """One of the layers of a period, in the order in which they are run."""

    stack: int
    """Index of the stack that it comes from."""
    body: Body
    writes: str | None = None
    """Name by which layers of the scan, or behind it, read the layer's keys and
    values."""
    reads: str | None = None
    """Name by which it reads an earlier layer's of the scan."""


class StackedLayers(NamedTuple):
    """Layers of one stack, each array with a leading axis of layers; or one of them,
    without."""

    params: Params
    layer_input: PyTree = None
    """What each layer reads alone, with a gradient."""
    routes: jax.Array | None = None
    """int [L, B, S, k]: see :class:`~maxlm.models.layers.attention.AttentionInputs`."""


class LayerCarry(NamedTuple):
    """What goes through the layers."""

    x: PyTree
    total: Aux
    keys: SharedKeys


class ScanResult(NamedTuple):
    """What a scan of layers returns."""

    carry: LayerCarry
    routes: tuple[jax.Array | None, ...]
    """Of each stack int32 [L, B, S, k]; None: they are not recorded."""


def scan_blocks(
    blocks: Sequence[nnx.Module],
    layers: Sequence[StackedLayers],
    turns: Sequence[BlockTurn],
    x: PyTree,
    context: PyTree,
    shared: PyTree = None,
    *,
    keys: SharedKeys | None = None,
    cast_shared: CastFn = keep_dtypes,
    dtype: DTypeLike,
    remat: RematPolicy = "none",
) -> ScanResult:
    """Runs stacked blocks layer after layer; returns x after all, their ``Aux`` added
    up, the keys and values that turns have written, and the experts that layers have
    recorded. Compile time does not grow with depth.

    Args:
        blocks: one for each stack; their structure alone is used
            (``params.stack_layers``).
        layers: of each stack, its parameters and what its layers read alone.
        turns: the layers of a period.
        x: an array, or a tree of arrays, that goes through the layers.
        context, shared: trees of arrays that every layer reads, without and with a
            gradient.
        keys: what layers before these have written.
        cast_shared: see :func:`~maxlm.parallel.layers.scan_layers`.
        dtype: of matrices in use, and of their gradients until all layers are through.
    """

    def run_layer(
        turn: BlockTurn,
        layer: StackedLayers,
        x: PyTree,
        total: Aux,
        keys_values: KeysValues | None,
        context: PyTree,
        shared: PyTree,
    ) -> LayerResult:
        block = bind(blocks[turn.stack], layer.params)
        arrays = LayerArrays(
            context, shared, layer.layer_input, keys_values, layer.routes
        )
        result = turn.body(block, x, arrays)
        written = None if turn.writes is None else result.keys_values
        total = _add_to_total(total, result.aux)
        return LayerResult(result.x, total, written, result.aux.routes)

    def run_turn(
        turn: BlockTurn,
        run: Callable[..., LayerResult],
        layer: StackedLayers,
        carry: LayerCarry,
        context: PyTree,
        shared: PyTree,
    ) -> tuple[LayerCarry, jax.Array | None]:
        # A layer is handed the keys that it reads alone: its backward pass keeps its
        # inputs.
        keys_values = None if turn.reads is None else carry.keys[turn.reads]
        result = run(layer, carry.x, carry.total, keys_values, context, shared)
        new_keys = carry.keys
        if turn.writes is not None:
            assert result.keys_values is not None
            new_keys = {**new_keys, turn.writes: result.keys_values}
        return LayerCarry(result.x, result.aux, new_keys), result.routes

    def cast_layer(block: nnx.Module, layer: StackedLayers) -> StackedLayers:
        cast = partial(cast_without_hoisting, dtype=dtype)
        return layer._replace(params=cast_matrices(block, layer.params, cast))

    first = _make_first_carry(
        blocks, layers, turns, x, context, cast_shared(shared), keys or {}
    )
    num_layers = len(jax.tree.leaves(layers[0].params)[0])
    is_loop_body = len(turns) == 1 and num_layers > 1
    layer_turns: list[LayerTurn] = []
    for turn in turns:
        run = apply_remat(partial(run_layer, turn), remat, is_loop_body=is_loop_body)
        cast = partial(cast_layer, blocks[turn.stack])
        layer_turns.append(LayerTurn(turn.stack, partial(run_turn, turn, run), cast))
    carry, routes = scan_layers(
        layer_turns, layers, first, context, shared=shared, cast_shared=cast_shared
    )
    return ScanResult(carry, routes)


def cast_matrices(
    module: nnx.Module, params: Params, cast: Callable[[jax.Array], jax.Array]
) -> Params:
    """Returns a module's parameters with its matrices cast, others as they are."""

    def cast_matrix(spec: ParamSpec, param: PyTree) -> PyTree:
        # `param` is an array, or arrays of one leaf that stand for one in its gradient.
        if spec.role != "matrix" or not jnp.issubdtype(spec.dtype, jnp.floating):
            return param
        return jax.tree.map(cast, param)

    specs = jax.tree.map(
        _declare_step_values, param_specs(module), params, is_leaf=is_leaf
    )
    return jax.tree.map(cast_matrix, specs, params)


def _add_to_total(total: Aux, aux: Aux) -> Aux:
    """Adds one layer's losses and sums; the total has those of all layers."""
    sums = dict(total.sums)
    for name, value in aux.sums.items():
        sums[name] = jnp.add(sums[name], value)
    return Aux(jnp.add(total.loss, aux.loss), sums)


def _make_first_carry(
    blocks: Sequence[nnx.Module],
    layers: Sequence[StackedLayers],
    turns: Sequence[BlockTurn],
    x: PyTree,
    context: PyTree,
    shared: PyTree,
    keys: SharedKeys,
) -> LayerCarry:
    """Returns what enters the first layer: zeros in the place of every sum, and of all
    keys and values, that some layer of a period has. Layers alone know their shapes."""
    total = Aux()
    first_keys = dict(keys)
    for turn in _list_unlike_turns(turns):
        first_layer = jax.tree.map(lambda a: a[0], layers[turn.stack])
        keys_values = None if turn.reads is None else first_keys[turn.reads]

        def run(
            layer: StackedLayers,
            keys_values: KeysValues | None,
            turn: BlockTurn = turn,
        ) -> tuple[Aux, KeysValues | None]:
            block = bind(blocks[turn.stack], layer.params)
            arrays = LayerArrays(
                context, shared, layer.layer_input, keys_values, layer.routes
            )
            result = turn.body(block, x, arrays)
            return replace(result.aux, routes=None), result.keys_values

        aux, written = jax.eval_shape(run, first_layer, keys_values)
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, accumulation_dtype(s.dtype)), aux
        )
        total = Aux(jnp.add(total.loss, zeros.loss), {**total.sums, **zeros.sums})
        if turn.writes is not None and turn.writes not in first_keys:
            first_keys[turn.writes] = jax.tree.map(_make_zeros, written)
    return LayerCarry(x, total, first_keys)


def _list_unlike_turns(turns: Sequence[BlockTurn]) -> Iterable[BlockTurn]:
    """Lists the turns that return other sums or keys than those before: layers of one
    stack return the same sums, whatever their kinds."""
    unlike: dict[tuple[int, str | None], BlockTurn] = {}
    for turn in turns:
        unlike.setdefault((turn.stack, turn.writes), turn)
    return unlike.values()


def _make_zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns zeros of an array's shape, dtype and layout."""
    sharding = shape.sharding
    spec = None if sharding is None else sharding.spec
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=spec)


def _declare_step_values(spec: StoredParam, param: StoredParam) -> StoredParam:
    """Returns a parameter's declarations, with those of a vector for what a leaf holds
    for one training step alone (``Leaf.seed_dropout``): it stays as it is."""
    if not is_leaf(spec):
        return spec
    step_values = [
        field.name
        for field in fields(spec)
        if getattr(spec, field.name) is None and getattr(param, field.name) is not None
    ]
    vector = ParamSpec((), (), jax.nn.initializers.zeros, "vector")
    return replace(spec, **dict.fromkeys(step_values, vector))


def cast_without_hoisting(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts one layer's x to ``dtype``, where it stands: XLA:TPU would cast all layers'
    parameters before the loop, with their dimensions turned around, and hold these
    copies throughout."""
    if x.dtype == dtype:
        return x
    target = jnp.finfo(dtype)
    x = lax.reduce_precision(x, target.nexp, target.nmant).astype(dtype)
    columns_per_device = x.shape[-1] // axis_size(get_layout(x)[-1])
    if columns_per_device < LANES:
        return x  # a TPU keeps so narrow a shard turned around to begin with
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
