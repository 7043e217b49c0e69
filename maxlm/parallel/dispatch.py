"""Dispatch of tokens to experts, and the way back. All of it runs on shards.

A token's k choices are its *assignments*, numbered t·k + j. A plan puts them into
*slots*, sorted by expert; ``send_to_experts`` takes an array of slots to the devices
that hold the experts, ``receive_from_experts`` brings one back. Each is the other's
transpose: the gradient of a sent array is received.
"""

from dataclasses import dataclass, field
from math import ceil

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.local import Axes, axis_size
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_outer_product


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
        there, back = self._slices()
        if self.ragged:
            out = jnp.zeros((self._num_rows, *slots.shape[1:]), slots.dtype)
            return lax.ragged_all_to_all(slots, out, *there, axis_name=self.axes)
        # Rows bound for one device are contiguous: send as many as there may be from
        # its first.
        ways = len(self.counts)
        room = self._num_rows // len(self.counts)
        first = there[0].reshape(ways, -1)[:, :1]
        got = self._swap(slots[jnp.minimum(first + jnp.arange(room), len(slots) - 1)])
        starts, sizes = (
            a.reshape(ways, -1).T for a in back[:2]
        )  # [experts here, ways]
        own = self.counts.reshape(ways, ways, -1)[:, self.device_index[0]]
        at = room * jnp.arange(ways) + (jnp.cumsum(own, 1) - own).T
        return _pick(got, self._num_rows, starts.ravel(), sizes.ravel(), at.ravel())

    def receive_from_experts(self, rows: jax.Array) -> jax.Array:
        """Receives [R, ...] → [T·k, ...]; zeros in slots sent nowhere where devices are
        several."""
        if not self.axes:
            return rows
        there, back = self._slices()
        if self.ragged:
            out = jnp.zeros((len(self.slot_assignments), *rows.shape[1:]), rows.dtype)
            return lax.ragged_all_to_all(rows, out, *back, axis_name=self.axes)
        ways = len(self.counts)
        room = self._num_rows // len(self.counts)
        own = self.counts.reshape(ways, ways, -1)[
            :, self.device_index[0]
        ]  # [ways, experts here]
        block = jax.vmap(lambda *slices: _pick(rows, room, *slices))
        got = self._swap(
            block(jnp.cumsum(own, 1) - own, own, back[0].reshape(ways, -1))
        )
        starts, sizes = there[:2]
        first = starts.reshape(ways, -1)[:, :1]
        at = room * jnp.arange(ways)[:, None] + starts.reshape(ways, -1) - first
        return _pick(got, len(self.slot_assignments), starts, sizes, at.ravel())

    def dot(
        self, rows: jax.Array, kernels: jax.Array, *, transposed: bool = False
    ) -> jax.Array:
        return grouped_matmul(rows, kernels, self._sizes, transpose_kernels=transposed)

    def outer_product(self, rows: jax.Array, others: jax.Array) -> jax.Array:
        return grouped_outer_product(rows, others, self._sizes)

    @property
    def _num_rows(self) -> int:
        (tokens, k), (ways, experts) = self.assignment_slots.shape, self.counts.shape
        return ways * tokens * min(k, experts // ways)

    @property
    def _sizes(self) -> jax.Array:
        """Rows of each expert here."""
        sizes = self.counts.sum(0, dtype=jnp.int32)
        return sizes.reshape(len(self.counts), -1)[self.device_index[0]]

    def _slices(self):
        """Returns the slices of both ragged exchanges, there and back: (first row,
        rows) of each slice sent, its first row at the receiver, rows received; one for
        each peer and expert."""
        ways = len(self.counts)
        here = self.device_index[0]
        mine = self.counts[here]
        first = (
            jnp.cumsum(self.counts, 1) - self.counts
        )  # of each expert's slots, by origin
        per_owner = self.counts.reshape(
            ways, ways, -1
        )  # origin, owner, expert of the owner
        totals = per_owner.sum(0)
        # Where rows of an origin begin at their owner: after other experts, then other
        # origins.
        begin = jnp.cumsum(totals, 1) - totals + jnp.cumsum(per_owner, 0) - per_owner
        received = per_owner[:, here].ravel()
        there = (first[here], mine, begin[here].ravel(), received)
        at_origin = first.reshape(ways, ways, -1)[:, here].ravel()
        return there, (begin[:, here].ravel(), received, at_origin, mine)

    def _swap(self, blocks: jax.Array) -> jax.Array:
        """[ways, room, ...]: block i to device i; what came, as [ways · room, ...]."""
        return lax.all_to_all(blocks, self.axes, 0, 0, tiled=True).reshape(
            -1, *blocks.shape[2:]
        )


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
        blocks = slots.reshape(
            axis_size(self.axes), self.experts_per_device, -1, *slots.shape[1:]
        )
        got = lax.all_to_all(blocks, self.axes, 0, 0, tiled=True)
        return got.swapaxes(0, 1).reshape(-1, *slots.shape[1:])

    def receive_from_experts(self, rows: jax.Array) -> jax.Array:
        """Receives [R, ...] → [E·b·C, ...]."""
        if not self.axes:
            return rows
        blocks = rows.reshape(
            self.experts_per_device, axis_size(self.axes), -1, *rows.shape[1:]
        )
        got = lax.all_to_all(blocks.swapaxes(0, 1), self.axes, 0, 0, tiled=True)
        return got.reshape(-1, *rows.shape[1:])

    def dot(
        self, rows: jax.Array, kernels: jax.Array, *, transposed: bool = False
    ) -> jax.Array:
        """Multiplies [R, D] by kernels [experts, D, F] ([experts, F, D] if transposed)
        → [R, F]."""
        dims = (((2,), (2 if transposed else 1,)), ((0,), (0,)))
        return lax.dot_general(self._split(rows), kernels, dims).reshape(len(rows), -1)

    def outer_product(self, rows: jax.Array, others: jax.Array) -> jax.Array:
        """Contracts [R, D] and [R, F] to [experts, D, F]."""
        dims = (((1,), (1,)), ((0,), (0,)))
        return lax.dot_general(self._split(rows), self._split(others), dims)

    def _split(self, rows: jax.Array) -> jax.Array:
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
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    slot = jnp.argsort(order).astype(
        jnp.int32
    )  # the inverse; a TPU sorts faster than it scatters
    counts = (flat[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    counts = lax.all_gather(counts, axes) if axes else counts[None]
    return DroplessDispatch(
        order, slot.reshape(-1, k), counts, device_index, axes, ragged
    )


def compute_expert_capacity(
    seq_len: int, experts_per_token: int, num_experts: int, factor: float
) -> int:
    """Returns the slots of an expert for one sequence: ⌈S·k/E · factor⌉, at most S."""
    return min(seq_len, ceil(seq_len * experts_per_token / num_experts * factor))


def plan_capacity(
    expert_ids: jax.Array, num_experts: int, expert_capacity: int, axes: Axes
) -> CapacityDispatch:
    """Give each sequence's assignments their slots: all first choices in the order of
    tokens, then all second choices, and so on, until an expert has its capacity
    (GShard, algorithm 1). ``expert_ids``: int32 [b, S, k] whole sequences;
    ``num_experts`` for nowhere."""
    b, s, k = expert_ids.shape
    by_rank = expert_ids.swapaxes(1, 2).reshape(b, k * s)
    order = jnp.argsort(by_rank, axis=1, stable=True)
    counts = (by_rank[..., None] == jnp.arange(num_experts + 1)).sum(1, dtype=jnp.int32)
    first = (
        jnp.cumsum(counts, 1) - counts
    )  # [b, E + 1], of those that chose the same expert
    place = jnp.argsort(order, axis=1) - jnp.take_along_axis(first, by_rank, 1)
    place = place.reshape(b, k, s).swapaxes(1, 2)
    kept = (place < expert_capacity) & (expert_ids < num_experts)
    rows = jnp.arange(b)[:, None, None]
    nowhere = num_experts * b * expert_capacity
    slot = jnp.where(kept, (expert_ids * b + rows) * expert_capacity + place, nowhere)
    slot = slot.reshape(-1, k).astype(jnp.int32)
    # Of slot c of expert e, in each row: the c-th of its assignments, if there are as
    # many.
    within = jnp.arange(expert_capacity)
    index = jnp.minimum(first[:, :num_experts, None] + within, k * s - 1)  # [b, E, C]
    rank, token = jnp.divmod(jax.vmap(jnp.take)(order, index), s)
    filled = within < counts[:, :num_experts, None]
    order = jnp.where(filled, (rows * s + token) * k + rank, b * s * k)
    order = order.swapaxes(0, 1).reshape(-1).astype(jnp.int32)
    return CapacityDispatch(order, slot, axes, num_experts // axis_size(axes))


def _pick(
    source: jax.Array, length: int, starts: jax.Array, sizes: jax.Array, at: jax.Array
) -> jax.Array:
    """[length, ...] whose rows starts[i] … + sizes[i] are the source's from at[i] on,
    for slices in order and without gaps; zeros beyond them."""
    row = jnp.arange(length)
    which = jnp.minimum(
        jnp.searchsorted(jnp.cumsum(sizes), row, side="right"), len(sizes) - 1
    )
    index = jnp.where(row < sizes.sum(), at[which] + row - starts[which], len(source))
    return jnp.take(source, index, axis=0, mode="fill", fill_value=0)
