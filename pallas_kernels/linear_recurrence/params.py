"""Operands of a linear recurrence, their checks, and how tokens are cut into chunks."""

from collections.abc import Hashable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kernel_types import Interpret

# Tokens of a block: its chunks' own products run at once, and the state at its start is
# all that a forward pass keeps for the backward pass. With K = V = 128 and bf16 that is
# a sixth of the operands' bytes.
BLOCK_TOKENS = 512

# The log decay of a token that starts anew. exp() of a sum with it is exactly 0, so no
# gradient and no rounding of an earlier document passes. It is finite because products
# of sums with masks, as a matrix unit does them, would make NaN of 0 · −inf.
RESET = -1e9


class RecurrenceOperands(NamedTuple):
    """Arrays of one call, starts and masks already in ``log_decay`` and ``k``."""

    q: jax.Array | None
    """[B, T, H, K]; None where only states are wanted."""
    k: jax.Array
    """[B, T, H, K]."""
    v: jax.Array
    """[B, T, N, V]; value head n reads key head n // (N / H)."""
    log_decay: jax.Array
    """fp32 [B, T, N], or [B, T, N, K] by key channel."""
    beta: jax.Array | None = None
    """[B, T, N]; None: no delta rule."""

    @property
    def decays_by_channel(self) -> bool:
        return self.log_decay.ndim == 4

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """B, N, K, V."""
        B, _, N, V = self.v.shape
        return B, N, self.k.shape[3], V


class RecurrenceCall(NamedTuple):
    """Everything static about one call."""

    scale: float
    chunk_size: int
    backend: str
    block_sizes: Hashable | None = None
    """Of a kernel; None: its choice."""
    interpret: Interpret = False


class RecurrenceKernel(Protocol):
    """An implementation: a module with these functions."""

    def supports(self, operands: RecurrenceOperands, call: RecurrenceCall) -> bool:
        """Returns whether it runs this, by shapes and dtypes."""
        ...

    def forward(
        self, operands: RecurrenceOperands, state: jax.Array, call: RecurrenceCall
    ) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        """Returns output [B, T, N, V] (None without q), the final state [B, N, K, V]
        and the states at block starts, [blocks, B, N, K, V]."""
        ...

    def backward(
        self,
        operands: RecurrenceOperands,
        block_states: jax.Array,
        d_output: jax.Array | None,
        d_final_state: jax.Array,
        call: RecurrenceCall,
    ) -> tuple[RecurrenceOperands, jax.Array]:
        """Returns gradients of the operands and of the initial state."""
        ...


class ChunkPlan(NamedTuple):
    """How T tokens are cut: blocks of chunks, the last block padded at its end."""

    chunk: int
    """Tokens of a chunk, a power of two."""
    chunks_per_block: int
    num_blocks: int

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.chunk * self.chunks_per_block

    @property
    def tokens(self) -> int:
        """Tokens with the padding."""
        return self.block * self.num_blocks


def plan_chunks(num_tokens: int, chunk_size: int) -> ChunkPlan:
    """Cuts tokens into chunks and blocks of nearly equal length, so that padding is
    less than a chunk a block."""
    chunk = min(chunk_size, 1 << (num_tokens - 1).bit_length())
    num_chunks = -(-num_tokens // chunk)
    num_blocks = -(-num_chunks * chunk // max(chunk, BLOCK_TOKENS))
    return ChunkPlan(chunk, -(-num_chunks // num_blocks), num_blocks)


def pad_tokens(operands: RecurrenceOperands, num_tokens: int) -> RecurrenceOperands:
    """Appends tokens that leave the state as it is: keys and log decays of zero."""
    missing = num_tokens - operands.k.shape[1]
    if missing == 0:
        return operands

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(pad, operands)


def get_state_dtype(operands: RecurrenceOperands) -> jnp.dtype:
    """Returns the dtype that states and sums have: fp32, or float64 where operands
    are, which XLA alone has."""
    has_float64 = any(x.dtype == jnp.float64 for x in jax.tree.leaves(operands))
    return jnp.dtype(jnp.float64 if has_float64 else jnp.float32)


def get_precision(operands: RecurrenceOperands) -> lax.Precision:
    """Returns the precision of products that an fp32 state or inverse is part of.

    Operands of 16 bits are rounded to 2⁻⁹ of themselves already; three bf16 products a
    product (``HIGH``) add 2⁻¹⁶.
    """
    is_narrow = operands.k.dtype.itemsize == operands.v.dtype.itemsize == 2
    return lax.Precision.HIGH if is_narrow else lax.Precision.HIGHEST


def validate_operands(operands: RecurrenceOperands) -> None:
    """
    Raises:
        ValueError: shapes that do not belong together.
    """
    k = operands.k
    v = operands.v
    q_shape = k.shape if operands.q is None else operands.q.shape
    shapes = ", ".join(
        f"{name} {x.shape}" for name, x in operands._asdict().items() if x is not None
    )
    is_valid = (
        k.ndim == v.ndim == 4
        and q_shape == k.shape
        and v.shape[:2] == k.shape[:2]
        and min(k.shape) > 0
        and min(v.shape) > 0
        and v.shape[2] % k.shape[2] == 0
    )
    if not is_valid:
        raise ValueError(
            f"{shapes}: want q and k [B, T, H, K], v [B, T, N, V], N a multiple of H"
        )
    by_head = v.shape[:3]
    by_channel = (*by_head, k.shape[3])
    if operands.log_decay.shape not in (by_head, by_channel):
        raise ValueError(f"{shapes}: want log_decay {by_head} or {by_channel}")
    if operands.beta is not None and operands.beta.shape != by_head:
        raise ValueError(f"{shapes}: want beta {by_head}")


def validate_chunk_size(chunk_size: int) -> None:
    """
    Raises:
        ValueError: a size that is no power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size}: want a power of two, as 64")


def mark_tokens(
    operands: RecurrenceOperands,
    starts: jax.Array | None,
    token_mask: jax.Array | None,
) -> RecurrenceOperands:
    """Puts starts and masked tokens into log decays and keys.

    Args:
        starts: bool [B, T], tokens before which the state is zero.
        token_mask: bool [B, T], False at tokens that leave the state as it is.

    Raises:
        ValueError: a mask of another shape.
    """
    shape = operands.k.shape[:2]
    for name, mask in (("starts", starts), ("token_mask", token_mask)):
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name} {mask.shape}: want bool [B, T], here {shape}")
    k = operands.k
    log_decay = operands.log_decay.astype(get_state_dtype(operands))
    if token_mask is not None:
        k = jnp.where(_expand(token_mask, k), k, 0)
        log_decay = jnp.where(_expand(token_mask, log_decay), log_decay, 0)
    if starts is not None:
        log_decay = jnp.where(_expand(starts, log_decay), RESET, log_decay)
    return operands._replace(k=k, log_decay=log_decay)


def _expand(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a [B, T] mask with dimensions of one behind, to fit x."""
    return mask.astype(bool).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
