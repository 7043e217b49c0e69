"""Attention as others call it: arguments checked, an implementation chosen, gradients
joined.

An implementation is a module here with

- ``supports(operands, params) -> bool``, by shapes, dtypes and which arrays are given,
- ``forward(operands, call) -> (o, lse)`` and
- ``backward(operands, (lse, delta, d_o), call) -> (d_q, d_k, d_v)``, and the biases'
  gradient where it supports these: as :func:`attention_forward` and
  :func:`attention_backward`,

imported when first wanted: each needs a part of Pallas that others do not.
"""

import importlib
from functools import partial
from typing import Unpack, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.attention.combine import compute_row_delta, sink_gradient
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionKernel,
    AttentionOperands,
    AttentionOptions,
    validate_arguments,
)
from pallas_kernels.chips import choose_backend, get_mesh_device

# What `backend` may be, and the kernels to try for it in order. XLA takes what these do
# not.
KERNELS = {
    "tpu": ("tpu",),
    "gpu": ("hopper", "triton"),
    "hopper": ("hopper",),
    "triton": ("triton",),
    "xla": (),
}


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, **options: Unpack[AttentionOptions]
) -> jax.Array:
    """Computes softmax(scores + mask)·v, exact, softmax in fp32 (Vaswani et al. 2017,
    eq. 1), or in float64 where operands are, which XLA alone has.

    The backward pass computes the weights again: nothing of size S × T is kept.
    Differentiable once, by q, k, v, ``sinks`` and ``biases``; ``slopes`` and whatever
    places tokens are constants. A query that no key is left for gives zeros, and zero
    gradients. Masked keys and values may hold anything finite.

    Args:
        q: [B, S, N, H].
        k: [B, T, K, H]; query head n reads kv head n // (N / K).
        v: [B, T, K, Hv].
        options: the mask, what is added to scores, and what computes them:
            :class:`AttentionOptions`.

    Returns:
        [B, S, N, Hv] in v's dtype.

    Raises:
        ValueError: shapes that do not belong together; options of another shape or
            sense; a ``backend`` that does not know these sizes.
    """
    operands, call = _prepare(q, k, v, v.dtype, options)
    return _attention(operands, call)


def attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    dtype: DTypeLike | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[jax.Array, jax.Array]:
    """Computes :func:`attention` and what its backward pass needs; not differentiable
    by JAX.

    Returns:
        o [B, S, N, Hv] in ``dtype`` (default v's); the natural log-sum-exp of each
        query's scores, its sink included, fp32 [B, S, N], −inf where it has neither key
        nor sink. A TPU sums the weights as it multiplies them: with bf16 values the
        log-sum-exp is off by 2⁻⁸ at most.
    """
    operands, call = _prepare(q, k, v, dtype or v.dtype, options)
    return _module(call.backend).forward(operands, call)


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_o: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    **options: Unpack[AttentionOptions],
) -> tuple[jax.Array, ...]:
    """Returns the gradients that pass through these keys (Dao et al. 2022, appendix B).

    The keys may be a block of all those that the queries see: ``lse`` and ``delta`` are
    of all of them, dK and dV are then this block's, and dQ and the biases' are terms of
    sums over blocks. ``sinks`` have no effect: ``lse`` has them, and their own gradient
    is :func:`sink_gradient`.

    Args:
        lse: fp32 [B, S, N], the log-sum-exp of every score of each query.
        delta: fp32 [B, S, N], :func:`compute_row_delta` of the whole output.
        d_o: [B, S, N, Hv], the output's cotangent.
        dtype: of dQ, dK and dV; all are summed in fp32.

    Returns:
        dQ, dK, dV, shaped as q, k and v; and, where there are ``biases``, theirs, fp32
        [N, 2R + 1].
    """
    operands, call = _prepare(q, k, v, dtype, options)
    operands = operands._replace(sinks=None)
    return _module(call.backend).backward(operands, (lse, delta, d_o), call)


def _on_hopper() -> bool:
    """Whether the GPU that the program is for has Hopper's instructions (compute
    capability 9.0, which a device that is not here does not tell)."""
    device = get_mesh_device()
    if device is not None:
        return any(card in device.device_kind for card in ("H100", "H20", "H800"))
    return getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"


def _module(name: str) -> AttentionKernel:
    module = importlib.import_module(f"pallas_kernels.attention.{name}")
    return cast(AttentionKernel, module)


def _prepare(q, k, v, dtype, options: AttentionOptions):
    """Returns the arrays among the options, and the call."""
    operands, params = validate_arguments(q, k, v, **options)
    backend = options.get("backend")

    def supports(name: str) -> bool:
        if name == "hopper" and backend != "hopper" and not _on_hopper():
            return False
        return _module(name).supports(operands, params)

    shapes = ", ".join(
        f"{x} {a.dtype} {a.shape}" for x, a in (("q", q), ("k", k), ("v", v))
    )
    name = choose_backend(backend, KERNELS, supports, f"{shapes} with {params}")
    kernel = options.get("block_sizes"), options.get("interpret", False)
    return operands, AttentionCall(params, name, dtype, *kernel)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(operands: AttentionOperands, call: AttentionCall) -> jax.Array:
    return _attention_forward(operands, call)[0]


def _attention_forward(operands, call):
    o, lse = _module(call.backend).forward(operands, call)
    return o, (operands, o, lse)


def _attention_backward(call, saved, d_o):
    operands, o, lse = saved
    (q, k, v, *_) = operands
    sinks = operands.sinks
    delta = compute_row_delta(o, d_o)
    call = call._replace(dtype=q.dtype)
    grads = _module(call.backend).backward(
        operands._replace(sinks=None), (lse, delta, d_o), call
    )
    d_q, d_k, d_v, *d_biases = grads
    d_sinks = None if sinks is None else sink_gradient(sinks, lse, delta)
    (d_biases,) = d_biases or (None,)
    d_k = d_k.astype(k.dtype)
    d_v = d_v.astype(v.dtype)
    return (AttentionOperands(d_q, d_k, d_v, sinks=d_sinks, biases=d_biases),)


_attention.defvjp(_attention_forward, _attention_backward)
