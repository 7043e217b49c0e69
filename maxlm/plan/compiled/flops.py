"""Floating-point operations of the matrix products in a compiled program."""

import re
from collections.abc import Iterator
from functools import lru_cache
from math import prod

import numpy as np

from maxlm.plan.compiled.hlo import Computation, HloShape, Instruction


def matmul_flops(instruction: Instruction, computation: Computation) -> int:
    """Returns 2·M·N·K of a dot, a convolution or a matrix library's call; 0 for
    others."""
    opcode = instruction.opcode
    if opcode not in ("dot", "convolution", "custom-call"):
        return 0
    operands = [operand.shapes for operand in computation.operands(instruction)]
    if opcode == "dot":
        contracted = instruction.integers("lhs_contracting_dims")
        return _dot(operands[0][0], instruction.shapes[0], contracted)
    if opcode == "convolution":
        return _convolution(instruction, operands[0][0], operands[1][0])
    dims = re.search(
        r'"lhs_contracting_dimensions":\["?(\d[^\]]*)\]', instruction.attributes
    )
    if "gemm" in instruction.custom_call_target and dims:
        contracted = tuple(int(n) for n in re.findall(r"\d+", dims[1]))
        return _dot(operands[0][0], instruction.shapes[0], contracted)
    return 0


def _dot(lhs: HloShape, result: HloShape, contracted: tuple[int, ...]) -> int:
    return 2 * result.size * prod(lhs.dims[d] for d in contracted)


def _convolution(instruction: Instruction, lhs: HloShape, rhs: HloShape) -> int:
    """Products that meet an element of the input, not its padding nor the holes of a
    dilation: compilers write batched and multi-dimensional dots as convolutions that
    consist mostly of those."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"%{instruction.name}: a convolution without dim_labels")
    left, right, out = labels.groups()
    result = instruction.shapes[0]
    spatial = sorted(c for c in left if c.isdigit())
    met = 1
    for axis, window in zip(
        spatial, _list_windows(instruction, len(spatial)), strict=True
    ):
        labelled = (lhs, left), (rhs, right), (result, out)
        met *= _count_positions(
            *(s.dims[names.index(axis)] for s, names in labelled), *window
        )
    batch, features = result.dims[out.index("b")], result.dims[out.index("f")]
    return 2 * rhs.dims[right.index("i")] * features * batch * met


def _list_windows(instruction: Instruction, count: int) -> Iterator[tuple[int, ...]]:
    """Stride, dilation of input and of kernel, and padding ahead, of each dimension."""
    parts = dict(
        part.split("=") for part in (instruction.attribute("window") or "").split()
    )
    usual = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1, "pad": 0}
    columns = (
        [int(n.split("_")[0]) for n in parts[name].split("x")]
        if name in parts
        else [n] * count
        for name, n in usual.items()
    )
    return zip(*columns, strict=True)


@lru_cache(maxsize=4096)
def _count_positions(
    inputs: int,
    kernel: int,
    outputs: int,
    stride: int,
    lhs_dilate: int,
    rhs_dilate: int,
    low: int,
) -> int:
    """Pairs of output and kernel positions that meet an input element along one
    dimension."""
    starts = np.arange(outputs) * stride - low
    count = 0
    for offset in range(0, kernel * rhs_dilate, rhs_dilate):
        place = starts + offset
        met = (
            (place >= 0)
            & (place <= (inputs - 1) * lhs_dilate)
            & (place % lhs_dilate == 0)
        )
        count += int(met.sum())
    return count
