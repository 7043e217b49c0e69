"""Floating-point operations of the matrix products in a compiled program."""

import re
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from maxlm.plan.compiled.hlo import Computation, HloShape, Instruction

_GEMM_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\["?(\d[^\]]*)\]')


def matmul_flops(instruction: Instruction, computation: Computation) -> int:
    """Returns 2·M·N·K of a dot, a convolution or a matrix library's call; 0 for
    others."""
    opcode = instruction.opcode
    if opcode not in ("dot", "convolution", "custom-call"):
        return 0
    # Shapes are read below, of products alone: other custom calls may have none.
    operands = list(computation.operands(instruction))
    if opcode == "dot":
        contracted = instruction.integers("lhs_contracting_dims")
        lhs = operands[0].shapes[0]
        return _count_dot_flops(lhs, instruction.shapes[0], contracted)
    if opcode == "convolution":
        lhs = operands[0].shapes[0]
        rhs = operands[1].shapes[0]
        return _count_convolution_flops(instruction, lhs, rhs)
    if "gemm" in instruction.custom_call_target:
        # A matrix library's call states its dot in JSON.
        dims = _GEMM_CONTRACTED.search(instruction.attributes)
        if dims:
            contracted = tuple(int(digits) for digits in re.findall(r"\d+", dims[1]))
            lhs = operands[0].shapes[0]
            return _count_dot_flops(lhs, instruction.shapes[0], contracted)
    return 0


def _count_dot_flops(
    lhs: HloShape, result: HloShape, contracted: tuple[int, ...]
) -> int:
    """Returns 2·M·N·K: a product and a sum for each element of the result and each
    element that is summed over."""
    contracted_size = prod(lhs.dims[dim] for dim in contracted)
    return 2 * result.size * contracted_size


def _count_convolution_flops(
    instruction: Instruction, lhs: HloShape, rhs: HloShape
) -> int:
    """Counts products that meet an element of the input, not its padding nor the holes
    of a dilation: compilers write batched and multi-dimensional dots as convolutions
    that consist mostly of those."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"%{instruction.name}: a convolution without dim_labels")
    # A letter for each dimension: b batch, f features of input or output, i and o those
    # of the kernel, digits the spatial ones.
    lhs_labels, rhs_labels, result_labels = labels.groups()
    lhs_sizes = dict(zip(lhs_labels, lhs.dims, strict=True))
    rhs_sizes = dict(zip(rhs_labels, rhs.dims, strict=True))
    result = instruction.shapes[0]
    result_sizes = dict(zip(result_labels, result.dims, strict=True))

    spatial_axes = sorted(label for label in lhs_labels if label.isdigit())
    windows = _list_windows(instruction, len(spatial_axes))
    # Pairs of output and kernel positions that meet an element.
    positions = 1
    for axis, window in zip(spatial_axes, windows, strict=True):
        positions *= _count_positions(
            inputs=lhs_sizes[axis],
            kernel=rhs_sizes[axis],
            outputs=result_sizes[axis],
            window=window,
        )
    features_in = rhs_sizes["i"]
    features_out = result_sizes["f"]
    return 2 * features_in * features_out * result_sizes["b"] * positions


class _Window(NamedTuple):
    """A convolution's window along one dimension."""

    stride: int = 1
    lhs_dilate: int = 1
    rhs_dilate: int = 1
    pad: int = 0
    """Padding before the first element."""


def _list_windows(instruction: Instruction, count: int) -> list[_Window]:
    """Reads the windows of so many dimensions, as in ``window={size=3x3 pad=1_1x1_1}``:
    an attribute that is left out has its default in all."""
    text = instruction.attribute("window") or ""
    attributes = dict(part.split("=") for part in text.split())
    windows = [_Window()] * count
    for name in _Window._fields:
        if name not in attributes:
            continue
        values = attributes[name].split("x")
        # Of padding before and after, ``1_1``, the first.
        numbers = [int(value.split("_")[0]) for value in values]
        windows = [
            window._replace(**{name: number})
            for window, number in zip(windows, numbers, strict=True)
        ]
    return windows


@lru_cache(maxsize=4096)
def _count_positions(inputs: int, kernel: int, outputs: int, window: _Window) -> int:
    """Counts pairs of output and kernel positions that meet an input element along one
    dimension."""
    # Positions in the dilated input: an element, then lhs_dilate - 1 holes, and so on;
    # below 0 and past the last element is padding.
    starts = np.arange(outputs) * window.stride - window.pad
    last = (inputs - 1) * window.lhs_dilate
    kernel_offsets = range(0, kernel * window.rhs_dilate, window.rhs_dilate)
    count = 0
    for offset in kernel_offsets:
        positions = starts + offset
        is_inside = (positions >= 0) & (positions <= last)
        is_element = positions % window.lhs_dilate == 0
        count += int((is_inside & is_element).sum())
    return count
