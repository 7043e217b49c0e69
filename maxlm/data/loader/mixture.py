"""Maps each global sequence to its store: weights kept exactly, any index answered
alone.

The stores are the leaves of a binary tree. At a node with weight share p on the left,
of the first t sequences that reach the node floor(p t + 1/2) go left. Both sides'
counts grow by at most one a step, so "the k-th sequence of this store" is well defined,
and every count stays within a few sequences of its weight for ever (largest-remainder
rounding of cumulative counts would let a small store's count fall back). Within a block
the order is shuffled, so that no store sits at the same rows of every batch.

Where weights change with the step, or a store has been read as often as it may, a new
segment begins: a run of global indices with one tree. Each knows how many sequences
every store gave before it, so each store's stream goes on without a gap or a repeat.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TypeVar

import numpy as np
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.data.loader.permutation import derive_keys, permute
from maxlm.data.store.arrays import Int64s

# Global indices shuffled together. Smaller keeps each batch closer to the weights.
BLOCK = 256
# Past any index: what `permute`, the arithmetic of the tree and Grain's counts can
# take.
ENDLESS = 1 << 62
_SHARE_BITS = 31
# A ramp is a stair of at most so many steps, each of at least BLOCK sequences: in each,
# counts are rounded anew, and each costs a look-up one segment more.
RAMP_STAIRS = 64

Weights = Mapping[str, float]


@dataclass(frozen=True)
class _Split:
    """A tree node: `share` / 2^31 of what reaches it goes left. Leaves are store
    numbers."""

    share: int
    left: "_Split | int"
    right: "_Split | int"


@dataclass(frozen=True)
class MixtureSegment:
    """A run of global indices, from `start` to the next segment's, over which weights
    are equal."""

    start: int
    tree: _Split | int
    weights: tuple[float, ...]
    """Weights by store number; 0 for a store that is not read here."""
    sequences_before: tuple[int, ...]
    """Sequences that each store gave before it."""


@dataclass(frozen=True)
class MixtureOrder:
    """Maps a global sequence index to (store number, index within that store's own
    stream)."""

    names: tuple[str, ...]
    segments: tuple[MixtureSegment, ...]
    end: int
    """The first index past the mixture; `ENDLESS` if there is none."""
    key: int | None
    """Shuffles within blocks of `BLOCK` indices; None keeps the even interleaving."""

    @classmethod
    def of(
        cls,
        phases: Sequence[tuple[int, Weights]],
        key: int | None,
        max_sequences: Mapping[str, int],
    ) -> "MixtureOrder":
        """Makes a mixture of stores, numbered in the order of the weights.

        Args:
            phases: (first index, weights of every store, which need not sum to 1), in
                rising order from 0.
            max_sequences: how many a store gives in all, for stores that do not go on
                for ever. Its weight then goes to the others, in proportion to theirs.
        """
        _, first_weights = phases[0]
        names = tuple(first_weights)
        limits = [max_sequences.get(name, ENDLESS) for name in names]
        counts_before = [0] * len(names)
        segments: list[MixtureSegment] = []
        phase_starts = [start for start, _ in phases]
        phase_stops = [*phase_starts[1:], ENDLESS]
        for (start, phase_weights), stop in zip(phases, phase_stops, strict=True):
            # A phase is one segment, or more if a store gives its last on the way.
            while start < stop:
                # Sequences that stores still have, those read in this phase alone.
                remaining: dict[int, int] = {}
                # Weights of these; 0 for a store that is read out or not read.
                weights = dict.fromkeys(names, 0.0)
                for number, name in enumerate(names):
                    num_remaining = limits[number] - counts_before[number]
                    if num_remaining > 0 and phase_weights[name]:
                        remaining[number] = num_remaining
                        weights[name] = phase_weights[name]
                if not remaining:
                    return cls(names, tuple(segments), end=start, key=key)

                tree = _make_tree(weights)
                segment = MixtureSegment(
                    start=start,
                    tree=tree,
                    weights=tuple(weights.values()),
                    sequences_before=tuple(counts_before),
                )
                segments.append(segment)
                length = _count_until_one_is_out(tree, remaining, stop - start)
                for number, count in _count_by_store(tree, length).items():
                    counts_before[number] += count
                start += length
        return cls(names, tuple(segments), end=ENDLESS, key=key)

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """Returns store numbers [n] and indices [n] within those stores' streams, both
        int64. Raises IndexError: an index at or past `end`."""
        if self.end < ENDLESS and indices.size and int(indices.max()) >= self.end:
            raise IndexError(f"the mixture ends after {self.end} sequences")
        stores = np.empty_like(indices)
        streams = np.empty_like(indices)
        starts = [segment.start for segment in self.segments]
        segment_numbers = np.searchsorted(starts, indices, side="right") - 1
        for number in np.unique(segment_numbers):
            segment = self.segments[number]
            places = np.flatnonzero(segment_numbers == number)
            in_segment = self._shuffle(indices[places] - segment.start, number)
            _descend(segment.tree, in_segment, places, stores, streams)
            streams[places] += np.array(segment.sequences_before)[stores[places]]
        return stores, streams

    def shares(self, index: int) -> dict[str, float]:
        """Returns each store's share of the sequences around a global index, by name;
        sum 1."""
        weights = self._find_segment(index).weights
        total = sum(weights)
        return {
            name: weight / total
            for name, weight in zip(self.names, weights, strict=True)
        }

    def count_sequences_before(self, index: int) -> dict[str, int]:
        """Counts each store's sequences among the first `index` of the mixture, or
        among all if it ends before, by name. O(1) in `index`."""
        index = min(index, self.end)
        segment = self._find_segment(index)
        counts = list(segment.sequences_before)
        # Whole blocks are counted by the tree; within the last the order is shuffled.
        whole_blocks = (index - segment.start) // BLOCK * BLOCK
        for store, count in _count_by_store(segment.tree, whole_blocks).items():
            counts[store] += count
        stores, _ = self.locate(np.arange(segment.start + whole_blocks, index))
        for store in stores.tolist():
            counts[store] += 1
        return dict(zip(self.names, counts, strict=True))

    def _find_segment(self, index: int) -> MixtureSegment:
        number = bisect_right(self.segments, index, key=lambda segment: segment.start)
        return self.segments[number - 1]

    def _shuffle(self, indices: Int64s, number: int) -> Int64s:
        """Indices within segment `number`, each moved within its block."""
        segment = self.segments[number]
        if self.key is None or isinstance(segment.tree, int):
            return indices
        is_last = number + 1 == len(self.segments)
        end = self.end if is_last else self.segments[number + 1].start
        length = end - segment.start
        blocks, in_block = np.divmod(indices, BLOCK)
        # A segment has fewer blocks than indices: adding its start makes no number come
        # twice.
        keys = derive_keys(self.key, segment.start + blocks)
        # A block cut by the segment's end is shuffled within what is left of it.
        is_cut = (blocks + 1) * BLOCK > length
        if is_cut.any():
            cut_size = length % BLOCK
            in_block[is_cut] = permute(in_block[is_cut], cut_size, keys[is_cut])
        is_whole = ~is_cut
        in_block[is_whole] = permute(in_block[is_whole], BLOCK, keys[is_whole])
        return blocks * BLOCK + in_block


def _check_weights(steps: Mapping[int, Weights]) -> None:
    """Refuses weights, by the step that they begin at, by which a store or a step has
    none."""
    if not steps[0]:
        raise MaxlmError(
            "no stores to mix", where="weights", fix="name at least one store"
        )
    for name in steps[0]:
        store_weights = [weights[name] for weights in steps.values()]
        invalid = [
            weight
            for weight in store_weights
            if not math.isfinite(weight) or weight < 0
        ]
        if invalid or not any(store_weights):
            weight = invalid[0] if invalid else 0
            message = f"the weight of store {name!r} is {weight}, not a positive number"
            fix = "give a weight above 0, or leave the store out"
            raise MaxlmError(message, where="weights", fix=fix)
    for step, weights in steps.items():
        if not any(weights.values()):
            message = f"from step {step:,} on all weights are 0"
            fix = "give a source a weight above 0"
            raise MaxlmError(message, where="weights", fix=fix)


def _make_tree(weights: Weights) -> _Split | int:
    """The tree of the stores with weights above 0; leaves are store numbers, places in
    `weights`."""
    # Huffman's order, the two lightest nodes first: small stores share a node, so each
    # share keeps its precision. Ties go by name and not by place: the mixture must not
    # depend on the order of a mapping.
    heap: list[tuple[float, str, _Split | int]] = [
        (weight, name, number)
        for number, (name, weight) in enumerate(weights.items())
        if weight
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        left_weight, left_name, left = heapq.heappop(heap)
        right_weight, right_name, right = heapq.heappop(heap)
        weight = left_weight + right_weight
        # At least 1: a store whose share is rounded to nothing would never be read.
        share = max(1, round(left_weight / weight * 2**_SHARE_BITS))
        node = _Split(share, left, right)
        heapq.heappush(heap, (weight, min(left_name, right_name), node))
    _, _, root = heap[0]
    return root


def _count_until_one_is_out(
    tree: _Split | int, remaining: Mapping[int, int], length: int
) -> int:
    """The fewest sequences after which a store has given all that it has `remaining`;
    at most `length`."""

    def is_one_out(total: int) -> bool:
        counts = _count_by_store(tree, total)
        return any(count >= remaining[store] for store, count in counts.items())

    # Counts grow with the total: the first total in 1, 2, ... is found by bisection.
    first_total = 1 + bisect_left(range(1, length), True, key=is_one_out)
    return min(length, first_total)


def _count_by_store(node: _Split | int, total: int) -> dict[int, int]:
    """Counts those of the first `total` sequences that reach each leaf."""
    if isinstance(node, int):
        return {node: total}
    num_left = _count_left(total, node.share)
    num_right = total - num_left
    return _count_by_store(node.left, num_left) | _count_by_store(node.right, num_right)


def _descend(
    node: _Split | int, indices: Int64s, places: Int64s, stores: Int64s, streams: Int64s
) -> None:
    """Writes, at `places` [n] of both arrays, the store that each index [n] of the
    sequences at a node reaches, and its index in that store's stream."""
    if isinstance(node, int):
        stores[places] = node
        streams[places] = indices
        return
    # Of the sequences before each index; it goes left if it is one more that does.
    num_left = _count_left(indices, node.share)
    goes_left = _count_left(indices + 1, node.share) > num_left
    goes_right = ~goes_left
    num_right = indices - num_left
    _descend(node.left, num_left[goes_left], places[goes_left], stores, streams)
    _descend(node.right, num_right[goes_right], places[goes_right], stores, streams)


Count = TypeVar("Count", int, Int64s)


def _count_left(total: Count, share: int) -> Count:
    """Counts those of the first `total` sequences at a node that go left: floor(total *
    share / 2^31 + 1/2), for total < 2^62."""
    # In two parts, high * 2^31 + low: the whole product would overflow 64 bits.
    high = total >> _SHARE_BITS
    low = total & ((1 << _SHARE_BITS) - 1)
    half = 1 << (_SHARE_BITS - 1)
    return high * share + ((low * share + half) >> _SHARE_BITS)


class Phase(Config):
    """Weights from some step on."""

    from_step: int = Field(ge=0)
    """The first step with these weights."""
    weights: dict[str, float] = Field(min_length=1)
    """Weights by source, at least 0, which reads nothing of it. A source that is not
    named here has its own weight."""
    ramp_steps: int = Field(default=0, ge=0)
    """Steps, from `from_step` on, over which shares move along a straight line (in up
    to 64 stairs) from those before to these; these hold from step `from_step` +
    `ramp_steps` on. 0 changes them at once."""


@dataclass(frozen=True)
class Mixing:
    """Settings of a mixture; see `maxlm.data.config.DataConfig` for what the fields
    mean."""

    weights: Weights
    """Weights by source."""
    max_epochs: Weights = field(default_factory=dict)
    """Times that a source may be read, by source; those not named have no limit."""
    temperature: float | None = None
    phases: tuple[Phase, ...] = ()

    def make_order(
        self,
        tokens: Mapping[str, int],
        sequences: Mapping[str, int],
        batch_size: int,
        key: int | None,
    ) -> MixtureOrder:
        """Makes the mixture of stores of these sizes, numbered in the order of
        `tokens`."""
        check_phases(self.phases, tuple(self.weights))

        # A source's weight counts by its size to the power of 1 / temperature. Without a temperature every size counts alike: the exponent is 0.
        exponent = 1 / (self.temperature or math.inf)
        largest = max([*tokens.values(), 1])
        sizes = {name: (count / largest) ** exponent for name, count in tokens.items()}

        # The weights as they are set, by the step that they begin at. A phase that
        # begins at step 0 without a ramp takes the place of the sources' own weights.
        weights_by_step = {0: self.weights}
        for phase in self.phases:
            weights_by_step[phase.from_step] = {**self.weights, **phase.weights}
        _check_weights(weights_by_step)

        # The same scaled by sizes, and with the stairs of ramps.
        before = {name: self.weights[name] * size for name, size in sizes.items()}
        scaled_by_step: dict[int, Weights] = {0: before}
        for phase in self.phases:
            weights = {**self.weights, **phase.weights}
            after = {name: weights[name] * size for name, size in sizes.items()}
            scaled_by_step |= _make_ramp(phase, before, after, batch_size)
            before = after
        # Again: a low temperature may leave nothing of a small store's weight.
        _check_weights(scaled_by_step)

        phases = [
            (step * batch_size, weights) for step, weights in scaled_by_step.items()
        ]
        # At least 1: 0 would be a source that nobody meant to leave out.
        max_sequences = {
            name: max(1, round(epochs * sequences[name]))
            for name, epochs in self.max_epochs.items()
        }
        return MixtureOrder.of(phases, key, max_sequences)


def check_phases(phases: Sequence[Phase], names: Sequence[str]) -> None:
    """Refuses phases of sources that are not there, and one that begins before the
    phase ahead of it is reached."""
    reached_step = -1
    for number, phase in enumerate(phases):
        where = f"phases.{number}"
        for name in phase.weights:
            if name not in names:
                message = f"there is no source {name!r}"
                fix = f"sources are: {', '.join(names)}"
                similar = get_close_matches(name, names, n=1)
                if similar:
                    fix = f"did you mean {similar[0]!r}?"
                raise MaxlmError(message, where=f"{where}.weights", fix=fix)
        if phase.from_step <= reached_step:
            ramp = " and its ramp" if phases[number - 1].ramp_steps else ""
            message = f"from_step={phase.from_step} is not past the phase before{ramp}"
            fix = f"begin at step {reached_step + 1} or later, in rising order"
            raise MaxlmError(message, where=where, fix=fix)
        reached_step = phase.from_step + max(0, phase.ramp_steps - 1)


def _make_ramp(
    phase: Phase, before: Weights, after: Weights, batch_size: int
) -> dict[int, Weights]:
    """Returns the weights of each stair of a phase's ramp and of what follows, by first
    step.

    Shares are interpolated, not weights, which may be of another scale. A stair has the
    shares of the line at its middle.
    """
    num_sequences = phase.ramp_steps * batch_size
    num_stairs = min(RAMP_STAIRS, phase.ramp_steps, max(1, num_sequences // BLOCK))
    total_before = sum(before.values())
    total_after = sum(after.values())
    if total_before == 0 or total_after == 0:
        num_stairs = 0  # `make_order` refuses such weights by their own step.
    weights_by_step: dict[int, Weights] = {}
    for stair in range(num_stairs):
        first_step = phase.from_step + stair * phase.ramp_steps // num_stairs
        fraction = (stair + 0.5) / num_stairs
        shares = {}
        for name in before:
            from_before = (1 - fraction) * before[name] / total_before
            from_after = fraction * after[name] / total_after
            shares[name] = from_before + from_after
        weights_by_step[first_step] = shares
    weights_by_step[phase.from_step + phase.ramp_steps] = after
    return weights_by_step
