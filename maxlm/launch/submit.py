"""A rendered job handed to its scheduler's own client."""

import shutil
import subprocess
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.launch.job import Job
from maxlm.launch.render import job_file_name
from maxlm.run import RunConfig
from maxlm.runtime.files import convert_write_errors, replace_file


def job_file_path(job: Job, run: RunConfig) -> Path:
    """Returns the path that a submitted job is written to: in the run's folder, or in runs/
    where that folder is on other machines or in a container."""
    here = job.scheduler == "slurm" and not job.options.image
    folder = run.folder if here else "runs"
    return Path(folder) / run.name / "launch" / job_file_name(job.scheduler)


def write_job_file(text: str, path: Path) -> None:
    """Write a rendered job."""
    with convert_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(text)


def submit_job(job: Job, path: Path) -> int:
    """Hand a job's file to the client of its scheduler, which speaks for itself; return the
    client's exit code."""
    for command in list_submit_commands(job, path):
        if shutil.which(command[0]) is None:
            raise MaxlmError(
                f"{command[0]} is not on the PATH here; the job is kept in this file",
                where=str(path),
                fix=f"where it is, run: {' '.join(command)}",
            )
        code = subprocess.run(command).returncode
        if code:
            return code
    return 0


def list_submit_commands(job: Job, path: Path) -> list[list[str]]:
    """Returns the commands that submit a job's file, in order."""
    file = str(path)
    if job.scheduler == "slurm":
        return [["sbatch", file]]
    if job.scheduler == "jobset":
        return [["kubectl", "create", "-f", file]]
    if job.scheduler == "skypilot":
        named = [part for name in job.secrets for part in ("--secret", name)]
        return [["sky", "jobs", "launch", "--yes", "--detach-run", *named, file]]
    if job.scheduler == "ray":
        submit = ["ray", "job", "submit", "--no-wait", "--working-dir", str(path.parent)]
        return [[*submit, "--", "python", path.name]]
    where = [
        f"--{key}={value}" for key in ("zone", "project") if (value := getattr(job.options, key))
    ]
    remote = f"maxlm-{job.name}.sh"
    tool = ["gcloud", "compute", "tpus", "tpu-vm"]
    # A shell reads its script as it goes: one that runs there is replaced, never overwritten.
    start = f"mv {remote}.new {remote} || exit; "
    start += f"setsid nohup bash {remote} >> maxlm-{job.name}.log 2>&1 < /dev/null &"
    return [
        [*tool, "scp", file, f"{job.name}:{remote}.new", "--worker=all", *where],
        [*tool, "ssh", job.name, "--worker=all", *where, f"--command={start}"],
    ]
