"""A job: everything a template may print, checked against the plan before anything is
written."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

from maxlm.config import MaxlmError, to_yaml
from maxlm.config.assets import find_shipped_config
from maxlm.launch.hosts import JobHosts, resolve_hosts
from maxlm.launch.options import (
    JobOptions,
    Mount,
    check_options,
    parse_env,
    parse_mounts,
    parse_secrets,
    parse_time_limit_seconds,
    split_pairs,
    supports_option,
)
from maxlm.launch.places import check_paths, find_placeholder_settings
from maxlm.plan.predict import Machine, RunPlan, plan_run
from maxlm.plan.show import format_prediction
from maxlm.run.config import RunConfig

# What GKE's Spot nodes leave of a job's grace, if their pool does not ask for more.
SPOT_GRACE_SECONDS = 15
# From a job's start to its first step: a container to fetch, a checkpoint to read, a
# compilation.
START_UP_SECONDS = 300
# A pod's name is a host's: the job's, its replicated job's, two numbers; 63 characters
# in all.
_MAX_NAME_LENGTH = 40


@dataclass(frozen=True)
class Job:
    """A scheduler's job. Its fields and those of its options are the template's
    variables."""

    scheduler: str
    name: str
    """Name that the scheduler takes: letters, digits, dashes."""
    title: str
    """Title that names the run and its machine, for a reader."""
    hosts: JobHosts
    program: str
    """``train``, or ``tune``, which reads Hugging Face checkpoints too."""
    config: str
    """A shipped config's name, or a file's path on the hosts."""
    settings: tuple[str, ...]
    config_text: str
    """Text to be written to `config` before; empty: it is there."""
    env: Mapping[str, str]
    secrets: Mapping[str, tuple[str, str]]
    mounts: tuple[Mount, ...]
    node_selector: Mapping[str, str]
    time: str | None
    """D-HH:MM:SS"""
    options: JobOptions

    @property
    def command(self) -> tuple[str, ...]:
        return (self.options.maxlm, self.program, self.config, *self.settings)

    @property
    def script(self) -> str:
        """Returns the command for a shell, which writes the config first if it is not
        there."""
        run = f"exec {shlex.join(self.command)}"
        if not self.config_text:
            return run
        end = f"end of {self.name}"
        write = f"cat > {self.config} <<'{end}' || exit 2"
        return f"{write}\n{self.config_text}{end}\n{run}"


def make_job(
    run: RunConfig,
    config_source: str,
    settings: Sequence[str],
    *,
    scheduler: str,
    on: str,
    options: JobOptions = JobOptions(),
    force: bool = False,
    user_template: bool = False,
) -> tuple[Job, RunPlan]:
    """Checks a run for a scheduler and a machine, and describes the job that trains it.

    Args:
        run: the config that `config_source`, a shipped config or a file, and `settings`
            load.
        on: the machine, as ``maxlm plan`` takes it.
        force: although it does not fit.
        user_template: whether the template is the user's own, which may mount folders.
    """
    check_options(options, scheduler)
    machine = Machine.from_name(on)
    hosts = resolve_hosts(machine.topology, scheduler, on, options.nodes)
    mounts = parse_mounts(options.mount, scheduler)
    in_container = is_containerized(scheduler, options)
    check_paths(run, scheduler, mounts if in_container else None, user_template)
    name = _make_job_name(options.name or run.name)
    limit = None
    if options.time is not None:
        limit = parse_time_limit_seconds(options.time)

    env = parse_env(options.env)
    secrets = parse_secrets(options.secret, scheduler)
    named_twice = [variable for variable in env if variable in secrets]
    if named_twice:
        message = f"{named_twice[0]} is named by --env and by --secret"
        raise MaxlmError(message, fix="leave one out")
    if hosts.platform == "cpu":
        env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(hosts.devices)} | env
    node_selector = split_pairs(
        "--node-selector",
        options.node_selector,
        form="KEY=VALUE",
        example="cloud.google.com/gke-accelerator=nvidia-h100-80gb",
    )

    plan = plan_run(run, machine)
    if not plan.fits and not force:
        message = f"does not fit on {on}: {format_prediction(plan)}"
        fix = f"find what does: maxlm plan {config_source} --on {on} --search "
        fix += "(or --force)"
        raise MaxlmError(message, where=run.name, fix=fix)
    has_grace = supports_option(scheduler, "grace")
    _check_times(limit, options.grace if has_grace else None, plan)

    config = config_source
    config_text = ""
    path = Path(config_source).expanduser()
    if path.is_file() or not find_shipped_config(config_source):
        config = str(path.resolve())
        if in_container or scheduler != "slurm":
            # The job does not see this machine's files: it writes the resolved config.
            config = f"/tmp/{name}.yaml"
            config_text = to_yaml(run)
            settings = ()
    title = f"{run.name} on {on}: {machine.topology.description}"
    placeholders = find_placeholder_settings(run)
    if placeholders:
        title += f"; REPLACE THE PLACEHOLDERS in {', '.join(placeholders)}"
    job = Job(
        scheduler=scheduler,
        name=name,
        title=title,
        hosts=hosts,
        program="train" if run.task.reads_text else "tune",
        config=config,
        settings=tuple(settings),
        config_text=config_text,
        env=env,
        secrets=secrets,
        mounts=mounts,
        node_selector=node_selector,
        time=None if limit is None else _format_clock(limit),
        options=options,
    )
    return job, plan


def is_containerized(scheduler: str, options: JobOptions) -> bool:
    """Returns whether a job's processes see only what is mounted into their
    container."""
    return scheduler in ("jobset", "skypilot") or bool(options.image)


def _check_times(limit: int | None, grace: int | None, plan: RunPlan) -> None:
    """Refuses a job that is over before a step is saved: one that has begun is finished
    first. ``limit`` and ``grace`` are in seconds."""
    step = plan.step_seconds or 0.0
    if grace is not None and grace <= step:
        message = f"--grace {grace} is shorter than a step ({step:.3g} s)"
        raise MaxlmError(message, fix=f"give --grace {floor(step) + 1} or more")
    required = START_UP_SECONDS + step + (grace or 0)
    if limit is not None and limit < required:
        minutes = -(-required // 60)
        raise MaxlmError(
            f"--time {_format_clock(limit)} is over before a step is saved: "
            f"{START_UP_SECONDS} s to start, {step:.3g} s a step and {grace or 0} s "
            f"to save",
            fix=f"give {minutes:.0f}m or more",
        )


def _make_job_name(name: str) -> str:
    """Makes a name that every scheduler takes."""
    job_name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    is_valid = re.fullmatch(r"[a-z][a-z0-9-]*", job_name) is not None
    if not is_valid or len(job_name) > _MAX_NAME_LENGTH:
        fix = "give --name: a letter, then letters, digits and dashes, "
        fix += f"{_MAX_NAME_LENGTH} at most"
        raise MaxlmError(f"'{name}' makes no name for a job", fix=fix)
    return job_name


def _format_clock(total: int) -> str:
    """Formats seconds as ``D-HH:MM:SS``, or ``HH:MM:SS``."""
    minutes, second = divmod(total, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02}:{minute:02}:{second:02}"
    return f"{days}-{clock}" if days else clock
