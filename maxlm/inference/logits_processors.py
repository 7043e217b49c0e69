"""Changes to a batch of rows' logits, as transformers makes them, by settings of each
row's own.

Arrays have any leading dimensions ``...``, the same for all: rows [R], or each shard's
rows [D, R]. A row's result does not depend on the others'. ``-inf`` marks a token that
is not drawn.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

# Probabilities that a float32 rounds to 0 would keep no token at all.
LEAST_PROBABILITY = 1e-30


LogitsChange = tuple[jax.Array, Callable[[jax.Array], jax.Array]]
"""The rows that need a change of logits, bool [...], and the change, of all rows."""


def apply_needed(logits: jax.Array, changes: Sequence[LogitsChange]) -> jax.Array:
    """Applies changes in order, each if any of the rows [...] beside it is set; where
    none is, all of them cost one reduction and one condition."""
    # [..., changes] -> [changes]
    needed_by_row = jnp.stack([rows for rows, _ in changes], axis=-1)
    row_axes = tuple(range(needed_by_row.ndim - 1))
    needed = jnp.any(needed_by_row, axis=row_axes)

    def keep(logits):
        return logits

    def apply(logits):
        for index, (_, change) in enumerate(changes):
            logits = lax.cond(needed[index], change, keep, logits)
        return logits

    return lax.cond(jnp.any(needed), apply, keep, logits)


def find_argmax(logits: jax.Array) -> jax.Array:
    """Returns the lowest id with the highest logit, int32 [...], of logits [..., V].

    ``jnp.argmax`` is one reduction of pairs, which XLA's CPU compiler does not
    vectorize.
    """
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    # A row with NaN has no entry that equals its highest: it gets the last id.
    last_id = logits.shape[-1] - 1
    highest_ids = jnp.where(logits == highest, ids, last_id)
    return jnp.min(highest_ids, axis=-1)


def mask_from_bits(bits: jax.Array, vocab: int) -> jax.Array:
    """Returns bool [..., vocab]: token v is bit v % 32 of word v // 32 of uint32 [...,
    words]."""
    # [..., words] -> [..., words, 32] -> [..., words · 32]
    spread = (bits[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    flat = spread.reshape(*bits.shape[:-1], -1)
    # The last word may have bits past the vocabulary.
    return flat[..., :vocab] == 1


def count_tokens(
    history: jax.Array, starts: jax.Array, ends: jax.Array, like: jax.Array
) -> jax.Array:
    """Counts how often each token stands in ``history[..., starts:ends]``.

    Args:
        history: int32 [..., T].
        starts, ends: int32 [...].
        like: an array [..., V], split over a mesh as the result shall be.

    Returns:
        fp32 [..., V].
    """
    slots = lax.broadcasted_iota(jnp.int32, history.shape, history.ndim - 1)
    is_counted = (slots >= starts[..., None]) & (slots < ends[..., None])
    zeros = jnp.zeros_like(like, jnp.float32)
    counted_ids = jnp.where(is_counted, history, -1)
    increments = is_counted.astype(jnp.float32)
    return scatter_tokens("add", zeros, counted_ids, increments)


def find_repeated_ngrams(
    history: jax.Array, lengths: jax.Array, sizes: jax.Array, like: jax.Array
) -> jax.Array:
    """Marks tokens that would complete an n-gram which the history already has.

    Args:
        history: int32 [..., T].
        lengths: tokens of it, int32 [...].
        sizes: n of each row, int32 [...]; 0: marks nothing.
        like: an array [..., V], split over a mesh as the result shall be.

    Returns:
        bool [..., V].
    """
    slots = lax.broadcasted_iota(jnp.int32, history.shape, history.ndim - 1)
    # Slot t ends an n-gram that the next token would repeat if the n - 1 tokens before
    # it are the last n - 1 of the history; before a row's beginning stands -1, which no
    # token equals.
    ends_ngram = (slots < lengths[..., None]) & (sizes[..., None] > 0)

    def compare(back, carry):
        """Compares the tokens ``back`` before each slot with that ``back`` before the
        next token; of rows with shorter n-grams nothing more."""
        ends_ngram, shifted = carry
        # The history, moved by one more slot to the right in each pass.
        no_token = jnp.full_like(shifted[..., :1], -1)
        shifted = jnp.concatenate([no_token, shifted[..., :-1]], -1)
        last_slot = (lengths - back)[..., None]
        last = jnp.take_along_axis(history, jnp.maximum(last_slot, 0), axis=-1)
        is_equal = (shifted == last) & (shifted >= 0) & (last_slot >= 0)
        is_compared = back >= sizes[..., None]
        return ends_ngram & (is_equal | is_compared), shifted

    # After T passes every longer n-gram has failed a comparison.
    longest = jnp.minimum(jnp.max(sizes), history.shape[-1] + 1)
    ends_ngram, _ = lax.fori_loop(1, longest, compare, (ends_ngram, history))
    none = jnp.zeros_like(like, bool)
    completing_ids = jnp.where(ends_ngram, history, -1)
    return scatter_tokens("max", none, completing_ids, ends_ngram)


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Marks each row's k [...] likeliest tokens, with all that are as likely as the
    last of them (Fan et al. 2018)."""
    # Each token weighs 1: the likelier ones are to be fewer than k.
    weights = jnp.ones_like(logits)
    return _keep_highest(logits, weights, k.astype(jnp.float32))


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Marks tokens of which the likelier ones hold less than probability p [...]
    (Holtzman et al. 2019, §3.1). Equally likely tokens stay or go together."""
    weights = _weigh(logits)
    target = p * jnp.sum(weights, axis=-1)
    return _keep_highest(logits, weights, target)


def keep_min_p(logits: jax.Array, share: jax.Array) -> jax.Array:
    """Marks tokens with at least a share [...] of the likeliest one's probability
    (Nguyen et al. 2024, arXiv 2407.01082, §3)."""
    return _weigh(logits) >= share[..., None]


def keep_typical(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Marks tokens of which those with a surprise closer to the entropy hold less than
    probability p [...] (Meister et al. 2022, arXiv 2202.00666, eq. 10)."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    probability = jnp.exp(log_p)
    # 0 · log 0 is 0 here, not NaN.
    terms = jnp.where(probability > 0, log_p * probability, 0)
    entropy = -jnp.sum(terms, axis=-1, keepdims=True)
    closeness = -jnp.abs(log_p + entropy)
    return _keep_highest(closeness, probability, p)


def _weigh(logits: jax.Array) -> jax.Array:
    """Probabilities in units of the likeliest token's."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    # A row without a token (all -inf) must not become NaN.
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    return jnp.exp(logits - highest)


def _keep_highest(
    values: jax.Array, weights: jax.Array, target: jax.Array
) -> jax.Array:
    """Marks values [..., V] of which the higher ones weigh less than ``target`` [...]
    together.

    Equals stay or go together. The lowest value to keep is found by bisection on the
    bits of fp32, in 32 passes over all rows, some 20 times faster on a CPU than XLA's
    sort of 8 rows of 49,152.
    """
    keys = _order_bits(values)
    target = jnp.maximum(target, LEAST_PROBABILITY)

    def add_bit(index, lowest):
        bit = jnp.uint32(1) << (31 - index).astype(jnp.uint32)
        # Bits are decided from the highest down. This is the greatest number that
        # begins with those decided so far and a 0; if the values above it weigh too
        # much already, the lowest value to keep is higher: the bit is a 1.
        candidate = _to_signed(lowest | (bit - 1))[..., None]
        weights_above = jnp.where(keys > candidate, weights, 0)
        total_above = jnp.sum(weights_above, axis=-1)
        return jnp.where(total_above < target, lowest, lowest | bit)

    no_bits = jnp.zeros_like(target, jnp.uint32)
    lowest = lax.fori_loop(0, 32, add_bit, no_bits)
    return keys >= _to_signed(lowest)[..., None]


def _order_bits(values: jax.Array) -> jax.Array:
    """int32 numbers in the order of fp32 ones; both zeros are one."""
    # -0.0 has other bits than 0.0.
    values = jnp.where(values == 0, 0.0, values)
    bits = lax.bitcast_convert_type(values, jnp.int32)
    # Negative numbers are sign and magnitude: their 31 lower bits are inverted to make
    # a greater magnitude a smaller integer. The shift fills 32 bits with the sign.
    sign_mask = bits >> 31
    return bits ^ (sign_mask & 0x7FFFFFFF)


def _to_signed(bits: jax.Array) -> jax.Array:
    """int32 numbers in the order of uint32 ones."""
    highest_bit = jnp.uint32(1 << 31)
    return lax.bitcast_convert_type(bits ^ highest_bit, jnp.int32)


def scatter_tokens(
    kind: Literal["add", "max"], target: jax.Array, ids: jax.Array, values: jax.Array
) -> jax.Array:
    """Adds values [..., N] at ids [..., N] to the last dimension of target [..., V], or
    takes the maximum; leaves out ids outside [0, V), so that -1 stands for none."""

    def scatter_row(row, ids, values):
        # A negative index would count from the end; one past the end is dropped.
        ids = jnp.where(ids < 0, row.shape[0], ids)
        entries = row.at[ids]
        if kind == "add":
            return entries.add(values, mode="drop")
        return entries.max(values, mode="drop")

    # Indexed by rows, a scatter is refused on a mesh that splits them; mapped over rows
    # it is not.
    for _ in range(target.ndim - 1):
        scatter_row = jax.vmap(scatter_row)
    return scatter_row(target, ids, values)
