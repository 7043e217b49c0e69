"""Mamba's selective scan (Gu & Dao 2023, arXiv 2312.00752, algorithm 2 with eq. 4's
zero-order hold of A and Euler step of B), over packed documents and from a given state.

A channel has N numbers of state, each with a decay of its own, so states of all tokens
would be N times the activations: only those between chunks of tokens are ever in
memory, and the backward pass computes the others anew, a chunk at a time.

Shapes: R rows, T tokens, F channels, N numbers of state a channel.
"""

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chips import choose_backend
from pallas_kernels.selective_scan import xla
from pallas_kernels.selective_scan.params import ScanParams

__all__ = [
    "CHUNK_TOKENS",
    "ScanSummary",
    "combine_scans",
    "selective_scan",
    "selective_scan_step",
    "summarize_scan",
]

CHUNK_TOKENS = 64
"""Tokens of a chunk, where the caller does not say."""
_KERNELS = {"tpu": ("tpu",), "xla": ()}


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    dt_bias: jax.Array | None = None,
    starts: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    live: jax.Array | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes ``h[t] = exp(dt[t] · A) · h[t − 1] + dt[t] · x[t] · B[t]`` and ``y[t] =
    C[t] · h[t] + D · x[t]``, for each channel by itself.

    Decays, states and sums are fp32. Differentiable in reverse mode in everything but
    ``starts`` and ``live``; the backward pass keeps the arguments and one state for each
    chunk.

    Args:
        x: [R, T, F].
        dt: [R, T, F], the step sizes, not negative. With a ``dt_bias``: softplus(dt +
            dt_bias) are the step sizes, in fp32, and never in memory.
        A: [F, N], not positive.
        B, C: [R, T, N].
        D: [F]. None: zeros.
        dt_bias: [F].
        starts: bool [R, T], whether a document begins with the token: h is zero before
            it. None: no token does.
        initial_state: fp32 [R, F, N], h before the first token. None: zeros.
        live: bool [R, T]; tokens that are not live leave h as it is. They come last in
            a row, and may hold anything. None: all are.
        chunk_tokens: tokens whose states exist at once in the backward pass; a row
            longer than this is scanned in equal parts of at most so many. The TPU's
            kernel has chunks of its own, whose states are not in HBM.
        backend: "tpu" or "xla". None: what the program is for, by the
            current mesh's devices or the default device.

    Returns:
        y [R, T, F] in x's dtype (of tokens that are not live: anything), and h after
        the last live token, fp32 [R, F, N].

    Raises:
        ValueError: shapes that do not belong together, chunk_tokens < 1, or a backend
            that is not known or has no kernel for these types.
    """
    _check(x, dt, A, B, C, D, dt_bias, starts, initial_state, live)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is at least 1; got {chunk_tokens}")
    num_rows, num_tokens, channels = x.shape
    state_dtype = jnp.promote_types(x.dtype, jnp.float32)
    if initial_state is None:
        # Made of x, so that it lies on the same devices of a mesh.
        zeros = jnp.zeros_like(x[:, 0, :, None], state_dtype)
        initial_state = jnp.broadcast_to(zeros, (num_rows, channels, A.shape[1]))
    if D is None:
        D = jnp.zeros_like(A[:, 0])
    if live is not None:
        # A step of size 0 keeps the state and adds nothing.
        dt = jnp.where(live[:, :, None], dt, xla.find_still_step(dt_bias))
        x = jnp.where(live[:, :, None], x, 0)
        B = jnp.where(live[:, :, None], B, 0)
        starts = None if starts is None else starts & live
    if num_tokens == 1:
        if starts is not None:
            initial_state = jnp.where(starts[:, :, None], 0, initial_state)
        y, state = _step(
            initial_state, x[:, 0], dt[:, 0], B[:, 0], C[:, 0], A, D, dt_bias
        )
        return y[:, None], state
    state = initial_state.astype(state_dtype)
    params = ScanParams(x, dt, A, B, C, D, dt_bias, starts, state)
    name = choose_backend(
        backend,
        _KERNELS,
        lambda name: _import_kernel(name).supports(params),
        f"a selective scan of {x.dtype}",
    )
    return _scan(params, _ScanCall(name, chunk_tokens))


def selective_scan_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Advances each row by one token: :func:`selective_scan` of T = 1 without T.

    Args:
        state: fp32 [R, F, N].
        x, dt: [R, F].
        A: [F, N].
        B, C: [R, N].
        D, dt_bias: [F].

    Returns:
        y [R, F] in x's dtype, and the state after the token.
    """
    if D is None:
        D = jnp.zeros_like(A[:, 0])
    return _step(state, x, dt, B, C, A, D, dt_bias)


def _step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    A: jax.Array,
    D: jax.Array,
    dt_bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    narrow = xla.ChunkTokens(x, dt, B, C, None)
    token = xla.widen_token(narrow, dt_bias, state.dtype)
    rates = A.T.astype(state.dtype)
    after = xla.advance_state(state.swapaxes(1, 2), token, rates)
    y = xla.read_state(after, token, D.astype(state.dtype))
    return y.astype(x.dtype), after.swapaxes(1, 2)


class ScanSummary(NamedTuple):
    """What a run of tokens does to the state before it: ``h = decay · h + offset``."""

    decay: jax.Array
    """fp32 [R, F, N], the product of all decays; 0 where a document begins in the
    run."""
    offset: jax.Array
    """fp32 [R, F, N], the state after the run from none before it."""

    def advance(self, state: jax.Array) -> jax.Array:
        """Returns the state after the run from that before it, fp32 [R, F, N]."""
        return self.decay * state + self.offset


def summarize_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    *,
    dt_bias: jax.Array | None = None,
    starts: jax.Array | None = None,
    live: jax.Array | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> ScanSummary:
    """Summarizes a run of tokens for the runs after it: devices that hold successive
    runs of a sequence exchange these, and each then scans from the state before its
    own. Differentiable.

    Args: as for :func:`selective_scan`.
    """
    state_dtype = jnp.promote_types(x.dtype, jnp.float32)

    # The backward pass keeps no step sizes.
    @jax.checkpoint
    def sum_steps(dt: jax.Array, dt_bias: jax.Array | None) -> jax.Array:
        step_sizes = xla.compute_step_sizes(dt, dt_bias, state_dtype)
        if live is not None:
            step_sizes = jnp.where(live[:, :, None], step_sizes, 0)
        return jnp.sum(step_sizes, axis=1)

    decay = jnp.exp(sum_steps(dt, dt_bias)[:, :, None] * A)
    if starts is not None:
        has_start = jnp.any(starts if live is None else starts & live, axis=1)
        decay = jnp.where(has_start[:, None, None], 0, decay)
    _, offset = selective_scan(
        x,
        dt,
        A,
        B,
        jnp.zeros_like(B),
        dt_bias=dt_bias,
        starts=starts,
        live=live,
        chunk_tokens=chunk_tokens,
    )
    return ScanSummary(decay, offset)


def combine_scans(first: ScanSummary, second: ScanSummary) -> ScanSummary:
    """Summarizes two successive runs as one; associative, so that
    ``jax.lax.associative_scan`` takes it."""
    return ScanSummary(
        second.decay * first.decay, second.decay * first.offset + second.offset
    )


class _ScanCall(NamedTuple):
    """Everything static about one call."""

    backend: str
    """The module that scans."""
    chunk_tokens: int


def _import_kernel(name: str) -> ModuleType:
    # Pallas is slow to import.
    return import_module(f"{__name__}.{name}")


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(params: ScanParams, call: _ScanCall) -> tuple[jax.Array, jax.Array]:
    kernel = _import_kernel(call.backend)
    y, state, _ = kernel.scan_forward(params, call.chunk_tokens, keeps_states=False)
    return y, state


class _Residuals(NamedTuple):
    params: ScanParams
    states: jax.Array
    """Before each chunk, in the layout of the module that scans."""


def _forward(params: ScanParams, call: _ScanCall):
    kernel = _import_kernel(call.backend)
    y, state, states = kernel.scan_forward(params, call.chunk_tokens, keeps_states=True)
    return (y, state), _Residuals(params, states)


def _backward(
    call: _ScanCall,
    residuals: _Residuals,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[ScanParams]:
    kernel = _import_kernel(call.backend)
    params, states = residuals
    d_y, d_state = cotangents
    gradients = kernel.scan_backward(params, states, d_y, d_state, call.chunk_tokens)
    return (gradients,)


_scan.defvjp(_forward, _backward)


def _check(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    dt_bias: jax.Array | None,
    starts: jax.Array | None,
    initial_state: jax.Array | None,
    live: jax.Array | None,
) -> None:
    if x.ndim != 3 or A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(f"x is [R, T, F] and A [F, N]; got x {x.shape}, A {A.shape}")
    num_rows, num_tokens, channels = x.shape
    num_states = A.shape[1]
    if num_tokens == 0:
        raise ValueError(f"there is at least one token; got x {x.shape}")
    by_token = (num_rows, num_tokens)
    expected = {
        "dt": (dt, x.shape),
        "B": (B, (*by_token, num_states)),
        "C": (C, (*by_token, num_states)),
        "D": (D, (channels,)),
        "dt_bias": (dt_bias, (channels,)),
        "starts": (starts, by_token),
        "initial_state": (initial_state, (num_rows, channels, num_states)),
        "live": (live, by_token),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} {array.shape}: want {shape} for x {x.shape}, A {A.shape}"
            )
