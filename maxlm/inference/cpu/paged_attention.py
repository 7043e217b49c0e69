"""Paged attention on a CPU, by a kernel in C++, which reads pages where they lie.

The module is a :class:`~maxlm.parallel.decode_kernels.PagedKernel`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.inference.cpu.library import PAGED_ATTENTION, load_library
from maxlm.parallel.decode_kernels import PagedOperands, PagedParams

_LANES = 16
"""Numbers of the widest vector register: the kernel has no loop for a rest."""


def supports(operands: PagedOperands, params: PagedParams) -> bool:
    """Returns whether queries and pages are fp32 and their features fill vectors."""
    for pages in (operands.keys, operands.values):
        if pages is None:
            continue
        if not isinstance(pages, jax.Array) or pages.dtype != jnp.float32:
            return False
    if operands.q.dtype != jnp.float32 or params.dtype != jnp.float32:
        return False
    if operands.q.shape[2] % _LANES or params.value_dim % _LANES:
        return False
    return load_library() is not None


def forward(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """Computes ``pallas_kernels.paged_attention.paged_attention``: (o, lse)."""
    tokens, heads, _ = operands.q.shape
    attend = jax.ffi.ffi_call(
        PAGED_ATTENTION,
        [
            jax.ShapeDtypeStruct((tokens, heads, params.value_dim), jnp.float32),
            jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        ],
        vmap_method="sequential",
    )
    values = operands.keys if operands.values is None else operands.values
    # A call's arguments are fixed: an empty array, or 0, stands for what is not there.
    head_terms = [
        jnp.zeros(0) if term is None else term
        for term in (operands.slopes, operands.sinks, operands.biases)
    ]
    o, lse = attend(
        operands.q,
        operands.keys,
        values,
        operands.page_tables,
        operands.kv_lengths,
        operands.key_limits,
        operands.query_starts,
        *head_terms,
        window=np.int64(params.window or 0),
        chunk=np.int64(params.chunk or 0),
        scale=np.float32(params.scale),
        soft_cap=np.float32(params.soft_cap or 0),
    )
    return o, lse
