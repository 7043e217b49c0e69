"""A stack of layers, run one after the other, with its gradient written out.

JAX could differentiate ``lax.scan`` itself, but then lifts what does not change from
layer to layer out of programs on shards, which fails inside a pipeline stage (see
``local.py``). Here each layer is differentiated by itself, inside the scan, and what
its backward pass needs becomes one stacked output of the forward scan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LayerFn = Callable[[Any, Any, Any, Any], Any]
"""(parameters, carry, context, what is shared) -> carry."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Residuals:
    """Places of the pieces of a layer's backward pass."""

    tree: Any
    places: tuple[int, ...]
    """Place of each leaf: i ≥ 0, among the layer's parameters and the context; -1-i,
    among what was stacked."""


def scan_layers(
    layers: Sequence[LayerFn],
    params: Any,
    carry: Any,
    context: Any,
    *,
    shared: Any = None,
    cast: Callable[[Any], Any] = lambda own: own,
) -> Any:
    """``carry`` after ``layers[l % P](cast(params[l]), carry, context, shared)`` for
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


def split_periods(tree: Any, period_length: int) -> Any:
    """Reshapes [L, ...] → [L / length, length, ...]; no copy."""
    if period_length == 1:
        return tree
    return jax.tree.map(lambda x: x.reshape(-1, period_length, *x.shape[1:]), tree)


def take_layer(tree: Any, layer_index: int, period_length: int) -> Any:
    """Returns one layer of a period [length, ...]; a period of one has no such axis."""
    return tree if period_length == 1 else jax.tree.map(lambda x: x[layer_index], tree)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(layers, cast, params, carry, context, shared):
    def body(carry, own):
        for place, layer in enumerate(layers):
            carry = layer(
                cast(take_layer(own, place, len(layers))), carry, context, shared
            )
        return carry, None

    return lax.scan(body, carry, split_periods(params, len(layers)))[0]


def _forward(layers, cast, params, carry, context, shared):
    found: list[_Residuals] = []

    def body(carry, own):
        own = [
            cast(take_layer(own, place, len(layers))) for place in range(len(layers))
        ]

        def period(own, carry, shared):
            for layer, params in zip(layers, own, strict=True):
                carry = layer(params, carry, context, shared)
            return carry

        carry, backward = jax.vjp(period, own, carry, shared)
        leaves, tree = jax.tree.flatten(backward)
        known = {
            id(leaf): i
            for i, leaf in enumerate(jax.tree.leaves((own, context, shared)))
        }
        stacked: dict[int, Any] = {}
        places = []
        for leaf in leaves:
            if id(leaf) in known:
                places.append(known[id(leaf)])
            else:
                stacked.setdefault(id(leaf), leaf)
                places.append(-1 - list(stacked).index(id(leaf)))
        found.append(_Residuals(tree, tuple(places)))
        return carry, tuple(stacked.values())

    out, stacked = lax.scan(body, carry, split_periods(params, len(layers)))
    return out, (params, context, shared, stacked, found[-1])


def _backward(layers, cast, saved, d_carry):
    params, context, shared, stacked, residuals = saved

    def body(carry, inputs):
        d_carry, d_shared = carry
        own, kept = inputs
        own = [
            cast(take_layer(own, place, len(layers))) for place in range(len(layers))
        ]
        known = jax.tree.leaves((own, context, shared))
        leaves = [known[i] if i >= 0 else kept[-1 - i] for i in residuals.places]
        d_own, d_carry, terms = jax.tree.unflatten(residuals.tree, leaves)(d_carry)
        d_shared = jax.tree.map(jnp.add, d_shared, terms)
        period = (
            d_own[0]
            if len(d_own) == 1
            else jax.tree.map(lambda *x: jnp.stack(x), *d_own)
        )
        return (d_carry, d_shared), period

    carry = d_carry, jax.tree.map(jnp.zeros_like, shared)
    inputs = split_periods(params, len(layers)), stacked
    (d_carry, d_shared), d_params = lax.scan(body, carry, inputs, reverse=True)
    if len(layers) > 1:  # [L / P, P, ...] → [L, ...]
        d_params = jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), d_params)
    d_params = jax.tree.map(lambda d, p: d.astype(p.dtype), d_params, params)
    return d_params, d_carry, None, d_shared


_scan.defvjp(_forward, _backward)
