"""Elements a token of what layers make, on one device."""

from math import prod
from typing import NamedTuple

from maxlm.models.costs import HeadCosts
from maxlm.plan.stacks import Map
from maxlm.plan.workload import MeshSplit, Number


class Heads(NamedTuple):
    """Elements a token of attention's arrays."""

    queries: Number
    output: Number
    keys: Number
    values: Number
    count: Number
    """Query heads, and log-sum-exps."""


def head_sizes(heads: HeadCosts | None, split: MeshSplit) -> Heads:
    """Returns the sizes of one branch's heads; without any, zeros."""
    if heads is None:
        return Heads(0.0, 0.0, 0.0, 0.0, 0.0)
    own = heads.num_heads / split.ways(split.compute.heads)
    kv = heads.num_kv_heads / split.ways(split.compute.mesh_axes(heads.kv_axis))
    size, value = heads.head_dim, heads.value_dim
    return Heads(own * size, own * value, kv * size, kv * value, own)


def count_hidden_elements(map_: Map, split: MeshSplit) -> Number:
    """Returns the elements a token that a map writes into the FFN's width."""
    if map_.writes != "mlp":
        return 0.0
    return sum(k.shape[-1] / split.shards(split.compute, k.axes[-1:]) for k in map_.kernels)


def count_latent_elements(map_: Map) -> int:
    """Returns the elements a token of the narrow latent vectors that a map writes."""
    return sum(k.shape[-1] for k in map_.kernels if k.writes == "latent")


def count_output_elements(map_: Map, split: MeshSplit) -> Number:
    """Returns the elements a token that a map writes within its layer."""
    inner = [k for k in map_.kernels if k.writes != "residual"]
    return sum(
        (
            prod(k.shape[k.inputs :]) / split.shards(split.compute, k.axes[k.inputs :])
            for k in inner
        ),
        start=0.0,
    )
