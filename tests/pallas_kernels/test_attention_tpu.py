"""The TPU attention kernels, in the interpreter, equal a float64 NumPy softmax."""

import re
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention as kernel
from pallas_kernels.attention import tpu
from pallas_kernels.attention.tpu_blocks import (
    AttentionSizes,
    TpuBlocks,
    TpuBlockSizes,
    backward_vmem_bytes,
    forward_vmem_bytes,
)
from pallas_kernels.chips import CHIPS
from tests.pallas_kernels import reference
from tests.pallas_kernels.cases import Case, cases, check, compiled
from tests.pallas_kernels.reference import operands

SMALL = TpuBlockSizes(TpuBlocks(128, 128, 128, 128), TpuBlocks(128, 128, 128, 128))
# Forward and backward; block of queries, of keys, tiles; tiles ahead, behind; pace.
BLOCKS = (
    SMALL,
    TpuBlockSizes(TpuBlocks(256, 128, 128, 128), TpuBlocks(256, 128, 128, 128)),
    TpuBlockSizes(TpuBlocks(256, 256, 128, 128, 1, 0, 3), TpuBlocks(256, 256, 128, 128, 2, 1)),
    TpuBlockSizes(TpuBlocks(128, 256, 128, 128, 2, 2), TpuBlocks(128, 256, 128, 128, 3, 2, 2)),
    TpuBlockSizes(TpuBlocks(256, 256, 128, 256, 2, 1, 4), TpuBlocks(256, 256, 256, 128, 1, 0)),
    TpuBlockSizes(TpuBlocks(512, 512, 256, 128, 2, 1, 6), TpuBlocks(256, 128, 256, 128)),
)
# Sums are of the weights as bf16: each is off by 2^-8 of itself at most, and so is their sum.
BF16_SUMS = 2.0**-8
# Memory that nobody wrote holds NaN, and reads past the end of an array are errors.
POISONED = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


def check_tpu(case: Case, blocks: TpuBlockSizes, interpret=True, **more) -> None:
    options = {"backend": "tpu", "block_sizes": blocks, "interpret": interpret}
    forward = partial(kernel.attention_forward, **options)
    check(
        forward, partial(kernel.attention_backward, **options), case, lse_rounding=BF16_SUMS, **more
    )


DRAWN = cases(
    lengths=(1, 100, 128, 129, 200, 256, 300),
    heads=((1, 1), (2, 2), (4, 2), (3, 1)),
    head_sizes=((8, 8), (9, 5), (130, 130), (3, 140)),
    places=("default", "default", "static", "traced"),
)


@settings(max_examples=5)
@given(DRAWN, st.sampled_from(BLOCKS))
def test_every_kind_equals_the_reference(case, blocks):
    check_tpu(case, blocks)


ALL = {"window": 150, "prefix": True, "packed": True, "soft_cap": 2.0, "slopes": True}


@pytest.mark.parametrize("place", ["static", "traced"])
def test_all_features_at_once(place):
    check_tpu(Case((2, 260, 300, 4, 2, 6, 9), place=place, sinks=True, **ALL), BLOCKS[1])


@pytest.mark.parametrize("features", [{}, {"causal": False, "soft_cap": 5.0}])
def test_half_precision_costs_no_more_than_in_plain_attention(features):
    check_tpu(Case((1, 256, 256, 4, 2, 32, 32), "bfloat16", **features), BLOCKS[4], rounding=0)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (Case((1, 200, 300, 2, 1, 9, 5), "bfloat16", packed=True, sinks=True), BLOCKS[3]),
        (Case((1, 130, 257, 1, 1, 8, 8), causal=False, slopes=True), BLOCKS[2]),
        (Case((2, 1, 100, 1, 1, 8, 8), place="traced", prefix=True), BLOCKS[0]),
    ],
)
def test_memory_that_nobody_wrote_is_never_read(case, blocks):
    check_tpu(case, blocks, POISONED)


# Documents of one block and of several; one that ends within a block; and positions that the
# program does not know.
DOCUMENTS = [((128, 128, 256), True, False), ((300,), False, False), ((300,), True, True)]


@pytest.mark.parametrize(("lengths", "causal", "traced"), DOCUMENTS)
def test_a_document_is_as_if_it_were_alone(lengths, causal, traced):
    total = sum(lengths)
    q, k, v = operands(1, total, total, 2, 1, 8)

    @compiled
    def results(q, k, v, **options):
        attend = partial(
            kernel.attention_forward, backend="tpu", block_sizes=SMALL, interpret=POISONED
        )
        return attend(q, k, v, causal=causal, **options)

    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    at = {name: np.array(7, np.int32) for name in ("q_offset", "k_offset") if traced}
    together = results(q, k, v, segment_ids=(ids, ids), **at)
    ends = np.cumsum(lengths)
    alone = [
        results(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in zip(ends - lengths, ends, strict=True)
    ]
    for x, *parts in zip(together, *alone, strict=True):
        np.testing.assert_allclose(x, np.concatenate(parts, axis=1), atol=1e-6)


PARTS = {
    "causal, sinks, packed": Case((1, 300, 300, 2, 1, 8, 8), packed=True, sinks=True),
    "far window": Case((1, 100, 500, 1, 1, 8, 8), window=400, place="static"),
    "full, traced": Case((1, 100, 300, 1, 1, 8, 8), "bfloat16", causal=False, sinks=True),
    "prefix, traced": Case((2, 200, 300, 1, 1, 8, 8), prefix=True, place="traced"),
}


@pytest.mark.parametrize(("case", "keys"), list(zip(PARTS, (256, 128, 128, 256), strict=True)))
def test_keys_that_vmem_does_not_hold_go_in_parts(monkeypatch, case, keys):
    """Forward and backward, each on a chip whose VMEM holds just so many keys."""
    own, parts = PARTS[case], []
    taken = tpu._parts
    monkeypatch.setattr(tpu, "_parts", lambda *x: parts.append(taken(*x)) or parts[-1])

    def on_chip_with_room(function, needed, blocks, out_bytes):
        _, S, T, _, _, H, Hv = own.shape
        sizes = AttentionSizes(S, T, H, Hv, jnp.dtype(own.dtype).itemsize, out_bytes)
        chip = CHIPS["v4"]._replace(vmem=int(needed(blocks, sizes, keys) / 0.85) + 9)

        def run(*operands, **options):
            monkeypatch.setattr(tpu, "get_chip", lambda: chip)
            return function(
                *operands, **options, backend="tpu", block_sizes=SMALL, interpret=POISONED
            )

        return run

    itemsize = jnp.dtype(own.dtype).itemsize
    check(
        on_chip_with_room(kernel.attention_forward, forward_vmem_bytes, SMALL.forward, itemsize),
        on_chip_with_room(kernel.attention_backward, backward_vmem_bytes, SMALL.backward, 4),
        own,
        lse_rounding=BF16_SUMS,
    )
    assert [len(x) for x in parts] == 2 * [-(-own.shape[2] // keys)]


@pytest.mark.parametrize("large", [slice(0, 256), slice(500, 600)])
def test_the_largest_scores_may_be_anywhere(large):
    """Of a tile that goes in pieces, and of several blocks: no sum overflows."""
    q, k, v = operands(1, 100, 600, 1, 1, 8)
    k[:, large] *= 300
    blocks = TpuBlockSizes(TpuBlocks(128, 512, 128, 512, 1, 1, 2), SMALL.backward)
    attend = partial(kernel.attention_forward, backend="tpu", block_sizes=blocks, interpret=True)
    found = compiled(attend)(q, k, v, causal=False)
    wanted = reference.attention(q, k, v, causal=False)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)  # scores are about 1,000


@pytest.mark.parametrize(("causal", "soft_cap"), [(True, None), (False, 3.0)])
def test_masked_keys_and_values_never_leak(causal, soft_cap):
    """Whatever is finite may lie there; its products overflow, in the backward pass too."""
    q, k, v = operands(1, 130, 150, 2, 1, 4)
    q_ids, k_ids = np.repeat([[0, 2]], [50, 80], axis=1), np.repeat([[1, 2, 0]], [60, 80, 10], 1)
    segments = q_ids, k_ids
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[k_ids != 2], dirty_v[k_ids != 2] = 3e38, -3e38
    options = {"causal": causal, "soft_cap": soft_cap, "segment_ids": segments}

    @compiled
    def pull(q, k, v, sinks, **options):
        attend = partial(
            kernel.attention, backend="tpu", block_sizes=SMALL, interpret=True, **options
        )
        o, back = jax.vjp(lambda *x: attend(*x[:3], sinks=x[3]), q, k, v, sinks)
        return o, *back(o)

    sinks = np.array([-np.inf, 0.5], np.float32)
    clean = pull(q, k, v, sinks, **options)
    jax.tree.map(np.testing.assert_array_equal, clean, pull(q, dirty_k, dirty_v, sinks, **options))
    wanted = reference.attention(q, k, v, sinks=sinks, d_o=clean[0], **options)
    for found, want in zip(clean, (wanted[0], *wanted[2:]), strict=True):
        np.testing.assert_allclose(found, want, atol=2e-5)


RING = {
    "causal, sinks": ({"sinks": np.array([0.3, -1], np.float32)}, False),
    "window, packed": ({"window": 130}, True),
    "full, capped, packed": ({"causal": False, "soft_cap": 2.0}, True),
}


@pytest.mark.parametrize("case", RING)
def test_blocks_of_keys_merge_to_the_whole_and_share_out_its_gradients(case):
    """A shard of queries meets keys in blocks, out of order, at offsets known when it runs; one
    block has the sinks."""
    options, is_packed = RING[case]
    S, T, size, first = 140, 390, 130, 130
    q, k, v = operands(1, S, T, 2, 1, 8)
    rng = np.random.default_rng(5)
    d_o = rng.standard_normal(q.shape).astype(np.float32)
    ids = reference.packed(rng, 1, T)
    q_ids = ids[:, first : first + S]
    by_tpu = {"backend": "tpu", "block_sizes": SMALL, "interpret": True}
    forward = jax.jit(
        partial(kernel.attention_forward, **by_tpu),
        static_argnames=("causal", "window", "soft_cap"),
    )
    backward = jax.jit(
        partial(kernel.attention_backward, **by_tpu),
        static_argnames=("causal", "window", "soft_cap"),
    )

    def block(start):
        rows = slice(start, start + size)
        mask = {**options, "q_offset": np.int32(first), "k_offset": np.int32(start)}
        mask |= {name: np.asarray(mask[name]) for name in ("q_offset", "k_offset")}
        if "sinks" in mask:
            mask["sinks"] = mask["sinks"] if start == 0 else np.full(2, -np.inf, np.float32)
        if is_packed:
            mask["segment_ids"] = q_ids, ids[:, rows]
        return rows, mask

    starts = (2 * size, 0, size)
    parts = []
    for start in starts:
        rows, mask = block(start)
        parts.append(forward(q, k[:, rows], v[:, rows], **mask))
    o, lse = reduce(kernel.merge_attention, parts)
    whole = {**options, "q_offset": first, "segment_ids": (q_ids, ids) if is_packed else None}
    wanted = reference.attention(q, k, v, d_o=d_o, **whole)
    np.testing.assert_allclose(o, wanted[0], atol=1e-5)
    np.testing.assert_allclose(lse, wanted[1], atol=1e-5)

    delta, d_q = kernel.compute_row_delta(o, d_o), 0
    for start in starts:
        rows, mask = block(start)
        term, d_k, d_v = backward(q, k[:, rows], v[:, rows], lse, delta, d_o, **mask)
        d_q += term
        np.testing.assert_allclose(d_k, wanted[3][:, rows], atol=1e-5)
        np.testing.assert_allclose(d_v, wanted[4][:, rows], atol=1e-5)
    np.testing.assert_allclose(d_q, wanted[2], atol=1e-5)


GOOD = TpuBlocks(128, 128, 128, 128)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            TpuBlocks(100, 128, 128, 128),
            "blocks (100, 128, 128, 128, 1, 1, 0): sizes are multiples",
        ),
        (
            TpuBlocks(256, 256, 512, 128),
            "blocks (256, 256, 512, 128, 1, 1, 0): tiles do not divide",
        ),
        (
            GOOD._replace(pace=-2),
            "blocks (128, 128, 128, 128, 1, 1, -2): ahead, behind and pace are",
        ),
        (
            TpuBlocks(8192, 8192, 512, 512),
            "blocks (8192, 8192, 512, 512, 1, 1, 0) with head sizes 64 and 128 take ",
        ),
    ],
)
def test_blocks_that_no_kernel_has(wrong, message):
    """Refused by the pass that they are for, before anything is lowered."""
    q, v = jnp.zeros((1, 300, 2, 64)), jnp.zeros((1, 300, 2, 128))
    saved = jnp.zeros(q.shape[:3]), jnp.zeros(q.shape[:3]), v
    forward, backward = TpuBlockSizes(wrong, GOOD), TpuBlockSizes(GOOD, wrong)
    for function, arrays, refused, allowed in (
        (kernel.attention_forward, (q, q, v), forward, backward),
        (kernel.attention_backward, (q, q, v, *saved), backward, forward),
    ):
        jax.eval_shape(partial(function, backend="tpu", block_sizes=allowed), *arrays)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            jax.eval_shape(partial(function, backend="tpu", block_sizes=refused), *arrays)
        assert "take" not in message or "of which a v4 has 16777216" in str(error.value)
