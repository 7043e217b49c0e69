"""Attention over a split sequence by all-to-all between rows and heads (Jacobs et al.
2023).

Everything here runs on shards (:mod:`maxlm.parallel.local`).
"""

from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlm.parallel.context import (
    HeadTerms,
    Segments,
    SequenceSplit,
    sequence_order_indices,
)
from maxlm.parallel.local import gather
from pallas_kernels.attention import (
    attention_backward,
    attention_forward,
    compute_row_delta,
)


def attend_shard_forward(
    split, number, q, k, v, segments, head_terms
) -> tuple[jax.Array, jax.Array]:
    """See :func:`blocks.attend_shard_forward`; n divides N, and log-sum-exps are of all
    rows in sequence order and this device's share of heads, fp32 [B, S, N / n]."""
    q, k, v = _whole_rows(split, q, k, v)
    own_terms = _own_terms(split, number, head_terms)
    o, lse = attention_forward(q, k, v, **_options(split, segments, own_terms))
    return _to_rows(o, split), lse


def attend_shard_backward(
    split,
    number,
    q,
    k,
    v,
    segments,
    head_terms,
    o: jax.Array,
    lse: jax.Array,
    d_o: jax.Array,
) -> tuple[Any, ...]:
    """See :func:`blocks.attend_shard_backward`; q, k and v are sent again."""
    copies = count_kv_copies(k.shape[2], split.num_shards)
    delta = _to_heads(compute_row_delta(o, d_o), split)
    d_o = _to_heads(d_o, split)
    q, k, v = _whole_rows(split, q, k, v)
    own_terms = _own_terms(split, number, head_terms)
    grads = attention_backward(
        q, k, v, lse, delta, d_o, **_options(split, segments, own_terms)
    )
    d_terms = own_terms.compute_gradients(lse, delta, *grads[3:])
    # fp32 on the wire only where the terms of a head's copies are still to be summed.
    wire = (q.dtype, *(k.dtype if copies == 1 else jnp.float32,) * 2)
    d_q, d_k, d_v = (
        _to_rows(g.astype(t), split) for g, t in zip(grads[:3], wire, strict=True)
    )
    d_k, d_v = (
        g.reshape(*g.shape[:2], -1, copies, g.shape[3]).sum(axis=3) for g in (d_k, d_v)
    )

    def pad_to_all_heads(own):  # [N / n, ...] → [N, ...], zeros for the others
        zeros = jnp.zeros((len(own) * split.num_shards, *own.shape[1:]), own.dtype)
        return lax.dynamic_update_slice_in_dim(zeros, own, number * len(own), axis=0)

    return d_q, d_k, d_v, jax.tree.map(pad_to_all_heads, d_terms)


def count_kv_copies(num_kv_heads: int, ways: int) -> int:
    """Counts the copies of each kv head that give devices equal numbers of them.

    The query heads that a device gets then read exactly the kv heads that it gets, in
    order: the repeated number, lcm(num_kv_heads, ways), divides the query heads, as
    both its factors do. With one kv head, every device gets it whole: nothing smaller
    would do.
    """
    return ways // gcd(num_kv_heads, ways)


def _whole_rows(split: SequenceSplit, q, k, v):
    copies = count_kv_copies(k.shape[2], split.num_shards)
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
    return tuple(_to_heads(x, split) for x in (q, k, v))


def _own_terms(
    split: SequenceSplit, number: jax.Array, head_terms: HeadTerms
) -> HeadTerms:
    """Returns those of this device's share of heads."""

    def own(x):
        size = len(x) // split.num_shards
        return lax.dynamic_slice_in_dim(x, number * size, size)

    return jax.tree.map(own, head_terms)


def _options(split: SequenceSplit, segments: Segments, own_terms: HeadTerms) -> Any:
    """Returns the kernel's arguments, for all rows in order and this device's share of
    heads."""
    if segments is not None:
        of_queries, of_keys = (gather(x, ((), split.axes), ((), ())) for x in segments)
        segments = _in_order(of_queries, split), _in_order(of_keys, split)
    return {
        "segment_ids": segments,
        **split.mask_kwargs,
        **split.score_kwargs(own_terms),
    }


def _to_heads(x: jax.Array, split: SequenceSplit) -> jax.Array:
    """[B, S / n, N, ...] → [B, S, N / n, ...], rows in sequence order."""
    x = lax.all_to_all(x, split.axes, split_axis=2, concat_axis=1, tiled=True)
    return _in_order(x, split)


def _to_rows(x: jax.Array, split: SequenceSplit) -> jax.Array:
    """Inverts :func:`_to_heads`."""
    x = _in_order(x, split, of_devices=True)
    return lax.all_to_all(x, split.axes, split_axis=1, concat_axis=2, tiled=True)


def _in_order(
    x: jax.Array, split: SequenceSplit, *, of_devices: bool = False
) -> jax.Array:
    """Rows from the devices' order to the sequence's, in which the tiles that a causal
    mask or a window empties are known before the program runs; or back, to that
    ``of_devices``."""
    if not split.balanced:
        return x
    ways = split.num_shards
    order = sequence_order_indices(ways * split.chunks_per_device, ways, balanced=True)
    order = order if of_devices else np.argsort(order)
    return x.reshape(x.shape[0], len(order), -1, *x.shape[2:])[:, order].reshape(
        x.shape
    )
