"""maxlm train"""

from typing import Annotated

from typer import Option

from maxlm.cli.common import ConfigArgument, SettingsArgument, run_training


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
    from maxlm.programs.run_config import load_run_config

    run_training(load_run_config(config, settings or ()), resume, profile)
