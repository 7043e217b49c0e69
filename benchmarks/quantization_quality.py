"""Prints the perplexity of a model quantized by each scheme, beside that of the model.

    python -m benchmarks.quantization_quality MODEL --text TEXT --calibrate TEXT

The perplexity is that of the first tokens of the text, which calibration must not have
seen. Each scheme is quantized by ``maxlm quantize``'s own program into a folder that is
removed again.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import bind
from maxlm.run.load import LoadedRun, load_model
from maxlm.run.quantize.calibration import CalibrationSettings
from maxlm.run.quantize.program import quantize_model
from maxlm.run.quantize.scheme import parse_scheme

SCHEMES = (
    "int8",
    "w8a8",
    "smoothquant",
    "w8a8-fp8",
    "nf4",
    "nf4-double",
    "int4-g32",
    "gptq-int4-g32",
    "awq-int4-g32",
    "awq-gptq-int4-g32",
    "int3-g32",
    "awq-int3-g32",
    "awq-gptq-int3-g32",
)


def compute_perplexity(loaded: LoadedRun, tokens: np.ndarray) -> float:
    """Returns the perplexity of one row of tokens."""
    assert isinstance(loaded.model, Decoder)
    rows = jnp.asarray(tokens, jnp.int32)[None]
    positions = jnp.arange(rows.shape[1], dtype=jnp.int32)[None]

    @jax.jit
    def compute(params: object, rows: jax.Array) -> jax.Array:
        model = bind(loaded.model, params)
        hidden, _ = model(rows, positions)
        log_probs = jax.nn.log_softmax(model.logits(hidden)[:, :-1])
        of_next = jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=2)
        return jnp.exp(-of_next.mean())

    with jax.set_mesh(loaded.mesh):
        return float(compute(loaded.params, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--calibration-rows", type=int, default=7)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    arguments = parser.parse_args()

    dense = load_model(arguments.model)
    ids = dense.tokenizer.encode(arguments.text.read_text())
    tokens = np.asarray(ids[: arguments.tokens])
    reference = compute_perplexity(dense, tokens)
    del dense
    print(f"{len(tokens)} tokens of {arguments.text.name}: {reference:.3f} in fp32")
    calibration = CalibrationSettings(
        arguments.calibrate,
        num_rows=arguments.calibration_rows,
        row_tokens=arguments.calibration_length,
    )
    print(f"{'scheme':<22}{'bits':>8}{'perplexity':>12}{'ratio':>8}{'seconds':>9}")
    for scheme in arguments.schemes.split(","):
        is_calibrated = parse_scheme(scheme).is_calibrated
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            quantized = quantize_model(
                arguments.model,
                Path(folder) / "model",
                scheme,
                calibration=calibration if is_calibrated else None,
            )
            seconds = time.monotonic() - start
            perplexity = compute_perplexity(load_model(quantized.folder), tokens)
        ratio = perplexity / reference
        line = f"{scheme:<22}{quantized.matrix_bits:>8.3f}{perplexity:>12.3f}"
        print(f"{line}{ratio:>8.3f}{seconds:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
