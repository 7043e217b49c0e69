"""The functions that others call: arguments checked, an implementation chosen, gradients joined."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import dispatch
from pallas_kernels.attention.combine import compute_row_delta, sink_gradient
from pallas_kernels.attention.params import (
    AttentionOperands,
    AttentionParams,
    Offset,
    Segments,
    validate_arguments,
)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: jax.Array | None = None,
    q_offset: Offset = 0,
    k_offset: Offset = 0,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    biases: jax.Array | None = None,
    backend: str | None = None,
    block_sizes: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """softmax(scores + mask)·v, exact, softmax in fp32 (Vaswani et al. 2017, eq. 1), or in float64
    where operands are, which XLA alone has.

    The backward pass computes the weights again: nothing of size S × T is kept. Differentiable
    once, by q, k, v, ``sinks`` and ``biases``; ``slopes`` and whatever places tokens are
    constants. A query that no key is left for gives zeros, and zero gradients. Masked keys and
    values may hold anything finite.

    Args:
        q: [B, S, N, H].
        k: [B, T, K, H]; query head n reads kv head n // (N / K).
        v: [B, T, K, Hv].
        causal: a query sees keys of its own position and below.
        window: of those, only the last ``window`` (1: itself alone); None: all. Causal only.
        prefix: int [B]: keys at positions below are visible to all queries, whatever ``causal``
            and ``window`` say (Raffel et al. 2020, §3.2.1). Causal only.
        q_offset, k_offset: position of the first query and of the first key; others follow. A
            Python int lets an implementation leave out at compile time what the mask empties; a
            traced int scalar serves a shard that learns its place at run time.
        q_positions, k_positions: int [B, S] and [B, T], or [1, S] and [1, T] for all rows alike:
            positions one by one, instead of an offset.
        segment_ids: int [B, S] and [B, T]; tokens attend within their own segment, 0 is padding.
        scale: of q·k; default H ** -0.5.
        soft_cap: scores become cap·tanh(score / cap) (Gemma Team 2024, §2).
        slopes: fp32 [N]: scores lose slope·|distance| after scale and cap (Press et al. 2022,
            ALiBi).
        sinks: fp32 [N]: a logit beside the scores in each head's softmax, whose weight goes to no
            value (Xiao et al. 2024, §3.3, learned per head as in gpt-oss). −inf: none.
        biases: fp32 [N, 2R + 1]: scores gain biases[n, clip(distance, −R, R) + R] after scale, cap
            and slopes, distance being the key's position less the query's (Raffel et al. 2020,
            §2.1: T5's relative positions, each bucket written out). XLA alone has them.
        backend: "tpu", "gpu" (or one of its kernels, "hopper", "triton") or "xla". None: by the
            platform of the program being traced, and XLA where its kernels do not support this.
        block_sizes: of the kernels, hashable; None: their choice. XLA has none.
        interpret: run the kernel of a ``backend`` in Pallas's interpreter, on any device: True, or
            its parameters, hashable. For tests.

    Returns:
        [B, S, N, Hv] in v's dtype.

    Raises:
        ValueError: shapes that do not belong together; heads that do not divide; segments,
            positions, a prefix, slopes, sinks or biases of another shape; an offset beside
            positions; a window below 1; a window or a prefix without ``causal``; a cap not above
            0; a ``backend`` that does not know these sizes.
    """
    operands, params = validate_arguments(
        q,
        k,
        v,
        causal=causal,
        window=window,
        prefix=prefix,
        q_offset=q_offset,
        k_offset=k_offset,
        q_positions=q_positions,
        k_positions=k_positions,
        segment_ids=segment_ids,
        scale=scale,
        soft_cap=soft_cap,
        slopes=slopes,
        sinks=sinks,
        biases=biases,
    )
    name = dispatch.choose_backend(backend, q, k, v, operands, params)
    learned, operands = (
        (operands.sinks, operands.biases),
        operands._replace(sinks=None, biases=None),
    )
    o: Any = _attention(q, k, v, *learned, operands, _Call(params, name, block_sizes, interpret))
    return o


def attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    dtype: Any = None,
    backend: str | None = None,
    block_sizes: Any = None,
    interpret: Any = False,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """:func:`attention` and what its backward pass needs; not to be differentiated by JAX.

    Args: as there; and ``dtype``, the output's (default v's).

    Returns:
        o [B, S, N, Hv] in ``dtype``; the natural log-sum-exp of each query's scores, its sink
        included, fp32 [B, S, N], −inf where it has neither key nor sink. A TPU sums the weights as
        it multiplies them: with bf16 values the log-sum-exp is off by 2⁻⁸ at most.
    """
    operands, params = validate_arguments(q, k, v, **options)
    name = dispatch.choose_backend(backend, q, k, v, operands, params)
    return _Call(params, name, block_sizes, interpret).forward(q, k, v, operands, dtype or v.dtype)


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_o: jax.Array,
    *,
    dtype: Any = jnp.float32,
    backend: str | None = None,
    block_sizes: Any = None,
    interpret: Any = False,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """Returns the gradients that pass through these keys (Dao et al. 2022, appendix B).

    The keys may be a block of all those that the queries see: ``lse`` and ``delta`` are of all of
    them, dK and dV are then this block's, and dQ and the biases' are terms of sums over blocks.

    Args: as :func:`attention`'s, ``sinks`` without effect (``lse`` has them; their own gradient is
        :func:`sink_gradient`); and

        lse: fp32 [B, S, N], the log-sum-exp of every score of each query.
        delta: fp32 [B, S, N], :func:`compute_row_delta` of the whole output.
        d_o: [B, S, N, Hv], the output's cotangent.
        dtype: of dQ, dK and dV; all are summed in fp32.

    Returns:
        dQ, dK, dV, shaped as q, k and v; and, where there are ``biases``, theirs, fp32
        [N, 2R + 1].
    """
    operands, params = validate_arguments(q, k, v, **options)
    operands = operands._replace(sinks=None)
    name = dispatch.choose_backend(backend, q, k, v, operands, params)
    return _Call(params, name, block_sizes, interpret).backward(
        q, k, v, lse, delta, d_o, operands, dtype
    )


class _Call(NamedTuple):
    """Everything static about one call."""

    params: AttentionParams
    implementation: str
    block_sizes: Any
    interpret: Any

    def forward(self, q, k, v, operands: AttentionOperands, dtype):
        return self._functions[0](q, k, v, operands, self.params, dtype)

    def backward(self, q, k, v, lse, delta, d_o, operands: AttentionOperands, dtype):
        return self._functions[1](q, k, v, lse, delta, d_o, operands, self.params, dtype)

    @property
    def _functions(self) -> tuple[Any, Any]:
        options = {"block_sizes": self.block_sizes, "interpret": self.interpret}
        return dispatch.bind_backend(self.implementation, **options)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, sinks, biases, operands: AttentionOperands, call: _Call):
    return _attention_forward(q, k, v, sinks, biases, operands, call)[0]


def _attention_forward(q, k, v, sinks, biases, operands, call):
    operands = operands._replace(biases=biases)
    o, lse = call.forward(q, k, v, operands._replace(sinks=sinks), v.dtype)
    return o, (q, k, v, sinks, operands, o, lse)


def _attention_backward(call, saved, d_o):
    q, k, v, sinks, operands, o, lse = saved
    delta = compute_row_delta(o, d_o)
    d_q, d_k, d_v, *d_biases = call.backward(q, k, v, lse, delta, d_o, operands, q.dtype)
    d_sinks = None if sinks is None else sink_gradient(sinks, lse, delta)
    (d_biases,) = d_biases or (None,)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), d_sinks, d_biases, None


_attention.defvjp(_attention_forward, _attention_backward)
