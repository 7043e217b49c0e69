"""maxlm train"""

from typing import Annotated

import typer


def command(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped config such as demo.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to override: key.path=value ...")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on from this run's newest checkpoint, in a folder of its own."),
    ] = None,
) -> None:
    """Train a model. Called again, it goes on from the newest checkpoint in the run's folder."""
    import os

    from maxlm.config import load
    from maxlm.plan.hardware import GPU_SHARE
    from maxlm.run import RunConfig

    # Read when JAX starts; the plan's limit of a GPU's memory is the same.
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # its newer name: JAX refuses both at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    run = load(RunConfig, config, settings or ()).value
    from maxlm.programs.pretrain import pretrain
    from maxlm.programs.report import report

    report(pretrain(run, resume=resume))
