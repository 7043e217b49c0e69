"""maxlm launch"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from maxlm.cli.common import ConfigArgument, SettingsArgument
from maxlm.config import MaxlmError
from maxlm.runtime.files import convert_write_errors


def command(
    context: typer.Context,
    scheduler: Annotated[
        Literal["slurm", "jobset", "skypilot", "ray", "tpu-vm"],
        Argument(help="What starts it."),
    ],
    config: ConfigArgument,
    settings: SettingsArgument = None,
    *,
    on: Annotated[
        str, Option(help="The machine: v5p-256, 2xv5e-256, h100x64, cpux8, ...")
    ],
    submitting: Annotated[
        bool, Option("--submit", help="Hand it to the scheduler.")
    ] = False,
    out: Annotated[Path | None, Option(help="Write it to this file as well.")] = None,
    template: Annotated[
        Path | None, Option(help="Your copy of a template from launch/.")
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Even if it does not fit by the plan.")
    ] = False,
    name: Annotated[str | None, Option(help="The job's; tpu-vm: the TPU's.")] = None,
    nodes: Annotated[
        int | None, Option(min=1, help="slurm, ray, for cpuxN: hosts.")
    ] = None,
    image: Annotated[
        str | None, Option(help="Container: slurm, jobset, skypilot.")
    ] = None,
    queue: Annotated[
        str | None, Option("--queue", "--partition", help="slurm, jobset.")
    ] = None,
    account: Annotated[str | None, Option(help="slurm.")] = None,
    namespace: Annotated[str | None, Option(help="jobset.")] = None,
    priority: Annotated[
        str | None, Option(help="slurm (QOS), jobset, skypilot.")
    ] = None,
    reservation: Annotated[str | None, Option(help="slurm, jobset.")] = None,
    spot: Annotated[
        bool, Option("--spot", help="Preemptible machines: jobset, skypilot.")
    ] = False,
    time: Annotated[
        str | None, Option(help="slurm: limit of a start, 24:00:00 or 24h.")
    ] = None,
    retries: Annotated[
        int | None, Option(min=0, help="Restarts after codes 75, 76: 100.")
    ] = None,
    grace: Annotated[int | None, Option(min=1, help="Seconds to save in: 120.")] = None,
    env: Annotated[list[str] | None, Option(help="NAME=VALUE; again for more.")] = None,
    secret: Annotated[
        list[str] | None, Option(help="NAME; jobset: NAME=SECRET/KEY.")
    ] = None,
    mount: Annotated[
        list[str] | None, Option(help="SOURCE:/PATH; again for more.")
    ] = None,
    node_selector: Annotated[
        list[str] | None, Option(help="jobset: KEY=VALUE of nodes.")
    ] = None,
    service_account: Annotated[str | None, Option(help="jobset.")] = None,
    zone: Annotated[str | None, Option(help="skypilot, tpu-vm.")] = None,
    project: Annotated[str | None, Option(help="tpu-vm.")] = None,
    maxlm: Annotated[
        str | None, Option(help="The program, if not on the hosts' PATH.")
    ] = None,
) -> None:
    """Print a scheduler's job for a run, checked against its plan; --submit starts it.

    \b
    maxlm launch slurm my.yaml --on h100x64 --partition gpu --time 24h
    maxlm launch jobset my.yaml --on v5e-256 --image IMAGE --queue tpu --mount gs://bucket:/data
    maxlm launch tpu-vm my.yaml --on v5p-64 --name my-tpu --zone us-east5-a --submit

    my.yaml names text (data.sources; rows to tune on: task.files) and a folder that all hosts see.
    Without data the job is printed with placeholders to replace, and cannot be submitted.

    Exit code: 0 printed or submitted, 1 the client failed, 2 a mistake in what was given.
    """
    import jax

    from maxlm.launch.job import SPOT_GRACE, is_containerized, make_job
    from maxlm.launch.options import JobOptions
    from maxlm.launch.places import (
        can_see_submitting_machine,
        find_placeholder_settings,
        make_placeholder_settings,
    )
    from maxlm.launch.render import job_file_path, render_job, submit_job
    from maxlm.plan.known_errors import format_known_time_errors
    from maxlm.plan.show import format_prediction
    from maxlm.run.load_config import load_run_config

    jax.config.update(
        "jax_platforms", "cpu"
    )  # Planning touches no accelerator of this machine's.
    given: dict[str, Any] = {}
    for field in fields(JobOptions):
        value = context.params[field.name]
        if value is not None:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    options = JobOptions(**given)
    all_settings = [*(settings or ())]
    run = load_run_config(config, all_settings)
    placeholders = []
    if not submitting:
        in_container = is_containerized(scheduler, options)
        sees_files = can_see_submitting_machine(
            scheduler, in_container, template is not None
        )
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
    kept = job_file_path(job, run)
    written = [
        path for path, asked in ((out, out), (kept, submitting)) if path and asked
    ]
    for path in written:
        with convert_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(text, end="")
    if named_placeholders:
        to_set = shlex.join(placeholders) or ", ".join(named_placeholders)
        words = f"the job has placeholders; set paths of your own: {to_set}"
        print(f"warning: {words}", file=sys.stderr)
    print(f"planned: {format_prediction(plan)}", file=sys.stderr)
    if plan.known_time_errors:
        print(
            f"note: {format_known_time_errors(plan.known_time_errors)}", file=sys.stderr
        )
    if scheduler == "jobset" and spot and options.grace > SPOT_GRACE:
        words = f"{SPOT_GRACE} s, not {options.grace}, unless their pool says so"
        print(f"note: GKE's Spot nodes give {words}", file=sys.stderr)
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    if submitting and submit_job(job, kept):
        raise typer.Exit(1)
