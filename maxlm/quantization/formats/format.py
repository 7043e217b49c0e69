"""What a number format for matrices is.

Values are matrices [..., R, C] of R outputs and C inputs, as published files have them:
what a format's scales share, a block, lies along C, the dimension that a product sums
over. Leading dimensions count layers and experts, each with a matrix of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Planes = Mapping[str, jax.Array]
"""A quantized matrix as its arrays by name, such as ``codes`` and ``scales``: each [...,
rows, columns] of its own numbers of rows and columns, which count R and C in order."""


@dataclass(frozen=True)
class PlaneSpec:
    """One array of a quantized matrix before it has values."""

    rows: int
    columns: int
    dtype: DTypeLike

    @property
    def nbytes(self) -> int:
        """Bytes of one matrix."""
        return self.rows * self.columns * jnp.dtype(self.dtype).itemsize


class Format(ABC):
    """A way to store matrices as codes and scales.

    A subclass is a frozen dataclass of its settings, compared by value. Encoding and
    decoding are pure functions that run under ``jax.jit``.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that :func:`~maxlm.quantization.formats.registry.parse_format` reads
        back."""

    @property
    @abstractmethod
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns that are stored together. A matrix is a whole number of
        blocks in either direction, unless :meth:`describe_planes` allows others; so is
        each device's part of it."""

    @abstractmethod
    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        """Returns the arrays of a matrix [rows, columns]. Raises MaxlmError, which
        names the size and the block: no whole number of blocks."""

    @abstractmethod
    def encode(self, values: jax.Array) -> Planes:
        """Quantizes fp32 [..., R, C], each number to the nearest code."""

    @abstractmethod
    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns the values [..., R, C] of codes, computed in fp32 and rounded to
        ``dtype``."""

    def count_bytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes of matrices [..., R, C], scales included."""
        *lead, rows, columns = shape
        planes = self.describe_planes(rows, columns)
        return prod(lead) * sum(plane.nbytes for plane in planes.values())

    def count_bits(self, shape: tuple[int, ...]) -> float:
        """Returns the bits a number, scales included."""
        return 8 * self.count_bytes(shape) / prod(shape)
