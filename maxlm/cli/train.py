"""maxlm train"""

from typing import Annotated

from typer import Option

from maxlm.cli.common import (
    ConfigArgument,
    CoordinatorOption,
    NumProcessesOption,
    ProcessIdOption,
    SettingsArgument,
    make_cluster_variables,
    run_training,
)


def command(
    config: ConfigArgument,
    settings: SettingsArgument = None,
    resume: Annotated[
        str | None, Option(help="Go on from this run, in a new folder.")
    ] = None,
    profile: Annotated[
        str | None, Option(help="Trace steps 10 to 13 for xprof: 10:13.")
    ] = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Train a model. Called again, it resumes from the newest checkpoint in the run's
    folder.

    On a cluster, every process is started with the same command and finds the others by
    itself (SLURM, TPUs, the templates of `maxlm launch`); --coordinator,
    --num-processes and --process-id say it otherwise.

    Exit code: 0 done, 2 a mistake in what was given, 75 preempted (SIGTERM, SIGUSR1)
    and saved, 76 a process hung or was lost: after the last two the same command
    resumes.
    """
    from maxlm.run.load_config import load_run_config

    cluster_variables = make_cluster_variables(coordinator, num_processes, process_id)
    run = load_run_config(config, settings or ())
    run_training(run, resume, profile, cluster_variables)
