"""A number format of few lines, for tests of what holds matrices in one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.quantization.formats.format import Format, Planes, PlaneSpec


@dataclass(frozen=True)
class RoundedFormat(Format):
    """int8 codes with an fp32 scale for each ``group`` inputs of an output, or with
    ``is_shared`` one for the whole matrix beside these."""

    group: int = 4
    is_shared: bool = False

    @property
    def name(self) -> str:
        return f"rounded-g{self.group}"

    @property
    def block_shape(self) -> tuple[int, int]:
        return 1, self.group

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        planes = {
            "codes": PlaneSpec(rows, columns, jnp.int8),
            "scales": PlaneSpec(rows, columns // self.group, jnp.float32),
        }
        if self.is_shared:
            planes["factor"] = PlaneSpec(1, 1, jnp.float32)
        return planes

    def encode(self, values: jax.Array) -> Planes:
        groups = values.reshape(*values.shape[:-1], -1, self.group)
        scales = jnp.abs(groups).max(-1) / 7
        codes = jnp.round(groups / scales[..., None])
        planes = {"codes": codes.astype(jnp.int8).reshape(values.shape)}
        if not self.is_shared:
            return planes | {"scales": scales}
        factor = jnp.full((*values.shape[:-2], 1, 1), 0.5, jnp.float32)
        return planes | {"scales": scales / factor, "factor": factor}

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        codes = planes["codes"].astype(jnp.float32)
        groups = codes.reshape(*codes.shape[:-1], -1, self.group)
        values = (groups * planes["scales"][..., None]).reshape(codes.shape)
        if self.is_shared:
            values = values * planes["factor"]
        return values.astype(dtype)
