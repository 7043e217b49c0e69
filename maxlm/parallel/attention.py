"""Attention on a mesh: each device attends over its own rows and heads."""

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.sharding import AxisRules
from pallas_kernels.attention import attention


def write_slots(
    cache: jax.Array, new: jax.Array, positions: jax.Array, *, rules: AxisRules
) -> jax.Array:
    """``cache`` with ``new`` written over the slots ``positions`` of each row; no communication.

    Args:
        cache: [B, T, K, H].
        new: [B, S, K, H].
        positions: int [B, S]; those outside 0..T-1 are not written.
    """
    keys = rules.spec("batch", None, "kv_heads", None)

    def local(cache, new, positions):
        rows = jnp.arange(cache.shape[0])[:, None]
        return cache.at[rows, positions].set(new.astype(cache.dtype), mode="drop")

    return jax.shard_map(local, in_specs=(keys, keys, rules.spec("batch", None)), out_specs=keys)(
        cache, new, positions
    )


def _own_heads(a: jax.Array, num_heads: int, group: int, split: tuple[str, ...]) -> jax.Array:
    """The kv heads [B, T, k, H] that this device's ``num_heads`` query heads read."""
    if num_heads % group and group % num_heads:
        raise ValueError(f"{num_heads} query heads a device straddle groups of {group}")
    first = lax.axis_index(split) * num_heads // group
    return lax.dynamic_slice_in_dim(a, first, max(num_heads // group, 1), axis=2)


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rules: AxisRules,
    causal: bool = True,
    q_positions: jax.Array | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """:func:`pallas_kernels.attention.attention` over local rows and heads; no communication.

    Where query heads are split over more devices than there are kv heads, kv heads are kept whole
    (``kv_heads: null``) and each device takes those that its own query heads read.

    Args: as there; q [B, S, N, H], k and v [B, T, K, H], positions and segments [B, S] / [B, T].
    """
    queries = rules.spec("batch", None, "heads", None)
    keys = rules.spec("batch", None, "kv_heads", None)
    rows = rules.spec("batch", None)
    optional = {"q_positions": q_positions, "segment_ids": segment_ids}

    split = rules.mesh_axes("heads") if not rules.mesh_axes("kv_heads") else ()
    group = q.shape[2] // k.shape[2]

    def local(q, k, v, optional):
        if split:
            k, v = (_own_heads(a, q.shape[2], group, split) for a in (k, v))
        return attention(q, k, v, causal=causal, **optional)

    return jax.shard_map(
        local,
        in_specs=(queries, keys, keys, jax.tree.map(lambda _: rows, optional)),
        out_specs=queries,
    )(q, k, v, optional)
