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
_GOOGLE = "0x1ae0"  # its number as a maker of PCI devices
_DEVICES = Path("/sys/bus/pci/devices")
_SERVER = "http://metadata.google.internal"


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
    slurm = _slurm(environ)
    if slurm and set(explicit) == {COORDINATOR}:
        found = replace(slurm, coordinator=explicit[COORDINATOR])
    elif explicit:
        found = _read_settings(explicit, slurm)
    else:
        found = slurm or _kubernetes_tpu(environ) or _tpu_vm(environ)
    return _checked(found) if found else None


def _read_settings(explicit: Mapping[str, str], slurm: Cluster | None) -> Cluster:
    if missing := [_name_option(name) for name in _SETTINGS if name not in explicit]:
        given = ", ".join(
            f"{_name_option(name)} is {value}" for name, value in explicit.items()
        )
        beside = f"; SLURM's step has {slurm.num_processes} tasks" if slurm else ""
        fix = "set all three, or none" + (" (SLURM's are used then)" if slurm else "")
        raise MaxlmError(
            f"{given}, but {' and '.join(missing)} not set{beside}", fix=fix
        )
    count = _number(explicit, NUM_PROCESSES)
    process = _number(explicit, PROCESS_ID)
    return Cluster("settings", explicit[COORDINATOR], count, process)


def _name_option(variable: str) -> str:
    """Returns the option of `maxlm train` that says the same, and the variable."""
    option = variable.removeprefix("MAXLM").lower().replace("_", "-")
    return f"-{option} ({variable})"


def _checked(cluster: Cluster) -> Cluster | None:
    count, number = cluster.num_processes, cluster.process_id
    host, _, port = cluster.coordinator.rpartition(":")
    fix = None
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        fix = "write it as host:port, such as node1:8476"
        what = f"the coordinator {cluster.coordinator!r} is no host with a port"
    elif count < 1:
        what = f"{count} is no number of processes"
    elif not 0 <= number < count:
        what = f"process id {number} is not below the number of processes, {count}"
        fix = f"number them 0 to {count - 1}"
    else:
        return cluster if count > 1 else None
    raise MaxlmError(what, where=cluster.source, fix=fix)


def _number(environ: Mapping[str, str], variable: str) -> int:
    try:
        return int(environ[variable])
    except ValueError:
        raise MaxlmError(
            f"{environ[variable]!r} is no whole number", where=variable
        ) from None


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Reads a task of a SLURM step. The batch script has a SLURM_PROCID too, but is no
    task."""
    names = ("JOB_ID", "PROCID", "STEP_ID", "STEP_NODELIST", "STEP_NUM_TASKS")
    if any(f"SLURM_{name}" not in environ for name in names):
        return None
    count = _number(environ, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return None
    # Steps of a job may run side by side.
    job, step = (_number(environ, f"SLURM_{name}_ID") for name in ("JOB", "STEP"))
    port = _SLURM_PORTS[(job + 101 * step) % len(_SLURM_PORTS)]
    return Cluster(
        "SLURM",
        f"{parse_first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        count,
        _number(environ, "SLURM_PROCID"),
        _slurm_gpus(environ),
    )


def parse_first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: gpu001 of
    ``gpu[001-003,7],login1``."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", found.group() if found else nodes)


def _slurm_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns an equal share of the node's GPUs for each of several tasks on it.

    SLURM may have given each task GPUs of its own, the only ones that it sees.
    """
    bound = any(environ.get(f"SLURM_{name}") for name in ("GPUS_PER_TASK", "GPU_BIND"))
    per_node = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):  # 2(x3),1
        tasks, _, times = part.rstrip(")").partition("(x")
        per_node += [int(tasks)] * int(times or 1)
    tasks = per_node[int(environ.get("SLURM_NODEID", "0"))]
    if bound or tasks == 1:
        return None
    share = max(1, int(environ.get("SLURM_GPUS_ON_NODE") or 0) // tasks)
    first = int(environ.get("SLURM_LOCALID", "0")) * share
    return tuple(range(first, first + share))


def _kubernetes_tpu(environ: Mapping[str, str]) -> Cluster | None:
    """Reads the variables that Google's Kubernetes sets in the pods of TPU slices."""
    if "TPU_WORKER_ID" not in environ or "TPU_WORKER_HOSTNAMES" not in environ:
        return None
    workers = environ["TPU_WORKER_HOSTNAMES"].split(",")
    return _slices("TPU pod", workers, _number(environ, "TPU_WORKER_ID"), environ)


def _tpu_vm(environ: Mapping[str, str]) -> Cluster | None:
    if environ.get("TPU_SKIP_MDS_QUERY"):
        return None
    number, endpoints = map(
        _read_attribute, ("agent-worker-number", "worker-network-endpoints")
    )
    if not number or not endpoints:
        return None
    # Names, or name:id:address.
    workers = [each.split(":")[-1] for each in endpoints.split(",")]
    lines = re.findall(
        r"^(\w+): *'?([^'\n]*)'?$", _read_attribute("tpu-env") or "", re.MULTILINE
    )
    worker = _number({"agent-worker-number": number}, "agent-worker-number")
    return _slices("TPU VM", workers, worker, dict(lines))


def _slices(
    source: str, workers: list[str], worker: int, settings: Mapping[str, str]
) -> Cluster:
    """All slices together; the first worker of the first is process 0."""
    count, number = (
        _number(settings, name) if settings.get(name) else default
        for name, default in (("MEGASCALE_NUM_SLICES", 1), ("MEGASCALE_SLICE_ID", 0))
    )
    first = settings.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    coordinator = f"{first.split(':')[0]}:{_TPU_PORT}"
    return Cluster(
        source, coordinator, count * len(workers), number * len(workers) + worker
    )


def _read_attribute(
    name: str, devices: Path = _DEVICES, server: str = _SERVER
) -> str | None:
    """Reads an attribute of this machine from Google's metadata server; None: there is
    none such, or the machine has no TPU (elsewhere nobody may answer for minutes)."""
    if not any(map(_is_tpu, devices.iterdir() if devices.exists() else ())):
        return None
    url = f"{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=15) as answer:
            return answer.read().decode()
    except OSError as error:
        if getattr(error, "code", 500) < 500:  # it has none such
            return None
        # A host that took itself for the only one would hold up the others.
        what = f"this machine's metadata cannot be read ({error})"
        fix = "start it again, or set TPU_SKIP_MDS_QUERY=1 if it is a host of its own"
        raise ProcessLost(what, where=url, fix=fix) from error


def _is_tpu(device: Path) -> bool:
    """Google's network cards and disks are in its machines with GPUs too."""
    try:
        vendor, kind = (
            (device / name).read_text().strip() for name in ("vendor", "class")
        )
    except OSError:  # a sandbox may show devices without what they are
        return False
    return vendor == _GOOGLE and not kind.startswith(("0x01", "0x02"))
