"""Linear recurrences as others call them: arguments checked, an implementation chosen,
gradients joined.

An implementation is a module here with the functions of
:class:`~pallas_kernels.linear_recurrence.params.RecurrenceKernel`, imported when first
wanted: each needs a part of Pallas that others do not.
"""

import importlib
from collections.abc import Hashable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from pallas_kernels.chips import choose_backend
from pallas_kernels.kernel_types import Interpret
from pallas_kernels.linear_recurrence.params import (
    RecurrenceCall,
    RecurrenceKernel,
    RecurrenceOperands,
    get_state_dtype,
    mark_tokens,
    validate_chunk_size,
    validate_operands,
)

# What `backend` may be, and the kernels to try for it in order. XLA takes what these do
# not.
KERNELS: dict[str, tuple[str, ...]] = {
    "gpu": ("triton",),
    "tpu": ("tpu",),
    "triton": ("triton",),
    "xla": (),
}


def linear_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    starts: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    backend: str | None = None,
    block_sizes: Hashable | None = None,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs a recurrence of matrix states over tokens, in chunks.

    With a = exp(log_decay), a state S [K, V] a head, and o = scale · Sᵀq:

    - without ``beta``, S ← diag(a)·S + k·vᵀ: Mamba-2 (k = B, q = C, v = Δ·x, log decay
      Δ·A; Dao & Gu 2024), lightning attention (Qin et al. 2024), gated linear attention
      (Yang et al. 2023);
    - with ``beta``, S ← (I − β·k·kᵀ)·diag(a)·S + β·k·vᵀ: Gated DeltaNet (Yang et al.
      2024), and by channel Kimi Delta Attention (Kimi Team 2025).

    States, decays and sums are fp32 whatever the operands are. Differentiable once by
    q, k, v, ``log_decay``, ``beta`` and ``initial_state``. The backward pass keeps the
    operands and a state every 512 tokens, and computes the others again.

    Args:
        q, k: [B, T, H, K], any T ≥ 1.
        v: [B, T, N, V], N a multiple of H: value head n reads key head n // (N / H),
            which is not repeated in memory.
        log_decay: [B, T, N], or [B, T, N, K] by key channel; fp32, as its sums matter
            and not its digits. Any value up to 0 is exact, −inf aside; above it while
            exp() of a chunk's sum is finite.
        beta: [B, T, N], or None: no delta rule. Keys of it should have a norm of at most
            √(2 / β), or states grow.
        initial_state: fp32 [B, N, K, V]; None: zeros. It belongs to the document that
            goes on at token 0.
        starts: bool [B, T], tokens before which the state is zero, token 0 among them or
            not (:func:`~pallas_kernels.linear_recurrence.find_segment_starts`). Nothing
            passes: the factor is exactly 0.
        token_mask: bool [B, T], False at padding: those tokens leave the state as it is,
            unless they start anew. Their output means nothing.
        scale: factor on outputs: 1 in Mamba-2, K ** -0.5 in the delta rules.
        chunk_size: tokens of a chunk, a power of two.
        backend: "gpu" or "triton", "tpu", "xla"; None: by the platform of the program being traced.
        block_sizes: of a kernel, hashable; None: its choice.
        interpret: whether Pallas's interpreter runs the kernel.

    Returns:
        Output [B, T, N, V] in v's dtype, and the state behind the last token, fp32
        [B, N, K, V].

    Raises:
        ValueError: shapes that do not belong together, a chunk size that is no power of
            two, a backend that does not know these sizes.
    """
    operands = RecurrenceOperands(q, k, v, log_decay, beta)
    validate_operands(operands)
    operands = mark_tokens(operands, starts, token_mask)
    state = _prepare_state(operands, initial_state)
    call = _prepare_call(operands, scale, chunk_size, backend, block_sizes, interpret)
    output, final_state = _run(operands, state, call)
    assert output is not None
    return output, final_state


def advance_state(
    operands: RecurrenceOperands,
    state: jax.Array,
    chunk_size: int = 64,
    backend: str | None = None,
) -> jax.Array:
    """Returns the state behind the tokens alone, [B, N, K, V]; operands are marked and
    have no q."""
    call = _prepare_call(operands, 1.0, chunk_size, backend, None, False)
    _, final_state = _run(operands, state, call)
    return final_state


def _prepare_state(
    operands: RecurrenceOperands, initial_state: jax.Array | None
) -> jax.Array:
    dtype = get_state_dtype(operands)
    shape = operands.state_shape
    if initial_state is None:
        return jnp.zeros(shape, dtype)
    if initial_state.shape != shape:
        raise ValueError(
            f"initial_state {initial_state.shape}: want [B, N, K, V], here {shape}"
        )
    return initial_state.astype(dtype)


def _prepare_call(
    operands: RecurrenceOperands,
    scale: float,
    chunk_size: int,
    backend: str | None,
    block_sizes: Hashable | None,
    interpret: Interpret,
) -> RecurrenceCall:
    validate_chunk_size(chunk_size)
    call = RecurrenceCall(scale, chunk_size, "xla", block_sizes, interpret)

    def supports(name: str) -> bool:
        return _module(name).supports(operands, call)

    shapes = ", ".join(
        f"{name} {x.dtype} {x.shape}"
        for name, x in operands._asdict().items()
        if x is not None
    )
    description = f"{shapes} in chunks of {chunk_size}"
    name = choose_backend(backend, KERNELS, supports, description)
    return call._replace(backend=name)


def _module(name: str) -> RecurrenceKernel:
    module = importlib.import_module(f"pallas_kernels.linear_recurrence.{name}")
    return cast(RecurrenceKernel, module)


def _run(
    operands: RecurrenceOperands, state: jax.Array, call: RecurrenceCall
) -> tuple[jax.Array | None, jax.Array]:
    """Runs :func:`_recur`, whose type is lost where its gradient is defined."""
    outputs = _recur(operands, state, call)
    return cast(tuple[jax.Array | None, jax.Array], outputs)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _recur(
    operands: RecurrenceOperands, state: jax.Array, call: RecurrenceCall
) -> tuple[jax.Array | None, jax.Array]:
    output, final_state, _ = _module(call.backend).forward(operands, state, call)
    return output, final_state


def _recur_forward(operands, state, call):
    output, final_state, block_states = _module(call.backend).forward(
        operands, state, call
    )
    return (output, final_state), (operands, block_states)


def _recur_backward(call, saved, cotangents):
    operands, block_states = saved
    d_output, d_final_state = cotangents
    return _module(call.backend).backward(
        operands, block_states, d_output, d_final_state, call
    )


_recur.defvjp(_recur_forward, _recur_backward)


def linear_recurrence_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    starts: jax.Array | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs :func:`linear_recurrence` for callers with a gradient of their own.

    Args: as there.

    Returns:
        Output [B, T, N, V] in v's dtype, and the states that
        :func:`linear_recurrence_backward` goes on from, [blocks, B, N, K, V].
    """
    operands = RecurrenceOperands(q, k, v, log_decay, beta)
    validate_operands(operands)
    operands = mark_tokens(operands, starts, None)
    state = _prepare_state(operands, initial_state)
    call = _prepare_call(operands, scale, chunk_size, backend, None, False)
    output, _, block_states = _module(call.backend).forward(operands, state, call)
    assert output is not None
    return output, block_states


def linear_recurrence_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None,
    block_states: jax.Array,
    d_output: jax.Array,
    *,
    starts: jax.Array | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[RecurrenceOperands, jax.Array]:
    """Computes gradients from that of the output alone.

    Args:
        block_states: of :func:`linear_recurrence_forward`, called with the same
            arguments.
        d_output: [B, T, N, V].

    Returns:
        Gradients of the operands in their dtypes, and of the initial state, [B, N, K,
        V].
    """
    operands = RecurrenceOperands(q, k, v, log_decay, beta)
    mark = partial(mark_tokens, starts=starts, token_mask=None)
    marked, pull_marks = jax.vjp(mark, operands)
    call = _prepare_call(marked, scale, chunk_size, backend, None, False)
    d_marked, d_state = _module(call.backend).backward(
        marked, block_states, d_output, jnp.zeros_like(block_states[0]), call
    )
    (gradients,) = pull_marks(d_marked)
    return gradients, d_state
