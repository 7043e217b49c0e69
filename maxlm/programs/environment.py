"""Describes what a run is trained with: versions, source, devices, hosts, the job."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

import maxlm
from maxlm.runtime.collectives import all_gather_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
# What changes how programs are compiled or run, and what a scheduler calls the job: never a
# variable that may hold a secret.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_NODELIST",
    "JOBSET_NAME",
    "JOBSET_RESTART_ATTEMPT",
    "RAY_JOB_ID",
    "SKYPILOT_TASK_ID",
    "TPU_NAME",
    "TPU_ACCELERATOR_TYPE",
)


def describe_environment() -> dict[str, Any]:
    """Returns plain data for ``environment.json``. All processes call it together.

    Packages that are missing, variables that are not set and a source that is no checkout are None
    or left out.
    """
    device = jax.devices()[0]
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "maxlm": maxlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions | {device.platform: device.client.platform_version},
        "git": read_git_state(Path(maxlm.__file__).parents[1]),
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "hosts": all_gather_json(platform.node()),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def read_git_state(root: Path) -> dict[str, Any] | None:
    """The commit that a source tree is at, whether it differs, and by how many bytes of diff.

    None: not a checkout, or no git. An installed package may lie inside another project's checkout,
    which does not track it.
    """
    if _git(root, "ls-files", "--error-unmatch", "maxlm/__init__.py") is None:
        return None
    commit, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    changes = _git(root, "diff", "HEAD") if status else b""
    if commit is None or status is None or changes is None:
        return None
    return {"commit": commit.decode().strip(), "dirty": bool(status), "diff_bytes": len(changes)}


def get_process_start() -> float:
    """Returns the unix seconds when this process was started; now, where nothing says."""
    try:
        # Behind the name, which may hold anything but ")": the 22nd field, in clock ticks since the
        # machine was booted (proc(5)).
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.time() - max(0.0, age)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        # What was only touched is not noted in the index: its lock is for who works there.
        quiet = ["--no-optional-locks", "-c", "diff.autoRefreshIndex=false"]
        command = ["git", *quiet, "-C", root, *arguments]
        done = subprocess.run(command, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
