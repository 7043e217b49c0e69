"""Elements a token of what layers make, on one device."""

from typing import NamedTuple

from maxlm.models.layers.attention import AttentionConfig
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


def head_sizes(attention: AttentionConfig, split: MeshSplit) -> Heads:
    own = attention.num_heads / split.ways(split.compute.heads)
    kv = attention.num_kv_heads / split.ways(split.kv_heads)
    size, value = attention.head_dim, attention.value_dim
    return Heads(own * size, own * value, kv * size, kv * value, own)


def count_hidden_elements(map_: Map, split: MeshSplit) -> Number:
    """Returns the elements a token that a map writes into the FFN's width."""
    if map_.writes != "mlp":
        return 0.0
    return sum(k.shape[-1] / split.shards(split.compute, k.axes[-1:]) for k in map_.kernels)


def count_latent_elements(map_: Map) -> int:
    """Returns the elements a token of the narrow latent vectors that a map writes."""
    return sum(k.shape[-1] for k in map_.kernels if k.writes == "latent")
