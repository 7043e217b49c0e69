"""Paged attention compiled by the TPU's and the GPU's own compilers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.kernel_cycles.static import Spec, measure
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.models.caches.config import PagedCacheConfig, QuantizedCacheConfig
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.caches.layout import choose_feature_multiple
from maxlm.parallel.terms import AttentionTerms
from maxlm.sharding import AxisRules
from pallas_kernels.chips import find_chip
from pallas_kernels.paged_attention import QuantizedPages, paged_attention, write_pages
from tests.aot.conftest import describe_device, read_kernels

pytestmark = pytest.mark.timeout(900)

MACHINES = ("v4:2x2x1", "tpu7x:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100x1")
# N, K, H, Hv; page; kind; static options; learned arrays.
CASES: dict[str, tuple[Any, ...]] = {
    "bf16": ((32, 8, 128, 128), 16, "bfloat16", {}, ()),
    "fp32, window, cap": (
        (9, 3, 64, 64),
        16,
        "float32",
        {"window": 500, "soft_cap": 30.0},
        (),
    ),
    "chunks of positions": (
        (32, 8, 128, 128),
        16,
        "bfloat16",
        {"window": 300, "chunk": 300},
        (),
    ),
    "slopes, sinks": ((16, 2, 128, 128), 64, "bfloat16", {}, ("slopes", "sinks")),
    "int8": ((32, 8, 128, 128), 32, "int8", {}, ()),
    "int4": ((32, 8, 128, 128), 64, "int4", {}, ()),
    "latent": ((16, 1, 576, 512), 32, "bfloat16", {"value_dim": 512}, ()),
}
P = 509
R = 12
M = 64
ROWS = 8
TOKENS = 8 + 300


@pytest.fixture(scope="module", params=MACHINES)
def device(request):
    return describe_device(request.param)


def describe_pages(
    kind: str, shape: tuple[int, ...], like, *, per_channel: bool
) -> Any:
    count, K, page, H = shape
    if not kind.startswith("int"):
        return like(shape, kind)
    scale = like((count, K, H) if per_channel else (count, K, page), jnp.bfloat16)
    if kind == "int8":
        return QuantizedPages(like(shape, jnp.int8), scale, None)
    return QuantizedPages(like((count, K, page // 2, H), jnp.uint8), scale, scale)


def compile_case(
    device, case: tuple[Any, ...], rows: int = R, uniform: int = ROWS, tokens=TOKENS
):
    (N, K, H, Hv), page, kind, static, learned = case
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Explicit,))
    here = NamedSharding(mesh, PartitionSpec())

    def like(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def like_pages(shape, dtype):
        # A TPU's default has the pages run fastest where the last dimension fills no
        # lanes.
        row_major = Format(Layout(tuple(range(len(shape)))), here)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_major)

    dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    arguments = (
        like((tokens, N, H), dtype),
        describe_pages(kind, (P, K, page, H), like_pages, per_channel=True),
        None
        if "value_dim" in static
        else describe_pages(kind, (P, K, page, Hv), like_pages, per_channel=False),
        like((rows, M), jnp.int32),
        like((rows,), jnp.int32),
        like((rows + 1,), jnp.int32),
    )
    arrays = {name: like((N,), jnp.float32) for name in learned}

    def run(arguments, arrays):
        return paged_attention(
            *arguments, uniform_rows=(uniform, 1), **static, **arrays
        )

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(arguments, arrays).compile()


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(device, case):
    """One for decoding rows, one for chunks; and no copy of the pages."""
    text = compile_case(device, CASES[case]).as_text()
    if device.platform == "gpu":
        calls = [
            line
            for line in text.splitlines()
            if "custom-call(" in line and "triton" in line
        ]
        assert len(calls) == 2
    else:
        assert read_kernels(find_chip(device).name, text) == ["paged_attention"] * 2
    pools = re.findall(rf"= \w+\[{P},[\d,]+\]\S* ([\w-]+)\(", text)
    assert set(pools) <= {"parameter", "bitcast"}
    # Nor of a part: into a TPU's VMEM it would go in slices.
    assert not re.findall(rf"slice-start\(.*\[{P},", text)


def decode(*, kind: str, page: int, lengths: list[int], window: int | None):
    """A step of decoding, for the count of what it reads."""
    shape = 200, 8, page, 128
    keys, values = (
        describe_pages(kind, shape, jax.ShapeDtypeStruct, per_channel=per_channel)
        for per_channel in (True, False)
    )
    tables = (
        np.arange(len(lengths) * 40, dtype=np.int32).reshape(len(lengths), 40)
        % shape[0]
    )
    starts = np.arange(len(lengths) + 1, dtype=np.int32)
    q = jax.ShapeDtypeStruct((len(lengths), 32, 128), jnp.bfloat16)

    def run(q, keys, values, *integers):
        return paged_attention(
            q, keys, values, *integers, uniform_rows=(len(lengths), 1), window=window
        )

    return run, (q, keys, values, tables, np.array(lengths, np.int32), starts)


@pytest.mark.parametrize(
    ("kind", "page", "window"),
    [
        ("bfloat16", 16, None),
        ("bfloat16", 32, 100),
        ("int8", 32, None),
        ("int4", 64, None),
    ],
)
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_decoding_reads_its_pages_and_no_more(chip, kind, page, window):
    """Bytes that the compiled kernel copies from HBM, each page's keys and values as
    they lie there: at most 1.05 times those of the rows' own pages, of which a window
    leaves its own; and queries, 16 rows a kv head, whose next copy is counted where a
    core has none."""
    lengths = [601, 33, 0, 640, 5, 350]
    kwargs = {"kind": kind, "page": page, "lengths": lengths, "window": window}
    (kernel,) = measure(Spec(f"{__name__}:decode", kwargs), chip).kernels
    firsts = [0 if window is None else max(n - window, 0) // page for n in lengths]
    pages = sum(-(-n // page) - first for n, first in zip(lengths, firsts, strict=True))
    element = {"bfloat16": 2, "int8": 1, "int4": 0.5}[kind]
    of_page = 2 * 8 * page * 128 * element
    if kind != "bfloat16":
        # Scales, and zeros: 8 heads of bf16 fill a tile of 8 or 16, values' tokens one
        # of 128.
        of_page += 2 * (1 if kind == "int8" else 2) * 16 * 128 * 2
    queries = 2 * (len(lengths) + 4) * 8 * 16 * 128
    assert (
        pages * of_page * 0.8
        <= kernel.hbm_read_bytes
        <= 1.05 * pages * of_page + queries
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tokens_are_written_in_place(device, dtype):
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Explicit,))
    here = NamedSharding(mesh, PartitionSpec())
    pages, new, slots = (
        jax.ShapeDtypeStruct(shape, kind, sharding=here)
        for shape, kind in (
            ((P, 8, 16, 128), dtype), ((40, 8, 128), dtype), ((40,), jnp.int32)
        )
    )  # fmt: skip
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(write_pages, donate_argnums=0).lower(pages, new, slots).compile()
        )
    memory = compiled.memory_analysis()
    pool = P * 8 * 16 * 128 * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == pool
    assert memory.temp_size_in_bytes < pool / 20


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("fp32, window, cap", "paged"),
        ("latent", "paged"),
        ("latent", "int8"),
        ("latent", "int4"),
    ],
)
def test_pages_of_narrow_heads_are_not_copied(device, case, kind):
    """Where features do not fill lanes, pages have room up to the next 128 on a TPU."""
    (N, K, H, Hv), page, dtype, static, _ = CASES[case]
    page *= 2 if kind == "int4" else 1
    axes = ("data", "fsdp", "expert", "context", "tensor", "stage")
    mesh = Mesh(
        np.array([device]).reshape((1,) * 6), axes, axis_types=(AxisType.Explicit,) * 6
    )
    here = NamedSharding(mesh, PartitionSpec())
    window = static.get("window")
    config = PagedCacheConfig() if kind == "paged" else QuantizedCacheConfig(kind=kind)
    multiple = choose_feature_multiple(device.platform)
    layout = CacheLayout(1, ROWS, P, page, cache=config, feature_multiple=multiple)
    latent = "value_dim" in static
    F = R - ROWS
    specs = kv_cache_spec(layout, window, K, H, None if latent else Hv)

    def like(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    cache = jax.tree.map(lambda spec: like(spec.shape, spec.dtype or dtype), specs)
    q, key = like((1, TOKENS, N, H), dtype), like((1, TOKENS, K, H), dtype)
    value = None if latent else like((1, TOKENS, K, Hv), dtype)
    tables = (like((1, R, M)),), (like((1, TOKENS)),)
    shapes = (1, TOKENS), (1, TOKENS), (1, R), (1, R + 1), (1, F)
    arrays = *map(like, shapes), *tables

    def run(cache, q, key, value, arrays):
        batch = RaggedBatch(*arrays, windows=(window,), uniform_rows=(ROWS, 1))
        settings = dict(static)
        value_dim = settings.pop("value_dim", None)
        terms = AttentionTerms(**settings)
        return cache.attend(
            q, key, value, batch, terms, rules=AxisRules(), value_dim=value_dim
        )

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(run, donate_argnums=0).lower(cache, q, key, value, arrays).compile()
        )
    largest = max(jax.tree.leaves(cache), key=lambda x: x.size)
    text = compiled.as_text()
    wide = largest.shape[-1]
    pools = rf"= \w+\[(?:1,)?(?:{P},\d+,\d+|{P * K * page}),{wide}\]\S* ([\w-]+)\("
    operations = re.findall(pools, text)
    assert operations
    assert not {"copy", "copy-done", "transpose"} & {*operations}
