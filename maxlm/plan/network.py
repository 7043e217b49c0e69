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
_PASSES_OVER_ARRAY = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0}


def sent_bytes(kind: str, group_size: Number, whole_bytes: Number) -> Number:
    """Returns the bytes that each device of a group of ``group_size`` sends in one run;
    ``whole_bytes`` are of the whole array of an all-gather, a reduce-scatter or an
    all-reduce, of what one device holds before an all-to-all, of what it passes on in a
    permute."""
    if kind == "collective-permute":
        return np.where(np.greater(group_size, 1), whole_bytes, 0.0)
    return (
        _PASSES_OVER_ARRAY.get(kind, 1.0) * whole_bytes * (group_size - 1) / group_size
    )


@dataclass(frozen=True)
class PlannedCollective:
    """All runs of one collective in a step."""

    what: str
    kind: str
    axes: tuple[str, ...]
    whole_bytes: Number
    """See :func:`sent_bytes`."""
    count: Number
    """Runs a step."""
    phase: Phase
    waits: bool = True
    """Whether computation needs it at once: activations do; weights are gathered, and
    their gradients scattered, beside other layers' work."""

    def wire_bytes(self, split: MeshPartitioning) -> Number:
        """Bytes that a device sends in a step."""
        return self.count * sent_bytes(
            self.kind, split.num_devices(self.axes), self.whole_bytes
        )


@dataclass(frozen=True)
class Network:
    """A machine's links."""

    topology: Topology
    chip: Chip

    def seconds(
        self,
        kind: str,
        axes: tuple[str, ...],
        whole_bytes: Number,
        split: MeshPartitioning,
    ) -> Number:
        """Returns the seconds of one run of a collective over mesh axes; see
        :func:`sent_bytes` for ``whole_bytes``."""
        ways = split.num_devices(axes)
        inner = self._inner(axes, split)
        run = self._on_torus if self.topology.platform == "tpu" else self._on_hosts
        return run(kind, whole_bytes, ways, inner)

    def link(self, axes: tuple[str, ...], split: MeshPartitioning) -> str:
        """Describes the links that mesh axes of one mesh run over."""
        ways = split.num_devices(axes)
        inner = self._inner(axes, split)
        if self.topology.platform == "cpu":
            return "memory"
        near, far = (
            ("ICI", "DCN") if self.topology.platform == "tpu" else ("NVLink", "network")
        )
        return " + ".join(
            ([near] if inner > 1 else []) + ([far] if ways > inner else [])
        )

    def _inner(self, axes: tuple[str, ...], split: MeshPartitioning) -> Number:
        """Devices of a group within one slice, or within one host."""
        if self.topology.platform != "gpu":
            first, second = BETWEEN_SLICES
            by_first = np.equal(np.mod(split.sizes[first], self.topology.slices), 0)
            crossed = np.where(by_first, first in axes, second in axes)
            return split.num_devices(axes) / np.where(
                crossed, self.topology.slices, 1.0
            )
        inner, stride = 1.0, 1.0
        domain = min(self.chip.nvlink_domain_size, self.topology.shape[-1])
        for axis in reversed(MESH_AXES):
            if axis in axes:
                inner = inner * np.clip(domain / stride, 1, split.sizes[axis])
            stride = stride * split.sizes[axis]
        return inner

    def _on_torus(
        self, kind: str, whole: Number, ways: Number, inner: Number
    ) -> Number:
        shape = self.topology.shape
        chip = self.chip
        across = ways / inner
        share = np.log(np.maximum(inner, 1)) / log(
            max(self.topology.devices_per_slice, 2)
        )
        closed = float(
            np.mean([1.0 if wraps else 0.5 for wraps in self.topology.wraps])
        )
        dimensions = sum(n > 1 for n in shape) or 1
        links = np.maximum(2 * dimensions * share * closed, 1.0)
        side = np.maximum(inner, 1) ** (1 / np.maximum(dimensions * share, 1))
        hops = np.where(
            np.greater(inner, 1), side * np.maximum(dimensions * share, 1), 0.0
        )
        if kind == "collective-permute":
            near = np.where(np.greater(inner, 1), whole / chip.link_bandwidth, 0.0)
            far = np.where(np.greater(across, 1), whole / chip.network_bandwidth, 0.0)
            return np.maximum(near, far) + np.where(
                inner * across > 1, chip.latency_seconds, 0.0
            )
        if kind.endswith("all-to-all"):
            near = whole * side / (8 * closed * chip.link_bandwidth)
            near = np.where(np.greater(inner, 1), near, 0.0)
            far = sent_bytes(kind, across, whole) / chip.network_bandwidth
            return near + far + hops * chip.latency_seconds
        near = sent_bytes(kind, inner, whole) / (links * chip.link_bandwidth)
        # Between slices each device exchanges its part of what its slice has summed up.
        far = sent_bytes(kind, across, whole / inner) / chip.network_bandwidth
        return near + far + hops * chip.latency_seconds

    def _on_hosts(
        self, kind: str, whole: Number, ways: Number, inner: Number
    ) -> Number:
        chip = self.chip
        leaves = np.greater(ways, inner)
        latency = np.where(np.greater(ways, 1), chip.latency_seconds, 0.0)
        if kind == "collective-permute":
            rate = np.where(leaves, chip.network_bandwidth, chip.link_bandwidth)
            return sent_bytes(kind, ways, whole) / rate + latency
        if kind.endswith("all-to-all"):
            far = whole * (ways - inner) / ways / chip.network_bandwidth
            return far + whole * (inner - 1) / ways / chip.link_bandwidth + latency
        link = chip.link_bandwidth
        network = inner * chip.network_bandwidth
        rate = np.where(leaves, np.minimum(network, link), link)
        return sent_bytes(kind, ways, whole) / rate + latency
