"""maxlm train"""

from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from maxlm.train.program import TrainingProgram


def command(
    config: ConfigArgument,
    settings: SettingsArgument = None,
    resume: Annotated[
        str | None, Option(help="Continue from this run, in a new folder.")
    ] = None,
    profile: Annotated[
        str | None, Option(help="Trace steps 10 to 13 for xprof: 10:13.")
    ] = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Train a model. The same command resumes from the newest checkpoint in the run's
    folder.

    On a cluster, start every process with the same command: they find each other (on
    SLURM, on TPUs, in the templates of `maxlm launch`). Elsewhere set --coordinator,
    --num-processes and --process-id.

    Exit codes: 0 done; 2 wrong input; 75 preempted (SIGTERM, SIGUSR1) and saved; 76 a
    process hung or was lost. After 75 and 76 the same command resumes.
    """
    from maxlm.run.load_config import load_run_config

    cluster_variables = make_cluster_variables(coordinator, num_processes, process_id)
    run = load_run_config(config, settings or ())
    run_training(run, resume, profile, cluster_variables, _load_program)


def _load_program() -> "TrainingProgram":
    from maxlm.train.program import train_model

    return train_model
