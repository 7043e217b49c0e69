"""The dtype of the maths; parameters and optimizer state are always fp32."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

ComputeDtype = Literal["auto", "bfloat16", "float32"]


def resolve_compute_dtype(setting: ComputeDtype, platform: str) -> np.dtype:
    """Returns the dtype a setting means on a platform ("cpu", "gpu", "tpu").

    ``auto`` is bfloat16 where there are matrix units for it and float32 on CPUs, which
    emulate it.
    """
    if setting == "auto":
        setting = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(setting)


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of norms, softmax and loss: float32, or a wider compute
    dtype."""
    return jnp.promote_types(dtype, jnp.float32)
