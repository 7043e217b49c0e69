"""Paged attention as others call it: arguments checked, an implementation chosen.

An implementation is a :class:`~pallas_kernels.paged_attention.PagedKernel`: a module
here, imported when first wanted, or an object that the caller passes.
"""

import importlib
import math
from collections.abc import Hashable
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.chips import choose_backend
from pallas_kernels.kernel_types import Interpret
from pallas_kernels.paged_attention.params import (
    PagedKernel,
    PagedOperands,
    PagedParams,
    Pages,
    validate_arguments,
)

# What `backend` may be, and the kernel to try for it. XLA takes what these do not.
KERNELS = {
    "tpu": ("tpu",),
    "gpu": ("triton",),
    "triton": ("triton",),
    "xla": (),
}


def paged_attention(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages | None,
    page_tables: jax.Array,
    kv_lengths: jax.Array,
    query_starts: jax.Array,
    *,
    uniform_rows: tuple[int, int] = (0, 0),
    value_dim: int | None = None,
    key_limits: jax.Array | None = None,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    biases: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    kernel: PagedKernel | None = None,
    backend: str | None = None,
    block_sizes: Hashable | None = None,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes causal softmax(scores + mask)·v of each row's last tokens, exact,
    softmax in fp32.

    A row's results do not depend on other rows, bit for bit, nor on what pages hold
    behind its length, as long as that is finite. Not differentiable.

    Args:
        q: [T, N, H]. Row r's queries are ``q[query_starts[r] : query_starts[r + 1]]``,
            of the row's last tokens; those from ``query_starts[R]`` on are padding,
            finite.
        key_pages: [P, K, page, H], or quantized; query head n reads kv head n // (N /
            K).
        value_pages: [P, K, page, Hv], or quantized; None: the first ``value_dim``
            features of the keys (latent attention). A TPU reads arrays of pages
            row-major, as they lie by default where the last dimension is a multiple of
            128; others need that layout (``jax.experimental.layout``), or XLA copies
            the whole.
        page_tables: int32 [R, M], in range: token t of row r is in page
            ``page_tables[r, t // page]``. Entries behind a row's pages, or wholly
            behind its window or chunk, are not used.
        kv_lengths: int32 [R], tokens of each row in the pages, its queries' own
            included.
        query_starts: int32 [R + 1], ascending from 0. A row without queries is skipped.
        uniform_rows: (rows, queries each) of the first rows, where the number of
            queries is the same (decoding). Such a row with ``kv_lengths`` 0 is empty:
            zeros.
        key_limits: int32 [R]: only keys at positions below are read, where later ones
            lie elsewhere; None: all.
        window: number of last keys that a query sees (1: itself alone); None: all.
        chunk: positions are cut into chunks of so many, and a query sees the keys of
            its own chunk alone; None: one chunk.
        scale: factor on q·k; None: H ** -0.5.
        soft_cap: scores become cap·tanh(score / cap) (Gemma Team 2024, §2).
        slopes: fp32 [N]: scores lose slope·distance (Press et al. 2022, ALiBi).
        sinks: fp32 [N]: a logit beside the scores in each head's softmax (Xiao et al.
            2024).
        biases: fp32 [N, 2R + 1]: scores gain biases[n, clip(distance, −R, R) + R], the
            distance being the key's position less the query's (Raffel et al. 2020,
            §2.1).
        dtype: of o; default q's.
        kernel: an implementation of the caller's own, taken where it supports this.
        backend: "tpu", "gpu" (or "triton") or "xla". None: by the platform of the
            program being traced, and XLA where its kernel does not support this.
        block_sizes: of the implementation, hashable; None: its choice.
        interpret: run the kernel of a ``backend`` in Pallas's interpreter. For tests.

    Returns:
        o [T, N, Hv]; the natural log-sum-exp of each query's scores, its sink included,
        fp32 [T, N], −inf where it has neither key nor sink (``merge_attention`` joins
        another part). Queries of no row give zeros and −inf.

    Raises:
        ValueError: shapes that do not belong together; options of another sense; a
            ``backend`` that does not know these sizes.
    """
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    operands = PagedOperands(
        q=q,
        keys=key_pages,
        values=value_pages,
        page_tables=page_tables,
        kv_lengths=kv_lengths,
        query_starts=query_starts,
        key_limits=kv_lengths if key_limits is None else key_limits,
        slopes=slopes,
        sinks=sinks,
        biases=biases,
    )
    num_uniform, queries_each = uniform_rows
    params = PagedParams(
        num_uniform=num_uniform,
        queries_each=queries_each,
        value_dim=value_dim or 0,
        scale=scale,
        soft_cap=soft_cap,
        window=window,
        chunk=chunk,
        dtype=jnp.dtype(dtype or q.dtype),
        block_sizes=block_sizes,
        interpret=interpret,
    )
    operands, params = validate_arguments(operands, params)
    if kernel is not None and kernel.supports(operands, params):
        return kernel.forward(operands, params)

    def supports(name: str) -> bool:
        return _module(name).supports(operands, params)

    shapes = jax.tree.map(lambda x: f"{x.dtype} {x.shape}", operands)
    name = choose_backend(backend, KERNELS, supports, f"{shapes} with {params}")
    return _module(name).forward(operands, params)


def _module(name: str) -> PagedKernel:
    module = importlib.import_module(f"pallas_kernels.paged_attention.{name}")
    return cast(PagedKernel, module)


def write_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes tokens into their places: in place where ``pages`` is donated, but for
    bf16 on a CPU, where XLA widens whole arrays of it to write or gather parts (fp32
    and fp16 it does not).

    Args:
        pages: [P, K, page, H].
        new: [T, K, H], cast to the pages' dtype.
        slots: int32 [T], page · page size + place in it, each at most once; what is out
            of range is dropped.

    Returns:
        The pages.
    """
    P, K, page, H = pages.shape
    T = len(new)
    # Rows [T, K] of one table [P · K · page, H], in the order in which they lie.
    head = jnp.arange(K, dtype=jnp.int32)
    token = jnp.arange(T, dtype=jnp.int32)
    rows = (slots[:, None] // page * K + head) * page + slots[:, None] % page
    # A slot out of range gets a row behind the table, each its own: rows are promised to
    # be unique, and what lies behind is dropped.
    inside = ((slots >= 0) & (slots < P * page))[:, None]
    num_rows = pages.size // H
    rows = jnp.where(inside, rows, num_rows + token[:, None] * K + head)
    flat = pages.reshape(P * K * page, H)
    new = new.astype(pages.dtype).reshape(T * K, H)
    flat = flat.at[rows.reshape(-1)].set(new, mode="drop", unique_indices=True)
    return flat.reshape(pages.shape)
