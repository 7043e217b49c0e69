"""Ray: a driver that starts one process on each node of a running cluster."""

from pathlib import Path

from maxlm.launch.job import Job
from maxlm.launch.schedulers.scheduler import JobScheduler


class RayScheduler(JobScheduler):
    """Jobs of a cluster that runs (``RAY_ADDRESS``), with maxlm on its nodes."""

    name = "ray"
    template = "ray/driver.py.j2"
    platforms = ("gpu", "cpu")
    options = frozenset({"nodes", "retries", "grace"})

    def list_submit_commands(self, job: Job, path: Path) -> list[list[str]]:
        command = ["ray", "job", "submit", "--no-wait"]
        command += ["--working-dir", str(path.parent)]
        return [[*command, "--", "python", path.name]]


RAY = RayScheduler()
