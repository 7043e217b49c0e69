"""The error and the size of every number format, and how many codes equal another
library's.

    python -m benchmarks.quantization_formats [--rows 1024] [--columns 1024] [NAME ...]

Values are drawn from N(0, 1). NRMSE is the root of the mean squared error, divided by
that of the values; bits a number count the scales. Beside them stand the share of codes
that equal those of an independent library, where one is installed that has the format,
and the largest difference of decoded values where codes are equal, divided by the
largest value.

NAME: formats, such as ``int4-g64``; default: some of each kind that is registered.
"""

import argparse
import logging
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import quantization_oracles as oracles
from benchmarks.quantization_oracles import OracleCodes, read_codes
from maxlm.quantization.formats.format import Format
from maxlm.quantization.formats.registry import FORMATS, parse_format

NAMES = {
    "int8": ["int8", "int8-asym", "int8-g128", "int8-b128"],
    "int4": ["int4", "int4-g32", "int4-g128", "int4-g32-asym"],
    "fp8": ["fp8", "fp8-tensor", "fp8-g128", "fp8-b128", "fp8-b128-ue8m0"],
    "fp8e5m2": ["fp8e5m2", "fp8e5m2-b128"],
    "nf4": ["nf4", "nf4-double", "nf4-g128"],
    "mxfp8": ["mxfp8", "mxfp8-rceil", "mxfp8-even", "mxfp8-ceil"],
    "mxfp4": ["mxfp4", "mxfp4-rceil", "mxfp4-even", "mxfp4-ceil"],
    "nvfp4": ["nvfp4", "nvfp4-one"],
    **{f"int{bits}": [f"int{bits}-g32"] for bits in (2, 3, 5, 6, 7)},
}
"""Formats of the table by kind; of other kinds the kind itself."""

Oracle = Callable[[Format, np.ndarray], OracleCodes | None]

ORACLES: dict[str, Oracle] = {
    **{f"int{bits}": oracles.encode_by_compressed_tensors for bits in range(2, 9)},
    "fp8": oracles.encode_float8,
    "fp8e5m2": oracles.encode_float8,
    "nf4": oracles.encode_by_bitsandbytes,
    "mxfp8": oracles.encode_by_torchao_mx,
    "mxfp8e5m2": oracles.encode_by_torchao_mx,
    "mxfp4": oracles.encode_by_torchao_mx,
    "nvfp4": oracles.encode_by_torchao_nvfp4,
    "e8p": oracles.encode_e8p_by_search,
}
"""By kind; of kinds that are not here, GGML's library where it has the format."""


def list_names() -> list[str]:
    """Lists the formats of the table."""
    return [name for kind in FORMATS.kinds() for name in NAMES.get(kind, [kind])]


def ask_oracle(format: Format, values: np.ndarray) -> OracleCodes | None:
    """Returns the codes of another library; None: none that is installed has the
    format."""
    kind = format.name.partition("-")[0]
    oracle = ORACLES.get(kind, oracles.encode_by_ggml)
    try:
        return oracle(format, values)
    except ImportError:
        return None


def describe_format(name: str, values: np.ndarray) -> str:
    """Returns a row of the table, on fp32 values [R, C]."""
    format = parse_format(name)
    planes = jax.jit(format.encode)(values)
    decoded = np.asarray(jax.jit(format.decode)(planes))
    squared_error = np.square(decoded - values, dtype=np.float64).sum()
    nrmse = np.sqrt(squared_error / np.square(values, dtype=np.float64).sum())
    bits = format.count_bits(values.shape)
    row = f"{name:16} {nrmse:9.5f} {bits:8.4f}"
    there = ask_oracle(format, values)
    if there is None:
        return row
    is_equal = read_codes(planes) == there.codes
    row += f"  {there.library:20} {is_equal.mean():11.6%}"
    if there.values is None:
        return row
    numbers_a_code = values.shape[1] // is_equal.shape[1]
    is_compared = np.repeat(is_equal, numbers_a_code, 1)
    differences = np.abs(decoded - there.values)[is_compared]
    return f"{row}  {differences.max() / np.abs(values).max():9.1e}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # torch's, about what is not installed
    generator = np.random.default_rng(args.seed)
    values = generator.normal(size=(args.rows, args.columns)).astype(np.float32)
    print(
        f"{'format':16} {'NRMSE':>9} {'bits':>8}  {'library':20} {'equal codes':>11}"
        f"  {'decoded':>9}"
    )
    for name in args.names or list_names():
        print(describe_format(name, values), flush=True)


if __name__ == "__main__":
    main()
