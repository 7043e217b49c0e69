"""maxlm quantize"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from maxlm.cli.common import StepOption
from maxlm.runtime.progress import show_progress


def command(
    source: Annotated[
        Path, Argument(help="A run's folder, a Hugging Face checkpoint's, or a GGUF.")
    ],
    target: Annotated[Path, Argument(help="Folder of the run to write.")],
    scheme: Annotated[
        str,
        Option(
            help="Such as int8, fp8, nf4-double, int4-g32, q4_k; on a text "
            "gptq-int4-g128, awq-int4-g32, awq-gptq-int4-g32, smoothquant.",
        ),
    ],
    calibrate: Annotated[
        str | None,
        Option(
            metavar="DATA",
            help="The text that a calibrated scheme reads: files, a folder, a token "
            "store, python-stdlib.",
        ),
    ] = None,
    calibration_rows: Annotated[
        int, Option(min=1, help="Rows of the text that are read.")
    ] = 128,
    calibration_length: Annotated[
        int, Option(min=1, help="Most tokens of a row.")
    ] = 512,
    batch_rows: Annotated[
        int, Option(min=1, help="Rows that a layer computes at once.")
    ] = 8,
    targets: Annotated[
        str | None,
        Option(
            help="Matrices, such as query,mlp.up,embedding,head; default: all linear "
            "maps of layers, and routed experts.",
        ),
    ] = None,
    step: StepOption = None,
) -> None:
    """Round a model's matrices to few bits, and write it as a run, which generate,
    chat, serve, eval and tune take as any other.

    maxlm quantize SmolLM2-135M runs/small --scheme awq-int4-g32 --calibrate text/

    A calibrated scheme keeps each layer when it is done: the same command goes on after
    the last. docs/quantization.md says which scheme is for what.
    """
    from maxlm.run.quantize.calibration import CalibrationSettings
    from maxlm.run.quantize.program import quantize_model

    calibration = None
    if calibrate is not None:
        calibration = CalibrationSettings(
            calibrate, calibration_rows, calibration_length, batch_rows
        )
    with show_progress() as progress:
        quantized = quantize_model(
            source,
            target,
            scheme,
            targets=None if targets is None else tuple(targets.split(",")),
            calibration=calibration,
            step=step,
            progress=progress,
        )
    size = f"{quantized.num_bytes / 1e6:,.1f} MB"
    print(
        f"{quantized.folder}: {quantized.num_params:,} parameters in {size}, matrices "
        f"in {quantized.matrix_bits:.2f} bits"
    )
    for note in quantized.notes:
        print(f"  {note}")
