"""What GGML's formats have in common: their blocks, bytes and names."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from maxlm.config.errors import MaxlmError
from maxlm.quantization.formats.format import Format, Planes, PlaneSpec
from maxlm.quantization.formats.ggml.blocks import map_in_runs
from maxlm.quantization.formats.ggml.layout import (
    BlockField,
    join_blocks,
    split_blocks,
)

RUN_NUMBERS = 1 << 15
"""Numbers that are quantized at once: what a search goes over again and again stays in
a CPU's cache."""


@dataclass(frozen=True)
class GgmlFormat(Format):
    """A type of GGML's: blocks along C, each with scales of its own."""

    type_name: ClassVar[str]
    """GGML's name of it, as in ``gguf.GGMLQuantizationType``: ``Q4_K``."""
    block_columns: ClassVar[int]
    fields: ClassVar[tuple[BlockField, ...]]
    """The members of a block, in the order of GGML's struct."""

    @property
    def name(self) -> str:
        return self.type_name.lower()

    @property
    def block_shape(self) -> tuple[int, int]:
        return 1, self.block_columns

    def count_row_bytes(self, columns: int) -> int:
        """Returns the bytes of a row in a GGUF file. Raises MaxlmError: no whole
        number of blocks."""
        self._check_columns(columns)
        block_bytes = sum(field.num_bytes for field in self.fields)
        return columns // self.block_columns * block_bytes

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        self._check_columns(columns)
        num_blocks = columns // self.block_columns
        return {
            field.plane: PlaneSpec(
                rows, num_blocks * field.num_items, jnp.dtype(field.dtype)
            )
            for field in self.fields
        }

    def from_bytes(self, raw: np.ndarray, columns: int) -> Planes:
        """Returns the codes and scales, as numpy's arrays, of rows as a GGUF file has
        them: uint8 [..., R, bytes of a row]. Raises MaxlmError: no whole number of
        blocks, or other bytes."""
        row_bytes = self.count_row_bytes(columns)
        if raw.shape[-1] != row_bytes:
            message = (
                f"a row of {raw.shape[-1]:,} bytes is no {columns:,} numbers of "
                f"{self.type_name}, which are {row_bytes:,} bytes"
            )
            raise MaxlmError(message, fix="read the file again: it is damaged")
        return cast(Planes, split_blocks(raw, self.fields))

    def to_bytes(self, planes: Planes) -> np.ndarray:
        """Returns the rows uint8 [..., R, bytes of a row] that a GGUF file has of these
        codes and scales; inverts :meth:`from_bytes`."""
        arrays = {name: np.asarray(plane) for name, plane in planes.items()}
        return join_blocks(arrays, self.fields)

    def encode(self, values: jax.Array) -> Planes:
        self._check_columns(values.shape[-1])
        blocks = values.astype(jnp.float32).reshape(-1, self.block_columns)
        planes = map_in_runs(self._encode, blocks, RUN_NUMBERS // self.block_columns)
        return {
            name: plane.reshape(*values.shape[:-1], -1)
            for name, plane in planes.items()
        }

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        return self._decode(planes).astype(dtype)

    @abstractmethod
    def _encode(self, values: jax.Array) -> dict[str, jax.Array]:
        """Quantizes fp32 [blocks, numbers of a block]."""

    @abstractmethod
    def _decode(self, planes: Planes) -> jax.Array:
        """Returns fp32 [..., R, C]."""

    def _check_columns(self, columns: int) -> None:
        if columns % self.block_columns:
            message = (
                f"a row of {columns:,} numbers is no whole number of {self.name}'s "
                f"blocks of {self.block_columns}"
            )
            fix = "choose another format for this matrix, such as q8_0"
            if self.block_columns == 32:
                fix = "keep this matrix in bf16"
            raise MaxlmError(message, fix=fix)
