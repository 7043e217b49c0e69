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
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
# SkyPilot's A100 has 40 GB.
_SKYPILOT_GPUS = {"a100": "A100-80GB"}
# Kinds of machines that a scheduler's template is written for.
_PLATFORMS = {
    "slurm": ("gpu", "cpu"),
    "jobset": ("tpu", "gpu"),
    "skypilot": ("tpu", "gpu"),
    "ray": ("gpu", "cpu"),
    "tpu-vm": ("tpu",),
}
_ONE_SLICE = ("skypilot", "tpu-vm")


@dataclass(frozen=True)
class JobHosts:
    """The hosts that a job asks for. One process runs on each and drives all its
    devices."""

    platform: str
    slices: int
    per_slice: int
    """Hosts of a slice; GPUs and CPUs are one slice."""
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


def resolve_hosts(
    topology: Topology, scheduler: str, machine: str, nodes: int | None
) -> JobHosts:
    """Returns the hosts of a machine. Raises MaxlmError: the scheduler has none such,
    or the hosts do not share the devices evenly.

    Args:
        machine: the machine's, for messages.
        nodes: how many hosts a CPU machine has; of others the name tells.
    """
    platform = topology.platform
    if platform not in _PLATFORMS[scheduler]:
        able = [s for s, platforms in _PLATFORMS.items() if platform in platforms]
        what = f"{scheduler} is not for {platform.upper()}s, and {machine} is one"
        raise MaxlmError(what, fix=f"use {' or '.join(able)}")
    if scheduler in _ONE_SLICE and platform == "tpu" and topology.slices > 1:
        what = f"{scheduler} starts one slice, and {machine} is {topology.slices}"
        raise MaxlmError(what, fix="use jobset")
    if platform == "cpu":
        nodes = nodes or 1
        if topology.devices % nodes:
            what = f"{topology.devices} devices do not divide over --nodes {nodes}"
            raise MaxlmError(what, fix="give a divisor of them")
        return JobHosts("cpu", 1, nodes, topology.devices // nodes)
    if platform == "gpu":
        count = topology.slices * topology.shape[0]
        devices = topology.shape[1]
        gpu = _SKYPILOT_GPUS.get(topology.kind, topology.kind.upper())
        found = JobHosts(
            "gpu", 1, count, devices, _GKE_GPUS[topology.kind], accelerator_type=gpu
        )
    else:
        tpu = TPUS[topology.kind]
        chips = prod(topology.shape)
        own = topology.chips_per_host
        # GKE names the shortest side first, but of one host's 2x2x1.
        sides = (
            topology.shape if topology.shape == (2, 2, 1) else sorted(topology.shape)
        )
        found = JobHosts(
            *(
                "tpu",
                topology.slices,
                max(chips // own, 1),
                min(chips, own),
                tpu.gke_accelerator,
            ),
            "x".join(map(str, sides)),
            f"{tpu.cloud_prefix}-{chips * tpu.cores}",
        )
    if nodes not in (None, found.count):
        what = f"--nodes {nodes}: {machine} is {found.count} hosts of {found.devices}"
        raise MaxlmError(
            what, fix="leave --nodes out, or name the shape of GPUs, as in h100:16x4"
        )
    return found
