"""What serving costs: sums by hand, rooflines by hand, and the search against every
candidate."""

import json
from dataclasses import asdict, replace
from math import ceil, inf
from types import SimpleNamespace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.model_runner import allocate_state
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.caches import CacheArraySpec, CacheLayout, RecurrentCache
from maxlm.plan.communication import list_collectives
from maxlm.plan.hardware import CHIPS
from maxlm.plan.machine import Machine
from maxlm.plan.served_model import (
    ServedModel,
    ServingOptions,
    read_workload,
    resolve_replica_mesh,
)
from maxlm.plan.serving import list_serving_points, search_serving
from maxlm.plan.serving_cache import (
    PAGE_TOKENS,
    CacheFormat,
    count_layer_caches,
    count_sequence_bytes,
    count_state_bytes,
    count_token_bytes,
)
from maxlm.plan.timing import DECODE_EFFICIENCY
from maxlm.plan.workload import RunWorkload
from maxlm.run.config import RunConfig
from tests.models.building import decoder, random_params
from tests.plan.architectures import run

Size = tuple[int, int]
"""Heads, and the size of each."""


def load(name: str, *settings: str) -> RunConfig:
    return load_config(RunConfig, f"models/{name}", settings).value


def place(
    name: str,
    on: str,
    prompt: int,
    new: int,
    *,
    tensor: int = 1,
    cache: CacheFormat = "auto",
    weights: str = "auto",
) -> ServedModel:
    machine = Machine.from_name(on)
    options = ServingOptions(prompt, new, weights)
    work = read_workload(load(name), machine, options)
    return serve(work, machine, options, tensor, cache)


def serve(
    work: RunWorkload,
    machine: Machine,
    options: ServingOptions,
    tensor: int,
    cache: CacheFormat,
) -> ServedModel:
    sizes = resolve_replica_mesh(work, machine, tensor)
    return ServedModel(work, machine, options, sizes, cache)


def test_the_sums_that_everyone_knows():
    """Llama 70B, 4,096 tokens in 16 bits: 1.34 GB; a batch of 32: 42.9 GB."""
    served = place("llama3_70b", "v5p-2", 3840, 256, tensor=1)
    whole = count_sequence_bytes(served.layer_caches, 4096)
    assert whole == 2 * 80 * 8 * 128 * 4096 * 2 == 1_342_177_280
    assert 32 * whole == 42_949_672_960
    assert served.count_cache_bytes(4096) == 1_342_177_280
    halved = place("llama3_70b", "h100x2", 3840, 256, tensor=2)
    assert halved.count_cache_bytes(4096) == 1_342_177_280 / 2


def quantized_bytes(tokens: int, key: Size, value: Size | None, bits: int) -> int:
    """Bytes of one layer's keys and values, (heads, size) each, as numpy holds them: a
    ring of 64 tokens and two pages in 16 bits; pages of codes for all, keys' scales by
    channel, values' by token."""
    page = 32 if bits == 8 else 64
    scales = 1 if bits == 8 else 2
    pages = ceil(tokens / page)
    arrays: list[np.ndarray] = []
    shapes = [shape for shape in (key, value) if shape]
    for heads, size in shapes:
        arrays.append(np.zeros((64 + 2 * page, heads, size), np.float16))
        arrays.append(np.zeros((pages, page, heads, size * bits // 8), np.uint8))
    arrays.append(np.zeros((pages, scales, *key), np.float16))
    if value:
        arrays.append(np.zeros((pages, scales, page, value[0]), np.float16))
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize(
    ("name", "layers", "key", "value"),
    [
        ("smollm2_135m", 30, (3, 64), (3, 64)),
        ("gpt2", 12, (12, 64), (12, 64)),
        ("deepseek_v2_lite", 27, (1, 512 + 64), None),  # values are a part of the keys
    ],
)
@pytest.mark.parametrize("length", [40, 64, 65, 777])
def test_caches_are_as_large_as_their_arrays(name, layers, key, value, length):
    # A TPU's pages have room for whole lanes.
    def pad(shape: Size) -> Size:
        heads, size = shape
        return heads, ceil(size / 128) * 128

    key = pad(key)
    value = value and pad(value)
    elements = sum(heads * size for heads, size in (key, value or (0, 0)))
    exact = 2 * layers * elements
    for cache, bits in (("auto", 16), ("int8", 8), ("int4", 4)):
        served = place(name, "v5p-2", 30, length - 30, cache=cache)
        if cache == "auto":
            assert served.count_cache_bytes(length) == exact * 32 * ceil(length / 32)
        else:
            expected = layers * quantized_bytes(length, key, value, bits)
            assert served.count_cache_bytes(length) == expected


def test_scales_leave_what_the_formats_promise():
    token_bytes = {}
    for cache in get_args(CacheFormat):
        served = place("smollm2_135m", "h100x1", 8, 8, cache=cache)
        token_bytes[cache] = count_token_bytes(served.layer_caches)
    assert token_bytes["int8"] / token_bytes["auto"] <= 0.53
    assert token_bytes["int4"] / token_bytes["auto"] <= 0.31


def test_windows_keep_their_pages_alone():
    """Gemma 3 1B: of 26 layers each sixth sees all tokens, others 512."""
    wide = 26 // 6
    token = 2 * 256 * 2
    for length in (100, 512, 2000, 5000):
        served = place("gemma3_1b", "v5e-1", 50, length - 50)
        pages = ceil(length / PAGE_TOKENS)
        window_pages = min(pages, ceil(511 / PAGE_TOKENS) + 1)
        slots = PAGE_TOKENS * (wide * pages + (26 - wide) * window_pages)
        assert served.count_cache_bytes(length) == token * slots
    row = place("gemma3_1b", "v5e-1", 50, 4950, cache="int8")
    local = next(layer for layer in row.layer_caches if layer.window)
    page = PAGE_TOKENS * 256 + 256 * 2 + PAGE_TOKENS * 256 + PAGE_TOKENS * 2
    pages = ceil(511 / PAGE_TOKENS) + 1
    assert count_sequence_bytes({local: 1}, 5000) == 128 * token + pages * page


@pytest.mark.parametrize(
    ("name", "layers", "state", "inputs", "token"),
    [
        # Of 52 layers 24 have a state, 4 attention; three convolved inputs.
        ("nemotron_h_8b", 24, 128 * 64 * 128, 3 * (8192 + 2 * 8 * 128), 4 * 2048),
        # 20 of 27; the others one vector.
        ("kimi_linear_48b_a3b", 20, 32 * 128 * 128, 3 * 3 * 4096, 7 * (512 + 64)),
        # 36 of 48.
        ("qwen3_next_80b_a3b", 36, 32 * 128 * 128, 3 * 8192, 12 * 2 * 2 * 256),
        # 70 of 80, without convolutions.
        ("minimax_text_01", 70, 64 * 128 * 128, 0, 10 * 2 * 8 * 128),
        # In each of 36 layers attention beside a state.
        ("falcon_h1_0_5b", 36, 24 * 64 * 128, 3 * (1536 + 256), 36 * 2 * 2 * 64),
    ],
)
def test_hybrids_keep_states_of_one_size_beside_pages(
    name, layers, state, inputs, token
):
    """States in fp32, the rest in 16 bits; a GPU's pages are not padded."""
    fixed = layers * (4 * state + 2 * inputs)
    for length in (32, 640):
        served = place(name, "h100x8", 30, length - 30)
        assert served.count_cache_bytes(length) == fixed + 2 * token * length
    assert count_state_bytes(served.layer_caches) == fixed
    # Each token writes the states as well as it reads them.
    bandwidth = 3350e9 * DECODE_EFFICIENCY["nvidia"].reading
    context = 32 * ceil((30 + 610 / 2) / 32)
    time = served.estimate_decode_seconds(np.array([512.0]))["cache"]
    moved = 512 * (2 * fixed + 2 * token * context)
    assert time[0] == pytest.approx(moved / bandwidth, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "parallel_heads",
        *(
            pytest.param(name, marks=pytest.mark.more)
            for name in (
                "mamba",
                "mamba2",
                "mamba2_groups",
                "lightning",
                "short_conv",
                "delta_hybrid",
                "kimi_delta_attention",
                "sparse",
                "latent",
                "pattern",
            )
        ),
    ],
)
def test_caches_are_as_large_as_the_engines(name, one_device_mesh):
    """The arrays that the engine allocates for 5 rows and 11 pages."""
    config = run(name, "dp").model
    assert isinstance(config, DecoderConfig)
    layout = CacheLayout(num_shards=1, num_rows=5, num_pages=11, page_size=PAGE_TOKENS)
    with jax.set_mesh(one_device_mesh):
        model = decoder(config, one_device_mesh)
        arrays = allocate_state(model, layout, PAGE_TOKENS)
        planned = count_layer_caches(model)
    row = count_sequence_bytes(planned, 0)
    page = count_sequence_bytes(planned, PAGE_TOKENS) - row
    allocated = sum(array.nbytes for array in jax.tree.leaves(arrays))
    assert allocated == 5 * row + 11 * page


@pytest.mark.parametrize("num_drafts", [1, pytest.param(5, marks=pytest.mark.more)])
def test_modules_that_guess_have_caches_as_large_as_the_engines(
    num_drafts, one_device_mesh
):
    """One of two modules for one guess, both for five."""
    config = run("mtp", "dp")
    assert isinstance(config.model, DecoderConfig)
    options = ServingOptions(9, 5, mtp_drafts=num_drafts)
    machine = Machine.from_name("h100x1")
    work = read_workload(config, machine, options)
    planned = serve(work, machine, options, 1, "auto").layer_caches
    with jax.set_mesh(one_device_mesh):
        model = decoder(config.model, one_device_mesh, jnp.bfloat16)
        sizes = {"max_sequences": 3, "max_length": 75, "page_size": PAGE_TOKENS}
        speculation = {"kind": "mtp", "num_drafts": num_drafts}
        settings = {**sizes, "speculation": speculation}
        params = jax.device_put(
            random_params(config.model, one_device_mesh),
            NamedSharding(one_device_mesh, PartitionSpec()),
        )
        engine = Engine(model, params, EngineConfig.model_validate(settings))
        layout = engine._spec.layout
        arrays = allocate_state(model, layout, PAGE_TOKENS).caches
    allocated = sum(array.nbytes for array in jax.tree.leaves(arrays))
    page = count_sequence_bytes(planned, PAGE_TOKENS)
    assert allocated == layout.num_pages * page
    without = count_sequence_bytes(count_layer_caches(model), PAGE_TOKENS)
    num_layers = config.model.num_layers
    assert page / without == (num_layers + min(2, num_drafts)) / num_layers


@pytest.mark.parametrize(("tensor", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_devices_keep_one_kv_head_each_where_there_are_fewer(tensor, heads):
    """Qwen3 30B: 48 layers with 4 heads of 128. No kernel is gathered."""
    served = place("qwen3_30b_a3b", "h100x8", 32, 32, tensor=tensor)
    whole = place("qwen3_30b_a3b", "h100x8", 32, 32, tensor=1)
    assert served.count_cache_bytes(64) == 2 * 48 * heads * 128 * 2 * 64
    assert count_token_bytes(served.unsplit_caches) == count_token_bytes(
        whole.layer_caches
    )
    shape, _ = served._plan_pass(1, 4)
    kinds = {sent.kind for sent in list_collectives(shape) if sent.phase == "forward"}
    assert kinds <= {"all-reduce"}


def test_a_state_is_of_one_size():
    state = RecurrentCache(CacheArraySpec((1, 1, 7), ("batch", None, "state")))
    stack = SimpleNamespace(name="layers", kinds=[SimpleNamespace(window=None)])
    config = SimpleNamespace(layer_stacks=[stack])
    caches: Any = {"layers": (state,) * 3}
    model: Any = SimpleNamespace(
        dtype="float32", config=config, cache_specs=lambda layout: caches
    )
    for length in (1, 1000):
        assert (
            count_sequence_bytes(count_layer_caches(model, "int8"), length) == 3 * 7 * 4
        )


def test_weights_are_counted_once_and_split():
    config = load("llama3_1_8b")
    counted = []
    for tensor in (1, 2, 4, 8):
        served = place("llama3_1_8b", "h100x8", 64, 64, tensor=tensor)
        norms = (2 * config.model.num_layers + 1) * 4096
        whole = 2 * (8_030_261_248 - norms)
        assert served.count_memory_bytes(1)["weights"] == whole / tensor + 4 * norms
        counted.append(served.count_memory_bytes(1)["sequences"])
    assert counted == sorted(counted, reverse=True)
    fp8 = place("llama3_1_8b", "h100x1", 64, 64, weights="fp8")
    layers = 8_030_261_248 - norms - 2 * 128256 * 4096
    # A scale for each output of query, key, value, out, gate, up and down.
    outputs = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    expected = whole - layers + 4 * outputs + 4 * norms
    assert fp8.count_memory_bytes(1)["weights"] == expected
    # Four bits, and a bfloat16 scale for 32 numbers.
    int4 = place("llama3_1_8b", "h100x1", 64, 64, weights="int4-g32")
    expected = whole - 2 * layers + layers // 2 + layers // 16 + 4 * norms
    assert int4.count_memory_bytes(1)["weights"] == expected
    with pytest.raises(MaxlmError, match="no scheme 'int44'"):
        place("llama3_1_8b", "h100x1", 64, 64, weights="int44")


def test_a_step_is_its_roofline():
    served = place("llama3_1_8b", "h100x1", 1024, 512)
    norms = 65 * 4096
    bandwidth = 3350e9 * DECODE_EFFICIENCY["nvidia"].reading
    read = 2 * (8_030_261_248 - norms - 128256 * 4096) + 4 * norms
    time = served.estimate_decode_seconds(np.array([1.0, 4000.0]))
    assert time["weights"][0] == pytest.approx(read / bandwidth)
    cached = 2 * 32 * 8 * 128 * 2 * (1024 + 256) / bandwidth
    assert np.asarray(time["cache"]) == pytest.approx([cached, 4000 * cached])
    flops = 2 * 4000 * (8_030_261_248 - norms - 128256 * 4096)
    assert time["weights"][1] == pytest.approx(flops / (989.4e12 * 0.53))
    assert np.all(time["communication"] == 0)


def test_a_cpu_reads_weights_at_the_rate_measured_in_reading(monkeypatch):
    """SiLU, which reads and writes, computes rather than waits for memory there."""
    cpu = replace(
        CHIPS["h100"], family="cpu", memory_bandwidth=5e9, read_bandwidth=20e9
    )
    monkeypatch.setattr("maxlm.plan.machine.measure_cpu", lambda _: cpu)
    served = place("smollm2_135m", "cpux1", 32, 64)
    weights = served.estimate_decode_seconds(np.array([1.0]))["weights"]
    # With its table, which is the head too (huggingface.co/HuggingFaceTB/SmolLM2-135M:
    # 135M).
    read = 4 * 134_515_008
    assert weights == pytest.approx(read / (20e9 * DECODE_EFFICIENCY["cpu"].reading))
    assert served.machine.to_json()["read_bandwidth"] == 20e9


def test_tensor_parallelism_sums_up_twice_a_layer():
    served = place("llama3_1_8b", "h100x8", 128, 128, tensor=4)
    split = served.split
    rows = 16
    hidden = rows * 4096 * 2
    logits = rows * 128256 * 4

    def seconds(kind: str, size: int) -> float:
        return (
            float(served.machine.estimate_seconds(kind, ("tensor",), size, split))
            / 0.54
        )

    expected = (2 * 32 + 1) * seconds("all-reduce", hidden) + seconds(
        "all-gather", logits
    )
    assert served.estimate_decode_seconds(rows)["communication"] == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    "name", ["llama3_1_8b", "mixtral_8x7b", "gemma3_4b", "deepseek_v2_lite"]
)
def test_more_sequences_are_slower_each_and_faster_together(name):
    (plan,), _ = search_serving(load(name), Machine.from_name("v5p-16"), tensor=4)
    batches = [point.batch for point in plan.curve]
    assert batches == sorted(set(batches))
    assert batches[-1] == plan.max_batch or len(batches) > 13
    for values in ("tpot_seconds", "tokens_per_second"):
        figures = [getattr(point, values) for point in plan.curve]
        assert figures == sorted(figures)
    assert plan.fits
    assert json.loads(json.dumps(asdict(plan), allow_nan=False))["point"]["batch"] > 0


def test_experts_are_read_as_tokens_meet_them():
    served = place("mixtral_8x7b", "v5p-2", 64, 64)
    one = served.count_read_weight_bytes(1)
    many = served.count_read_weight_bytes(500)
    # 12.9 of 46.7 billion parameters are met by one token (Mixtral, table 1), tables
    # apart.
    assert one / many == pytest.approx(12.9 / 46.7, rel=0.02)


@pytest.mark.heavy
@pytest.mark.parametrize("tpot_ms", [None, 22.0, 14.0])
def test_nothing_better_is_missed(tpot_ms):
    config = load("llama3_1_8b")
    machine = Machine.from_name("v5e-8")
    options = ServingOptions(60_000, 2000, tpot_ms=tpot_ms)
    best = -inf
    work = read_workload(config, machine, options)
    for tensor in (1, 2, 4, 8):
        for cache in get_args(CacheFormat):
            served = serve(work, machine, options, tensor, cache)
            for batch in range(1, served.count_max_rows() * 8 // tensor + 1):
                (point,) = list_serving_points(served, [batch])
                if point.tpot_seconds <= (tpot_ms or inf) / 1e3:
                    best = max(best, point.tokens_per_second)
    plans, _ = search_serving(config, machine, options, caches=get_args(CacheFormat))
    assert len(plans) == 12
    good = [plan.point.tokens_per_second for plan in plans if plan.is_feasible]
    assert good == sorted(good, reverse=True)
    assert good[:1] == pytest.approx([best])


def test_what_cannot_be():
    one = Machine.from_name("h100x1")
    config = load("llama3_1_70b")
    plan = search_serving(config, one)[0][0]
    assert (plan.fits, plan.max_batch) == (False, 0)
    (slow,), _ = search_serving(load("llama3_1_8b"), one, ServingOptions(tpot_ms=1))
    assert slow.fits
    assert not slow.meets_targets
    for name, options, words in (
        ("bert_base", ServingOptions(), "decoders"),
        ("llama3_8b", ServingOptions(8000, 193), "exceed the context of 8,192"),
        ("llama3_8b", ServingOptions(mtp_drafts=1), "no modules that predict"),
    ):
        with pytest.raises(MaxlmError, match=words):
            search_serving(load(name), one, options)
    eight = Machine.from_name("h100x8")
    for name, words in (
        ("qwen2_5_7b", "heads=28 does not divide over tensor=8"),
        ("phi3_medium", "5 query heads a device straddle the groups of 4"),
    ):
        with pytest.raises(MaxlmError, match=words):
            search_serving(load(name), eight, tensor=8)
