"""maxlm launch"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from maxlm.cli.common import ConfigArgument, SettingsArgument
from maxlm.config import MaxlmError
from maxlm.launch.schedulers import SCHEDULERS
from maxlm.runtime.files import convert_write_errors


def command(
    context: typer.Context,
    scheduler: Annotated[
        str,
        Argument(
            help=f"The scheduler that starts the job: {', '.join(SCHEDULERS.kinds())}.",
            autocompletion=SCHEDULERS.kinds,
        ),
    ],
    config: ConfigArgument,
    settings: SettingsArgument = None,
    *,
    on: Annotated[
        str, Option(help="The machine: v5p-256, 2xv5e-256, h100x64, cpux8, ...")
    ],
    submitting: Annotated[
        bool, Option("--submit", help="Submit the job to the scheduler.")
    ] = False,
    out: Annotated[Path | None, Option(help="Also write the job to this file.")] = None,
    template: Annotated[
        Path | None, Option(help="Your copy of a template from launch/.")
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Even if the plan does not fit the machine.")
    ] = False,
    name: Annotated[
        str | None, Option(help="Name of the job; tpu-vm: of the TPU.")
    ] = None,
    nodes: Annotated[
        int | None, Option(min=1, help="slurm, ray with cpuxN: number of hosts.")
    ] = None,
    image: Annotated[
        str | None, Option(help="Container image: slurm, jobset, skypilot.")
    ] = None,
    queue: Annotated[
        str | None, Option("--queue", "--partition", help="Queue: slurm, jobset.")
    ] = None,
    account: Annotated[str | None, Option(help="Account: slurm.")] = None,
    namespace: Annotated[str | None, Option(help="Namespace: jobset.")] = None,
    priority: Annotated[
        str | None, Option(help="Priority: slurm (QOS), jobset, skypilot.")
    ] = None,
    reservation: Annotated[
        str | None, Option(help="Reservation: slurm, jobset.")
    ] = None,
    spot: Annotated[
        bool, Option("--spot", help="Preemptible machines: jobset, skypilot.")
    ] = False,
    time: Annotated[
        str | None, Option(help="Time limit of a start, 24:00:00 or 24h: slurm.")
    ] = None,
    retries: Annotated[
        int | None,
        Option(min=0, help="Restarts after exit codes 75, 76; default: 100."),
    ] = None,
    grace: Annotated[
        int | None, Option(min=1, help="Seconds to save in; default: 120.")
    ] = None,
    env: Annotated[
        list[str] | None, Option(help="NAME=VALUE of a variable; repeatable.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        Option(help="NAME of a secret variable; jobset: NAME=SECRET/KEY."),
    ] = None,
    mount: Annotated[
        list[str] | None, Option(help="SOURCE:/PATH to mount; repeatable.")
    ] = None,
    node_selector: Annotated[
        list[str] | None, Option(help="KEY=VALUE of nodes: jobset.")
    ] = None,
    service_account: Annotated[
        str | None, Option(help="Service account: jobset.")
    ] = None,
    zone: Annotated[str | None, Option(help="Zone: skypilot, tpu-vm.")] = None,
    project: Annotated[str | None, Option(help="Project: tpu-vm.")] = None,
    maxlm: Annotated[
        str | None, Option(help="Path of maxlm, if not on the hosts' PATH.")
    ] = None,
) -> None:
    """Print a scheduler's job for a run, checked against its plan; --submit starts it.

    \b
    maxlm launch slurm my.yaml --on h100x64 --partition gpu --time 24h
    maxlm launch jobset my.yaml --on v5e-256 --image IMAGE --queue tpu --mount gs://bucket:/data
    maxlm launch tpu-vm my.yaml --on v5p-64 --name my-tpu --zone us-east5-a --submit

    my.yaml names text (data.sources; rows to tune on: task.files) and a folder that all hosts see.
    Without data the job is printed with placeholders to replace, and cannot be submitted.

    Exit codes: 0 printed or submitted, 1 the scheduler's client failed, 2 wrong input.
    """
    import jax

    from maxlm.launch.make_job import make_job
    from maxlm.launch.options import JobOptions
    from maxlm.launch.places import find_placeholder_settings, make_placeholder_settings
    from maxlm.launch.render import job_file_path, render_job, submit_job
    from maxlm.launch.schedulers import get_scheduler
    from maxlm.plan.known_errors import format_known_time_errors
    from maxlm.plan.show import format_prediction
    from maxlm.run.load_config import load_run_config

    target = get_scheduler(scheduler)
    # Planning touches no accelerator of this machine's.
    jax.config.update("jax_platforms", "cpu")
    # Each field of JobOptions is an option of this name; None: it is not given.
    job_options: dict[str, Any] = {}
    for field in fields(JobOptions):
        value = context.params[field.name]
        if value is not None:
            job_options[field.name] = tuple(value) if isinstance(value, list) else value
    options = JobOptions(**job_options)
    all_settings = [*(settings or ())]
    run = load_run_config(config, all_settings)
    placeholders = []
    if not submitting:
        has_template = template is not None
        sees_files = has_template or target.sees_submitting_machine(options)
        placeholders = make_placeholder_settings(run, sees_files=sees_files)
    if placeholders:
        all_settings += placeholders
        run = load_run_config(config, all_settings)
    named_placeholders = find_placeholder_settings(run)
    if submitting and named_placeholders:
        message = f"{named_placeholders[0]} is a placeholder"
        raise MaxlmError(message, fix="name a path of your own")
    job, plan = make_job(
        run,
        config,
        all_settings,
        scheduler=scheduler,
        on=on,
        options=options,
        force=force,
        user_template=template is not None,
    )
    text = render_job(job, template)
    job_file = job_file_path(job, run)
    written = []
    if out is not None:
        written.append(out)
    if submitting:
        written.append(job_file)
    for path in written:
        with convert_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(text, end="")
    if named_placeholders:
        settings_to_replace = shlex.join(placeholders) or ", ".join(named_placeholders)
        _print_note(
            f"warning: the job has placeholders; set paths of your own: "
            f"{settings_to_replace}"
        )
    _print_note(f"planned: {format_prediction(plan)}")
    if plan.known_time_errors:
        _print_note(f"note: {format_known_time_errors(plan.known_time_errors)}")
    for note in target.list_notes(options):
        _print_note(f"note: {note}")
    for path in written:
        _print_note(f"written: {path}")
    if submitting:
        exit_code = submit_job(job, job_file)
        if exit_code:
            raise typer.Exit(1)


def _print_note(line: str) -> None:
    """Print beside the job, which alone goes to stdout."""
    print(line, file=sys.stderr)
