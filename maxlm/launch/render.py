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
from maxlm.launch.job import Job
from maxlm.launch.schedulers import get_scheduler
from maxlm.run.config import RunConfig

# Text that YAML reads as itself. A colon at the end would make it a key.
_WORD = re.compile(r"[A-Za-z/](?:[A-Za-z0-9_./:@=+-]*[A-Za-z0-9_./@=+-])?")
# Booleans of YAML 1.1, and null.
_NO_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


def render_job(job: Job, template: Path | None = None) -> str:
    """Renders the job from its scheduler's template, or from the user's own in its
    place."""
    scheduler = get_scheduler(job.scheduler)
    path = template or scheduler.find_template()
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        shell=_shell,
        yaml=_yaml,
        # JSON's strings and objects of them are Python's too.
        python=partial(json.dumps, ensure_ascii=False),
        kubernetes=_kubernetes,
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
        fix = f"compare with {scheduler.template_label}"
        raise MaxlmError(f"{error}", where=where, fix=fix) from None


def _yaml(value: str) -> str:
    """Formats text as a line of YAML 1.1 and 1.2 alike: quoted unless it is obviously a
    word."""
    if _WORD.fullmatch(value) and value.lower() not in _NO_WORDS:
        return value
    line = yaml.safe_dump(
        value, default_style='"', width=float("inf"), allow_unicode=True
    )
    return line.removesuffix("\n")


def _kubernetes(value: str) -> str:
    """Escapes a word of a container's command, or a variable's value, in which
    Kubernetes would put a variable for ``$(NAME)`` and ``$`` for ``$$``."""
    return re.sub(r"\$(?=[$(])", "$$", value)


def _shell(value: str | tuple[str, ...]) -> str:
    return shlex.quote(value) if isinstance(value, str) else shlex.join(value)


def job_file_path(job: Job, run: RunConfig) -> Path:
    """Returns the path that a submitted job is written to: in the run's folder, or in
    runs/ where that folder is on other machines or in a container."""
    scheduler = get_scheduler(job.scheduler)
    sees_folder = scheduler.sees_submitting_machine(job.options)
    folder = run.folder if sees_folder else "runs"
    return Path(folder) / run.name / "launch" / scheduler.file_name


def submit_job(job: Job, path: Path) -> int:
    """Hands a job's file to its scheduler's client; returns the client's exit code."""
    scheduler = get_scheduler(job.scheduler)
    for command in scheduler.list_submit_commands(job, path):
        program = command[0]
        if shutil.which(program) is None:
            message = f"{program} is not on the PATH here; the job is kept in this file"
            fix = f"where it is, run: {' '.join(command)}"
            raise MaxlmError(message, where=str(path), fix=fix)
        exit_code = subprocess.run(command).returncode
        if exit_code:
            return exit_code
    return 0
