"""A job's text from its scheduler's template."""

import json
import re
import shlex
from dataclasses import fields
from functools import partial
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.config.assets import find_asset
from maxlm.launch.job import Job

# scheduler → template under launch/; what follows the last slash, without .j2, is the file's name.
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


def job_file_name(scheduler: str) -> str:
    """Returns the file name of a rendered job."""
    return TEMPLATES[scheduler].rpartition("/")[2].removesuffix(".j2")


def render_job(job: Job, template: Path | None = None) -> str:
    """Renders the job from its scheduler's template, or from the user's own in its place."""
    from jinja2 import Environment, StrictUndefined, TemplateError

    path = template or find_asset(f"launch/{TEMPLATES[job.scheduler]}")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # JSON's strings and objects of them are Python's too.
    python = partial(json.dumps, ensure_ascii=False)
    filters = {"shell": _shell, "yaml": _yaml, "python": python, "kubernetes": _kubernetes}
    environment.filters |= filters
    parts = (job.options, job)
    values = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    try:
        found = environment.from_string(path.read_text())
        return found.render(**values, command=job.command, script=job.script)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise MaxlmError(f"cannot be read: {reason}", where=str(path)) from None
    except TemplateError as error:
        line = f":{line}" if (line := getattr(error, "lineno", None)) else ""
        fix = f"compare with the shipped launch/{TEMPLATES[job.scheduler]}"
        raise MaxlmError(f"{error}", where=f"{path}{line}", fix=fix) from None


def _yaml(value: str) -> str:
    """One line of YAML that is this text, to YAML 1.1 and 1.2 alike: quoted unless it is obviously
    a word."""
    import yaml

    if _WORD.fullmatch(value) and value.lower() not in _NO_WORDS:
        return value
    line = yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True)
    return line.removesuffix("\n")


def _kubernetes(value: str) -> str:
    """A word of a container's command, or a variable's value, in which Kubernetes would put a
    variable for ``$(NAME)`` and ``$`` for ``$$``."""
    return re.sub(r"\$(?=[$(])", "$$", value)


def _shell(value: str | tuple[str, ...]) -> str:
    return shlex.quote(value) if isinstance(value, str) else shlex.join(value)
