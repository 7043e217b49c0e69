"""A job's file: rendered from its scheduler's template, written, handed to the
scheduler."""

import json
import re
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined, TemplateError

from maxlm.config import MaxlmError
from maxlm.config.assets import find_asset
from maxlm.launch.job import Job
from maxlm.run.config import RunConfig

# scheduler → template under launch/; what follows the last slash, without .j2, is the
# file's name.
TEMPLATES = {
    "slurm": "slurm/job.sbatch.j2",
    "jobset": "jobset/jobset.yaml.j2",
    "skypilot": "skypilot/task.yaml.j2",
    "ray": "ray/driver.py.j2",
    "tpu-vm": "tpu_vm/worker.sh.j2",
}
# A colon at the end would make it a key.
_WORD = re.compile(r"[A-Za-z/](?:[A-Za-z0-9_./:@=+-]*[A-Za-z0-9_./@=+-])?")
_NO_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


def render_job(job: Job, template: Path | None = None) -> str:
    """Renders the job from its scheduler's template, or from the user's own in its
    place."""
    path = template or find_asset(f"launch/{TEMPLATES[job.scheduler]}")
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON's strings and objects of them are Python's too.
    python = partial(json.dumps, ensure_ascii=False)
    environment.filters.update(
        shell=_shell, yaml=_yaml, python=python, kubernetes=_kubernetes
    )
    values = {
        **vars(job.options),
        **vars(job),
        "command": job.command,
        "script": job.script,
    }
    try:
        return environment.from_string(path.read_text()).render(values)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise MaxlmError(f"cannot be read: {reason}", where=str(path)) from None
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        fix = f"compare with the shipped launch/{TEMPLATES[job.scheduler]}"
        raise MaxlmError(f"{error}", where=where, fix=fix) from None


def _yaml(value: str) -> str:
    """This text as a line of YAML 1.1 and 1.2 alike: quoted unless it is obviously a
    word."""
    if _WORD.fullmatch(value) and value.lower() not in _NO_WORDS:
        return value
    line = yaml.safe_dump(
        value, default_style='"', width=float("inf"), allow_unicode=True
    )
    return line.removesuffix("\n")


def _kubernetes(value: str) -> str:
    """A word of a container's command, or a variable's value, in which Kubernetes would
    put a variable for ``$(NAME)`` and ``$`` for ``$$``."""
    return re.sub(r"\$(?=[$(])", "$$", value)


def _shell(value: str | tuple[str, ...]) -> str:
    return shlex.quote(value) if isinstance(value, str) else shlex.join(value)


def job_file_path(job: Job, run: RunConfig) -> Path:
    """Returns the path that a submitted job is written to: in the run's folder, or in
    runs/ where that folder is on other machines or in a container."""
    folder = (
        run.folder if job.scheduler == "slurm" and not job.options.image else "runs"
    )
    name = TEMPLATES[job.scheduler].rpartition("/")[2].removesuffix(".j2")
    return Path(folder) / run.name / "launch" / name


def submit_job(job: Job, path: Path) -> int:
    """Hand a job's file to its scheduler's client; return the client's exit code."""
    for command in list_submit_commands(job, path):
        if shutil.which(command[0]) is None:
            what = f"{command[0]} is not on the PATH here; the job is kept in this file"
            raise MaxlmError(
                what, where=str(path), fix=f"where it is, run: {' '.join(command)}"
            )
        if code := subprocess.run(command).returncode:
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
        submit = [
            "ray",
            "job",
            "submit",
            "--no-wait",
            "--working-dir",
            str(path.parent),
        ]
        return [[*submit, "--", "python", path.name]]
    where = [
        f"--{key}={value}"
        for key in ("zone", "project")
        if (value := getattr(job.options, key))
    ]
    remote = f"maxlm-{job.name}.sh"
    tool = ["gcloud", "compute", "tpus", "tpu-vm"]
    # A shell reads its script as it goes: one that runs there is replaced, never
    # overwritten.
    start = f"mv {remote}.new {remote} || exit; "
    start += f"setsid nohup bash {remote} >> maxlm-{job.name}.log 2>&1 < /dev/null &"
    return [
        [*tool, "scp", file, f"{job.name}:{remote}.new", "--worker=all", *where],
        [*tool, "ssh", job.name, "--worker=all", *where, f"--command={start}"],
    ]
