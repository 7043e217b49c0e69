"""Promise: int8 and int4 caches answer as KIVI says, evicting ones keep what their
papers say, each against a float64 simulation; none holds more than it should."""

from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from pydantic import TypeAdapter

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.model_runner import allocate_state, copy_rows, state_specs
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.step_arrays import StepSizes, make_ragged_batch
from maxlm.models.caches.config import AnyCacheConfig
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.caches.layout import CacheLayout, allocate_cache_array
from maxlm.models.caches.paged import PagedCache
from maxlm.parallel.terms import AttentionTerms
from maxlm.sharding import ShardingConfig
from tests.errors import message

ROWS, CHUNK, CHUNKS = 4, 11, 2
# (tokens that rows decode or try, how many are accepted; tokens of rows' chunks) of
# each step.
DECODE = {0: 1, 1: 1, 2: 1, 3: 1}
STEPS: list[tuple[dict[int, int], dict[int, int]]] = [
    ({}, {0: 11}),
    ({}, {0: 6, 1: 3}),
    ({0: 1}, {2: 10}),
    ({0: 1, 1: 1}, {2: 8, 3: 1}),
    *[(DECODE, {})] * 9,
]
OPTIONS: dict[str, Any] = {
    "gqa": {},
    "mqa": {"heads": (4, 1)},
    "mla": {
        "heads": (4, 1),
        "value_dim": 5,
        "sinks": np.array([1.0, 4.0, -2.0, 0.3], np.float32),
    },
    "window": {"window": 9},
    "cap, slopes": {
        "soft_cap": 2.0,
        "slopes": np.array([0.5, 0.1, 0.02, 0.3], np.float32),
    },
    "sinks": {"sinks": np.array([0.5, -2.0, 1.5, 3.0], np.float32), "window": 11},
    "biases": {
        "biases": np.random.default_rng(5).normal(size=(4, 15)).astype(np.float32)
    },
}


def parse(**settings: Any) -> Any:
    return TypeAdapter(AnyCacheConfig).validate_python(settings)


@dataclass
class CacheCase:
    """Sequences of random tokens, and how they are attended to."""

    config: Any
    heads: tuple[int, int] = (4, 2)
    value_dim: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    slopes: Any = None
    biases: Any = None
    sinks: Any = None
    chunk: int | None = None
    scale: float | None = 0.7
    page: int = 4
    size: int = 8
    feature_multiple: int = 1
    whole_keys: bool = False

    def run(self, mesh, steps, width=1) -> tuple[Any, Any, Any, Any]:
        """Returns q, k, v [D, R, T, heads, size] and what the cache answered; the cache
        too."""
        N, K = self.heads
        rng = np.random.default_rng(3)
        rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
        if self.value_dim or self.whole_keys:
            rules = rules.model_copy(update={"kv_heads": ()})
        D = prod(mesh.shape[axis] for axis in rules.batch)
        T = 48
        q, k, v = (rng.normal(size=(D, ROWS, T, n, self.size)) for n in (N, K, K))
        pages = ROWS * T // self.page + 1
        layout = CacheLayout(
            D,
            ROWS,
            pages,
            self.page,
            cache=self.config,
            head_ways=prod(mesh.shape[axis] for axis in rules.heads),
            feature_multiple=self.feature_multiple,
        )
        shape = StepSizes(ROWS, width, CHUNK, CHUNKS, 1)
        value_size = None if self.value_dim else self.size
        spec = kv_cache_spec(
            layout, self.window, K, self.size, value_size, chunk=self.chunk
        )
        terms = AttentionTerms(
            self.window,
            self.scale,
            self.soft_cap,
            self.slopes,
            self.biases,
            self.sinks,
            self.chunk,
        )

        @jax.jit
        def step(cache, q, k, v, **arrays: jax.Array | tuple[jax.Array, ...]):
            arrays = jax.tree.map(
                lambda x: jax.sharding.reshard(x, rules.spec("batch")), arrays
            )
            inputs: Any = SimpleNamespace(**arrays)
            batch = make_ragged_batch(inputs, shape, layout, (self.window,), rules)
            split = lambda x, h: jax.sharding.reshard(x, rules.spec("batch", None, h))  # noqa: E731
            q, k, v = split(q, "heads"), split(k, "kv_heads"), split(v, "kv_heads")
            values = None if self.value_dim else v
            y, cache = cache.attend(
                q, k, values, batch, terms, rules=rules, value_dim=self.value_dim
            )
            return jax.sharding.reshard(y, jax.sharding.PartitionSpec()), cache

        out = np.full((D, ROWS, T, N, self.value_dim or self.size), np.nan)
        table = [
            rng.permutation(pages - 1)[: ROWS * T // self.page] + 1 for _ in range(D)
        ]
        table = np.array(table, np.int32).reshape(D, ROWS, -1)
        known = np.zeros(ROWS, int)
        with jax.set_mesh(mesh):
            cache = jax.jit(
                lambda: jax.tree.map(
                    lambda s: allocate_cache_array(s, rules, jnp.float32), spec
                )
            )()
            for decode, chunks in steps:
                computed = np.full((D, ROWS), -1, np.int32)
                counts = np.zeros((D, ROWS), np.int32)
                for row in decode:
                    computed[:, row] = known[row]
                    counts[:, row] = width
                ids, starts, sizes = np.zeros((3, D, CHUNKS), np.int32)
                places = [(r, known[r] + g) for r in range(ROWS) for g in range(width)]
                for at, (row, size) in enumerate(chunks.items()):
                    ids[:, at] = row
                    starts[:, at] = known[row]
                    sizes[:, at] = size
                    places += [(row, known[row] + i) for i in range(size)]
                places += [(0, 0)] * (ROWS * width + CHUNK - len(places))
                index = tuple(np.array(places).T)
                step_arrays = [x[:, *index].astype(np.float32) for x in (q, k, v)]
                for (
                    row,
                    accepted,
                ) in decode.items():  # what is guessed wrongly is other tokens
                    for g in range(accepted, width):
                        step_arrays[1][:, row * width + g] *= -3
                y, cache = step(
                    cache, *step_arrays, computed=computed, counts=counts, chunk_rows=ids,
                    chunk_starts=starts, chunk_sizes=sizes, chunk_lengths=starts + sizes,
                    page_tables=(table,),
                )  # fmt: skip
                for at, (row, place) in enumerate(places):
                    new = (
                        decode.get(row, 0) if at < ROWS * width else chunks.get(row, 0)
                    )
                    if known[row] <= place < known[row] + new:
                        out[:, row, place] = y[:, at]
                for row, new in (*decode.items(), *chunks.items()):
                    known[row] += new
        return (q, k, v if value_size else k[..., : self.value_dim]), out, known, cache

    def weigh(self, q, k, at, keys_at, head) -> np.ndarray:
        """Softmax weights [G, T, S] of one kv head's queries [T, G, H]; keys -1 are
        none."""
        G = self.heads[0] // self.heads[1]
        heads = slice(head * G, (head + 1) * G)
        scores = np.einsum("tgh,sh->gts", q, k) * self.scale
        distance = at[:, None] - keys_at
        if self.soft_cap:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
        if self.slopes is not None:
            scores -= self.slopes[heads, None, None] * distance
        if self.biases is not None:
            scores += self.biases[heads][:, np.clip(-distance, -7, 7) + 7]
        seen = (distance >= 0) & (distance < (self.window or 1000))
        if self.chunk:
            seen &= at[:, None] // self.chunk == keys_at // self.chunk
        weights = np.where(seen, np.exp(scores), 0)
        sink = 0 if self.sinks is None else np.exp(self.sinks[heads, None, None])
        return weights / (weights.sum(-1, keepdims=True) + sink)


def list_blocks(steps, row: int) -> list[tuple[int, int, bool]]:
    """(start, tokens, whether it is a chunk) of what a row computes together."""
    blocks = []
    start = 0
    for decode, chunks in steps:
        for which, part in enumerate((decode, chunks)):
            if row in part:
                blocks.append((start, part[row], bool(which)))
                start += part[row]
    return blocks


def round_to(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """What KIVI makes of numbers that share a scale along an axis."""
    bf16 = lambda a: a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float)  # noqa: E731
    if bits == 8:
        scale = bf16(np.abs(x).max(axis, keepdims=True) / 127)
        return np.clip(np.round(x / scale), -127, 127) * scale
    zero = bf16(x.min(axis, keepdims=True))
    scale = bf16((x.max(axis, keepdims=True) - zero) / 15)
    return np.clip(np.round((x - zero) / scale), 0, 15) * scale + zero


def simulate_kivi(case: CacheCase, q, k, v, blocks, ring: int) -> np.ndarray:
    """One row's answers [T, N, Hv]: pages older than the recent ones are rounded."""
    N, K = case.heads
    page = case.page
    bits = int(case.config.kind[3:])
    pages = k.reshape(-1, page, K, case.size)
    rough_k = round_to(pages, bits, 1).reshape(k.shape)
    rough_v = (
        rough_k[..., : case.value_dim] if case.value_dim else round_to(v, bits, -1)
    )
    out = np.full((len(k), N, v.shape[-1]), np.nan)
    for start, size, _ in blocks:
        limit = max(start // page - ring, 0) * page
        old = np.arange(len(k))[:, None, None] < limit
        end = start + size
        at = start
        keys, values = np.where(old, rough_k, k)[:end], np.where(old, rough_v, v)[:end]
        at = np.arange(start, end)
        for head in range(K):
            queries = slice(head * N // K, (head + 1) * N // K)
            weights = case.weigh(
                q[start:end, queries], keys[:, head], at, np.arange(end), head
            )
            out[start:end, queries] = np.einsum("gts,sh->tgh", weights, values[:, head])
    return out


def simulate_eviction(
    case: CacheCase, q, k, v, blocks
) -> tuple[np.ndarray, list[set[int]]]:
    """One row's answers [T, N, Hv], and each kv head's tokens at the end."""
    (N, K), config = case.heads, case.config
    budget = min(config.budget, case.window or config.budget)
    out = np.full((len(k), N, v.shape[-1]), np.nan)
    last = []
    for head in range(K):
        queries = slice(head * N // K, (head + 1) * N // K)
        kept_positions = []
        scores = {}
        for start, size, is_chunk in blocks:
            end = start + size
            at = np.arange(start, start + size)

            def rank(token):
                if case.window and token <= end - case.window:  # noqa: B023
                    return -1, token
                if case.chunk and token // case.chunk < end // case.chunk:  # noqa: B023
                    return -1, token
                if config.kind == "sinks":
                    return (1e9 if token < config.num_sinks else 0), token
                return (1e9 if token >= end - config.recent else scores[token]), token  # noqa: B023

            if not is_chunk:  # it takes another's place, then attends
                kept_positions = sorted(kept_positions, key=rank)[-(budget - 1) :]
            kept_positions = sorted(kept_positions) + at.tolist()
            weights = case.weigh(
                q[start:end, queries],
                k[kept_positions, head],
                at,
                np.array(kept_positions),
                head,
            )
            out[start:end, queries] = np.einsum(
                "gts,sh->tgh", weights, v[kept_positions, head]
            )
            if config.kind == "h2o":
                for token, mass in zip(
                    kept_positions, weights.sum((0, 1)), strict=True
                ):
                    scores[token] = scores.get(token, 0) + mass
            if config.kind == "snapkv":
                scores.update(dict.fromkeys(range(start, end), 0))
            if config.kind == "snapkv" and is_chunk:
                mass = weights[:, -min(config.recent, size) :].sum((0, 1))
                around = np.convolve(
                    mass, np.ones(config.pooling) / config.pooling, "full"
                )
                side = config.pooling // 2
                scores = dict(
                    zip(
                        kept_positions,
                        around[side : side + len(kept_positions)],
                        strict=True,
                    )
                )
            kept_positions = sorted(kept_positions, key=rank)[-budget:]
        last.append(set(kept_positions))
    return out, last


def check(outputs, expected, known) -> None:
    for row, tokens in enumerate(known):
        np.testing.assert_allclose(
            outputs[row, :tokens], expected[row][:tokens], atol=2e-5
        )


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.more), "int4"])
@pytest.mark.parametrize("name", OPTIONS)
def test_quantized_answers_are_kivi_s(one_device_mesh, kind, name):
    case = CacheCase(parse(kind=kind, recent=3), **OPTIONS[name])
    (q, k, v), outputs, known, cache = case.run(one_device_mesh, STEPS)
    assert not isinstance(cache, PagedCache)
    both = [
        simulate_kivi(case, q[0, r], k[0, r], v[0, r], list_blocks(STEPS, r), 1)
        for r in range(4)
    ]
    check(outputs[0], both, known)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("paged", marks=pytest.mark.more),
        pytest.param("int8", marks=pytest.mark.more),
        "int4",
    ],
)
@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_room_for_more_features_changes_no_answer(one_device_mesh, kind, name):
    recent = {} if kind == "paged" else {"recent": 3}
    narrow = CacheCase(parse(kind=kind, **recent), **OPTIONS[name], scale=8**-0.5)
    wide = replace(narrow, feature_multiple=12, scale=None)
    _, expected, known, _ = narrow.run(one_device_mesh, STEPS)
    _, outputs, _, cache = wide.run(one_device_mesh, STEPS)
    pages = cache.key if kind == "paged" else cache.key.codes
    assert pages.shape[-1] == 12
    check(outputs[0], expected[0], known)


@pytest.mark.heavy
def test_rejected_guesses_leave_no_trace(one_device_mesh):
    """Rows try 4 tokens a step, and 1 to 4 are right."""
    case = CacheCase(parse(kind="int4", recent=5))
    rng = np.random.default_rng(0)
    steps: Any = [*STEPS[:2], ({}, {2: 1, 3: 10})]
    steps += [({r: int(rng.integers(1, 5)) for r in range(4)}, {}) for _ in range(9)]
    (q, k, v), outputs, known, _ = case.run(one_device_mesh, steps, width=4)
    both = [
        simulate_kivi(case, q[0, r], k[0, r], v[0, r], list_blocks(steps, r), 2)
        for r in range(4)
    ]
    check(outputs[0], both, known)


# Those that together have every option of attention.
FEW = ("mla", "cap, slopes", "sinks", "biases")
EVICTED = OPTIONS | {"chunks": {"window": 10, "chunk": 10}}
EVICTING = {
    "h2o": parse(kind="h2o", budget=7, recent=3),
    "snapkv": parse(kind="snapkv", budget=8, recent=3, pooling=3),
    "sinks": parse(kind="sinks", budget=6, num_sinks=2),
}


def check_eviction(case: CacheCase, mesh, steps=STEPS) -> None:
    (q, k, v), outputs, known, cache = case.run(mesh, steps)
    positions = np.asarray(cache.positions)
    for shard in range(len(outputs)):
        for row, tokens in enumerate(known):
            arrays = (
                q[shard, row],
                k[shard, row],
                v[shard, row],
                list_blocks(steps, row),
            )
            expected, kept_positions = simulate_eviction(case, *arrays)
            np.testing.assert_allclose(
                outputs[shard, row, :tokens], expected[:tokens], atol=2e-5
            )
            stored_positions = [
                set((row_positions[row_positions > 0] - 1).tolist())
                for row_positions in positions[shard, row]
            ]
            assert stored_positions == kept_positions


@pytest.mark.heavy
@pytest.mark.parametrize("kind", EVICTING)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else pytest.mark.more)
        for name in EVICTED
    ],
)
def test_evicting_caches_keep_what_a_simulation_keeps(one_device_mesh, kind, name):
    check_eviction(CacheCase(EVICTING[kind], **EVICTED[name]), one_device_mesh)


@pytest.mark.parametrize("kind", ["int4", "h2o"])
def test_caches_of_which_a_layer_has_no_use_are_refused(kind):
    """Integers know no chunks; what a layer has chosen for itself others cannot read."""
    more = {"budget": 7, "recent": 3} if kind == "h2o" else {"recent": 3}
    layout = CacheLayout(1, ROWS, 9, 4, cache=parse(kind=kind, **more))
    sizes: dict[str, Any] = {"num_kv_heads": 2, "key_size": 8, "value_size": 8}
    with pytest.raises(MaxlmError, match=f"kind={kind} for layers that share keys"):
        kv_cache_spec(layout, None, **sizes, is_shared=True)
    if kind == "int4":
        with pytest.raises(MaxlmError, match="kind=int4 for attention in chunks of 30"):
            kv_cache_spec(layout, 30, **sizes, chunk=30)


def test_heavy_hitters_over_many_steps(one_device_mesh):
    steps = [*STEPS, *[(DECODE, {})] * 14]
    check_eviction(
        CacheCase(parse(kind="h2o", budget=12, recent=5)), one_device_mesh, steps
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        "gqa",
        pytest.param("mla", marks=pytest.mark.more),
        pytest.param("cap, slopes", marks=pytest.mark.more),
    ],
)
def test_eight_devices_answer_alike(mesh, name):
    eight = mesh(data=2, fsdp=2, tensor=2)
    for kind in EVICTING:
        check_eviction(CacheCase(EVICTING[kind], **OPTIONS[name]), eight)
    case = CacheCase(parse(kind="int4", recent=3), **OPTIONS[name])
    (q, k, v), outputs, known, _ = case.run(eight, STEPS)
    for d in range(4):
        expected = [
            simulate_kivi(case, q[d, r], k[d, r], v[d, r], list_blocks(STEPS, r), 1)
            for r in range(4)
        ]
        check(outputs[d], expected, known)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "tensor", [pytest.param(2, marks=pytest.mark.more), 4]
)  # of 2 kv heads
@pytest.mark.parametrize("kind", ["paged", "int8", "h2o"])
def test_devices_that_compute_all_keys_answer_alike(
    mesh, one_device_mesh, kind, tensor
):
    config = EVICTING[kind] if kind == "h2o" else parse(kind=kind)
    case = CacheCase(config, **OPTIONS["cap, slopes"], sinks=OPTIONS["sinks"]["sinks"])
    _, expected, known, _ = case.run(one_device_mesh, STEPS)
    _, outputs, _, _ = replace(case, whole_keys=True).run(mesh(tensor=tensor), STEPS)
    check(outputs[0], expected[0], known)


def count_bytes(spec, unit) -> int:
    leaves = [
        spec_leaf for spec_leaf in jax.tree.leaves(spec) if spec_leaf.unit == unit
    ]
    return sum(
        prod(x.shape) * jnp.dtype(x.dtype or "bfloat16").itemsize for x in leaves
    )


def test_caches_hold_as_much_as_promised():
    sizes = {}
    for kind in ("paged", "int8", "int4"):
        layout = CacheLayout(1, 3, 10, 32, cache=parse(kind=kind))
        sizes[kind] = kv_cache_spec(layout, None, 5, 64, 64)
    token = {kind: count_bytes(spec, "page") / 320 for kind, spec in sizes.items()}
    assert token["paged"] == 2 * 2 * 5 * 64
    assert token["int8"] / token["paged"] <= 0.53
    assert token["int4"] / token["paged"] <= 0.31
    # 64 recent tokens, a page that is being filled, and one more.
    assert count_bytes(sizes["int8"], "row") == 3 * 128 * token["paged"]
    for config in EVICTING.values():
        layout = CacheLayout(1, 3, 10, 32, cache=config)
        spec = kv_cache_spec(layout, None, 5, 64, 64)
        beside = 4 if config.kind == "sinks" else 8
        assert count_bytes(spec, "page") == 0
        assert count_bytes(spec, "row") == 3 * config.budget * 5 * (2 * 2 * 64 + beside)


PROMPTS = [[1], [5, 9, 2, 40, 3, 8, 8], [7, 7], list(range(20, 43))]
SCARCE = {
    "num_pages": 14,
    "speculation": {"kind": "prompt_lookup", "min_ngram": 1, "num_drafts": 3},
}
SIZES = {"max_sequences": 3, "max_length": 48, "page_size": 4, "prefill_tokens": 16}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("cache", "scarce"),
    [
        ({"kind": "h2o", "budget": 48, "recent": 4}, {}),
        pytest.param({"kind": "int4", "recent": 48}, SCARCE, marks=pytest.mark.more),
    ],
)
def test_sequences_within_the_budget_are_exact(
    one_device_mesh, build_tiny, cache, scarce
):
    """Four prompts in three rows of an engine. In pages for one and a half someone has
    to wait, and guesses are taken back."""
    with jax.set_mesh(one_device_mesh):
        llama = build_tiny("llama", one_device_mesh, num_layers=1)
        expected = [llama.greedy(prompt, 20) for prompt in PROMPTS]
    engine = Engine(
        llama.model,
        llama.params,
        EngineConfig.model_validate({"cache": cache, **SIZES, **scarce}),
    )
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    rows = [[] for _ in PROMPTS]
    for output in engine.run(
        [GenerationRequest(str(i), tuple(p), sampling) for i, p in enumerate(PROMPTS)]
    ):
        rows[int(output.request_id)] += output.token_ids
    assert rows == expected
    assert bool(engine.stats().preemptions_total) == bool(scarce)
    assert bool(engine.stats().drafted_tokens_total) == bool(scarce)
    assert engine.stats().num_free_pages == engine.stats().num_pages


@pytest.mark.parametrize("kind", ["int8", *EVICTING])
def test_copied_rows_are_whole_and_pages_stay(llama, kind):
    """What a fork of a sequence begins with."""
    layout = CacheLayout(1, 3, 5, 4, cache=EVICTING.get(kind) or parse(kind=kind))
    sizes = (llama.model, layout, 8)
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.integers(0, 99, x.shape), x.dtype)  # noqa: E731
    state = jax.tree.map(fill, allocate_state(*sizes))
    before = jax.tree.map(np.asarray, state)
    after = copy_rows(*sizes, state, np.array([[0, 0, 1]], np.int32))
    trees = map(jax.tree.leaves, (state_specs(*sizes), before, after))
    for spec, old, new in zip(*trees, strict=True):
        np.testing.assert_array_equal(
            new, old if spec.unit == "page" else old[:, [0, 0, 1]]
        )


def test_settings_that_cannot_be_meant():
    for settings, fault in (
        (
            {"kind": "h2o", "budget": 4, "recent": 4},
            "recent=4 leaves nothing of budget=4",
        ),
        ({"kind": "sinks", "budget": 3}, "num_sinks=4 leaves nothing of budget=3"),
        ({"kind": "snapkv", "budget": 64, "pooling": 4}, "pooling=4 is even"),
    ):
        assert fault in message(lambda s=settings: parse(**s))
    layout = CacheLayout(1, 1, 2, 7, cache=parse(kind="int4"))
    assert "page_size=7 is odd" in message(lambda: kv_cache_spec(layout, None, 1, 8, 8))
    assert EngineConfig.model_validate({"cache": {"kind": "int4"}}).page_size == 64
    assert EngineConfig().page_size == 16


def test_guesses_need_a_cache_that_takes_tokens_back(llama):
    settings = SIZES | {
        "speculation": {"kind": "prompt_lookup"},
        "cache": EVICTING["h2o"],
    }
    fault = message(
        lambda: Engine(llama.model, llama.params, EngineConfig.model_validate(settings))
    )
    assert "cannot take tokens back" in fault
