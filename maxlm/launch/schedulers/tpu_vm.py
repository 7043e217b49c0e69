"""A TPU of Cloud TPU's that runs already: a script copied to each of its hosts."""

from pathlib import Path

from maxlm.launch.job import Job
from maxlm.launch.schedulers.scheduler import JobScheduler


class TpuVmScheduler(JobScheduler):
    """No scheduler but ``gcloud``: each host's script starts its process again."""

    name = "tpu-vm"
    template = "tpu_vm/worker.sh.j2"
    platforms = ("tpu",)
    options = frozenset({"name", "retries", "zone", "project"})

    def list_submit_commands(self, job: Job, path: Path) -> list[list[str]]:
        """Returns commands that copy a job's script to each host, and start it."""
        options = ["--worker=all"]
        if job.options.zone:
            options.append(f"--zone={job.options.zone}")
        if job.options.project:
            options.append(f"--project={job.options.project}")
        script = f"maxlm-{job.name}.sh"
        log = f"maxlm-{job.name}.log"
        # A shell reads its script as it goes: one that runs there is replaced, never
        # overwritten.
        start = f"mv {script}.new {script} || exit; "
        start += f"setsid nohup bash {script} >> {log} 2>&1 < /dev/null &"
        gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
        return [
            [*gcloud, "scp", str(path), f"{job.name}:{script}.new", *options],
            [*gcloud, "ssh", job.name, *options, f"--command={start}"],
        ]


TPU_VM = TpuVmScheduler()
