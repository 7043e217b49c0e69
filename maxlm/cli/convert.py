"""maxlm convert"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from maxlm.cli.common import StepOption
from maxlm.config import MaxlmError
from maxlm.runtime.progress import show_progress


def command(
    source: Annotated[
        Path, Argument(help="A Hugging Face checkpoint's folder, GGUF file or run.")
    ],
    target: Annotated[
        Path, Argument(help="Folder to write, or a file that ends in .gguf.")
    ],
    family: Annotated[
        str | None, Option(help="Write the parameter names of this model family.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="Write float32, bfloat16 or float16.")
    ] = None,
    step: StepOption = None,
    shard_gb: Annotated[float, Option(help="Largest file, in GB (10^9 bytes).")] = 5.0,
    adapter: Annotated[
        bool, Option("--adapter", help="Write a run's adapter, for PEFT.")
    ] = False,
    merge: Annotated[
        bool, Option("--merge", help="Write a run, a run's adapter merged into it.")
    ] = False,
    base: Annotated[
        Path | None, Option(help="The model that a PEFT adapter is for.")
    ] = None,
    quantization: Annotated[
        str | None,
        Option(help="Type of a GGUF file: f32, f16, bf16, q8_0, q6_k, q4_k_m, ..."),
    ] = None,
) -> None:
    """Turn a Hugging Face checkpoint or a GGUF file into a run, or a run into one that
    transformers loads, or llama.cpp (TARGET.gguf). A run's adapter is merged, or with
    --adapter written alone; with --merge the merged model is a run too. PEFT's adapters
    are read beside their --base.

    Tensors are converted one at a time: the model need not fit in memory. To train an
    imported run further, use a new name and train.start_from=TARGET.
    """
    from maxlm.run.convert import convert
    from maxlm.run.merge import write_merged_run

    if not 0 < shard_gb < float("inf"):
        raise MaxlmError(f"--shard-gb {shard_gb}", fix="use a number above 0")
    if merge:
        unused = {
            "--family": family is not None,
            "--dtype": dtype is not None,
            "--shard-gb": shard_gb != 5.0,
            "--adapter": adapter,
            "--base": base is not None,
            "--quantization": quantization is not None,
        }
        for option, is_given in unused.items():
            if is_given:
                message = f"{option} beside --merge, which writes a run"
                raise MaxlmError(message, fix="leave one of them out")
        with show_progress() as progress:
            merged = write_merged_run(source, target, step=step, progress=progress)
        print(f"{merged.folder}: a run, {merged.num_params:,} parameters")
        return
    with show_progress() as progress:
        result = convert(
            source,
            target,
            family=family,
            dtype=dtype,
            step=step,
            shard_bytes=int(shard_gb * 1e9),
            adapter=adapter,
            base=base,
            quantization=quantization,
            progress=progress,
        )
    parameters = f"{result.num_params:,} parameters"
    print(f"{result.folder}: {result.family}, {parameters}, {result.dtype}")
    for note in result.notes:
        print(f"  {note}")
