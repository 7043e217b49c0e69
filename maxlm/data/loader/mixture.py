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
        names = tuple(phases[0][1])
        limits = [max_sequences.get(name, ENDLESS) for name in names]
        before = [0] * len(names)
        segments = list[MixtureSegment]()
        for (start, of_phase), (stop, _) in zip(
            phases, [*phases[1:], (ENDLESS, {})], strict=True
        ):
            while start < stop:
                open_ = {
                    n: of_phase[n] * (before[i] < limits[i])
                    for i, n in enumerate(names)
                }
                if not any(open_.values()):
                    return cls(names, tuple(segments), start, key)
                tree = _tree(open_)
                segments.append(
                    MixtureSegment(start, tree, tuple(open_.values()), tuple(before))
                )
                left = {
                    i: limits[i] - before[i] for i, w in enumerate(open_.values()) if w
                }
                length = _until_full(tree, left, stop - start)
                for i, count in _counts(tree, length).items():
                    before[i] += count
                start += length
        return cls(names, tuple(segments), ENDLESS, key)

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """Returns store numbers [n] and indices [n] within those stores' streams, both
        int64. Raises IndexError: an index at or past `end`."""
        if self.end < ENDLESS and indices.size and int(indices.max()) >= self.end:
            raise IndexError(f"the mixture ends after {self.end} sequences")
        stores, streams = np.empty_like(indices), np.empty_like(indices)
        starts = [segment.start for segment in self.segments]
        numbers = np.searchsorted(starts, indices, side="right") - 1
        for number in np.unique(numbers):
            segment = self.segments[number]
            at = np.flatnonzero(numbers == number)
            within = self._shuffled(indices[at] - segment.start, number)
            _descend(segment.tree, within, at, stores, streams)
            streams[at] += np.array(segment.sequences_before)[stores[at]]
        return stores, streams

    def shares(self, index: int) -> dict[str, float]:
        """Returns each store's share of the sequences around a global index, by name;
        sum 1."""
        weights = self._find_segment(index).weights
        return {n: w / sum(weights) for n, w in zip(self.names, weights, strict=True)}

    def count_sequences_before(self, index: int) -> dict[str, int]:
        """Counts each store's sequences among the first `index` of the mixture, or
        among all if it ends before, by name. O(1) in `index`."""
        index = min(index, self.end)
        segment = self._find_segment(index)
        counts = list(segment.sequences_before)
        # Whole blocks are counted by the tree; within the last the order is shuffled.
        whole_blocks = (index - segment.start) // BLOCK * BLOCK
        for store, count in _counts(segment.tree, whole_blocks).items():
            counts[store] += count
        stores, _ = self.locate(np.arange(segment.start + whole_blocks, index))
        for store in stores.tolist():
            counts[store] += 1
        return dict(zip(self.names, counts, strict=True))

    def _find_segment(self, index: int) -> MixtureSegment:
        number = bisect_right(self.segments, index, key=lambda segment: segment.start)
        return self.segments[number - 1]

    def _shuffled(self, indices: Int64s, number: int) -> Int64s:
        """Indices within segment `number`, each moved within its block."""
        segment = self.segments[number]
        if self.key is None or isinstance(segment.tree, int):
            return indices
        ends = [*(each.start for each in self.segments[1:]), self.end]
        length = ends[number] - segment.start
        blocks, within = np.divmod(indices, BLOCK)
        # A segment has fewer blocks than indices: adding its start makes no number come
        # twice.
        keys = derive_keys(self.key, segment.start + blocks)
        # A block cut by the segment's end is shuffled within what is left of it.
        cut = (blocks + 1) * BLOCK > length
        if cut.any():
            within[cut] = permute(within[cut], length % BLOCK, keys[cut])
        within[~cut] = permute(within[~cut], BLOCK, keys[~cut])
        return blocks * BLOCK + within


def _check_weights(steps: Mapping[int, Weights]) -> None:
    """Refuses weights, by the step that they begin at, by which a store or a step has
    none."""
    if not steps[0]:
        raise MaxlmError(
            "no stores to mix", where="weights", fix="name at least one store"
        )
    for name in steps[0]:
        used = [weights[name] for weights in steps.values()]
        wrong = [
            weight for weight in used if not (math.isfinite(weight) and weight >= 0)
        ]
        if wrong or not any(used):
            what = f"the weight of store {name!r} is {[*wrong, 0][0]}, not a positive number"
            fix = "give a weight above 0, or leave the store out"
            raise MaxlmError(what, where="weights", fix=fix)
    for step, weights in steps.items():
        if not any(weights.values()):
            what = f"from step {step:,} on all weights are 0"
            raise MaxlmError(
                what, where="weights", fix="give a source a weight above 0"
            )


def _tree(weights: Weights) -> _Split | int:
    """The tree of the stores with weights above 0; leaves are places in `weights`."""
    # Huffman's order: small stores share a node, so each share keeps its precision.
    # Ties go by name and not by place: the mixture must not depend on the order of a
    # mapping.
    heap: list[tuple[float, str, _Split | int]] = [
        (weight, name, number)
        for number, (name, weight) in enumerate(weights.items())
        if weight
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        (weight_a, name_a, a), (weight_b, name_b, b) = (
            heapq.heappop(heap),
            heapq.heappop(heap),
        )
        share = max(1, round(weight_a / (weight_a + weight_b) * 2**_SHARE_BITS))
        heapq.heappush(
            heap, (weight_a + weight_b, min(name_a, name_b), _Split(share, a, b))
        )
    return heap[0][2]


def _until_full(tree: _Split | int, left: Mapping[int, int], length: int) -> int:
    """The fewest sequences after which a store has given all it has `left`; at most
    `length`."""

    def is_any_full(total: int) -> bool:
        return any(
            count >= left[store] for store, count in _counts(tree, total).items()
        )

    return min(length, 1 + bisect_left(range(1, length), True, key=is_any_full))


def _counts(node: _Split | int, total: int) -> dict[int, int]:
    """Counts those of the first `total` sequences that reach each leaf."""
    if isinstance(node, int):
        return {node: total}
    left = _left_count(total, node.share)
    return _counts(node.left, left) | _counts(node.right, total - left)


def _descend(
    node: _Split | int, indices: Int64s, at: Int64s, stores: Int64s, streams: Int64s
) -> None:
    if isinstance(node, int):
        stores[at], streams[at] = node, indices
        return
    before = _left_count(indices, node.share)
    goes_left = _left_count(indices + 1, node.share) > before
    right = ~goes_left
    _descend(node.left, before[goes_left], at[goes_left], stores, streams)
    _descend(node.right, (indices - before)[right], at[right], stores, streams)


Count = TypeVar("Count", int, Int64s)


def _left_count(total: Count, share: int) -> Count:
    """floor(total * share / 2^31 + 1/2), split so that nothing overflows for total <
    2^62."""
    high, low = total >> _SHARE_BITS, total & ((1 << _SHARE_BITS) - 1)
    return high * share + ((low * share + (1 << (_SHARE_BITS - 1))) >> _SHARE_BITS)


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
        exponent = 1 / (self.temperature or math.inf)
        largest = max([*tokens.values(), 1])
        sizes = {name: (count / largest) ** exponent for name, count in tokens.items()}
        # A phase that begins at step 0 without a ramp takes the place of the sources'
        # own weights.
        steps = {0: self.weights}
        steps |= {
            phase.from_step: {**self.weights, **phase.weights} for phase in self.phases
        }
        _check_weights(steps)
        before = {name: self.weights[name] * size for name, size in sizes.items()}
        scaled: dict[int, Weights] = {0: before}
        for phase in self.phases:
            weights = {**self.weights, **phase.weights}
            after = {name: weights[name] * size for name, size in sizes.items()}
            scaled |= _make_ramp(phase, before, after, batch_size)
            before = after
        _check_weights(scaled)  # a low temperature may leave nothing of a small store's
        phases = [(step * batch_size, weights) for step, weights in scaled.items()]
        # 0 would be a source that nobody meant to leave out.
        most = {
            name: max(1, round(n * sequences[name]))
            for name, n in self.max_epochs.items()
        }
        return MixtureOrder.of(phases, key, most)


def check_phases(phases: Sequence[Phase], names: Sequence[str]) -> None:
    """Refuses phases of sources that are not there, and one that begins before the
    phase ahead of it is reached."""
    reached_step = -1
    for number, phase in enumerate(phases):
        where = f"phases.{number}"
        for name in phase.weights:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                fix = (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"sources are: {', '.join(names)}"
                )
                raise MaxlmError(
                    f"there is no source {name!r}", where=f"{where}.weights", fix=fix
                )
        if phase.from_step <= reached_step:
            ramp = " and its ramp" if phases[number - 1].ramp_steps else ""
            what = f"from_step={phase.from_step} is not past the phase before{ramp}"
            fix = f"begin at step {reached_step + 1} or later, in rising order"
            raise MaxlmError(what, where=where, fix=fix)
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
    stairs = min(RAMP_STAIRS, phase.ramp_steps, max(1, num_sequences // BLOCK))
    total_before = sum(before.values())
    total_after = sum(after.values())
    if total_before == 0 or total_after == 0:
        stairs = 0  # `make_order` refuses such weights by their own step.
    weights_by_step: dict[int, Weights] = {}
    for stair in range(stairs):
        part = (stair + 0.5) / stairs
        weights_by_step[phase.from_step + stair * phase.ramp_steps // stairs] = {
            name: (1 - part) * before[name] / total_before
            + part * after[name] / total_after
            for name in before
        }
    weights_by_step[phase.from_step + phase.ramp_steps] = after
    return weights_by_step
