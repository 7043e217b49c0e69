"""Paged attention, decoding and prefilling, beside jax's own two kernels."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cycles.contests.contest import OWN, Benchmark, Contender, Pass
from benchmarks.kernel_cycles.static.measure import Spec

Program = tuple[Callable[..., Any], Sequence[Any]]

_GROUP, _KV_HEADS, _HEAD_DIM = 4, 8, 128
# jax's paged kernel: pages of a block. Its ragged one: pages and queries of a block.
_PAGED = (16, 32)
_RAGGED = {"decode": ((16, 8), (32, 8)), "prefill": ((16, 64), (32, 64), (32, 128))}


def draw_tables(rows: int, context: int, page: int) -> np.ndarray:
    """int32 [rows, pages]: pages in any order, seed 0."""
    pages = -(-context // page)
    order = np.random.default_rng(0).permutation(rows * pages)
    return order.reshape(rows, pages).astype(np.int32)


def _problem(which: str, rows: int, context: int, page: int) -> tuple[Any, ...]:
    """Returns q; tables, lengths and starts of queries; the number of pages. Decoding:
    a query a row; prefilling: one row, its last ``rows`` tokens."""
    queries = rows
    rows = rows if which == "decode" else 1
    tables = draw_tables(rows, context, page)
    lengths = np.full(rows, context, np.int32)
    starts = np.linspace(0, queries, rows + 1).astype(np.int32)
    q = jax.ShapeDtypeStruct((queries, _GROUP * _KV_HEADS, _HEAD_DIM), jnp.bfloat16)
    return q, tables, lengths, starts, tables.size


def own(
    *,
    which: str,
    rows: int,
    context: int,
    page: int,
    kind: str = "bf16",
    blocks: Sequence[int] = (),
) -> Program:
    """This package's.

    Args:
        kind: of the pages: "bf16", "int8" or "int4".
        blocks: queries and keys of a block; none: its choice.
    """
    from pallas_kernels.paged_attention import QuantizedPages, paged_attention
    from pallas_kernels.paged_attention.tpu import TpuPagedBlocks

    q, tables, lengths, starts, P = _problem(which, rows, context, page)
    shape = P, _KV_HEADS, page, _HEAD_DIM
    uniform = (rows, 1) if which == "decode" else (0, 0)

    def describe(per_channel: bool) -> Any:
        like: Any = jax.ShapeDtypeStruct
        if kind == "bf16":
            return like(shape, jnp.bfloat16)
        scale = like(
            shape[:2] + ((_HEAD_DIM,) if per_channel else (page,)), jnp.bfloat16
        )
        if kind == "int8":
            return QuantizedPages(like(shape, jnp.int8), scale, None)
        packed = P, _KV_HEADS, page // 2, _HEAD_DIM
        return QuantizedPages(like(packed, jnp.uint8), scale, scale)

    sizes = TpuPagedBlocks(*blocks) if blocks else None

    def run(q, tables, lengths, starts, keys, values):
        options = {"uniform_rows": uniform, "block_sizes": sizes}
        return paged_attention(q, keys, values, tables, lengths, starts, **options)[0]

    return run, (q, tables, lengths, starts, describe(True), describe(False))


def jax_paged(
    *, which: str, rows: int, context: int, page: int, blocks: Sequence[int]
) -> Program:
    """``jax.experimental.pallas.ops.tpu.paged_attention``: decoding alone."""
    from jax.experimental.pallas.ops.tpu.paged_attention import (
        paged_attention_kernel as kernel,
    )

    q, tables, lengths, _, P = _problem(which, rows, context, page)
    shape = jax.ShapeDtypeStruct((_KV_HEADS, P, page, _HEAD_DIM), jnp.bfloat16)

    def run(q, tables, lengths, keys, values):
        return kernel.paged_attention(
            q, keys, values, lengths, tables, pages_per_compute_block=blocks[0]
        )

    return run, (q, tables, lengths, shape, shape)


def jax_ragged(
    *, which: str, rows: int, context: int, page: int, blocks: Sequence[int]
) -> Program:
    """``jax.experimental.pallas.ops.tpu.ragged_paged_attention``, keys and values
    interleaved."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    q, tables, lengths, starts, P = _problem(which, rows, context, page)
    pages = jax.ShapeDtypeStruct((P, page, 2 * _KV_HEADS, _HEAD_DIM), jnp.bfloat16)

    def run(q, pages, tables, lengths, starts, count):
        return kernel.ragged_paged_attention(
            q, pages, lengths, tables, starts, count, sm_scale=_HEAD_DIM**-0.5,
            num_kv_pages_per_block=blocks[0], num_queries_per_block=blocks[1],
            vmem_limit_bytes=64 << 20,
        )  # fmt: skip

    return run, (q, pages, tables, lengths, starts, np.array([len(lengths)], np.int32))


def paged_attention(options: argparse.Namespace) -> Benchmark:
    decode = {"rows": options.sequences, "context": options.seq, "page": options.page}
    prefill = decode | {"rows": options.chunk}
    problems = {"decode": decode, "prefill": prefill}
    where = {name: problem | {"which": name} for name, problem in problems.items()}

    def contender(name: str, function: str, programs: Any, peer: bool) -> Contender:
        specs = {
            which: [
                Spec(f"{__name__}:{function}", problem | settings)
                for settings in programs[which]
            ]
            for which, problem in where.items()
        }
        return Contender(name, specs, peer)

    contenders = [contender(OWN, "own", {name: [{}] for name in where}, False)]
    if options.peers:
        most = -(-options.seq // options.page)
        paged = [{"blocks": (min(pages, most),)} for pages in _PAGED]
        ragged = {
            which: [{"blocks": (min(pages, most), queries)} for pages, queries in tried]
            for which, tried in _RAGGED.items()
        }
        contenders += [
            contender("jax paged", "jax_paged", {"decode": paged, "prefill": []}, True),
            contender("jax ragged", "jax_ragged", ragged, True),
        ]
    heads = _GROUP * _KV_HEADS
    queries, keys = options.chunk, options.seq
    pairs = {
        "decode": options.sequences * keys,
        "prefill": queries * keys - queries * (queries - 1) // 2,
    }
    title = (
        f"paged_attention, {heads} heads of {_HEAD_DIM} over {_KV_HEADS}, context "
        f"{options.seq}, "
        f"pages of {options.page}, bf16: {options.sequences} rows, or the last "
        f"{queries} tokens"
    )
    passes = [
        Pass(which, 4 * heads * _HEAD_DIM * number, blocks=("blocks",))
        for which, number in pairs.items()
    ]
    return Benchmark(title, contenders, passes)
