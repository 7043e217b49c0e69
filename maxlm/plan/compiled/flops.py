"""Floating-point operations of the matrix products in a compiled program."""

import re
from functools import lru_cache
from math import prod

import numpy as np

from maxlm.plan.compiled.hlo import Computation, HloShape, Instruction

_CONTRACTED = "lhs_contracting_dims"
_PADDING = re.compile(r"(-?\d+)_(-?\d+)(?:_(-?\d+))?")


def matmul_flops(instruction: Instruction, computation: Computation) -> int:
    """2·M·N·K of a dot, a convolution or a call of a matrix library; 0 for anything else."""
    opcode = instruction.opcode
    if opcode not in ("dot", "convolution", "ragged-dot", "custom-call"):
        return 0
    operands = [operand.shapes for operand in computation.operands(instruction)]
    if opcode == "dot":
        return _dot(operands[0][0], instruction.shapes[0], instruction.integers(_CONTRACTED))
    if opcode == "convolution":
        return _convolution(instruction, operands[0][0], operands[1][0])
    if opcode == "ragged-dot":
        return _ragged(instruction, operands[0][0], operands[1][0])
    found = re.search(r'"lhs_contracting_dimensions":\["?(\d[^\]]*)\]', instruction.attributes)
    if "gemm" in instruction.target and found:
        contracted = tuple(int(n) for n in re.findall(r"\d+", found[1]))
        return _dot(operands[0][0], instruction.shapes[0], contracted)
    return 0


def declared_flops(instruction: Instruction) -> int | None:
    """Returns the FLOPs that a custom kernel declares (``pl.CostEstimate``); None: none."""
    found = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', instruction.attributes)
    return int(found[1]) if found else None


def _dot(lhs: HloShape, result: HloShape, contracted: tuple[int, ...]) -> int:
    return 2 * result.size * prod(lhs.dims[d] for d in contracted)


def _ragged(instruction: Instruction, lhs: HloShape, rhs: HloShape) -> int:
    """Every row meets one group's matrix, whichever dimension is ragged."""
    contracted = instruction.integers(_CONTRACTED)
    ragged = instruction.integers("lhs_ragged_dims")
    if set(ragged) <= set(contracted):
        summed = instruction.integers("rhs_contracting_dims")
        return 2 * lhs.size * prod(n for d, n in enumerate(rhs.dims) if d not in summed)
    return _dot(lhs, instruction.shapes[0], contracted)


def _convolution(instruction: Instruction, lhs: HloShape, rhs: HloShape) -> int:
    """Products that meet an element of the input, not its padding nor the holes of a dilation:
    compilers write batched and multi-dimensional dots as convolutions that consist mostly of
    those."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"%{instruction.name}: a convolution without dim_labels")
    left, right, out = labels.groups()
    result = instruction.shapes[0]
    spatial = sorted(c for c in left if c.isdigit())
    window = _window(instruction.attributes, len(spatial))
    positions = prod(
        _positions(
            lhs.dims[left.index(axis)],
            rhs.dims[right.index(axis)],
            result.dims[out.index(axis)],
            **window[int(axis)],
        )
        for axis in spatial
    )
    batch, features = result.dims[out.index("b")], result.dims[out.index("f")]
    return 2 * rhs.dims[right.index("i")] * features * batch * positions


def _window(attributes: str, count: int) -> list[dict[str, int]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(part.split("=") for part in (found[1].split() if found else ()))

    def numbers(name: str) -> list[int]:
        return [int(n) for n in parts[name].split("x")] if name in parts else [1] * count

    stride, lhs_dilate, rhs_dilate = (numbers(n) for n in ("stride", "lhs_dilate", "rhs_dilate"))
    pads = _PADDING.findall(parts["pad"]) if "pad" in parts else [("0", "0", "")] * count
    return [
        {"stride": s, "lhs_dilate": ld, "rhs_dilate": rd, "low": int(pad[0])}
        for s, ld, rd, pad in zip(stride, lhs_dilate, rhs_dilate, pads, strict=True)
    ]


@lru_cache(maxsize=4096)
def _positions(
    inputs: int,
    kernel: int,
    outputs: int,
    *,
    stride: int,
    lhs_dilate: int,
    rhs_dilate: int,
    low: int,
) -> int:
    """Pairs of output and kernel positions that meet an input element along one dimension."""
    starts, count = np.arange(outputs) * stride - low, 0
    for offset in range(0, kernel * rhs_dilate, rhs_dilate):
        place = starts + offset
        met = (place >= 0) & (place <= (inputs - 1) * lhs_dilate) & (place % lhs_dilate == 0)
        count += int(met.sum())
    return count
