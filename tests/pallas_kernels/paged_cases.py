"""Paged attentions of every kind, and what any implementation must make of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import QuantizedPages, paged_attention
from tests.models.building import QUICK
from tests.pallas_kernels import paged_reference
from tests.pallas_kernels.cases import GARBAGE

DEAD = (0, 1)
"""An empty uniform row."""


class PagedCase(NamedTuple):
    """One call; arrays follow from ``seed``."""

    rows: Sequence[tuple[int, int]]
    """Each row's tokens, and how many of them are queries."""
    heads: tuple[int, int, int, int] = (6, 2, 16, 16)
    """N, K, H, Hv."""
    page: int = 16
    num_uniform: int = 0
    """The first rows, with the first one's number of queries each."""
    kind: str = "float32"
    """Of the pages: a dtype, "int8", "int4" or "int8 with zeros"."""
    latent: bool = False
    """Whether values are the first Hv features of the keys."""
    padding: int = 0
    """Queries of no row."""
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    slopes: bool = False
    sinks: bool = False
    reach: int | None = None
    """Of biases by distance."""
    limited: bool = False
    """Whether a row's last keys lie elsewhere."""
    seed: int = 0


def build(case: PagedCase) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Arguments as NumPy arrays; options that are arrays; static options. What no query
    may read is garbage: other pages, tokens behind a row's end, pages that a window has
    left behind."""
    rng = np.random.default_rng(case.seed)
    (N, K, H, Hv), page = case.heads, case.page
    lengths = np.array([length for length, _ in case.rows], np.int32)
    counts = np.array([count for _, count in case.rows], np.int32)
    pages = -(-lengths // page)
    R = len(lengths)
    M = max(pages.max(), 1) + 2
    P = int(pages.sum()) + 3
    order = list(rng.permutation(np.arange(1, P)))
    tables = np.zeros((R, M), np.int32)
    used = np.zeros((P, page), bool)
    firsts = np.zeros(R, np.int32)
    limits = np.maximum(lengths - rng.integers(0, 20, R), 0).astype(np.int32)
    limits = limits if case.limited else lengths
    for r in range(R):
        tables[r, : pages[r]] = [order.pop() for _ in range(pages[r])]
        if case.window is not None:
            firsts[r] = max(lengths[r] - counts[r] - case.window + 1, 0)
        if case.chunk is not None:
            first_query = max(lengths[r] - counts[r], 0)
            chunk_start = first_query // case.chunk * case.chunk
            firsts[r] = max(firsts[r], chunk_start)
        for t in range(firsts[r], limits[r]):
            used[tables[r, t // page], t % page] = True
        tables[r, : firsts[r] // page] = 0
        tables[r, pages[r] :] = rng.integers(0, P, M - pages[r])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    q = 2 * rng.standard_normal((starts[-1] + case.padding, N, H)).astype(np.float32)
    dtype = jnp.dtype("float32" if "int" in case.kind else case.kind)
    keys = _draw_pages(rng, case.kind, (P, K, page, H), used, True)
    values = (
        None
        if case.latent
        else _draw_pages(rng, case.kind, (P, K, page, Hv), used, False)
    )
    static: dict[str, Any] = {"scale": 0.6 * H**-0.5}
    if case.latent:
        static["value_dim"] = Hv
    if case.num_uniform:
        static["uniform_rows"] = case.num_uniform, case.rows[0][1]
    if case.window is not None:
        static["window"] = case.window
    if case.chunk is not None:
        static["chunk"] = case.chunk
    if case.soft_cap is not None:
        static["soft_cap"] = case.soft_cap
    arrays: dict[str, Any] = {}
    if case.slopes:
        arrays["slopes"] = (2.0 ** -rng.uniform(0, 6, N)).astype(np.float32)
    if case.sinks:
        arrays["sinks"] = rng.normal(0, 2, N).astype(np.float32)
    if case.reach is not None:
        arrays["biases"] = rng.normal(0, 2, (N, 2 * case.reach + 1)).astype(np.float32)
    if case.limited:
        arrays["key_limits"] = limits
    return (q.astype(dtype), keys, values, tables, lengths, starts), arrays, static


def _draw_pages(rng, kind: str, shape: tuple[int, ...], used, per_channel: bool) -> Any:
    P, K, page, H = shape
    if "int" not in kind:
        x = rng.standard_normal(shape).astype(jnp.dtype(kind))
        return np.where(used[:, None, :, None], x, np.asarray(GARBAGE, x.dtype))
    scale = 0.03 * rng.uniform(0.5, 2, (P, K, H) if per_channel else (P, K, page))
    zero = rng.normal(0, 0.5, scale.shape)
    unused = ~(used.any(1)[:, None, None] if per_channel else used[:, None])
    scale, zero = (np.where(unused, 1e30, x).astype(np.float32) for x in (scale, zero))
    if kind == "int4":
        codes = rng.integers(0, 256, (P, K, page // 2, H)).astype(np.uint8)
        return QuantizedPages(codes, 8 * scale, zero)
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    return QuantizedPages(codes, scale, zero if "zeros" in kind else None)


class Implementation(TypedDict, total=False):
    """Which implementation computes, and how; without a key, its default."""

    backend: str
    block_sizes: Any
    interpret: Any


def run(case: PagedCase, **call: Unpack[Implementation]) -> tuple[Any, Any]:
    """o and lse of an implementation, compiled."""
    arguments, arrays, static = build(case)
    return run_built(arguments, arrays, static, **call)


def run_built(
    arguments, arrays, static, **call: Unpack[Implementation]
) -> tuple[np.ndarray, np.ndarray]:
    function = jax.jit(
        partial(paged_attention, **static, **call), compiler_options=QUICK
    )
    results = function(*jax.tree.map(jnp.asarray, arguments), **arrays)
    return jax.tree.map(np.asarray, results)


def check(
    case: PagedCase, *, tolerance: float = 2e-5, **call: Unpack[Implementation]
) -> None:
    """Results are the reference's to ``tolerance``, of the largest value where that is
    above 1; and zeros and −inf of queries that are no row's."""
    arguments, arrays, static = build(case)
    o, lse = run_built(arguments, arrays, static, **call)
    assert (o.dtype, lse.dtype) == (arguments[0].dtype, np.float32)
    static.pop("uniform_rows", None)
    exact_o, exact_lse = paged_reference.paged_attention(*arguments, **static, **arrays)
    np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(exact_lse))
    seen = np.isfinite(lse)
    np.testing.assert_allclose(
        np.float64(o), exact_o, rtol=0, atol=tolerance * np.abs(exact_o).max(initial=1)
    )
    np.testing.assert_allclose(
        lse[seen],
        exact_lse[seen],
        rtol=0,
        atol=tolerance * np.abs(exact_lse[seen]).max(initial=1),
    )
