"""SkyPilot: a managed job on machines that it rents."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from maxlm.launch.job import Job
from maxlm.launch.schedulers.scheduler import JobScheduler


class SkyPilotScheduler(JobScheduler):
    """Managed jobs, which SkyPilot starts again after a preemption."""

    name = "skypilot"
    template = "skypilot/task.yaml.j2"
    platforms = ("tpu", "gpu")
    options = frozenset(
        {"name", "image", "priority", "spot", "secret", "mount", "zone"}
    )
    fixes: ClassVar[Mapping[str, str]] = {
        "retries": "leave it out: SkyPilot starts again after 75 and 76 as often as it "
        "takes",
    }
    # Without an image too: a machine rented for the job has nothing of the user's.
    always_in_container = True

    def list_submit_commands(self, job: Job, path: Path) -> list[list[str]]:
        command = ["sky", "jobs", "launch", "--yes", "--detach-run"]
        for name in job.secrets:
            command += ["--secret", name]
        return [[*command, str(path)]]


SKYPILOT = SkyPilotScheduler()
