"""Context parallelism: self-attention over a sequence that is split over devices.

Three methods, the same numbers; all on shards, with gradients of their own:

- ``all_gather``: every device gathers all keys and values, and attends with its own
  queries. Two large collectives and a whole sequence's keys in memory; simple, and fast
  where kv heads are few.
- ``ring``: keys and values travel around the ring of devices, a block at a time, while
  the device computes with the block it has (Liu et al. 2023, ring attention). Memory
  for two blocks; the transfer hides behind the computation where blocks are long.
- ``ulysses``: an all-to-all turns a share of the sequence with all heads into the whole
  sequence with a share of heads, and one more turns the output back (Jacobs et al.
  2023). The least traffic where heads are many; its size is limited by the query heads.

In sequence order a causal mask gives the first device the least work and the last the
most, and all wait for it. **Balanced order** cuts the sequence into 2n chunks for n
devices and gives device i the chunks i and 2n−1−i, so that ``all_gather`` and ``ring``
do equal work everywhere: half of what no mask would need. Ulysses is balanced in any
order, and so is a window much shorter than a device's share of the sequence; in
sequence order the ring then ends at the last device in reach.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.errors import Requirement
from maxlm.parallel.local import Axes, axis_size
from maxlm.parallel.terms import HeadTerms
from maxlm.sharding import AxisRules
from pallas_kernels.attention.params import AttentionOptions

ContextMethod = Literal["all_gather", "ring", "ulysses"]
Segments = tuple[jax.Array, jax.Array] | None
"""Segment ids of queries and of keys; None: each row is one segment."""
Count = Any
"""A number, or an array of numbers, one for each of many meshes that a plan tries."""


class SequenceSplit(NamedTuple):
    """Split of a sequence over devices, and its attention mask. Hashable: what is no
    array of an attention."""

    axes: Axes
    """The mesh axes over which rows are split."""
    method: ContextMethod
    balanced: bool
    causal: bool
    window: int | None
    scale: float | None = None
    """Factor on q·k; None: by the head size."""
    soft_cap: float | None = None
    batch_invariant: bool = False
    """Whether rows that are not split are attended to one key after the other
    (:mod:`maxlm.parallel.batch_invariance`)."""

    @property
    def num_shards(self) -> int:
        return axis_size(self.axes)

    def score_options(self, head_terms: HeadTerms) -> AttentionOptions:
        """Returns the kernel's options of how scores are computed."""
        return {
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "slopes": head_terms.slopes,
            "biases": head_terms.biases,
            "sinks": head_terms.sinks,
        }

    def kernel_options(
        self, head_terms: HeadTerms, segments: Segments
    ) -> AttentionOptions:
        """Returns the kernel's options for queries and keys of the whole sequence."""
        return {
            "segment_ids": segments,
            "causal": self.causal,
            "window": self.window,
            **self.score_options(head_terms),
        }

    @property
    def chunks_per_device(self) -> int:
        """Runs of neighbouring tokens that a device holds."""
        return 2 if self.balanced else 1

    def last_ring_step(self, tokens_per_device: int) -> int:
        """Counts the devices before its own, of ``tokens_per_device`` tokens each, that
        hold keys a device may need. Later devices' keys pass by as the ring closes."""
        # In balanced order each device also holds late tokens, which see far.
        window = None if self.balanced else self.window
        return int(count_ring_steps(self.num_shards, tokens_per_device, window))

    def chunk_starts(self, device_index: jax.Array, chunk_size: int) -> list[jax.Array]:
        """Returns the index in the sequence of the first token of each chunk, of
        ``chunk_size`` tokens, of the device at ``device_index`` along ``axes``."""
        if not self.balanced:
            return [device_index * chunk_size]
        early_start = device_index * chunk_size
        late_chunk = 2 * self.num_shards - 1 - device_index
        return [early_start, late_chunk * chunk_size]


def count_ring_steps(
    num_shards: Count, tokens_per_device: Count, window: int | None
) -> Count:
    """Returns the devices before one's own that hold keys it may need, of so many that
    hold the sequence in order; numbers or arrays of them."""
    others = num_shards - 1
    if window is None:
        return others
    # The first of its tokens sees window − 1 tokens of the devices before it.
    reached = (window + tokens_per_device - 2) // tokens_per_device
    return np.minimum(others, reached)


def require_context(
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    *,
    rules: AxisRules,
    sizes: Mapping[str, Count],
    method: ContextMethod = "all_gather",
    balanced: bool = False,
) -> Iterator[Requirement]:
    """Requires that attention can be split over the sequence: the length divides,
    Ulysses can share out the heads, no query head's kv head lies on another device.

    Args:
        seq_len: tokens in a row of the batch.
        rules: compute rules.
        sizes: mesh axis → devices.
    """
    yield from require_keys_beside_queries(num_heads, num_kv_heads, rules, sizes)
    seq_axes = rules.mesh_axes("seq")
    head_axes = rules.mesh_axes("heads")
    head_shards = prod(sizes[axis] for axis in head_axes)
    seq_shards = prod(sizes[axis] for axis in seq_axes)
    is_whole = np.equal(seq_shards, 1)

    yield from require_split_length(
        seq_len, rules=rules, sizes=sizes, balanced=balanced
    )

    split = _describe_axes(head_axes + seq_axes, sizes)
    message = f"ulysses splits query heads, and {num_heads} do not divide over {split}"
    fix = "use ring or all_gather, or fewer devices on these axes"
    refuse = partial(MaxlmError, message, where="parallel.context", fix=fix)
    divides = num_heads % (head_shards * seq_shards) == 0
    yield Requirement(is_whole | (method != "ulysses") | divides, refuse)


def require_split_length(
    seq_len: int, *, rules: AxisRules, sizes: Mapping[str, Count], balanced: bool
) -> Iterator[Requirement]:
    """Requires that rows of so many tokens divide over the devices that share them;
    arguments are those of :func:`require_context`."""
    seq_shards = prod(sizes[axis] for axis in rules.mesh_axes("seq"))
    num_chunks = seq_shards * (2 if balanced else 1)
    is_whole = np.equal(seq_shards, 1)
    divides = seq_len % num_chunks == 0
    refuse = partial(_length_error, seq_len, seq_shards, balanced)
    yield Requirement(is_whole | divides, refuse)


def require_keys_beside_queries(
    num_heads: int, num_kv_heads: int, rules: AxisRules, sizes: Mapping[str, Count]
) -> Iterator[Requirement]:
    """Requires that kv heads are split as query heads are, or whole where each device's
    query heads are whole groups, or lie within one."""
    head_axes = rules.mesh_axes("heads")
    kv_axes = rules.mesh_axes("kv_heads")
    where = "sharding.compute.kv_heads"

    # Axes that only one of both has may be there where they have one device.
    unshared_size = prod(sizes[axis] for axis in set(head_axes) ^ set(kv_axes))
    same_order = [axis for axis in head_axes if axis in kv_axes] == [
        axis for axis in kv_axes if axis in head_axes
    ]
    kv_heads_are_whole = np.equal(prod(sizes[axis] for axis in kv_axes), 1)
    split_alike = np.equal(unshared_size, 1) & same_order
    message = (
        f"heads are on mesh axes {_describe_axes(head_axes, sizes)}, "
        f"kv_heads on {_describe_axes(kv_axes, sizes)}"
    )
    fix = "give them the axes of heads, or null"
    refuse = partial(MaxlmError, message, where=where, fix=fix)
    yield Requirement(kv_heads_are_whole | split_alike, refuse)

    head_shards = prod(sizes[axis] for axis in head_axes)
    group_size = max(num_heads // num_kv_heads, 1)
    heads_per_device = num_heads // head_shards
    aligned = (
        (heads_per_device % group_size == 0)
        | (group_size % np.maximum(heads_per_device, 1) == 0)
        # Heads that do not divide are refused elsewhere, by name.
        | (num_heads % head_shards != 0)
    )
    message = (
        f"{heads_per_device} query heads a device straddle the groups of {group_size} "
        "that share a kv head"
    )
    fix = f"split heads over a multiple or a divisor of {num_kv_heads} devices"
    refuse = partial(MaxlmError, message, where=where, fix=fix)
    yield Requirement(np.logical_not(kv_heads_are_whole) | aligned, refuse)


def _describe_axes(axes: Axes, sizes: Mapping[str, Count]) -> str:
    return "·".join(f"{axis}={sizes[axis]}" for axis in axes) or "none"


def _length_error(length: int, num_shards: int, balanced: bool) -> MaxlmError:
    num_chunks = num_shards * (2 if balanced else 1)
    below = length // num_chunks * num_chunks
    above = -(-length // num_chunks) * num_chunks
    chunking = f"{num_shards} context shards"
    if balanced:
        chunking += ", two chunks each when balanced"
    fix = f"use {below} or {above}" if below else f"use {above}"
    if balanced and length % num_shards == 0:
        fix += ", or parallel.balance_sequence=false"
    return MaxlmError(
        f"a sequence of {length} does not divide into {num_chunks} chunks ({chunking})",
        where="data.seq_len",
        fix=fix,
    )


def sequence_order_indices(length: int, num_shards: int, balanced: bool) -> np.ndarray:
    """Returns the index of the token that stands at each place, int [length], where
    device i of n holds places i·length/n and on; raises MaxlmError where the length
    does not divide."""
    if length % (num_shards * (2 if balanced else 1)):
        raise _length_error(length, num_shards, balanced)
    if not balanced:
        return np.arange(length)
    # Device i has chunk i of the first half, and its mirror image of the second.
    chunks = np.arange(length).reshape(2 * num_shards, -1)
    early = chunks[:num_shards]
    late = chunks[num_shards:][::-1]
    return np.stack([early, late], axis=1).reshape(-1)
