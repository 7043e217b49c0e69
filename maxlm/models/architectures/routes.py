"""Routes: the experts that each token meets in each layer, as one array.

An engine reports them, and a training pass that is given them uses the same experts
(router replay: Ma et al. 2025, arXiv 2510.11370).

Shapes: B batch, S sequence, L layers of a stack, E layers with experts in the order of
the layers (modules of ``mtp`` are not among them), k experts of a token.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.runs import LayerRun
from maxlm.models.layers.moe import MoeConfig

OWN_CHOICE = -1
"""Stands for an expert where a router is to choose itself."""


class ExpertLayer(NamedTuple):
    """Where a layer with experts is found."""

    stack_name: str
    index: int
    """Its index in the stack."""
    config: MoeConfig


class RouteShape(NamedTuple):
    """What a model's routes look like for each token."""

    num_layers: int
    """E; 0: no layer has experts."""
    experts_per_token: int
    """k."""
    dtype: np.dtype
    """The smallest signed type that the numbers of experts fit in."""


def list_expert_layers(config: TransformerConfig) -> list[ExpertLayer]:
    """Lists a model's layers that have experts, first to last."""
    layers: list[ExpertLayer] = []
    for run in config.layer_runs:
        for place in run.iterate_places():
            ffn = place.stack.block.ffn
            if isinstance(ffn, MoeConfig):
                layers.append(ExpertLayer(place.stack.name, place.index, ffn))
    return layers


def get_route_shape(config: TransformerConfig) -> RouteShape:
    """Returns the shape of a token's routes, [E, k]."""
    routers = [layer.config for layer in list_expert_layers(config)]
    experts_per_token = max((moe.experts_per_token for moe in routers), default=0)
    num_experts = max((moe.num_experts for moe in routers), default=0)
    dtype = np.int8 if num_experts - 1 <= np.iinfo(np.int8).max else np.int16
    return RouteShape(len(routers), experts_per_token, np.dtype(dtype))


def split_routes(
    config: TransformerConfig, run: LayerRun, routes: jax.Array | None
) -> dict[str, jax.Array | None]:
    """Returns the routes of a run's layers by stack, int [L, B, S, k], from those of
    all layers, int [B, S, E, k]; None: of layers without experts."""
    by_stack: dict[str, jax.Array | None] = {stack.name: None for stack in run.stacks}
    if routes is None:
        return by_stack
    layers_first = jnp.moveaxis(routes, 2, 0)
    expert_layers = list_expert_layers(config)
    for name in by_stack:
        numbers = [
            number
            for number, layer in enumerate(expert_layers)
            if layer.stack_name == name
        ]
        if numbers:
            by_stack[name] = layers_first[jnp.asarray(numbers)]
    return by_stack


def join_routes(
    config: TransformerConfig, routes: Mapping[str, Sequence[jax.Array] | jax.Array]
) -> jax.Array:
    """Returns the routes of all layers as one array [B, S, E, k].

    Args:
        routes: by stack, int32 [B, S, k] of each of its layers.
    """
    shape = get_route_shape(config)
    layers = [
        routes[layer.stack_name][layer.index].astype(shape.dtype)
        for layer in list_expert_layers(config)
    ]
    return jnp.stack(layers, axis=2)
