"""Schedulers that start a run's job, one a file.

To add one, write a :class:`~maxlm.launch.schedulers.scheduler.JobScheduler` in a file here
and name it in ``SCHEDULERS``, or register it from outside:
``SCHEDULERS.register("name", MyScheduler())``, or an installed package's entry point of
the group ``maxlm.schedulers``, which names such an object.
"""

from maxlm.config import MaxlmError
from maxlm.config.registry import Registry
from maxlm.launch.schedulers.scheduler import JobScheduler

_FOLDER = "maxlm.launch.schedulers"
SCHEDULERS = Registry[JobScheduler](
    "scheduler",
    {
        "slurm": f"{_FOLDER}.slurm:SLURM",
        "jobset": f"{_FOLDER}.jobset:JOBSET",
        "skypilot": f"{_FOLDER}.skypilot:SKYPILOT",
        "ray": f"{_FOLDER}.ray:RAY",
        "tpu-vm": f"{_FOLDER}.tpu_vm:TPU_VM",
    },
)


def get_scheduler(name: str) -> JobScheduler:
    """Returns a scheduler. Raises MaxlmError, with near names: there is none of that
    name."""
    scheduler = SCHEDULERS.find(name)
    if scheduler is None:
        message = f"there is no scheduler '{name}'"
        raise MaxlmError(message, fix=SCHEDULERS.suggest(name))
    return scheduler


__all__ = ["SCHEDULERS", "JobScheduler", "get_scheduler"]
