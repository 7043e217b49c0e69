"""Attention with keys and values in blocks, a device's share each: the ring and the
all-gather.

A device keeps its own queries and takes the keys of one device after another, its own
first. What the causal mask or the window wholly empties is skipped, and what they leave
whole is not masked. Everything here runs on shards (:mod:`maxlm.parallel.local`).

Shapes: B batch, S sequence, n devices that share it, N query heads, K kv heads that
they read, H head dim, Hv value dim.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.context import Segments, SequenceSplit
from maxlm.parallel.local import gather, reduce
from maxlm.parallel.terms import HeadTerms
from pallas_kernels.attention import (
    attention_backward,
    attention_forward,
    compute_row_delta,
    merge_attention,
)
from pallas_kernels.attention.params import AttentionOptions

T = TypeVar("T")
Arrays = TypeVar("Arrays", bound=tuple[jax.Array, ...])


class KeyValueBlock(NamedTuple):
    """The keys of one device, or of all."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


QueryGradients = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""Gradients that stay with the queries, fp32: dQ's chunks; the biases', where there are
any."""
KeyGradients = tuple[jax.Array, jax.Array]
"""dK and dV of one device's keys, fp32."""
Gradients = tuple[QueryGradients, KeyGradients]
AttentionOutput = tuple[jax.Array, jax.Array]
"""(o, log-sum-exp), fp32."""
PartialOutput = tuple[AttentionOutput, ...]
"""Of each chunk of queries, over the keys seen so far."""


def attend_shard_forward(
    split: SequenceSplit,
    device_index: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    head_terms: HeadTerms,
) -> tuple[jax.Array, jax.Array]:
    """Returns this device's rows of the output, [B, S / n, N, Hv] in v's dtype, and
    their log-sum-exps, fp32 [B, S / n, N].

    Args:
        device_index: int32 scalar, the device's number along the context axes.
        q: [B, S / n, N, H].
        k, v: [B, S / n, K, H], those kv heads that the query heads read.
        segments: int [B, S / n] of queries and of keys.
        head_terms: those of these query heads.
    """
    q_segments, k_segments = segments or (None, None)
    queries = _Queries(split, device_index, q_segments, head_terms, (q,))
    block = KeyValueBlock(k, v, k_segments)
    run = _ring_forward if split.method == "ring" else _gathered_forward
    o, lse = zip(*run(queries, block), strict=True)
    return jnp.concatenate(o, axis=1).astype(v.dtype), jnp.concatenate(lse, axis=1)


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
    """Returns fp32 gradients of this device's q, k and v; and of ``head_terms``, a term
    of the sum over devices. Keys and values are sent again, not kept from the forward
    pass: memory for one layer's, not for every layer's."""
    q_segments, k_segments = segments or (None, None)
    delta = compute_row_delta(o, d_o)
    queries = _Queries(
        split, device_index, q_segments, head_terms, (q, lse, delta, d_o)
    )
    block = KeyValueBlock(k, v, k_segments)
    run = _ring_backward if split.method == "ring" else _gathered_backward
    (d_q, d_biases), (d_k, d_v) = run(queries, block)
    d_terms = head_terms.compute_gradients(lse, delta, *d_biases)
    return jnp.concatenate(d_q, axis=1), d_k, d_v, d_terms


class _Queries:
    """A device's own rows, in chunks of neighbours."""

    def __init__(
        self,
        split: SequenceSplit,
        device_index: jax.Array,
        segments: jax.Array | None,
        head_terms: HeadTerms,
        arrays: tuple[jax.Array, ...],
    ):
        self.split = split
        self.device_index = device_index
        self.head_terms = head_terms
        chunks = (_split_chunks(array, split) for array in arrays)
        self.arrays = tuple(zip(*chunks, strict=True))
        """Arrays of each chunk: its q, and in the backward pass lse, delta and d_o."""
        self.segments = _split_chunks(segments, split)

    def find_device_before(self, steps: jax.Array | int) -> jax.Array:
        """Returns the number of the device so many places before in the ring."""
        num_shards = self.split.num_shards
        return (self.device_index + num_shards - steps) % num_shards

    def list_pairs(
        self, block: KeyValueBlock, key_device: jax.Array | None
    ) -> Iterator["_Pair"]:
        """Yields chunks of queries with chunks of a block's keys, but for those that
        the mask empties on every device. A chunk of queries meets the nearest keys
        first. ``key_device``: the device whose keys these are, another than the
        queries'; None: the same."""
        split = self.split
        chunk_size = self.arrays[0][0].shape[1]
        # k, v and segments of each chunk of keys.
        split_arrays = [_split_chunks(array, split) for array in block]
        key_chunks = list(zip(*split_arrays, strict=True))
        q_starts = split.chunk_starts(self.device_index, chunk_size)
        k_starts = q_starts
        if key_device is not None:
            k_starts = split.chunk_starts(key_device, chunk_size)
        uses_distance = (
            self.head_terms.slopes is not None or self.head_terms.biases is not None
        )
        # Sinks are no pair's: `add_block` takes them once.
        score_options = split.score_options(self.head_terms._replace(sinks=None))

        for i in range(split.chunks_per_device):
            for j in reversed(range(split.chunks_per_device)):
                k, v, k_segments = key_chunks[j]
                segments = None
                if k_segments is not None:
                    segments = (self.segments[i], k_segments)
                options: AttentionOptions = {
                    "segment_ids": segments,
                    "causal": False,
                    **score_options,
                }
                is_live = None
                # The same indices: queries and keys may both count from 0.
                is_same_chunk = key_device is None and i == j
                if uses_distance and not is_same_chunk:
                    options["q_offset"] = q_starts[i]
                    options["k_offset"] = k_starts[j]

                if not split.causal:
                    pass
                elif i < j:
                    continue  # every device's first chunk lies before all second ones
                elif is_same_chunk:
                    options["causal"] = True
                    options["window"] = split.window
                elif split.window is None:
                    # All keys before the queries, or all after; second chunks lie after
                    # first ones.
                    is_live = None if i > j else k_starts[j] < q_starts[i]
                else:
                    options["causal"] = True
                    options["window"] = split.window
                    options["q_offset"] = q_starts[i]
                    options["k_offset"] = k_starts[j]
                    # Whether the chunk's first query's window, or a later one's, reaches
                    # a key of this chunk.
                    oldest_seen = q_starts[i] - split.window + 1
                    is_before = k_starts[j] < q_starts[i]
                    is_live = is_before & (oldest_seen < k_starts[j] + chunk_size)
                yield _Pair(i, j, k, v, options, is_live)

    def add_block(
        self,
        block: KeyValueBlock,
        key_device: jax.Array | None,
        partial: PartialOutput | None,
    ) -> PartialOutput:
        """Returns ``partial`` (None: nothing yet) with a block of keys added."""
        outputs: list[AttentionOutput | None] = [None] * self.split.chunks_per_device
        if partial is not None:
            outputs = list(partial)
        for pair in self.list_pairs(block, key_device):
            (q,) = self.arrays[pair.q_chunk]

            # Arguments with defaults: a loop's variables would change before a branch
            # is traced.
            def attend(before, pair=pair, q=q):
                sinks = self.head_terms.sinks if before is None else None
                options: AttentionOptions = {}
                options.update(pair.options)
                options["sinks"] = sinks
                output = attention_forward(
                    q, pair.k, pair.v, dtype=jnp.float32, **options
                )
                return output if before is None else merge_attention(before, output)

            outputs[pair.q_chunk] = pair.run_if_live(attend, outputs[pair.q_chunk])
        # The first block is the queries' own: each chunk has met its keys there.
        return cast(PartialOutput, tuple(outputs))

    def add_block_gradients(
        self,
        block: KeyValueBlock,
        key_device: jax.Array | None,
        sums: QueryGradients | None,
    ) -> Gradients:
        """Returns ``sums`` (None: nothing yet) with this block's part added, and the
        block's dK and dV."""
        if sums is None:
            biases = self.head_terms.biases
            d_q = tuple(jnp.zeros(q.shape, jnp.float32) for q, *_ in self.arrays)
            d_biases = () if biases is None else (jnp.zeros_like(biases),)
            sums = (d_q, d_biases)
        d_q = list(sums[0])
        d_biases = sums[1]
        zeros = [
            jnp.zeros(_split_chunks(array, self.split)[0].shape, jnp.float32)
            for array in (block.k, block.v)
        ]
        d_keys: list[Sequence[jax.Array]] = [zeros] * self.split.chunks_per_device
        for pair in self.list_pairs(block, key_device):
            q, *saved = self.arrays[pair.q_chunk]

            def add(sums, pair=pair, q=q, saved=saved):
                terms = attention_backward(q, pair.k, pair.v, *saved, **pair.options)
                return _add(sums, terms)

            pair_sums = (d_q[pair.q_chunk], *d_keys[pair.k_chunk], *d_biases)
            d_q[pair.q_chunk], *rest = pair.run_if_live(add, pair_sums)
            d_keys[pair.k_chunk] = rest[:2]
            d_biases = rest[2:]
        d_k, d_v = (jnp.concatenate(d, axis=1) for d in zip(*d_keys, strict=True))
        return (tuple(d_q), tuple(d_biases)), (d_k, d_v)


class _Pair(NamedTuple):
    """One chunk of queries and one of keys."""

    q_chunk: int
    k_chunk: int
    k: jax.Array
    v: jax.Array
    options: AttentionOptions
    is_live: jax.Array | None
    """bool scalar, whether any query sees any key by its index, where devices differ in
    that."""

    def run_if_live(self, function: Callable[[T], T], state: T) -> T:
        # Devices take different branches: there must be no collective in them.
        if self.is_live is None:
            return function(state)
        return lax.cond(self.is_live, function, lambda same: same, state)


def _split_chunks(x: jax.Array | None, split: SequenceSplit) -> tuple[Any, ...]:
    """Splits [B, S / n, ...] into the device's chunks; None: None for each."""
    if x is None:
        return (None,) * split.chunks_per_device
    return tuple(jnp.split(x, split.chunks_per_device, axis=1))


def _add(xs: Arrays, ys: Arrays) -> Arrays:
    """Adds arrays to arrays, one by one."""
    sums = tuple(x + y for x, y in zip(xs, ys, strict=True))
    return cast(Arrays, sums)


def _run_steps(step: Callable[[T, jax.Array], T], carry: T, stop: int) -> T:
    """Runs ``step(carry, t)`` for t = 1 .. stop − 1: a loop, so that programs do not
    grow with it."""
    steps = jnp.arange(1, stop, dtype=jnp.int32)
    return lax.scan(lambda carry, t: (step(carry, t), None), carry, steps)[0]


def _rotate(tree: T, split: SequenceSplit, places: int = 1) -> T:
    """Sends everything to the next device of the ring, or so many on."""
    num_shards = split.num_shards
    pairs = [(i, (i + places) % num_shards) for i in range(num_shards)]
    return jax.tree.map(lambda x: lax.ppermute(x, split.axes, pairs), tree)


# At step t of a ring a device has the keys of the t-th device before it. It sends them
# on before it computes with them: neither waits for the other, so XLA's scheduler runs
# the transfer under the computation, in a loop's body as in straight code. Outside the
# loop stand the first step (own keys, whose mask is known before) and the last (no keys
# to send).


def _ring_forward(queries: _Queries, block: KeyValueBlock) -> PartialOutput:
    split = queries.split

    def step(carry, t):
        partial, block = carry
        partial = queries.add_block(block, queries.find_device_before(t), partial)
        return partial, _rotate(block, split)

    last_step = split.last_ring_step(block.k.shape[1])
    if last_step == 0:
        return queries.add_block(block, None, None)
    next_block = _rotate(block, split)
    partial = queries.add_block(block, None, None)
    partial, block = _run_steps(step, (partial, next_block), last_step)
    return queries.add_block(block, queries.find_device_before(last_step), partial)


def _ring_backward(queries: _Queries, block: KeyValueBlock) -> Gradients:
    split = queries.split

    # dK and dV travel with their keys, one step behind: a step sends on the sums that
    # the step before has finished, and adds its own terms to those that arrive for its
    # block. So no transfer waits for its own step's computation. A last hop brings the
    # sums home.
    def step(carry, t):
        query_sums, block, key_sums = carry
        next_block, arrived_sums = _rotate((block, key_sums), split)
        query_sums, key_terms = queries.add_block_gradients(
            block, queries.find_device_before(t), query_sums
        )
        return query_sums, next_block, _add(arrived_sums, key_terms)

    last_step = split.last_ring_step(block.k.shape[1])
    if last_step == 0:
        return queries.add_block_gradients(block, None, None)
    next_block = _rotate(block, split)
    query_sums, key_sums = queries.add_block_gradients(block, None, None)
    query_sums, block, key_sums = _run_steps(
        step, (query_sums, next_block, key_sums), last_step
    )
    arrived_sums = _rotate(key_sums, split)
    query_sums, key_terms = queries.add_block_gradients(
        block, queries.find_device_before(last_step), query_sums
    )
    hops_home = split.num_shards - last_step
    return query_sums, _rotate(_add(arrived_sums, key_terms), split, hops_home)


# The all-gather takes the same steps over keys that are all here.


def _gather_block(split: SequenceSplit, block: KeyValueBlock) -> KeyValueBlock:
    def gather_rows(x):
        rest = ((),) * (x.ndim - 2)
        return gather(x, ((), split.axes, *rest), ((), (), *rest))

    return jax.tree.map(gather_rows, block)


def _take_block(
    split: SequenceSplit, whole: KeyValueBlock, key_device: jax.Array
) -> KeyValueBlock:
    """Returns one device's block of the gathered keys."""
    size = whole.k.shape[1] // split.num_shards
    return jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, key_device * size, size, axis=1), whole
    )


def _gathered_forward(queries: _Queries, block: KeyValueBlock) -> PartialOutput:
    split = queries.split
    whole = _gather_block(split, block)

    def step(partial, t):
        key_device = queries.find_device_before(t)
        block = _take_block(split, whole, key_device)
        return queries.add_block(block, key_device, partial)

    stop = split.last_ring_step(block.k.shape[1]) + 1
    return _run_steps(step, queries.add_block(block, None, None), stop)


def _gathered_backward(queries: _Queries, block: KeyValueBlock) -> Gradients:
    split = queries.split
    whole = _gather_block(split, block)
    size = block.k.shape[1]

    def put(sums, key_device, terms):
        return tuple(
            lax.dynamic_update_slice_in_dim(x, term, key_device * size, axis=1)
            for x, term in zip(sums, terms, strict=True)
        )

    def step(carry, t):
        query_sums, key_sums = carry
        key_device = queries.find_device_before(t)
        block = _take_block(split, whole, key_device)
        query_sums, key_terms = queries.add_block_gradients(
            block, key_device, query_sums
        )
        return query_sums, put(key_sums, key_device, key_terms)

    query_sums, key_terms = queries.add_block_gradients(block, None, None)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (whole.k, whole.v))
    key_sums = put(zeros, queries.device_index, key_terms)
    stop = split.last_ring_step(size) + 1
    query_sums, key_sums = _run_steps(step, (query_sums, key_sums), stop)
    # Each device has terms of all rows; a reduce-scatter leaves it the sum of its own.
    whole_rows = ((),) * 4
    split_rows = ((), split.axes, (), ())
    d_k, d_v = (reduce(x, split.axes, whole_rows, split_rows) for x in key_sums)
    return query_sums, (d_k, d_v)
