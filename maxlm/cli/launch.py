"""maxlm launch"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from maxlm.cli.arguments import ConfigArgument, SettingsArgument


def command(
    context: typer.Context,
    scheduler: Annotated[str, typer.Argument(help="slurm, jobset, skypilot, ray or tpu-vm.")],
    config: ConfigArgument,
    settings: SettingsArgument = None,
    *,
    on: Annotated[str, typer.Option(help="The machine: v5p-256, 2xv5e-256, h100x64, cpux8, ...")],
    submitting: Annotated[
        bool, typer.Option("--submit", help="Hand it to the scheduler's client; keeps a copy.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write it to this file as well.")] = None,
    template: Annotated[
        Path | None, typer.Option(help="Your own copy of a template from launch/.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Although the plan says that it does not fit.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The job's; tpu-vm: the TPU's.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="slurm, ray with cpuxN: hosts to spread it over.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Container; slurm (by pyxis), jobset, skypilot.")
    ] = None,
    queue: Annotated[
        str | None, typer.Option("--queue", "--partition", help="slurm; jobset: Kueue's queue.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="slurm.")] = None,
    namespace: Annotated[str | None, typer.Option(help="jobset.")] = None,
    priority: Annotated[
        str | None,
        typer.Option(help="slurm: QOS; jobset: priority class; skypilot: 0 to 1000."),
    ] = None,
    reservation: Annotated[str | None, typer.Option(help="slurm, jobset.")] = None,
    spot: Annotated[
        bool, typer.Option("--spot", help="Machines that may be taken away: jobset, skypilot.")
    ] = False,
    time: Annotated[
        str | None, typer.Option(help="slurm: the limit of one start, 24:00:00 or 24h.")
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="Restarts after exit codes 75, 76 (jobset: 76): 100."),
    ] = None,
    grace: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds to save in when it is to stop: 120; slurm, jobset, ray."),
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; again for more.")] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME of a variable where you submit (slurm, skypilot); jobset: NAME=SECRET/KEY."
        ),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE:/PATH; a bucket's URL, jobset's claim, a host's folder."),
    ] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of nodes' labels: jobset.")
    ] = None,
    service_account: Annotated[str | None, typer.Option(help="jobset.")] = None,
    zone: Annotated[str | None, typer.Option(help="skypilot, tpu-vm.")] = None,
    project: Annotated[str | None, typer.Option(help="tpu-vm.")] = None,
    maxlm: Annotated[
        str | None, typer.Option(help="The program on the hosts, if not on their PATH.")
    ] = None,
) -> None:
    """Print a scheduler's job for a run, checked against its plan; --submit starts it.

    \b
    maxlm launch slurm my.yaml --on h100x64 --partition gpu --time 24h
    maxlm launch jobset my.yaml --on v5e-256 --image IMAGE --queue tpu --mount gs://bucket:/data
    maxlm launch tpu-vm my.yaml --on v5p-64 --name my-tpu --zone us-east5-a --submit

    my.yaml names text (data.sources) and a folder that all hosts see. Without text the job is
    printed with placeholders to replace, and cannot be submitted.

    Exit code: 0 printed or submitted, 1 the client failed, 2 a mistake in what was given.
    """
    import jax

    from maxlm.config import MaxlmError, load_config
    from maxlm.launch.job import SPOT_GRACE, make_job, summarize_plan
    from maxlm.launch.options import JobOptions, check_scheduler
    from maxlm.launch.places import find_placeholders, make_placeholders
    from maxlm.launch.render import render_job
    from maxlm.launch.submit import job_file_path, submit_job, write_job_file
    from maxlm.run import RunConfig

    check_scheduler(scheduler)
    jax.config.update("jax_platforms", "cpu")  # Planning touches no accelerator of this machine's.
    given = {field.name: context.params[field.name] for field in fields(JobOptions)}
    lists = {name: tuple(given[name] or ()) for name in ("env", "secret", "mount", "node_selector")}
    options = JobOptions(**{**given, **lists})
    run = load_config(RunConfig, config, settings or ()).value
    placeholders = [] if submitting else make_placeholders(run)
    settings = [*(settings or ()), *placeholders]
    if placeholders:
        run = load_config(RunConfig, config, settings).value
    if submitting and (named := find_placeholders(run)):
        raise MaxlmError(f"{named[0]} is a placeholder", fix="name a path of your own")
    own_template = template is not None
    checks = {"scheduler": scheduler, "on": on, "force": force, "own_template": own_template}
    job, plan = make_job(run, config, settings, options=options, **checks)
    text = render_job(job, template)
    kept = job_file_path(job, run)
    written = [path for path, asked in ((out, out), (kept, submitting)) if path and asked]
    for path in written:
        write_job_file(text, path)
    print(text, end="")
    if placeholders:
        shown = shlex.join(placeholders)
        print(f"warning: the job has placeholders; set paths of your own: {shown}", file=sys.stderr)
    print(f"planned: {summarize_plan(plan)}", file=sys.stderr)
    if scheduler == "jobset" and spot and job.grace > SPOT_GRACE:
        words = f"{SPOT_GRACE} s, not {job.grace}, unless their pool says so"
        print(f"note: GKE's Spot nodes give {words}", file=sys.stderr)
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    if submitting and submit_job(job, kept):
        raise typer.Exit(1)
