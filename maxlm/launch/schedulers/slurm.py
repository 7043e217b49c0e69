"""SLURM: a batch script that starts one process on each node with ``srun``."""

from pathlib import Path, PurePosixPath

from maxlm.config import MaxlmError
from maxlm.launch.job import Job
from maxlm.launch.options import JobOptions, Mount
from maxlm.launch.schedulers.scheduler import JobScheduler


class SlurmScheduler(JobScheduler):
    """Batch jobs of nodes that share a file system with the machine that submits
    them; containers need the pyxis plugin."""

    name = "slurm"
    template = "slurm/job.sbatch.j2"
    platforms = ("gpu", "cpu")
    options = frozenset(
        {
            *("name", "nodes", "image", "queue", "account", "priority", "reservation"),
            *("time", "retries", "grace", "secret", "mount"),
        }
    )
    shares_files = True
    mountable = "a folder of its hosts"

    def check_options(self, options: JobOptions) -> None:
        if options.mount and not options.image:
            fix = "add --image, or leave it out"
            raise MaxlmError("--mount is into a container", fix=fix)

    def can_mount(self, mount: Mount) -> bool:
        return mount.source.startswith("/")

    def suggest_mount(self, folder: PurePosixPath) -> str:
        return f"{folder}:{folder}"

    def list_submit_commands(self, job: Job, path: Path) -> list[list[str]]:
        return [["sbatch", str(path)]]


SLURM = SlurmScheduler()
