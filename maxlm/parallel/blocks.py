"""Attention with keys and values in blocks, a device's share each: the ring and the
all-gather.

A device keeps its own queries and takes the keys of one device after another, its own
first. What the causal mask or the window wholly empties is skipped, and what they leave
whole is not masked. Everything here runs on shards (:mod:`maxlm.parallel.local`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.context import HeadTerms, Segments, SequenceSplit
from maxlm.parallel.local import gather, reduce
from pallas_kernels.attention import (
    attention_backward,
    attention_forward,
    compute_row_delta,
    merge_attention,
)


class KeyValueBlock(NamedTuple):
    """The keys of one device, or of all."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


QueryGradients = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""Gradients that stay with the queries, fp32: dQ's chunks; the biases', where there are
any."""
Gradients = tuple[QueryGradients, tuple[jax.Array, jax.Array]]
"""Gradients of the queries, and dK and dV of one device's keys, fp32."""
PartialOutput = tuple[tuple[jax.Array, jax.Array], ...]
"""(o, log-sum-exp) over the keys seen so far for each chunk of queries, fp32."""


def attend_shard_forward(
    split: SequenceSplit,
    number: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    head_terms: HeadTerms,
) -> tuple[jax.Array, jax.Array]:
    """Returns this device's rows of the output, [B, S / n, N, Hv] in v's dtype, and
    their log-sum-exps, fp32 [B, S / n, N].

    Args:
        number: int32 scalar, the device's number along the context axes.
        q: [B, S / n, N, H].
        k, v: [B, S / n, K, H], those kv heads that the query heads read.
        segments: int [B, S / n] of queries and of keys.
        head_terms: those of these query heads.
    """
    run = _ring_forward if split.method == "ring" else _gathered_forward
    q_segments, k_segments = segments or (None, None)
    queries = _Queries(split, number, q_segments, q, head_terms=head_terms)
    o, lse = zip(*run(queries, KeyValueBlock(k, v, k_segments)), strict=True)
    return jnp.concatenate(o, axis=1).astype(v.dtype), jnp.concatenate(lse, axis=1)


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
    """Returns fp32 gradients of this device's q, k and v; and of ``head_terms``, a term
    of the sum over devices. Keys and values are sent again, not kept from the forward
    pass: memory for one layer's, not for every layer's."""
    run = _ring_backward if split.method == "ring" else _gathered_backward
    q_segments, k_segments = segments or (None, None)
    delta = compute_row_delta(o, d_o)
    queries = _Queries(
        split, number, q_segments, q, lse, delta, d_o, head_terms=head_terms
    )
    (d_q, d_biases), (d_k, d_v) = run(queries, KeyValueBlock(k, v, k_segments))
    d_terms = head_terms.compute_gradients(lse, delta, *d_biases)
    return jnp.concatenate(d_q, axis=1), d_k, d_v, d_terms


class _Queries:
    """A device's own rows, in chunks of neighbours."""

    def __init__(
        self,
        split: SequenceSplit,
        number: jax.Array,
        segments: jax.Array | None,
        *arrays: jax.Array,
        head_terms: HeadTerms = HeadTerms(),
    ):
        self.split, self.number, self.head_terms = split, number, head_terms
        self.arrays = tuple(zip(*(_cut(x, split) for x in arrays), strict=True))
        """Arrays of each chunk: its q, and in the backward pass lse, delta and d_o."""
        self.segments = _cut(segments, split)

    def number_before(self, steps: Any) -> jax.Array:
        """The number of the device so many places before in the ring."""
        return (self.number + self.split.num_shards - steps) % self.split.num_shards

    def pairs(
        self, block: KeyValueBlock, number: jax.Array | None
    ) -> Iterator["_Pair"]:
        """Chunks of queries with chunks of a block's keys, but for those that the mask
        empties on every device. A chunk of queries meets the nearest keys first.
        ``number``: of the device whose keys these are, another than the queries'; None:
        the same."""
        split = self.split
        size = self.arrays[0][0].shape[1]
        keys = list(zip(*(_cut(x, split) for x in block), strict=True))
        starts = split.chunk_starts(self.number, size)
        key_starts = starts if number is None else split.chunk_starts(number, size)
        slopes, biases, _ = self.head_terms
        by_distance = slopes is not None or biases is not None
        of_scores = split.score_kwargs(self.head_terms)
        del of_scores["sinks"]  # no pair's: `fold` takes them once
        for a in range(split.chunks_per_device):
            for b in reversed(range(split.chunks_per_device)):
                k, v, k_segments = keys[b]
                segments = (
                    None if k_segments is None else (self.segments[a], k_segments)
                )
                mask = {"segment_ids": segments, "causal": False, **of_scores}
                live = None
                places = {"q_offset": starts[a], "k_offset": key_starts[b]}
                same = (
                    number is None and a == b
                )  # the same indices: both may count from 0
                if by_distance and not same:
                    mask |= places
                if not split.causal:
                    pass
                elif a < b:
                    continue  # every device's first chunk lies before all second ones
                elif same:
                    mask |= split.mask_kwargs
                elif split.window is None:
                    # All keys before the queries, or all after; second chunks lie after
                    # first ones.
                    live = None if a > b else key_starts[b] < starts[a]
                else:
                    mask |= split.mask_kwargs | places
                    oldest = starts[a] - split.window + 1
                    live = (key_starts[b] < starts[a]) & (oldest < key_starts[b] + size)
                yield _Pair(a, b, k, v, mask, live)

    def fold(
        self,
        block: KeyValueBlock,
        number: jax.Array | None,
        partial: PartialOutput | None,
    ) -> PartialOutput:
        """``partial`` (None: nothing yet) with a block of keys added."""
        parts: list[Any] = list(partial or (None,) * self.split.chunks_per_device)
        for pair in self.pairs(block, number):
            (q,) = self.arrays[pair.query]

            def attend(before, pair=pair, q=q):
                own: Any = pair.mask | {
                    "sinks": self.head_terms.sinks if before is None else None
                }
                here = attention_forward(q, pair.k, pair.v, dtype=jnp.float32, **own)
                return here if before is None else merge_attention(before, here)

            parts[pair.query] = pair.where_live(attend, parts[pair.query])
        return tuple(parts)

    def pull(
        self, block: KeyValueBlock, number: jax.Array | None, own: QueryGradients | None
    ) -> Gradients:
        """``own`` (None: nothing yet) with this block's part added, and the block's dK,
        dV."""
        if own is None:
            d_q = tuple(jnp.zeros(q.shape, jnp.float32) for q, *_ in self.arrays)
            biases = self.head_terms.biases
            own = d_q, () if biases is None else (jnp.zeros_like(biases),)
        d_q = list(own[0])
        d_biases = own[1]
        chunks = (_cut(x, self.split)[0] for x in (block.k, block.v))
        zeros = [jnp.zeros(x.shape, jnp.float32) for x in chunks]
        d_keys: list[Any] = [zeros] * self.split.chunks_per_device
        for pair in self.pairs(block, number):
            q, *saved = self.arrays[pair.query]

            def add(sums, pair=pair, q=q, saved=saved):
                return _add(
                    sums, attention_backward(q, pair.k, pair.v, *saved, **pair.mask)
                )

            sums = (d_q[pair.query], *d_keys[pair.key], *d_biases)
            d_q[pair.query], *sums = pair.where_live(add, sums)
            d_keys[pair.key], d_biases = sums[:2], sums[2:]
        d_k, d_v = (jnp.concatenate(x, axis=1) for x in zip(*d_keys, strict=True))
        return (tuple(d_q), tuple(d_biases)), (d_k, d_v)


class _Pair(NamedTuple):
    """One chunk of queries and one of keys."""

    query: int
    key: int
    k: jax.Array
    v: jax.Array
    mask: dict[str, Any]
    """Arguments of the kernel."""
    live: jax.Array | None
    """bool scalar, whether any query sees any key by its index, where devices differ in
    that."""

    def where_live(self, function: Any, state: Any) -> Any:
        # Devices take different branches: there must be no collective in them.
        if self.live is None:
            return function(state)
        return lax.cond(self.live, function, lambda same: same, state)


def _cut(x: Any, split: SequenceSplit) -> tuple[Any, ...]:
    number = split.chunks_per_device
    return (None,) * number if x is None else tuple(jnp.split(x, number, axis=1))


def _add(xs: Any, ys: Any) -> Any:
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


def _steps(step: Any, carry: Any, stop: int) -> Any:
    """``step(carry, t)`` for t = 1 .. stop − 1: a loop, so that programs do not grow
    with it."""
    numbers = jnp.arange(1, stop, dtype=jnp.int32)
    return lax.scan(lambda carry, t: (step(carry, t), None), carry, numbers)[0]


def _rotate(tree: Any, split: SequenceSplit, places: int = 1) -> Any:
    """Everything to the next device of the ring, or so many on."""
    around = [(i, (i + places) % split.num_shards) for i in range(split.num_shards)]
    return jax.tree.map(lambda x: lax.ppermute(x, split.axes, around), tree)


# At step t of a ring a device has the keys of the t-th device before it. It sends them
# on before it computes with them: neither waits for the other, so XLA's scheduler runs
# the transfer under the computation, in a loop's body as in straight code. Outside the
# loop stand the first step (own keys, whose mask is known before) and the last (no keys
# to send).


def _ring_forward(queries: _Queries, block: KeyValueBlock) -> PartialOutput:
    split = queries.split

    def step(carry, t):
        partial, block = carry
        return queries.fold(block, queries.number_before(t), partial), _rotate(
            block, split
        )

    last = split.last_ring_step(block.k.shape[1])
    if last == 0:
        return queries.fold(block, None, None)
    coming = _rotate(block, split)
    partial, block = _steps(step, (queries.fold(block, None, None), coming), last)
    return queries.fold(block, queries.number_before(last), partial)


def _ring_backward(queries: _Queries, block: KeyValueBlock) -> Gradients:
    split = queries.split

    # dK and dV travel with their keys, one step behind: a step sends on the sums that
    # the step before has finished, and adds its own terms to those that arrive for its
    # block. So no transfer waits for its own step's computation. A last hop brings the
    # sums home.
    def step(carry, t):
        own, block, sums = carry
        coming, arriving = _rotate((block, sums), split)
        own, terms = queries.pull(block, queries.number_before(t), own)
        return own, coming, _add(arriving, terms)

    last = split.last_ring_step(block.k.shape[1])
    if last == 0:
        return queries.pull(block, None, None)
    coming = _rotate(block, split)
    own, sums = queries.pull(block, None, None)
    own, block, sums = _steps(step, (own, coming, sums), last)
    arriving = _rotate(sums, split)
    own, terms = queries.pull(block, queries.number_before(last), own)
    return own, _rotate(_add(arriving, terms), split, split.num_shards - last)


# The all-gather takes the same steps over keys that are all here.


def _gathered(split: SequenceSplit, block: KeyValueBlock) -> KeyValueBlock:
    def whole(x):
        rest = ((),) * (x.ndim - 2)
        return gather(x, ((), split.axes, *rest), ((), (), *rest))

    return jax.tree.map(whole, block)


def _block_of(
    split: SequenceSplit, whole: KeyValueBlock, number: jax.Array
) -> KeyValueBlock:
    size = whole.k.shape[1] // split.num_shards
    return jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, number * size, size, axis=1), whole
    )


def _gathered_forward(queries: _Queries, block: KeyValueBlock) -> PartialOutput:
    split = queries.split
    whole = _gathered(split, block)

    def step(partial, t):
        number = queries.number_before(t)
        return queries.fold(_block_of(split, whole, number), number, partial)

    stop = split.last_ring_step(block.k.shape[1]) + 1
    return _steps(step, queries.fold(block, None, None), stop)


def _gathered_backward(queries: _Queries, block: KeyValueBlock) -> Gradients:
    split = queries.split
    whole = _gathered(split, block)
    size = block.k.shape[1]

    def put(sums, number, terms):
        return tuple(
            lax.dynamic_update_slice_in_dim(x, term, number * size, axis=1)
            for x, term in zip(sums, terms, strict=True)
        )

    def step(carry, t):
        own, sums = carry
        number = queries.number_before(t)
        own, terms = queries.pull(_block_of(split, whole, number), number, own)
        return own, put(sums, number, terms)

    own, terms = queries.pull(block, None, None)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (whole.k, whole.v))
    sums = put(zeros, queries.number, terms)
    own, sums = _steps(step, (own, sums), split.last_ring_step(size) + 1)
    everywhere = ((),) * 4
    rows = ((), split.axes, (), ())
    d_k, d_v = (reduce(x, split.axes, everywhere, rows) for x in sums)
    return own, (d_k, d_v)
