"""Paged attention on a CPU, by a kernel in C++, which reads pages where they lie."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import load_kernels
from pallas_kernels.paged_attention.params import PagedOperands, PagedParams

# Numbers of the widest vector register.
_LANES = 16


def supports(operands: PagedOperands, params: PagedParams) -> bool:
    """Whether pages are fp32 and their features fill vectors."""
    floats = (operands.q, operands.keys, operands.values, jnp.empty((), params.dtype))
    return (
        all(x is None or getattr(x, "dtype", None) == jnp.float32 for x in floats)
        and operands.q.shape[2] % _LANES == params.value_dim % _LANES == 0
        and load_kernels() is not None
    )


def forward(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.paged_attention.paged_attention`."""
    own = operands
    tokens, heads, _ = operands.q.shape
    shapes = (tokens, heads, params.value_dim), (tokens, heads)
    attend = jax.ffi.ffi_call(
        "pallas_kernels.PagedAttention",
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        vmap_method="sequential",
    )
    values = own.keys if own.values is None else own.values
    tables = own.page_tables, own.kv_lengths, own.key_limits, own.query_starts
    terms = [
        jnp.zeros(0) if x is None else x for x in (own.slopes, own.sinks, own.biases)
    ]
    o, lse = attend(
        *(own.q, own.keys, values, *tables, *terms),
        window=np.int64(params.window or 0),
        scale=np.float32(params.scale),
        soft_cap=np.float32(params.soft_cap or 0),
    )
    return o, lse
