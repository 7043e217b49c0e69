"""A stack of layers, run one after the other, with its gradient written out.

JAX could differentiate ``lax.scan`` itself, but then lifts what does not change from
layer to layer out of programs on shards, which fails inside a pipeline stage (see
``local.py``). Here each layer is differentiated by itself, inside the scan, and what
its backward pass needs becomes one stacked output of the forward scan.

Letters: L layers, P layers of a period.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any
"""A tree of arrays."""
LayerFn = Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]
"""(parameters, carry, context, what is shared) -> carry."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Residuals:
    """Places of the pieces of a period's backward pass."""

    tree: Any  # a PyTreeDef, which is no type to a checker
    places: tuple[int, ...]
    """Place of each leaf: i ≥ 0, among what is known without being kept; −1 − i, among
    what was stacked."""


def scan_layers(
    layers: Sequence[LayerFn],
    params: PyTree,
    carry: PyTree,
    context: PyTree,
    *,
    shared: PyTree = None,
    cast: Callable[[PyTree], PyTree] = lambda layer_params: layer_params,
) -> PyTree:
    """Returns ``carry`` after ``layers[l % P](cast(params[l]), carry, context, shared)`` for
    every l, P being their number; reverse-mode differentiable in ``params``, ``carry``
    and ``shared``.

    Compile time does not grow with depth. The backward pass keeps what ``jax.vjp`` of
    one layer keeps (under ``jax.checkpoint``: what its policy names, and the carry),
    once a layer; parameters, context and what is shared are not kept again.

    Args:
        layers: what layers do, by turns: one function where all are alike.
        params: arrays with a leading layer axis, a multiple of P.
        carry: arrays; a layer returns the same shapes, dtypes and layouts.
        context: arrays every layer reads, without gradient (positions, segment ids).
        shared: arrays every layer reads, with a gradient, which is summed over layers.
        cast: one layer's parameters to the dtypes it computes in, and nothing else.
            Until all layers are through, gradients are held in these too.
    """
    return _scan(tuple(layers), cast, params, carry, context, shared)


def split_periods(tree: PyTree, period_length: int) -> PyTree:
    """Reshapes [L, ...] → [L / length, length, ...]; no copy."""
    if period_length == 1:
        return tree
    return jax.tree.map(lambda x: x.reshape(-1, period_length, *x.shape[1:]), tree)


def take_layer(tree: PyTree, layer_index: int, period_length: int) -> PyTree:
    """Returns one layer of a period [length, ...]; a period of one has no such axis."""
    if period_length == 1:
        return tree
    return jax.tree.map(lambda x: x[layer_index], tree)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    layers: tuple[LayerFn, ...],
    cast: Callable[[PyTree], PyTree],
    params: PyTree,
    carry: PyTree,
    context: PyTree,
    shared: PyTree,
) -> PyTree:
    period_length = len(layers)

    def body(carry, period_params):
        for index, layer in enumerate(layers):
            layer_params = cast(take_layer(period_params, index, period_length))
            carry = layer(layer_params, carry, context, shared)
        return carry, None

    carry, _ = lax.scan(body, carry, split_periods(params, period_length))
    return carry


def _forward(layers, cast, params, carry, context, shared):
    period_length = len(layers)
    # A scan may trace its body more than once; the last trace is the one that runs.
    traced: list[_Residuals] = []

    def body(carry, period_params):
        cast_params = _cast_period(cast, period_params, period_length)

        def run_period(cast_params, carry, shared):
            for layer, layer_params in zip(layers, cast_params, strict=True):
                carry = layer(layer_params, carry, context, shared)
            return carry

        carry, backward = jax.vjp(run_period, cast_params, carry, shared)
        residuals, stacked = _split_residuals(backward, (cast_params, context, shared))
        traced.append(residuals)
        return carry, stacked

    out, stacked = lax.scan(body, carry, split_periods(params, period_length))
    return out, (params, context, shared, stacked, traced[-1])


def _split_residuals(
    backward: PyTree, known: PyTree
) -> tuple[_Residuals, tuple[jax.Array, ...]]:
    """Splits a backward pass, a tree of arrays, into places and what is not known
    anyway, each array once."""
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
    return _Residuals(tree, tuple(places)), tuple(stacked.values())


def _cast_period(
    cast: Callable[[PyTree], PyTree], period_params: PyTree, period_length: int
) -> list[PyTree]:
    """Returns each layer's parameters, in the dtypes it computes in."""
    return [
        cast(take_layer(period_params, index, period_length))
        for index in range(period_length)
    ]


def _backward(layers, cast, saved, d_carry):
    params, context, shared, stacked, residuals = saved
    period_length = len(layers)

    def body(carry, inputs):
        d_carry, d_shared = carry
        period_params, period_stacked = inputs
        cast_params = _cast_period(cast, period_params, period_length)
        known = jax.tree.leaves((cast_params, context, shared))
        leaves = [
            known[place] if place >= 0 else period_stacked[-1 - place]
            for place in residuals.places
        ]
        backward = jax.tree.unflatten(residuals.tree, leaves)
        d_layers, d_carry, d_shared_terms = backward(d_carry)
        d_shared = jax.tree.map(jnp.add, d_shared, d_shared_terms)
        if period_length == 1:
            return (d_carry, d_shared), d_layers[0]
        d_period = jax.tree.map(lambda *layers: jnp.stack(layers), *d_layers)
        return (d_carry, d_shared), d_period

    d_shared = jax.tree.map(jnp.zeros_like, shared)
    inputs = (split_periods(params, period_length), stacked)
    (d_carry, d_shared), d_params = lax.scan(
        body, (d_carry, d_shared), inputs, reverse=True
    )
    if period_length > 1:  # [L / P, P, ...] → [L, ...]
        d_params = jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), d_params)
    d_params = jax.tree.map(lambda d, p: d.astype(p.dtype), d_params, params)
    return d_params, d_carry, None, d_shared


_scan.defvjp(_forward, _backward)
