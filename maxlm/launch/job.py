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
SPOT_GRACE = 15
# From a job's start to its first step: a container to fetch, a checkpoint to read, a
# compilation.
START_UP = 300
# A pod's name is a host's: the job's, its replicated job's, two numbers; 63 characters
# in all.
_LONGEST_NAME = 40


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
    """Check a run for a scheduler and a machine, and describe the job that trains it.

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
    mounted = parse_mounts(options.mount, scheduler)
    in_container = is_containerized(scheduler, options)
    check_paths(run, scheduler, mounted if in_container else None, user_template)
    name = _job_name(options.name or run.name)
    limit = None if options.time is None else parse_time_limit_seconds(options.time)
    env = parse_env(options.env)
    secrets = parse_secrets(options.secret, scheduler)
    if both := [variable for variable in env if variable in secrets]:
        raise MaxlmError(
            f"{both[0]} is named by --env and by --secret", fix="leave one out"
        )
    if hosts.platform == "cpu":
        env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(hosts.devices)} | env
    label = "cloud.google.com/gke-accelerator=nvidia-h100-80gb"
    node_selector = split_pairs(
        "--node-selector", options.node_selector, "KEY=VALUE", label
    )
    plan = plan_run(run, machine)
    if not plan.fits and not force:
        fix = f"find what does: maxlm plan {config_source} --on {on} --search (or --force)"
        raise MaxlmError(
            f"does not fit on {on}: {format_prediction(plan)}", where=run.name, fix=fix
        )
    _check_times(
        limit, options.grace if supports_option(scheduler, "grace") else None, plan
    )
    config = config_source
    text = ""
    path = Path(config_source).expanduser()
    if path.is_file() or not find_shipped_config(config_source):
        config = str(path.resolve())
        if (
            in_container or scheduler != "slurm"
        ):  # the job does not see this machine's files
            config = f"/tmp/{name}.yaml"
            settings = ()
            text = to_yaml(run)
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
        config_text=text,
        env=env,
        secrets=secrets,
        mounts=mounted,
        node_selector=node_selector,
        time=None if limit is None else _clock(limit),
        options=options,
    )
    return job, plan


def is_containerized(scheduler: str, options: JobOptions) -> bool:
    """Returns whether a job's processes see only what is mounted into their
    container."""
    return scheduler in ("jobset", "skypilot") or bool(options.image)


def _check_times(limit: int | None, grace: int | None, plan: RunPlan) -> None:
    """Refuse a job that is over before a step is saved: one that has begun is finished
    first."""
    step = plan.step_seconds or 0.0
    if grace is not None and grace <= step:
        what = f"--grace {grace} is shorter than a step ({step:.3g} s)"
        raise MaxlmError(what, fix=f"give --grace {floor(step) + 1} or more")
    least = START_UP + step + (grace or 0)
    if limit is not None and limit < least:
        raise MaxlmError(
            f"--time {_clock(limit)} is over before a step is saved: {START_UP} s to "
            f"start, "
            f"{step:.3g} s a step and {grace or 0} s to save",
            fix=f"give {-(-least // 60):.0f}m or more",
        )


def _job_name(name: str) -> str:
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", found) or len(found) > _LONGEST_NAME:
        fix = f"give --name: a letter, then letters, digits and dashes, {_LONGEST_NAME} at most"
        raise MaxlmError(f"'{name}' makes no name for a job", fix=fix)
    return found


def _clock(total: int) -> str:
    minutes, second = divmod(total, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-" * (days > 0) + f"{hour:02}:{minute:02}:{second:02}"
