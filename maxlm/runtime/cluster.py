"""Finds out which processes a run has, and which of them this is, from the
environment."""

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.config.errors import ProcessLost

# What JAX takes itself: above the ports that Linux gives to outgoing connections.
_SLURM_PORTS = range(61440, 65536)
_TPU_PORT = 8482
COORDINATOR = "MAXLM_COORDINATOR"
NUM_PROCESSES = "MAXLM_NUM_PROCESSES"
PROCESS_ID = "MAXLM_PROCESS_ID"
_SETTINGS = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
_GOOGLE_VENDOR = "0x1ae0"  # its number as a maker of PCI devices
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_METADATA_SERVER = "http://metadata.google.internal"


@dataclass(frozen=True)
class Cluster:
    """One process's place among several."""

    source: str
    """Source of these facts (settings, SLURM, ...), for messages."""
    coordinator: str
    """host:port of process 0."""
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """GPUs of this host that belong to this process; None: all that it sees."""


def find_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """Returns this process's place in its cluster; None if it is alone.

    The first that says anything: MAXLM_COORDINATOR, MAXLM_NUM_PROCESSES and
    MAXLM_PROCESS_ID; a step of SLURM with several tasks (of which a coordinator named
    alone replaces that part); the variables of a TPU pod on Kubernetes; the metadata of
    a TPU VM.
    """
    explicit = {name: environ[name] for name in _SETTINGS if environ.get(name)}
    slurm = _read_slurm(environ)
    if slurm and set(explicit) == {COORDINATOR}:
        cluster = replace(slurm, coordinator=explicit[COORDINATOR])
    elif explicit:
        cluster = _read_settings(explicit, slurm)
    else:
        cluster = slurm or _read_kubernetes_tpu(environ) or _read_tpu_vm(environ)
    if cluster is None:
        return None
    _check_cluster(cluster)
    return cluster if cluster.num_processes > 1 else None


def _read_settings(explicit: Mapping[str, str], slurm: Cluster | None) -> Cluster:
    missing = [_name_option(name) for name in _SETTINGS if name not in explicit]
    if missing:
        present = ", ".join(
            f"{_name_option(name)} is {value}" for name, value in explicit.items()
        )
        message = f"{present}, but {' and '.join(missing)} not set"
        fix = "set all three, or none"
        if slurm:
            message += f"; SLURM's step has {slurm.num_processes} tasks"
            fix += " (SLURM's are used then)"
        raise MaxlmError(message, fix=fix)
    return Cluster(
        source="settings",
        coordinator=explicit[COORDINATOR],
        num_processes=_read_number(explicit, NUM_PROCESSES),
        process_id=_read_number(explicit, PROCESS_ID),
    )


def _name_option(variable: str) -> str:
    """Returns the option of `maxlm train` that says the same, and the variable."""
    option = variable.removeprefix("MAXLM").lower().replace("_", "-")
    return f"-{option} ({variable})"


def _check_cluster(cluster: Cluster) -> None:
    count = cluster.num_processes
    process = cluster.process_id
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        message = f"the coordinator {cluster.coordinator!r} is no host with a port"
        fix = "write it as host:port, such as node1:8476"
        raise MaxlmError(message, where=cluster.source, fix=fix)
    if count < 1:
        raise MaxlmError(f"{count} is no number of processes", where=cluster.source)
    if not 0 <= process < count:
        message = f"process id {process} is not below the number of processes, {count}"
        fix = f"number them 0 to {count - 1}"
        raise MaxlmError(message, where=cluster.source, fix=fix)


def _read_number(environ: Mapping[str, str], variable: str) -> int:
    text = environ[variable]
    try:
        return int(text)
    except ValueError:
        raise MaxlmError(f"{text!r} is no whole number", where=variable) from None


def _read_slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Reads a task of a SLURM step. The batch script has a SLURM_PROCID too, but is no
    task."""
    names = ("JOB_ID", "PROCID", "STEP_ID", "STEP_NODELIST", "STEP_NUM_TASKS")
    if any(f"SLURM_{name}" not in environ for name in names):
        return None
    count = _read_number(environ, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return None
    job = _read_number(environ, "SLURM_JOB_ID")
    step = _read_number(environ, "SLURM_STEP_ID")
    # Steps of a job may run side by side: each has a port of its own.
    port = _SLURM_PORTS[(job + 101 * step) % len(_SLURM_PORTS)]
    host = parse_first_host(environ["SLURM_STEP_NODELIST"])
    return Cluster(
        source="SLURM",
        coordinator=f"{host}:{port}",
        num_processes=count,
        process_id=_read_number(environ, "SLURM_PROCID"),
        local_device_ids=_share_slurm_gpus(environ),
    )


def parse_first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: gpu001 of
    ``gpu[001-003,7],login1``."""
    first_entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    entry = first_entry.group() if first_entry else nodes
    # Of each range in brackets its first number.
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", entry)


def _share_slurm_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns an equal share of the node's GPUs for each of several tasks on it.

    SLURM may have given each task GPUs of its own, the only ones that it sees.
    """
    if environ.get("SLURM_GPUS_PER_TASK") or environ.get("SLURM_GPU_BIND"):
        return None
    # Tasks of each node of the step, with equal ones written together: 2(x3),1.
    tasks_by_node = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        tasks_by_node += [int(tasks)] * int(times or 1)
    num_tasks = tasks_by_node[int(environ.get("SLURM_NODEID", "0"))]
    if num_tasks == 1:
        return None
    num_gpus = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    gpus_per_task = max(1, num_gpus // num_tasks)
    first_gpu = int(environ.get("SLURM_LOCALID", "0")) * gpus_per_task
    return tuple(range(first_gpu, first_gpu + gpus_per_task))


def _read_kubernetes_tpu(environ: Mapping[str, str]) -> Cluster | None:
    """Reads the variables that Google's Kubernetes sets in the pods of TPU slices."""
    if "TPU_WORKER_ID" not in environ or "TPU_WORKER_HOSTNAMES" not in environ:
        return None
    workers = environ["TPU_WORKER_HOSTNAMES"].split(",")
    worker = _read_number(environ, "TPU_WORKER_ID")
    return _join_slices("TPU pod", workers, worker, environ)


def _read_tpu_vm(environ: Mapping[str, str]) -> Cluster | None:
    if environ.get("TPU_SKIP_MDS_QUERY"):
        return None
    number = _read_attribute("agent-worker-number")
    endpoints = _read_attribute("worker-network-endpoints")
    if not number or not endpoints:
        return None
    # Names, or name:id:address.
    workers = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
    # Lines such as MEGASCALE_NUM_SLICES: '2'.
    tpu_environ = _read_attribute("tpu-env") or ""
    settings = re.findall(r"^(\w+): *'?([^'\n]*)'?$", tpu_environ, re.MULTILINE)
    worker = _read_number({"agent-worker-number": number}, "agent-worker-number")
    return _join_slices("TPU VM", workers, worker, dict(settings))


def _join_slices(
    source: str, workers: list[str], worker: int, settings: Mapping[str, str]
) -> Cluster:
    """All slices together; the first worker of the first is process 0."""
    num_slices = 1
    slice_id = 0
    if settings.get("MEGASCALE_NUM_SLICES"):
        num_slices = _read_number(settings, "MEGASCALE_NUM_SLICES")
    if settings.get("MEGASCALE_SLICE_ID"):
        slice_id = _read_number(settings, "MEGASCALE_SLICE_ID")
    first_worker = settings.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    host = first_worker.split(":")[0]
    return Cluster(
        source=source,
        coordinator=f"{host}:{_TPU_PORT}",
        num_processes=num_slices * len(workers),
        process_id=slice_id * len(workers) + worker,
    )


def _read_attribute(
    name: str, devices: Path = _PCI_DEVICES, server: str = _METADATA_SERVER
) -> str | None:
    """Reads an attribute of this machine from Google's metadata server; None: there is
    none such, or the machine has no TPU (elsewhere nobody may answer for minutes)."""
    if not devices.exists() or not any(map(_is_tpu, devices.iterdir())):
        return None
    url = f"{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=15) as response:
            return response.read().decode()
    except OSError as error:
        status = getattr(error, "code", 500)  # an error of the network has none
        if status < 500:  # there is no such attribute
            return None
        # A host that took itself for the only one would hold up the others.
        message = f"this machine's metadata cannot be read ({error})"
        fix = "start it again, or set TPU_SKIP_MDS_QUERY=1 if it is a host of its own"
        raise ProcessLost(message, where=url, fix=fix) from error


def _is_tpu(device: Path) -> bool:
    """Google's network cards and disks are in its machines with GPUs too."""
    try:
        vendor = (device / "vendor").read_text().strip()
        device_class = (device / "class").read_text().strip()
    except OSError:  # a sandbox may show devices without what they are
        return False
    is_disk_or_network_card = device_class.startswith(("0x01", "0x02"))
    return vendor == _GOOGLE_VENDOR and not is_disk_or_network_card
