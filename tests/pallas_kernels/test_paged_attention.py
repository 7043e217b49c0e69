"""Paged attention equals float64 attention over each row's own tokens, whatever the
pages of others hold; tokens are written in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import QuantizedPages, paged_attention, write_pages
from pallas_kernels.paged_attention.xla import XlaBlockSizes
from tests.pallas_kernels.paged_cases import DEAD, PagedCase, build, check, run_built

SMALL = {"backend": "xla", "block_sizes": XlaBlockSizes(8, 48)}
DECODE = [(37, 1), DEAD, (1, 1), (150, 1), (64, 1)]
CHUNKS = [(50, 13), (9, 9), (130, 1), (33, 0), (60, 37)]
FEATURES = {"soft_cap": 3.0, "slopes": True, "sinks": True}
WINDOWED = PagedCase(DECODE + CHUNKS, num_uniform=5, window=90, padding=2)
CASES = {
    "decode": PagedCase(DECODE, num_uniform=5),
    "decode of several tokens, everything": PagedCase(
        [(37, 3), (0, 3), (3, 3), (200, 3)],
        num_uniform=4,
        window=21,
        reach=9,
        **FEATURES,
    ),
    "one row": PagedCase([(100, 1)], (9, 3, 64, 64), num_uniform=1),
    "ragged": PagedCase(CHUNKS, padding=5),
    "mixed, everything": PagedCase(
        DECODE + CHUNKS,
        (8, 1, 24, 40),
        32,
        5,
        padding=3,
        window=40,
        reach=30,
        seed=1,
        **FEATURES,
    ),
    "mixed, limits": PagedCase(
        DECODE + CHUNKS, num_uniform=5, limited=True, sinks=True, padding=1
    ),
    "chunks of positions": PagedCase(
        [(37, 3), (0, 3), (3, 3), (90, 3), (45, 45)], num_uniform=4, chunk=11
    ),
    "latent": PagedCase(DECODE + CHUNKS, (4, 1, 64, 48), num_uniform=5, latent=True),
    "bf16": PagedCase(DECODE + CHUNKS, num_uniform=5, kind="bfloat16"),
    "int8": PagedCase(DECODE + CHUNKS, num_uniform=5, kind="int8"),
    "int8 with zeros, latent": PagedCase(
        DECODE + CHUNKS,
        (4, 1, 56, 40),
        num_uniform=5,
        kind="int8 with zeros",
        latent=True,
    ),
    "int4": PagedCase(
        DECODE + CHUNKS, (3, 3, 16, 24), 32, num_uniform=5, kind="int4", window=40
    ),
}


@pytest.mark.parametrize(
    "call", [SMALL, {"backend": "xla"}], ids=["small blocks", "default"]
)
@pytest.mark.parametrize("case", CASES)
def test_xla_equals_the_reference(case, call):
    check(CASES[case], tolerance=2e-2 if case == "bf16" else 2e-5, **call)


def test_other_rows_change_nothing():
    """Bit for bit: their lengths, tokens and pages, and all pages that are nobody's."""
    check_independence(SMALL)
    long = PagedCase([(300, 1), (200, 1), (750, 40)], (2, 1, 64, 64), num_uniform=2)
    check_independence({"backend": "xla"}, long)


def check_independence(call, case=WINDOWED):
    arguments, arrays, static = build(case)
    o, lse = run_built(arguments, arrays, static, **call)
    q, keys, values, tables, lengths, starts = (x.copy() for x in arguments)
    unchanged = (0, len(lengths) - 1)
    rng = np.random.default_rng(3)
    pages = np.concatenate(
        [tables[r, : -(-lengths[r] // case.page)] for r in unchanged]
    )
    queries = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in unchanged])
    free = np.setdiff1d(np.arange(len(keys)), pages)
    for x in (keys, values):
        x[free] = rng.standard_normal(x[free].shape)
    others = np.setdiff1d(np.arange(len(q)), queries)
    q[others] = rng.standard_normal(q[others].shape)
    for r in set(range(len(lengths))) - set(unchanged):
        tables[r] = rng.choice(free, len(tables[r]))
        lengths[r] = case.page * len(tables[r]) - r
    changed = run_built(
        (q, keys, values, tables, lengths, starts), arrays, static, **call
    )
    np.testing.assert_array_equal(changed[0][queries], o[queries])
    np.testing.assert_array_equal(changed[1][queries], lse[queries])


def test_only_blocks_that_someone_sees_are_read():
    """Neither behind the longest row nor before the first window: pages of NaN there,
    which would spoil what a weight of 0 is multiplied by."""
    case = PagedCase([(170, 1), (200, 1), (260, 30)], num_uniform=2, window=20)
    arguments, arrays, static = build(case)
    q, keys, values, tables, *rest = arguments
    expected = run_built(arguments, arrays, static, backend="xla")
    wide = np.zeros((3, 1 << 14), np.int32)
    wide[:, : tables.shape[1]] = tables
    keys[0], values[0] = np.nan, np.nan
    for r, (first, last) in enumerate([(144, 192), (144, 240), (192, 288)]):
        behind = np.arange(wide.shape[1]) * case.page
        spoilt = (behind < min(first, 144)) | (behind >= (240 if r < 2 else last))
        wide[r] = np.where(spoilt, 0, np.where(wide[r] == 0, 1, wide[r]))
    results = run_built((q, keys, values, wide, *rest), arrays, static, **SMALL)
    np.testing.assert_allclose(results[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_writes_are_in_place(dtype):
    """Tokens reach their slots, those out of range nothing, and no buffer of the pool's
    size is made where it is donated."""
    rng = np.random.default_rng(0)
    pages = jnp.asarray(9 * rng.standard_normal((700, 3, 16, 8)), dtype)
    new = (9 * rng.standard_normal((6, 3, 8))).astype(np.float32)
    slots = np.array([17, 0, 11199, -1, 11200, 11200 * 3], np.int32)
    expected = np.asarray(pages).copy()
    for token in range(3):
        expected[slots[token] // 16, :, slots[token] % 16] = new[token]
    compiled = jax.jit(write_pages, donate_argnums=0).lower(pages, new, slots).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 20
    np.testing.assert_array_equal(np.asarray(compiled(pages, new, slots)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window"),
        ({"value_dim": 4}, "either value_pages or value_dim"),
        ({"uniform_rows": (3, 1)}, "uniform_rows"),
        ({"slopes": np.zeros(5, np.float32)}, "slopes"),
        ({"backend": "none"}, "known are"),
        ({"backend": "tpu", "biases": np.zeros((6, 3), np.float32)}, "no tpu kernel"),
        ({"key_limits": np.zeros(3, np.int32)}, "key_limits"),
    ],
)
def test_what_does_not_belong_together_is_said(changes, message):
    arguments, *_ = build(PagedCase([(20, 1), (33, 12)]))
    with pytest.raises(ValueError, match=message):
        paged_attention(*arguments, **changes)


def test_scales_of_another_shape_are_refused():
    (q, keys, values, *rest), *_ = build(PagedCase([(20, 1)], kind="int8"))
    with pytest.raises(ValueError, match="scale or zero of key_pages"):
        paged_attention(
            q, QuantizedPages(keys.codes, keys.scale[:1], None), values, *rest
        )
