"""A stack of layers, run one after the other, with its gradient written out.

JAX could differentiate ``lax.scan`` itself, but then lifts what does not change from
layer to layer out of programs on shards, which fails inside a pipeline stage (see
``local.py``). Here each layer is differentiated by itself, inside the scan, and what
its backward pass needs becomes one stacked output of the forward scan.

Layers need not be alike: those of a period may take their parameters from several
stacks by turns, such as three layers with a recurrence and one with attention.

Letters: L layers of a stack, P layers of a period, C of them from one stack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any
"""A tree of arrays."""
LayerFn = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
"""(parameters, carry, context, what is shared) -> (carry, arrays to record)."""
CastFn = Callable[[PyTree], PyTree]
"""One layer's parameters -> the same in the dtypes that it computes in."""


def keep_dtypes(tree: PyTree) -> PyTree:
    """A :data:`CastFn` that casts nothing."""
    return tree


class LayerTurn(NamedTuple):
    """One of the layers that a period runs, in their order."""

    stack: int
    """Index of the stack that its parameters come from."""
    run: LayerFn
    cast: CastFn


@jax.tree_util.register_static
@dataclass(frozen=True)
class Residuals:
    """Places of the pieces of a backward pass, as ``jax.vjp`` returns it: a tree of
    arrays."""

    tree: Any  # a PyTreeDef, which is no type to a checker
    places: tuple[int, ...]
    """Place of each leaf: i ≥ 0, among what is known without being kept; −1 − i, among
    what was kept."""

    def join(self, known: PyTree, stacked: Sequence[jax.Array]) -> PyTree:
        """Returns the backward pass; inverts :func:`split_residuals`."""
        arrays = jax.tree.leaves(known)
        leaves = [
            arrays[place] if place >= 0 else stacked[-1 - place]
            for place in self.places
        ]
        return jax.tree.unflatten(self.tree, leaves)


def scan_layers(
    turns: Sequence[LayerTurn],
    params: Sequence[PyTree],
    carry: PyTree,
    context: PyTree,
    *,
    shared: PyTree = None,
    cast_shared: CastFn = keep_dtypes,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Returns ``carry`` after all layers, each ``turn.run(turn.cast(parameters), carry,
    context, shared)``, and what the layers of each stack have recorded, with a leading
    layer axis; reverse-mode differentiable in ``params``, ``carry`` and ``shared``. A
    turn takes the next layer of its stack; the turns are repeated until the stacks are
    through. What is recorded has no gradient.

    Compile time does not grow with depth. The backward pass keeps what ``jax.vjp`` of
    one layer keeps (under ``jax.checkpoint``: what its policy names, and the carry),
    once a layer; parameters, context and what is shared are not kept again.

    Args:
        turns: the layers of a period: one where all are alike. A turn's ``cast`` only
            changes dtypes; until all layers are through, gradients are held in these
            too.
        params: of each stack, arrays with a leading layer axis, as many times C as
            the turns are repeated. Integers among them have no gradient.
        carry: arrays; a layer returns the same shapes, dtypes and layouts.
        context: arrays every layer reads, without gradient (positions, segment ids).
        shared: arrays every layer reads, with a gradient, which is summed over layers in
            their own dtype.
        cast_shared: changes dtypes of what is shared to those that layers compute in,
            once for all layers of a pass.
    """
    return _scan(tuple(turns), cast_shared, tuple(params), carry, context, shared)


def count_turns(turns: Sequence[LayerTurn], num_stacks: int) -> list[int]:
    """Counts the layers of a period that come from each stack."""
    counts = [0] * num_stacks
    for turn in turns:
        counts[turn.stack] += 1
    return counts


def split_periods(
    params: tuple[PyTree, ...], turns: Sequence[LayerTurn]
) -> tuple[PyTree, ...]:
    """Reshapes each stack's [L, ...] → [L / C, C, ...], where C is above 1; no copy."""

    def split_stack(tree: PyTree, count: int) -> PyTree:
        if count == 1:
            return tree
        return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), tree)

    counts = count_turns(turns, len(params))
    return tuple(
        split_stack(tree, count) for tree, count in zip(params, counts, strict=True)
    )


def take_turns(
    period_params: tuple[PyTree, ...], turns: Sequence[LayerTurn]
) -> list[PyTree]:
    """Returns the parameters of each layer of a period, of which every stack has
    [C, ...], or [...] where C is 1."""
    counts = count_turns(turns, len(period_params))
    taken = [0] * len(period_params)
    layers: list[PyTree] = []
    for turn in turns:
        tree = period_params[turn.stack]
        index = taken[turn.stack]
        taken[turn.stack] += 1
        if counts[turn.stack] > 1:
            tree = jax.tree.map(partial(_take_index, index), tree)
        layers.append(tree)
    return layers


def _take_index(index: int, x: jax.Array) -> jax.Array:
    return x[index]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    turns: tuple[LayerTurn, ...],
    cast_shared: CastFn,
    params: tuple[PyTree, ...],
    carry: PyTree,
    context: PyTree,
    shared: PyTree,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    shared = cast_shared(shared)

    def body(carry, period_params):
        layers = _cast_period(turns, period_params)
        carry, recorded = _run_period(turns, layers, carry, context, shared)
        return carry, _join_turns(recorded, turns, len(params))

    carry, recorded = lax.scan(body, carry, split_periods(params, turns))
    return carry, _join_periods(recorded, turns)


def _run_period(
    turns: Sequence[LayerTurn],
    cast_params: Sequence[PyTree],
    carry: PyTree,
    context: PyTree,
    shared: PyTree,
) -> tuple[PyTree, list[PyTree]]:
    """Runs the layers of a period; returns also what each has recorded."""
    recorded: list[PyTree] = []
    for turn, layer_params in zip(turns, cast_params, strict=True):
        carry, layer_recorded = turn.run(layer_params, carry, context, shared)
        recorded.append(layer_recorded)
    return carry, recorded


def _forward(turns, cast_shared, params, carry, context, shared):
    cast = cast_shared(shared)
    # A scan may trace its body more than once; the last trace is the one that runs.
    traced: list[Residuals] = []

    def body(carry, period_params):
        cast_params = _cast_period(turns, period_params)
        floating, integers = _split_floating(cast_params)

        def run_period(floating, carry, shared):
            layers = _merge(floating, integers)
            return _run_period(turns, layers, carry, context, shared)

        carry, backward, recorded = jax.vjp(
            run_period, floating, carry, cast, has_aux=True
        )
        residuals, stacked = split_residuals(backward, (cast_params, context, cast))
        traced.append(residuals)
        return carry, (stacked, _join_turns(recorded, turns, len(params)))

    carry, (stacked, recorded) = lax.scan(body, carry, split_periods(params, turns))
    out = carry, _join_periods(recorded, turns)
    return out, (params, context, shared, stacked, traced[-1])


def _split_floating(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree's floating arrays from its integers; None in the others' places."""

    def is_floating(x: jax.Array) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    floating = jax.tree.map(lambda x: x if is_floating(x) else None, tree)
    integers = jax.tree.map(lambda x: None if is_floating(x) else x, tree)
    return floating, integers


def _is_none(x: PyTree) -> bool:
    return x is None


def _merge(floating: PyTree, integers: PyTree) -> PyTree:
    """Inverts :func:`_split_floating`."""
    return jax.tree.map(
        lambda x, other: other if x is None else x, floating, integers, is_leaf=_is_none
    )


def split_residuals(
    backward: PyTree, known: PyTree
) -> tuple[Residuals, tuple[jax.Array, ...]]:
    """Splits a backward pass, a tree of arrays, into places and what is to be kept: not
    known anyway, each array once."""
    leaves, tree = jax.tree.flatten(backward)
    # By identity: an array that the pass reads as it is, is the same tracer.
    known_places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(known))}
    stacked: dict[int, jax.Array] = {}
    places = []
    for leaf in leaves:
        if id(leaf) in known_places:
            places.append(known_places[id(leaf)])
        else:
            stacked.setdefault(id(leaf), leaf)
            places.append(-1 - list(stacked).index(id(leaf)))
    return Residuals(tree, tuple(places)), tuple(stacked.values())


def _cast_period(
    turns: Sequence[LayerTurn], period_params: tuple[PyTree, ...]
) -> list[PyTree]:
    """Returns each layer's parameters, in the dtypes it computes in."""
    layers = take_turns(period_params, turns)
    return [
        turn.cast(layer_params)
        for turn, layer_params in zip(turns, layers, strict=True)
    ]


def _join_turns(
    layers: Sequence[PyTree], turns: Sequence[LayerTurn], num_stacks: int
) -> tuple[PyTree, ...]:
    """Stacks what each layer of a period has by stack; the inverse of
    :func:`take_turns`."""
    by_stack: list[list[PyTree]] = [[] for _ in range(num_stacks)]
    for turn, layer in zip(turns, layers, strict=True):
        by_stack[turn.stack].append(layer)

    def join_layers(trees: list[PyTree]) -> PyTree:
        if len(trees) == 1:
            return trees[0]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)

    return tuple(join_layers(trees) for trees in by_stack)


def _join_periods(
    d_params: tuple[PyTree, ...], turns: Sequence[LayerTurn]
) -> tuple[PyTree, ...]:
    """Reshapes each stack's [L / C, C, ...] → [L, ...]; the inverse of
    :func:`split_periods`."""

    def join_stack(tree: PyTree, count: int) -> PyTree:
        if count == 1:
            return tree
        return jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), tree)

    counts = count_turns(turns, len(d_params))
    return tuple(
        join_stack(tree, count) for tree, count in zip(d_params, counts, strict=True)
    )


def _backward(turns, cast_shared, saved, d_out):
    params, context, shared, stacked, residuals = saved
    d_carry, _ = d_out
    cast = cast_shared(shared)

    def body(carry, inputs):
        d_carry, d_shared = carry
        period_params, period_stacked = inputs
        cast_params = _cast_period(turns, period_params)
        backward = residuals.join((cast_params, context, cast), period_stacked)
        d_layers, d_carry, d_shared_terms = backward(d_carry)
        # A layer's gradient is in the dtype that it computes in, their sum is not.
        d_shared = jax.tree.map(
            lambda total, term: total + term.astype(total.dtype),
            d_shared,
            d_shared_terms,
        )
        return (d_carry, d_shared), _join_turns(d_layers, turns, len(params))

    d_shared = jax.tree.map(jnp.zeros_like, shared)
    inputs = (split_periods(params, turns), stacked)
    (d_carry, d_shared), d_params = lax.scan(
        body, (d_carry, d_shared), inputs, reverse=True
    )
    d_params = _join_periods(d_params, turns)
    # None stands for integers.
    d_params = jax.tree.map(
        lambda d, p: None if d is None else d.astype(p.dtype),
        d_params,
        params,
        is_leaf=_is_none,
    )
    return d_params, d_carry, None, d_shared


_scan.defvjp(_forward, _backward)
