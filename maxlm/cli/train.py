"""maxlm train"""

from typing import Annotated

from typer import Option

from maxlm.cli.common import ConfigArgument, SettingsArgument


def command(
    config: ConfigArgument,
    settings: SettingsArgument = None,
    resume: Annotated[str | None, Option(help="Go on from this run, in a new folder.")] = None,
    profile: Annotated[str | None, Option(help="Trace steps 10 to 13 for xprof: 10:13.")] = None,
) -> None:
    """Train a model. Called again, it resumes from the newest checkpoint in the run's folder.

    On a cluster, every process is started with the same command and finds the others by itself
    (SLURM, TPUs, the templates of `maxlm launch`).

    Exit code: 0 done, 2 a mistake in what was given, 75 preempted (SIGTERM, SIGUSR1) and saved,
    76 a process hung or was lost: after the last two the same command resumes.
    """
    import os

    from maxlm.config import load_config
    from maxlm.plan.hardware import GPU_SHARE
    from maxlm.run import RunConfig

    # Read when JAX starts; the plan's limit of a GPU's memory is the same.
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # its newer name: JAX refuses both at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    run = load_config(RunConfig, config, settings or ()).value
    from maxlm.runtime.session import distributed_session
    from maxlm.train.profile import parse_steps

    traced = parse_steps(profile) if profile else None
    with distributed_session(
        run.model_dump(mode="json"),
        join_timeout_seconds=run.faults.join_seconds,
        peer_timeout_seconds=run.faults.peer_seconds,
    ):
        from maxlm.programs.report import print_training_report
        from maxlm.programs.train import train_model

        print_training_report(train_model(run, resume=resume, profile=traced))
