"""maxlm convert"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from maxlm.cli.common import StepOption
from maxlm.config import MaxlmError
from maxlm.runtime.progress import show_progress


def command(
    context: typer.Context,
    source: Annotated[
        Path, Argument(help="A Hugging Face checkpoint's folder, or a run's.")
    ],
    target: Annotated[
        Path, Argument(help="What to make: a run's folder, or a checkpoint's.")
    ],
    family: Annotated[
        str | None, Option(help="The family whose names to write.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="Write float32, bfloat16 or float16.")
    ] = None,
    step: StepOption = None,
    shard_gb: Annotated[
        float, Option(help="Most of a file, in GB of 10^9 bytes.")
    ] = 5.0,
    adapter: Annotated[
        bool, Option("--adapter", help="Write a run's adapter, for PEFT.")
    ] = False,
    base: Annotated[
        Path | None, Option(help="The model that a PEFT adapter is for.")
    ] = None,
) -> None:
    """Turn a Hugging Face checkpoint into a run, or a run into one that transformers
    loads. A run's adapter is merged, or with --adapter written alone; PEFT's are read
    beside their --base.

    Tensors pass one at a time, so that a model need not fit in memory. To go on from an
    imported run, train under a new name with train.start_from=TARGET.
    """
    from maxlm.run.convert import convert

    if not 0 < shard_gb < float("inf"):
        raise MaxlmError(f"--shard-gb {shard_gb}", fix="use a number above 0")
    options = {
        name: given for name, given in context.params.items() if name != "shard_gb"
    }
    with show_progress() as progress:
        done = convert(**options, shard_bytes=int(shard_gb * 1e9), progress=progress)
    print(f"{done.folder}: {done.family}, {done.num_params:,} parameters, {done.dtype}")
    for note in done.notes:
        print(f"  {note}")
