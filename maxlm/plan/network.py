"""Time of collectives over a machine's links.

A TPU's torus: an axis of n of a slice's N chips, laid along the torus, has about log n
/ log N of its dimensions, and each gives a ring both of its directions; half of that
where a dimension is not closed. GPUs: NVLink joins a host's, the network every GPU with
its own card; groups of several hosts' GPUs are rings that leave a host as often as they
have members there. Several slices are crossed over the network by `data`, else `stage`,
after the collective within each.

Algorithms are rings: (n − 1) / n of an array for an all-gather or a reduce-scatter,
twice that for an all-reduce. An all-to-all on a ring of n sends its bytes n / 4 hops on
average.
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np

from maxlm.plan.hardware import Chip
from maxlm.plan.topology import Topology
from maxlm.plan.workload import MeshPartitioning, Number
from maxlm.sharding import MESH_AXES
from maxlm.sharding.links import BETWEEN_SLICES

Phase = Literal["forward", "backward", "once"]
PASSES: tuple[Phase, Phase] = ("forward", "backward")
# Times that a ring carries the whole array past a device: an all-reduce is a
# reduce-scatter and an all-gather.
_PASSES_OVER_ARRAY = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0}


def count_sent_bytes(kind: str, group_size: Number, whole_bytes: Number) -> Number:
    """Returns the bytes that each device of a group of ``group_size`` sends in one run.

    Args:
        whole_bytes: of an all-gather, a reduce-scatter or an all-reduce, bytes of the
            whole array; of an all-to-all, of what one device holds before it; of a
            permute, of what it passes on.
    """
    if kind == "collective-permute":
        return np.where(np.greater(group_size, 1), whole_bytes, 0.0)
    # (n - 1) / n of the array: a device has one of the n parts already, or keeps it.
    passes = _PASSES_OVER_ARRAY.get(kind, 1.0)
    return passes * whole_bytes * (group_size - 1) / group_size


@dataclass(frozen=True)
class PlannedCollective:
    """All runs of one collective in a step."""

    content: str
    """The arrays that are sent, in words."""
    kind: str
    """HLO's name of the collective, such as ``all-gather``."""
    axes: tuple[str, ...]
    whole_bytes: Number
    """See :func:`count_sent_bytes`."""
    count: Number
    """Runs a step."""
    phase: Phase
    waits: bool = True
    """Whether computation needs it at once: activations do; weights are gathered, and
    their gradients scattered, beside other layers' work."""

    def wire_bytes(self, split: MeshPartitioning) -> Number:
        """Returns the bytes that a device sends in a step."""
        group_size = split.num_devices(self.axes)
        return self.count * count_sent_bytes(self.kind, group_size, self.whole_bytes)


@dataclass(frozen=True)
class Network:
    """A machine's links."""

    topology: Topology
    chip: Chip

    def estimate_seconds(
        self,
        kind: str,
        axes: tuple[str, ...],
        whole_bytes: Number,
        split: MeshPartitioning,
    ) -> Number:
        """Returns the seconds of one run of a collective over mesh axes; see
        :func:`count_sent_bytes` for ``whole_bytes``."""
        group_size = split.num_devices(axes)
        num_near = self._count_near_devices(axes, split)
        if self.topology.platform == "tpu":
            return self._estimate_torus_seconds(kind, whole_bytes, group_size, num_near)
        return self._estimate_host_seconds(kind, whole_bytes, group_size, num_near)

    def describe_link(self, axes: tuple[str, ...], split: MeshPartitioning) -> str:
        """Describes the links that mesh axes of one mesh run over."""
        if self.topology.platform == "cpu":
            return "memory"
        is_tpu = self.topology.platform == "tpu"
        group_size = split.num_devices(axes)
        num_near = self._count_near_devices(axes, split)
        links = []
        if num_near > 1:
            links.append("ICI" if is_tpu else "NVLink")
        if group_size > num_near:
            links.append("DCN" if is_tpu else "network")
        return " + ".join(links)

    def _count_near_devices(
        self, axes: tuple[str, ...], split: MeshPartitioning
    ) -> Number:
        """Counts devices of a group within one slice, or within one host's NVLink."""
        if self.topology.platform != "gpu":
            # One axis crosses all slices: `data` where they divide it, else `stage`.
            slices = self.topology.slices
            first, second = BETWEEN_SLICES
            first_crosses = np.equal(np.mod(split.sizes[first], slices), 0)
            is_crossed = np.where(first_crosses, first in axes, second in axes)
            slices_of_group = np.where(is_crossed, slices, 1.0)
            return split.num_devices(axes) / slices_of_group
        # The last mesh axis is the fastest: its neighbours are neighbours on a host.
        num_near = 1.0
        stride = 1.0  # devices between neighbours along an axis
        domain = min(self.chip.nvlink_domain_size, self.topology.shape[-1])
        for axis in reversed(MESH_AXES):
            if axis in axes:
                near_along_axis = np.clip(domain / stride, 1, split.sizes[axis])
                num_near = num_near * near_along_axis
            stride = stride * split.sizes[axis]
        return num_near

    def _estimate_torus_seconds(
        self, kind: str, whole_bytes: Number, group_size: Number, num_near: Number
    ) -> Number:
        """Estimates one run over ``group_size`` devices, ``num_near`` of them in one
        slice."""
        chip = self.chip
        slices = group_size / num_near
        uses_torus = np.greater(num_near, 1)

        # Links of the group: n of a slice's N devices lie along log n / log N of the
        # torus's dimensions, each of which gives a ring both of its directions, if it
        # is closed, or half of that.
        slice_devices = max(self.topology.devices_per_slice, 2)
        dimensions = sum(side > 1 for side in self.topology.shape) or 1
        dimension_share = np.log(np.maximum(num_near, 1)) / log(slice_devices)
        group_dimensions = np.maximum(dimensions * dimension_share, 1)
        share_by_dimension = [1.0 if wraps else 0.5 for wraps in self.topology.wraps]
        closed_share = float(np.mean(share_by_dimension))
        links = np.maximum(2 * dimensions * dimension_share * closed_share, 1.0)

        # Devices along each of its dimensions, and a ring's hops around all of them.
        side = np.maximum(num_near, 1) ** (1 / group_dimensions)
        hops = np.where(uses_torus, side * group_dimensions, 0.0)
        latency = hops * chip.latency_seconds

        if kind == "collective-permute":
            # Pairs within a slice and across slices send at the same time.
            crosses_slices = np.greater(slices, 1)
            torus = np.where(uses_torus, whole_bytes / chip.link_bandwidth, 0.0)
            network = np.where(
                crosses_slices, whole_bytes / chip.network_bandwidth, 0.0
            )
            one_hop = np.where(num_near * slices > 1, chip.latency_seconds, 0.0)
            return np.maximum(torus, network) + one_hop

        if kind.endswith("all-to-all"):
            # On average bytes go a quarter of a ring's side; both directions carry.
            torus = whole_bytes * side / (8 * closed_share * chip.link_bandwidth)
            torus = np.where(uses_torus, torus, 0.0)
            network_bytes = count_sent_bytes(kind, slices, whole_bytes)
            network = network_bytes / chip.network_bandwidth
            return torus + network + latency

        torus_bytes = count_sent_bytes(kind, num_near, whole_bytes)
        torus = torus_bytes / (links * chip.link_bandwidth)
        # Between slices each device exchanges its part of what its slice has summed up.
        network_bytes = count_sent_bytes(kind, slices, whole_bytes / num_near)
        network = network_bytes / chip.network_bandwidth
        return torus + network + latency

    def _estimate_host_seconds(
        self, kind: str, whole_bytes: Number, group_size: Number, num_near: Number
    ) -> Number:
        """Estimates one run over ``group_size`` devices, ``num_near`` of them on one
        host."""
        chip = self.chip
        leaves_host = np.greater(group_size, num_near)
        latency = np.where(np.greater(group_size, 1), chip.latency_seconds, 0.0)

        if kind == "collective-permute":
            bandwidth = np.where(
                leaves_host, chip.network_bandwidth, chip.link_bandwidth
            )
            return count_sent_bytes(kind, group_size, whole_bytes) / bandwidth + latency

        if kind.endswith("all-to-all"):
            # Each of the n devices gets 1 / n of what a device holds.
            num_far = group_size - num_near
            network = whole_bytes * num_far / group_size / chip.network_bandwidth
            nvlink = whole_bytes * (num_near - 1) / group_size / chip.link_bandwidth
            return network + nvlink + latency

        # A ring leaves a host as often as it has members there: so many network cards
        # work at once, at most as fast as NVLink.
        all_cards = num_near * chip.network_bandwidth
        slowest = np.minimum(all_cards, chip.link_bandwidth)
        bandwidth = np.where(leaves_host, slowest, chip.link_bandwidth)
        return count_sent_bytes(kind, group_size, whole_bytes) / bandwidth + latency
