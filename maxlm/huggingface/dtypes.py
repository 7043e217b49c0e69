"""Number formats: their names in safetensors files, and casting that loses nothing unasked."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from pydantic import Field

from maxlm.config import Config, MaxlmError

SLAB_BYTES = 4 << 20
"""Tensors are cast and written in pieces of about this size, so that no second copy exists."""

NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""NumPy's dtypes by their names in safetensors files."""


class TensorDtypes(Config):
    """Number format of each tensor in safetensors files."""

    default: str
    """Format of most tensors, as safetensors names it ("BF16")."""
    exceptions: Mapping[str, str] = Field(default_factory=dict)
    """Formats of other tensors, by their names there."""

    def get_dtype(self, name: str) -> str:
        return self.exceptions.get(name, self.default)

    def with_names(self, names: Mapping[str, str]) -> "TensorDtypes":
        """Returns the formats under other names; ``names``: old → new, of all tensors."""
        kinds = {names[name]: dtype for name, dtype in self.exceptions.items()}
        return TensorDtypes(default=self.default, exceptions=kinds)

    @classmethod
    def from_dtypes(cls, dtypes: Mapping[str, str]) -> "TensorDtypes":
        """Makes the shortest description of each tensor's own."""
        default = Counter(dtypes.values()).most_common(1)[0][0]
        return cls(default=default, exceptions={n: d for n, d in dtypes.items() if d != default})


def is_floating(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def cast_values(
    values: np.ndarray, dtype: np.dtype, *, where: str, lossy: bool = False
) -> np.ndarray:
    """Casts ``values``, which a message calls ``where``, to ``dtype``; returns them if they are
    that already. ``lossy`` rounds what does not fit exactly.

    Raises:
        MaxlmError: a value would change and not ``lossy``; or would be infinite, or no number,
            where it was finite.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(dtype)
        if np.can_cast(values.dtype, dtype, "safe"):
            return result
        back = result.astype(values.dtype)
    if np.any(np.isfinite(values) & ~np.isfinite(back)):
        fix = "choose a number format of wider range"
        raise MaxlmError(f"values too large for {dtype.name}", where=where, fix=fix)
    if not lossy and np.any((back != values) & ~np.isnan(values)):
        raise MaxlmError(
            f"its {values.dtype.name} values would be rounded to {dtype.name}",
            where=where,
            fix="save the model as float32 first"
            if values.dtype == np.float64
            else "ask for that outright, or for a format that holds them",
        )
    return result


def split_into_slabs(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yields ``values`` in C order as contiguous pieces along axis 0, views where they can be."""
    rows = values if values.ndim else values[None]
    step = max(1, SLAB_BYTES // max(1, math.prod(rows.shape[1:]) * rows.itemsize))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step])
