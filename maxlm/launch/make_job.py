"""Makes a job of a run and a machine, checked against the plan before anything is
written."""

import re
from collections.abc import Sequence
from dataclasses import fields
from math import floor
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.config.assets import find_shipped_config
from maxlm.config.show import to_yaml
from maxlm.launch.hosts import resolve_hosts
from maxlm.launch.job import Job
from maxlm.launch.options import (
    JobOptions,
    is_plain_word,
    parse_env,
    parse_time_limit_seconds,
    split_pairs,
)
from maxlm.launch.places import check_paths, find_placeholder_settings
from maxlm.launch.schedulers import SCHEDULERS, JobScheduler, get_scheduler
from maxlm.plan.machine import Machine
from maxlm.plan.predict import RunPlan, plan_run
from maxlm.plan.show import format_prediction
from maxlm.plan.topology import Topology
from maxlm.run.config import RunConfig

# From a job's start to its first step: a container to fetch, a checkpoint to read, a
# compilation.
START_UP_SECONDS = 300
# A pod's name is a host's: the job's, its replicated job's, two numbers; 63 characters
# in all.
_MAX_NAME_LENGTH = 40


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
        scheduler: the name of a registered scheduler.
        on: the machine, as ``maxlm plan`` takes it.
        force: although it does not fit.
        user_template: whether the template is the user's own, which may mount folders.
    """
    target = get_scheduler(scheduler)
    check_options(options, target)
    machine = Machine.from_name(on)
    check_machine(machine.topology, target, on)
    hosts = resolve_hosts(machine.topology, on, options.nodes)
    mounts = target.parse_mounts(options.mount)
    check_paths(run, target, options, mounts, user_template)
    name = _make_job_name(options.name or run.name)
    limit = None
    if options.time is not None:
        limit = parse_time_limit_seconds(options.time)

    env = parse_env(options.env)
    secrets = dict(target.parse_secret(pair) for pair in options.secret)
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
    grace = options.grace if target.takes_option("grace") else None
    _check_times(limit, grace, plan)

    config = config_source
    config_text = ""
    path = Path(config_source).expanduser()
    if path.is_file() or not find_shipped_config(config_source):
        config = str(path.resolve())
        if not target.sees_submitting_machine(options):
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
        program=run.task.command,
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


def check_options(options: JobOptions, scheduler: JobScheduler) -> None:
    """Checks that each option is one that the scheduler takes, and in a form that a
    job's file can hold. Raises MaxlmError: one is not."""
    for option in fields(options):
        name = f"--{option.name.replace('_', '-')}"
        value = getattr(options, option.name)
        # `maxlm` is quoted where it is written; the others stand as they are.
        is_written_plainly = isinstance(value, str) and option.name != "maxlm"
        if is_written_plainly and not is_plain_word(value):
            raise MaxlmError(f"{name} '{value}' is not one plain word")
        is_set = value != option.default
        if is_set and not scheduler.takes_option(option.name):
            fix = scheduler.find_fix(option.name)
            if fix is None:
                takers = [
                    other.name
                    for _, other in SCHEDULERS.items()
                    if other.takes_option(option.name)
                ]
                fix = f"leave it out ({', '.join(takers)} has it)"
            raise MaxlmError(f"{scheduler.name} has no use for {name}", fix=fix)
    scheduler.check_options(options)


def check_machine(topology: Topology, scheduler: JobScheduler, machine: str) -> None:
    """Checks that the scheduler has such a machine; ``machine`` is its name. Raises
    MaxlmError: it does not."""
    platform = topology.platform
    if platform not in scheduler.platforms:
        able = [
            other.name for _, other in SCHEDULERS.items() if platform in other.platforms
        ]
        message = f"{scheduler.name} is not for {platform.upper()}s, "
        message += f"and {machine} is one"
        raise MaxlmError(message, fix=f"use {' or '.join(able)}")
    # GPUs are one slice to a scheduler, whatever links join them.
    has_several_slices = platform == "tpu" and topology.slices > 1
    if has_several_slices and not scheduler.starts_several_slices:
        message = f"{scheduler.name} starts one slice, "
        message += f"and {machine} is {topology.slices}"
        able = [
            other.name for _, other in SCHEDULERS.items() if other.starts_several_slices
        ]
        raise MaxlmError(message, fix=f"use {' or '.join(able)}")


def _check_times(limit: int | None, grace: int | None, plan: RunPlan) -> None:
    """Refuses a job that is over before a step is saved: one that has begun is finished
    first. ``limit`` and ``grace`` are in seconds."""
    step = plan.longest_step_seconds or 0.0
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
