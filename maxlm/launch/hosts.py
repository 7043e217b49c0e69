"""A machine as schedulers see it: slices, hosts, devices of a host, and what vendors
call them."""

from dataclasses import dataclass
from math import prod

from maxlm.config import MaxlmError
from maxlm.plan.topology import TPUS, Topology

# kind → GKE's accelerator ("GPU platforms": a2-ultragpu, a3-highgpu, a3-ultragpu,
# a4-highgpu).
_GKE_GPUS = {
    "a100": "nvidia-a100-80gb",
    # GKE has none; the label that NVIDIA's GPU operator gives such nodes elsewhere.
    "l40s": "NVIDIA-L40S",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
# SkyPilot's A100 has 40 GB.
_SKYPILOT_GPUS = {"a100": "A100-80GB"}


@dataclass(frozen=True)
class JobHosts:
    """The hosts that a job asks for. One process runs on each and drives all its
    devices."""

    platform: str
    slices: int
    """Of a TPU machine; GPUs and CPUs are one slice."""
    per_slice: int
    """Hosts of a slice."""
    devices: int
    """Devices of a host, as its scheduler counts them: chips, GPUs, virtual CPU
    devices."""
    gke_accelerator: str = ""
    gke_topology: str = ""
    accelerator_type: str = ""
    """Name of a slice in Cloud TPU's API, or of a GPU in SkyPilot."""

    @property
    def count(self) -> int:
        return self.slices * self.per_slice

    @property
    def whole(self) -> bool:
        """Whether the job takes all of a host; 8 is the most devices that one has."""
        return self.platform == "cpu" or self.count > 1 or self.devices == 8


def resolve_hosts(topology: Topology, machine: str, nodes: int | None) -> JobHosts:
    """Returns the hosts of a machine. Raises MaxlmError: they do not share its devices
    evenly.

    Args:
        machine: the machine's name, for messages.
        nodes: how many hosts a CPU machine has; of others the name tells.
    """
    platform = topology.platform
    if platform == "cpu":
        nodes = nodes or 1
        if topology.devices % nodes:
            devices = f"{topology.devices} devices"
            message = f"{devices} do not divide over --nodes {nodes}"
            raise MaxlmError(message, fix="give a divisor of them")
        return JobHosts("cpu", 1, nodes, topology.devices // nodes)
    hosts = (
        _list_gpu_hosts(topology) if platform == "gpu" else _list_tpu_hosts(topology)
    )
    if nodes not in (None, hosts.count):
        message = (
            f"--nodes {nodes}: {machine} is {hosts.count} hosts of {hosts.devices}"
        )
        fix = "leave --nodes out, or name the shape of GPUs, as in h100:16x4"
        raise MaxlmError(message, fix=fix)
    return hosts


def _list_gpu_hosts(topology: Topology) -> JobHosts:
    hosts_per_slice, gpus_per_host = topology.shape
    return JobHosts(
        platform="gpu",
        slices=1,
        per_slice=topology.slices * hosts_per_slice,
        devices=gpus_per_host,
        gke_accelerator=_GKE_GPUS[topology.kind],
        accelerator_type=_SKYPILOT_GPUS.get(topology.kind, topology.kind.upper()),
    )


def _list_tpu_hosts(topology: Topology) -> JobHosts:
    tpu = TPUS[topology.kind]
    chips = prod(topology.shape)
    # GKE names the shortest side first, but of one host's 2x2x1.
    sides = topology.shape
    if sides != (2, 2, 1):
        sides = sorted(sides)
    return JobHosts(
        platform="tpu",
        slices=topology.slices,
        per_slice=max(chips // topology.chips_per_host, 1),
        devices=min(chips, topology.chips_per_host),
        gke_accelerator=tpu.gke_accelerator,
        gke_topology="x".join(map(str, sides)),
        accelerator_type=f"{tpu.cloud_prefix}-{chips * tpu.cores}",
    )
