"""What a linear recurrence has in memory besides, as mixers state it."""

import jax.numpy as jnp
from jax.typing import DTypeLike

# The last dimension of a TPU's tiles.
_LANES = 128


def count_kernel_elements(
    num_heads: int,
    num_key_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: DTypeLike,
    *,
    decays_by_channel: bool = False,
) -> float:
    """Counts elements a token, in fp32, that a TPU's kernel of a recurrence
    (``pallas_kernels/linear_recurrence/tpu.py``) has in main memory in its backward
    pass: arrays with heads first, whose last dimension fills whole tiles.

    Args:
        dtype: of queries, keys and values.
        decays_by_channel: whether each key channel has a decay.
    """
    fp32_share = jnp.dtype(dtype).itemsize / 4
    keys = num_heads * _round_up(key_dim)
    values = num_heads * _round_up(value_dim)
    # Gradients of queries and keys, a value head's each: in fp32 where those of a key
    # head are summed.
    is_summed = num_heads != num_key_heads
    elements = 2 * keys * (1.0 if is_summed else fp32_share)
    # Values, outputs, and the gradients of both.
    elements += 4 * values * fp32_share
    # Log decays and their gradients.
    if decays_by_channel:
        elements += 2 * keys
    return elements


def _round_up(size: int) -> int:
    return -(-size // _LANES) * _LANES
