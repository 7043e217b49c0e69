"""Dispatch of tokens to experts, and the way back. All of it runs on shards.

A token's k choices are its *assignments*, numbered t·k + j. A plan puts them into
*slots*, sorted by expert; ``send_to_experts`` takes an array of slots to the devices
that hold the experts, ``receive_from_experts`` brings one back. Each is the other's
transpose: the gradient of a sent array is received.

Letters: T tokens of a device, k experts of a token, E experts, R rows at the experts;
b sequences of a device, C slots of an expert for one sequence; ways, the devices that
experts are split over.
"""

from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.local import Axes, axis_size
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_outer_product


class _RaggedSlices(NamedTuple):
    """Slices of one ragged exchange, as ``lax.ragged_all_to_all`` takes them: int32
    [E], one for each peer and expert."""

    input_offsets: jax.Array
    """First row of each slice that is sent."""
    send_sizes: jax.Array
    output_offsets: jax.Array
    """Its first row at the receiver."""
    recv_sizes: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DroplessDispatch:
    """Every assignment is served. Slots: one each; those of tokens that go nowhere come
    last.

    On the owner rows are sorted by expert, then by device of origin. There may be as
    many as all peers' tokens, each once for every expert here that it can choose: ways
    × tokens a device × min(k, experts a device), the size of every array of rows.
    """

    slot_assignments: jax.Array
    """int32 [T·k]: the assignment in each slot."""
    assignment_slots: jax.Array
    """int32 [T, k]: the slot of each assignment."""
    counts: jax.Array
    """int32 [ways, E]: assignments of each device of the expert axes to each expert."""
    device_index: jax.Array
    """int32 [1]: this device's number along the expert axes."""
    axes: Axes = field(metadata={"static": True})
    ragged: bool = field(metadata={"static": True})
    """Devices exchange by ragged all-to-all; otherwise by an all-to-all of worst-case
    blocks."""

    def send_to_experts(self, slots: jax.Array) -> jax.Array:
        """Sends [T·k, ...] → [R, ...]; with several devices rows beyond the groups are
        zeros."""
        if not self.axes:
            return slots
        sent, returned = self._make_slices()
        if self.ragged:
            rows = jnp.zeros((self._num_rows, *slots.shape[1:]), slots.dtype)
            return lax.ragged_all_to_all(slots, rows, *sent, axis_name=self.axes)

        # Rows bound for one device are contiguous: send as many as there may be from
        # its first.
        ways = len(self.counts)
        block_rows = self._num_rows // ways
        first = sent.input_offsets.reshape(ways, -1)[:, :1]
        index = jnp.minimum(first + jnp.arange(block_rows), len(slots) - 1)
        received = self._exchange_blocks(slots[index])

        # Sort what came by expert. Of each expert here, by origin: [experts here, ways].
        starts = returned.input_offsets.reshape(ways, -1).T
        sizes = returned.send_sizes.reshape(ways, -1).T
        counts = self._counts_by_origin()
        # A row's source: its origin's block, behind the rows of experts before its own.
        first_of_block = block_rows * jnp.arange(ways)
        rows_before = (jnp.cumsum(counts, 1) - counts).T
        sources = first_of_block + rows_before
        return _gather_slices(
            received, self._num_rows, starts.ravel(), sizes.ravel(), sources.ravel()
        )

    def receive_from_experts(self, rows: jax.Array) -> jax.Array:
        """Receives [R, ...] → [T·k, ...]; zeros in slots sent nowhere where devices are
        several."""
        if not self.axes:
            return rows
        sent, returned = self._make_slices()
        num_slots = len(self.slot_assignments)
        if self.ragged:
            slots = jnp.zeros((num_slots, *rows.shape[1:]), rows.dtype)
            return lax.ragged_all_to_all(rows, slots, *returned, axis_name=self.axes)

        ways = len(self.counts)
        block_rows = self._num_rows // ways
        counts = self._counts_by_origin()
        # A block for each origin, of its rows at the experts here.
        gather_blocks = jax.vmap(
            lambda *slices: _gather_slices(rows, block_rows, *slices)
        )
        blocks = gather_blocks(
            jnp.cumsum(counts, 1) - counts,
            counts,
            returned.input_offsets.reshape(ways, -1),
        )
        received = self._exchange_blocks(blocks)

        # An expert's slots: in its owner's block, behind those of the owner's experts
        # before it.
        starts = sent.input_offsets
        first = starts.reshape(ways, -1)[:, :1]
        first_of_block = block_rows * jnp.arange(ways)[:, None]
        sources = first_of_block + starts.reshape(ways, -1)
        sources = sources - first
        return _gather_slices(
            received, num_slots, starts, sent.send_sizes, sources.ravel()
        )

    def dot(
        self, rows: jax.Array, kernels: jax.Array, *, transposed: bool = False
    ) -> jax.Array:
        return grouped_matmul(rows, kernels, self._sizes, transpose_kernels=transposed)

    def outer_product(self, rows: jax.Array, others: jax.Array) -> jax.Array:
        return grouped_outer_product(rows, others, self._sizes)

    def spread_to_rows(self, vectors: jax.Array) -> jax.Array:
        """Returns [experts here, F] as [R, F], a row its expert's; zeros behind the
        last."""
        return jnp.take(vectors, self._row_experts, axis=0, mode="fill", fill_value=0)

    def sum_by_expert(self, rows: jax.Array) -> jax.Array:
        """Sums [R, F] over each expert's rows, [experts here, F] in fp32 or wider."""
        # By a product: a TPU sums few groups of many rows slowly by a scatter.
        is_expert = self._row_experts[:, None] == jnp.arange(len(self._sizes))
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        return lax.dot_general(
            is_expert.astype(rows.dtype),
            rows,
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=wide,
        )

    @property
    def _num_rows(self) -> int:
        """R, enough for the worst case."""
        tokens, k = self.assignment_slots.shape
        ways, num_experts = self.counts.shape
        return ways * tokens * min(k, num_experts // ways)

    @property
    def _sizes(self) -> jax.Array:
        """Rows of each expert here."""
        sizes = self.counts.sum(0, dtype=jnp.int32)
        return sizes.reshape(len(self.counts), -1)[self.device_index[0]]

    @property
    def _row_experts(self) -> jax.Array:
        """The expert here of each row, int32 [R]; their number behind the last
        expert's."""
        ends = jnp.cumsum(self._sizes)
        row = jnp.arange(self._num_rows, dtype=ends.dtype)
        return jnp.searchsorted(ends, row, side="right")

    def _counts_by_origin(self) -> jax.Array:
        """Returns the assignments of each device to each expert here, [ways, experts
        here]."""
        ways = len(self.counts)
        return self.counts.reshape(ways, ways, -1)[:, self.device_index[0]]

    def _make_slices(self) -> tuple[_RaggedSlices, _RaggedSlices]:
        """Returns the slices of both ragged exchanges, there and back."""
        ways = len(self.counts)
        device = self.device_index[0]
        sent_sizes = self.counts[device]
        # First slot of each expert, by origin: [ways, E].
        first_slots = jnp.cumsum(self.counts, 1) - self.counts
        # Origin, owner, expert of the owner.
        per_owner = self.counts.reshape(ways, ways, -1)
        totals = per_owner.sum(0)
        # Where rows of an origin begin at their owner: after those of the experts
        # before, then those of the origins before, of the same expert.
        rows_of_other_experts = jnp.cumsum(totals, 1) - totals
        first_rows = rows_of_other_experts + jnp.cumsum(per_owner, 0) - per_owner
        received_sizes = per_owner[:, device].ravel()
        there = _RaggedSlices(
            input_offsets=first_slots[device],
            send_sizes=sent_sizes,
            output_offsets=first_rows[device].ravel(),
            recv_sizes=received_sizes,
        )
        slots_at_origin = first_slots.reshape(ways, ways, -1)[:, device].ravel()
        back = _RaggedSlices(
            input_offsets=first_rows[:, device].ravel(),
            send_sizes=received_sizes,
            output_offsets=slots_at_origin,
            recv_sizes=sent_sizes,
        )
        return there, back

    def _exchange_blocks(self, blocks: jax.Array) -> jax.Array:
        """Sends block i of [ways, room, ...] to device i; returns what came, [ways ·
        room, ...]."""
        received = lax.all_to_all(blocks, self.axes, 0, 0, tiled=True)
        return received.reshape(-1, *blocks.shape[2:])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CapacityDispatch:
    """Every expert serves a fixed number of assignments of each sequence: C slots, some
    empty.

    On the owner rows are sorted by expert, each with as many: a plain all-to-all and
    batched matrix products, on any backend.
    """

    slot_assignments: jax.Array
    """int32 [E·b·C]: the assignment in each slot; T·k in an empty one."""
    assignment_slots: jax.Array
    """int32 [T, k]: the slot of each assignment; E·b·C for one that is dropped."""
    axes: Axes = field(metadata={"static": True})
    experts_per_device: int = field(metadata={"static": True})

    def send_to_experts(self, slots: jax.Array) -> jax.Array:
        """Sends [E·b·C, ...] → [R, ...], R = experts a device × ways · b · C."""
        if not self.axes:
            return slots
        ways = axis_size(self.axes)
        blocks = slots.reshape(ways, self.experts_per_device, -1, *slots.shape[1:])
        received = lax.all_to_all(blocks, self.axes, 0, 0, tiled=True)
        # By expert, then by origin.
        return received.swapaxes(0, 1).reshape(-1, *slots.shape[1:])

    def receive_from_experts(self, rows: jax.Array) -> jax.Array:
        """Receives [R, ...] → [E·b·C, ...]."""
        if not self.axes:
            return rows
        ways = axis_size(self.axes)
        blocks = rows.reshape(self.experts_per_device, ways, -1, *rows.shape[1:])
        received = lax.all_to_all(blocks.swapaxes(0, 1), self.axes, 0, 0, tiled=True)
        return received.reshape(-1, *rows.shape[1:])

    def dot(
        self, rows: jax.Array, kernels: jax.Array, *, transposed: bool = False
    ) -> jax.Array:
        """Multiplies [R, D] by kernels [experts, D, F] ([experts, F, D] if transposed)
        → [R, F]."""
        kernel_dim = 2 if transposed else 1
        dims = (((2,), (kernel_dim,)), ((0,), (0,)))
        products = lax.dot_general(self._split_experts(rows), kernels, dims)
        return products.reshape(len(rows), -1)

    def outer_product(self, rows: jax.Array, others: jax.Array) -> jax.Array:
        """Contracts [R, D] and [R, F] to [experts, D, F]."""
        dims = (((1,), (1,)), ((0,), (0,)))
        return lax.dot_general(
            self._split_experts(rows), self._split_experts(others), dims
        )

    def spread_to_rows(self, vectors: jax.Array) -> jax.Array:
        """Returns [experts here, F] as [R, F], a row its expert's."""
        rows_per_expert = len(self.slot_assignments) // self.experts_per_device
        return jnp.repeat(vectors, rows_per_expert, axis=0)

    def sum_by_expert(self, rows: jax.Array) -> jax.Array:
        """Sums [R, F] over each expert's rows, [experts here, F] in fp32 or wider."""
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        return jnp.sum(self._split_experts(rows), axis=1, dtype=wide)

    def _split_experts(self, rows: jax.Array) -> jax.Array:
        return rows.reshape(self.experts_per_device, -1, rows.shape[-1])


DispatchPlan = DroplessDispatch | CapacityDispatch


def plan_dropless(
    expert_ids: jax.Array,
    num_experts: int,
    axes: Axes,
    device_index: jax.Array,
    *,
    ragged: bool,
) -> DroplessDispatch:
    """Sorts this device's assignments by expert and learns the counts of its peers.

    Args:
        expert_ids: int32 [b, s, k], a token's distinct experts; ``num_experts`` for
            nowhere.
        axes: mesh axes that split the experts; they also split the tokens.
        device_index: int32 [1], this device's number along them.
    """
    k = expert_ids.shape[-1]
    flat_ids = expert_ids.reshape(-1)
    slot_assignments = jnp.argsort(flat_ids, stable=True).astype(jnp.int32)
    # The inverse; a TPU sorts faster than it scatters.
    assignment_slots = jnp.argsort(slot_assignments).astype(jnp.int32)
    is_chosen = flat_ids[:, None] == jnp.arange(num_experts)
    counts = is_chosen.sum(0, dtype=jnp.int32)
    counts = lax.all_gather(counts, axes) if axes else counts[None]
    return DroplessDispatch(
        slot_assignments,
        assignment_slots.reshape(-1, k),
        counts,
        device_index,
        axes,
        ragged,
    )


def compute_expert_capacity(
    seq_len: int, experts_per_token: int, num_experts: int, factor: float
) -> int:
    """Returns the slots of an expert for one sequence: ⌈S·k/E · factor⌉, at most S."""
    equal_share = seq_len * experts_per_token / num_experts
    return min(seq_len, ceil(equal_share * factor))


def plan_capacity(
    expert_ids: jax.Array, num_experts: int, expert_capacity: int, axes: Axes
) -> CapacityDispatch:
    """Gives each sequence's assignments their slots: all first choices in the order of
    tokens, then all second choices, and so on, until an expert has its capacity
    (GShard, arXiv 2006.16668, algorithm 1).

    Args:
        expert_ids: int32 [b, S, k] of whole sequences; ``num_experts`` for nowhere.
    """
    b, seq_len, k = expert_ids.shape
    num_ranked = k * seq_len
    # [b, k·S]: all first choices, then all second ones.
    by_rank = expert_ids.swapaxes(1, 2).reshape(b, num_ranked)
    order = jnp.argsort(by_rank, axis=1, stable=True)
    is_chosen = by_rank[..., None] == jnp.arange(num_experts + 1)
    counts = is_chosen.sum(1, dtype=jnp.int32)
    # [b, E + 1]: the first place in the order of those that chose an expert.
    first = jnp.cumsum(counts, 1) - counts

    # The slot of each assignment: its place among those of its expert and row.
    place_in_order = jnp.argsort(order, axis=1)
    place = place_in_order - jnp.take_along_axis(first, by_rank, 1)
    place = place.reshape(b, k, seq_len).swapaxes(1, 2)
    has_slot = (place < expert_capacity) & (expert_ids < num_experts)
    row = jnp.arange(b)[:, None, None]
    nowhere = num_experts * b * expert_capacity
    # Slots lie by expert, then by row.
    slot_if_any = (expert_ids * b + row) * expert_capacity + place
    slots = jnp.where(has_slot, slot_if_any, nowhere)
    assignment_slots = slots.reshape(-1, k).astype(jnp.int32)

    # Of slot c of expert e, in each row: the c-th of its assignments, if there are as
    # many.
    slot = jnp.arange(expert_capacity)
    index = jnp.minimum(first[:, :num_experts, None] + slot, num_ranked - 1)
    ranked = jax.vmap(jnp.take)(order, index)
    rank, token = jnp.divmod(ranked, seq_len)  # [b, E, C]
    is_filled = slot < counts[:, :num_experts, None]
    assignment_if_any = (row * seq_len + token) * k + rank
    no_assignment = b * seq_len * k
    assignments = jnp.where(is_filled, assignment_if_any, no_assignment)
    # [E, b, C], as slots lie.
    slot_assignments = assignments.swapaxes(0, 1).reshape(-1).astype(jnp.int32)
    experts_per_device = num_experts // axis_size(axes)
    return CapacityDispatch(
        slot_assignments, assignment_slots, axes, experts_per_device
    )


def _gather_slices(
    source: jax.Array,
    length: int,
    starts: jax.Array,
    sizes: jax.Array,
    source_starts: jax.Array,
) -> jax.Array:
    """Returns [length, ...] whose rows starts[i] … + sizes[i] are the source's from
    source_starts[i] on, for slices in order and without gaps; zeros beyond them."""
    row = jnp.arange(length)
    # The slice that each row is in; rows beyond them are zeros.
    slice_index = jnp.searchsorted(jnp.cumsum(sizes), row, side="right")
    slice_index = jnp.minimum(slice_index, len(sizes) - 1)
    is_filled = row < sizes.sum()
    index = source_starts[slice_index] + row - starts[slice_index]
    index = jnp.where(is_filled, index, len(source))
    return jnp.take(source, index, axis=0, mode="fill", fill_value=0)
