"""Promise: a mesh changes where a model generates, not what."""

import re

import jax
import numpy as np
import pytest

from maxlm.inference import generate as generation
from maxlm.inference.decode import init_cache, prefill
from maxlm.inference.generate import generate
from maxlm.inference.sampling import SamplingConfig
from maxlm.models.architectures.transformer import Decoder
from maxlm.sharding import AxisRules
from tests.errors import message

PROMPTS = [[1, 2], [5, 9, 2, 40, 3], [7]]  # 3 rows on 4 shards of the batch
GREEDY = SamplingConfig(temperature=0, max_new_tokens=6)
SAMPLED = SamplingConfig(temperature=2.0, top_k=50, top_p=0.95, max_new_tokens=6)


def tokens(tiny, sampling):
    steps = generate(tiny.model, tiny.params, PROMPTS, sampling, eos_id=None, key=jax.random.key(0))
    return list(steps)


@pytest.fixture(scope="module")
def eight(mesh):
    return mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def sharded(eight, build_tiny):
    return build_tiny("llama", eight)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_the_same_tokens_on_eight_devices_as_on_one(sharded, tinies, sampling):
    expected = tokens(tinies["llama"], sampling)
    assert tokens(sharded, sampling) == expected


def test_ring_caches_of_a_window_on_four_devices_answer_as_on_one(mesh, build_tiny):
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 4}
    one, four = (
        build_tiny("llama", m, attention=attention) for m in (mesh(), mesh(data=2, tensor=2))
    )
    with jax.set_mesh(mesh()):
        assert init_cache(one.model, 4, 16)["layers"][0].key.shape == (3, 4, 4, 2, 6)
        expected = [one.greedy(prompt, 8) for prompt in PROMPTS]
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    for tiny in (one, four):
        assert [list(row) for row in zip(*tokens(tiny, greedy), strict=True)] == expected


def test_the_cache_stays_split_and_is_never_sent(sharded, eight):
    batch, width, length = 4, 8, 16
    with jax.set_mesh(eight):
        start = jax.jit(lambda p, t, n: prefill(sharded.model, p, t, n, length))
        ids, lengths = np.ones((batch, width), np.int32), np.full(batch, width, np.int32)
        _, cache = start(sharded.params, ids, lengths)
        assert {s.data.shape for s in cache["layers"][0].key.addressable_shards} == {
            (3, 1, length, 1, 6)
        }
        seeds = np.zeros(batch, np.uint32)
        given = generation._Given(sharded.params, seeds, jax.random.key(0))
        settings = generation._Settings(sharded.model, GREEDY, None)
        step = generation._advance.lower(settings, given, lengths, lengths, cache, None)
        step = step.compile().as_text()
    collectives = re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-|collective-)\S+\(", step)
    assert collectives  # the regular expression finds something: weights, here
    moved = [shape for shape in collectives if re.fullmatch(r"\d+,\d+,\d+,6", shape)]
    assert moved == []  # neither the cache nor the new keys and values: [rows, slots, heads, 6]


def test_a_mesh_that_splits_the_sequence_is_refused(tinies):
    model, params = tinies["llama"].model, tinies["llama"].params
    split = Decoder(model.config, rules=AxisRules(seq=("context",)), dtype=model.dtype)
    how = {"eos_id": None, "key": jax.random.key(0)}
    assert message(generate, split, params, [[1]], GREEDY, **how) == (
        "mesh: the sequence is split over context; generate on a mesh with context=1"
    )
