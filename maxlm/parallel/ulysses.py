"""Attention over a split sequence by all-to-all between rows and heads (Jacobs et al.
2023).

Everything here runs on shards (:mod:`maxlm.parallel.local`). Shapes: B batch, S
sequence, n devices that share it, N query heads.
"""

from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlm.parallel.context import Segments, SequenceSplit, sequence_order_indices
from maxlm.parallel.local import gather
from maxlm.parallel.terms import HeadTerms
from pallas_kernels.attention import (
    attention_backward,
    attention_forward,
    compute_row_delta,
)
from pallas_kernels.attention.params import AttentionOptions


def attend_shard_forward(
    split: SequenceSplit,
    device_index: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    head_terms: HeadTerms,
) -> tuple[jax.Array, jax.Array]:
    """See :func:`blocks.attend_shard_forward`; n divides N, and log-sum-exps are of all
    rows in sequence order and this device's share of heads, fp32 [B, S, N / n]."""
    q, k, v = _exchange_to_heads(split, q, k, v)
    local_terms = _select_terms(split, device_index, head_terms)
    options = _kernel_options(split, segments, local_terms)
    o, lse = attention_forward(q, k, v, **options)
    return _to_rows(o, split), lse


def attend_shard_backward(
    split: SequenceSplit,
    device_index: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    head_terms: HeadTerms,
    o: jax.Array,
    lse: jax.Array,
    d_o: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, HeadTerms]:
    """See :func:`blocks.attend_shard_backward`; q, k and v are sent again."""
    num_copies = count_kv_copies(k.shape[2], split.num_shards)
    delta = _to_heads(compute_row_delta(o, d_o), split)
    d_o = _to_heads(d_o, split)
    q, k, v = _exchange_to_heads(split, q, k, v)
    local_terms = _select_terms(split, device_index, head_terms)
    options = _kernel_options(split, segments, local_terms)
    d_q, d_k, d_v, *d_biases = attention_backward(q, k, v, lse, delta, d_o, **options)
    d_terms = local_terms.compute_gradients(lse, delta, *d_biases)

    # fp32 on the wire only where the terms of a head's copies are still to be summed.
    key_wire_dtype = k.dtype if num_copies == 1 else jnp.float32
    d_q = _to_rows(d_q.astype(q.dtype), split)
    d_k = _to_rows(d_k.astype(key_wire_dtype), split)
    d_v = _to_rows(d_v.astype(key_wire_dtype), split)
    d_k = _sum_copies(d_k, num_copies)
    d_v = _sum_copies(d_v, num_copies)

    def pad_to_all_heads(d_term):  # [N / n, ...] → [N, ...], zeros for the others
        num_heads = len(d_term) * split.num_shards
        zeros = jnp.zeros((num_heads, *d_term.shape[1:]), d_term.dtype)
        first_head = device_index * len(d_term)
        return lax.dynamic_update_slice_in_dim(zeros, d_term, first_head, axis=0)

    return d_q, d_k, d_v, jax.tree.map(pad_to_all_heads, d_terms)


def count_kv_copies(num_kv_heads: int, ways: int) -> int:
    """Counts the copies of each kv head that give devices equal numbers of them.

    The query heads that a device gets then read exactly the kv heads that it gets, in
    order: the repeated number, lcm(num_kv_heads, ways), divides the query heads, as
    both its factors do. With one kv head, every device gets it whole: nothing smaller
    would do.
    """
    return ways // gcd(num_kv_heads, ways)


def _sum_copies(d: jax.Array, num_copies: int) -> jax.Array:
    """Sums the gradients of each kv head's copies: [B, T, copies · K, H] → [B, T, K,
    H]."""
    return d.reshape(*d.shape[:2], -1, num_copies, d.shape[3]).sum(axis=3)


def _exchange_to_heads(
    split: SequenceSplit, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exchanges a share of rows with all heads for all rows with a share of heads."""
    num_copies = count_kv_copies(k.shape[2], split.num_shards)
    if num_copies > 1:
        k = jnp.repeat(k, num_copies, axis=2)
        v = jnp.repeat(v, num_copies, axis=2)
    return _to_heads(q, split), _to_heads(k, split), _to_heads(v, split)


def _select_terms(
    split: SequenceSplit, device_index: jax.Array, head_terms: HeadTerms
) -> HeadTerms:
    """Returns those of this device's share of heads."""

    def select(term):
        size = len(term) // split.num_shards
        return lax.dynamic_slice_in_dim(term, device_index * size, size)

    return jax.tree.map(select, head_terms)


def _kernel_options(
    split: SequenceSplit, segments: Segments, local_terms: HeadTerms
) -> AttentionOptions:
    """Returns the kernel's options, for all rows in order and this device's share of
    heads."""
    if segments is not None:
        # Heads are exchanged, but segment ids have none: every device gathers them.
        q_segments, k_segments = (
            gather(ids, ((), split.axes), ((), ())) for ids in segments
        )
        segments = (
            _to_sequence_order(q_segments, split),
            _to_sequence_order(k_segments, split),
        )
    return split.kernel_options(local_terms, segments)


def _to_heads(x: jax.Array, split: SequenceSplit) -> jax.Array:
    """[B, S / n, N, ...] → [B, S, N / n, ...], rows in sequence order."""
    x = lax.all_to_all(x, split.axes, split_axis=2, concat_axis=1, tiled=True)
    return _to_sequence_order(x, split)


def _to_rows(x: jax.Array, split: SequenceSplit) -> jax.Array:
    """Inverts :func:`_to_heads`."""
    x = _to_device_order(x, split)
    return lax.all_to_all(x, split.axes, split_axis=1, concat_axis=2, tiled=True)


# In sequence order the tiles that a causal mask or a window empties are known before
# the program runs; devices hold rows in balanced order.


def _to_sequence_order(x: jax.Array, split: SequenceSplit) -> jax.Array:
    if not split.balanced:
        return x
    return _take_chunks(x, np.argsort(_device_order(split)))


def _to_device_order(x: jax.Array, split: SequenceSplit) -> jax.Array:
    if not split.balanced:
        return x
    return _take_chunks(x, _device_order(split))


def _device_order(split: SequenceSplit) -> np.ndarray:
    num_chunks = split.num_shards * split.chunks_per_device
    return sequence_order_indices(num_chunks, split.num_shards, balanced=True)


def _take_chunks(x: jax.Array, order: np.ndarray) -> jax.Array:
    chunked = x.reshape(x.shape[0], len(order), -1, *x.shape[2:])
    return chunked[:, order].reshape(x.shape)
