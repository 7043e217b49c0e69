"""A stack of equal layers, run one after the other, with its gradient written out.

JAX could differentiate ``lax.scan`` itself, but then lifts what does not change from layer to layer
out of programs on shards, which fails inside a pipeline stage (see ``local.py``). Here each layer
is differentiated by itself, inside the scan, and what its backward pass needs becomes one stacked
output of the forward scan.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Residuals:
    """Where the pieces of a layer's backward pass are found."""

    tree: Any
    places: tuple[int, ...]
    """Of each leaf: i ≥ 0, among the layer's parameters and the context; -1-i, among what was
    stacked."""


def scan_layers(
    layer: Callable[[Any, Any, Any], Any],
    params: Any,
    carry: Any,
    context: Any,
    *,
    cast: Callable[[Any], Any] = lambda own: own,
) -> Any:
    """``carry`` after ``layer(cast(params[l]), carry, context)`` for every l; reverse-mode
    differentiable in ``params`` and ``carry``.

    Compile time does not grow with depth. The backward pass keeps what ``jax.vjp`` of one layer
    keeps (under ``jax.checkpoint``: what its policy names, and the carry), once a layer; parameters
    and context are not kept again.

    Args:
        params: arrays with a leading layer axis.
        carry: arrays; the layer returns the same shapes, dtypes and layouts.
        context: arrays every layer reads, without gradient (positions, segment ids).
        cast: one layer's parameters to the dtypes it computes in, and nothing else. Until all
            layers are through, gradients are held in these too.
    """
    return _scan(layer, cast, params, carry, context)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(layer, cast, params, carry, context):
    def body(carry, own):
        return layer(cast(own), carry, context), None

    return lax.scan(body, carry, params)[0]


def _forward(layer, cast, params, carry, context):
    found: list[_Residuals] = []

    def body(carry, own):
        own = cast(own)
        carry, backward = jax.vjp(lambda own, carry: layer(own, carry, context), own, carry)
        leaves, tree = jax.tree.flatten(backward)
        known = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((own, context)))}
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

    out, stacked = lax.scan(body, carry, params)
    return out, (params, context, stacked, found[-1])


def _backward(layer, cast, saved, d_carry):
    del layer
    params, context, stacked, residuals = saved

    def body(d_carry, inputs):
        own, kept = inputs
        known = jax.tree.leaves((cast(own), context))
        leaves = [known[i] if i >= 0 else kept[-1 - i] for i in residuals.places]
        d_own, d_carry = jax.tree.unflatten(residuals.tree, leaves)(d_carry)
        return d_carry, d_own

    d_carry, d_params = lax.scan(body, d_carry, (params, stacked), reverse=True)
    d_params = jax.tree.map(lambda d, p: d.astype(p.dtype), d_params, params)
    return d_params, d_carry, None


_scan.defvjp(_forward, _backward)
