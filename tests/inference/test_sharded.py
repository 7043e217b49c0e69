"""Promise: a mesh changes where a model generates, not what."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.embedding import Embedder
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.generate import collect_tokens, generate
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.scoring import Scorer
from maxlm.inference.sequences import ScheduledStep
from maxlm.inference.speculation import DraftModel
from maxlm.inference.step import run_step
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.parallel.config import ParallelConfig
from maxlm.run.model_placement import place_model
from maxlm.sharding import ShardingConfig
from maxlm.sharding.mesh import MESH_AXES
from tests.inference.conftest import CONFIGS, Tiny

pytestmark = pytest.mark.heavy

PROMPTS = [
    [1, 2],
    [5, 9, 2, 40, 3],
    [7],
    list(range(20)),
    [4, 4, 4, 4],
    [3],
]  # on 4 shards
GREEDY = SamplingConfig(temperature=0, max_new_tokens=6)
SAMPLED = SamplingConfig(temperature=2.0, top_k=50, top_p=0.95, max_new_tokens=6)
SMALL = {"max_sequences": 2, "max_length": 32, "page_size": 4, "prefill_tokens": 8}


def tokens(tiny, sampling):
    config = EngineConfig(**SMALL)
    outputs = generate(tiny.model, tiny.params, PROMPTS, sampling, config=config)
    return collect_tokens(outputs)


@pytest.fixture(scope="module")
def eight(mesh):
    return mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def sharded(eight, build_tiny):
    return build_tiny("llama", eight, num_layers=1)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_the_same_tokens_on_eight_devices_as_on_one(sharded, tinies, sampling):
    assert tokens(sharded, sampling) == tokens(tinies["shallow"], sampling)


@pytest.mark.more
def test_the_same_tokens_with_windows_forks_and_guesses(mesh, build_tiny):
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 4}
    one, four = (
        build_tiny("llama", m, attention=attention)
        for m in (mesh(), mesh(data=2, tensor=2))
    )
    speculation = {"kind": "draft_model", "folder": "", "num_drafts": 2}

    def run(tiny):
        config = EngineConfig(**SMALL, speculation=speculation)
        engine = Engine(
            tiny.model, tiny.params, config, draft=DraftModel(tiny.model, tiny.params)
        )
        requests = [
            GenerationRequest(str(i), tuple(prompt), SAMPLED, num_sequences=1 + i % 2)
            for i, prompt in enumerate(PROMPTS)
        ]
        rows = {}
        for output in engine.run(requests):
            row = rows.setdefault((output.request_id, output.sequence_index), [])
            row += output.token_ids
        return rows

    assert run(one) == run(four)


@pytest.mark.more
@pytest.mark.parametrize(
    "attention",
    [
        {"num_kv_heads": 2, "output_gate": "element", "qk_norm_form": "all_heads"}
        | {"qk_norm": True, "chunk": 7},
        {"num_kv_heads": 4, "output_gate": "head", "chunk": 7}
        | {"latent": {"kv_rank": 10, "rotary_dim": 2, "value_dim": 4}},
    ],
    ids=["heads", "latent"],
)
def test_the_same_tokens_with_gates_and_chunks(mesh, build_tiny, attention):
    attention = {"num_heads": 4, "head_dim": 6, **attention}
    one, four = (
        build_tiny("llama", m, attention=attention)
        for m in (mesh(), mesh(data=2, tensor=2))
    )
    with jax.set_mesh(mesh()):
        expected = [one.greedy(prompt, 6) for prompt in PROMPTS]
    assert tokens(one, GREEDY) == expected
    assert tokens(four, GREEDY) == expected


@pytest.mark.more
def test_the_same_tokens_with_sparse_attention(mesh, build_tiny):
    """Each token attends to five earlier ones, in prompts in chunks and one by one."""
    attention = {
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 6,
        "latent": {"q_rank": 7, "kv_rank": 10, "rotary_dim": 2, "value_dim": 4},
    }
    mixer = {
        "kind": "sparse_attention",
        "attention": attention,
        "index_heads": 16,
        "index_dim": 5,
        "top_k": 5,
    }
    one, four = (
        build_tiny("llama", m, attention=None, mixer=mixer)
        for m in (mesh(), mesh(data=2, tensor=2))
    )
    with jax.set_mesh(mesh()):
        expected = [one.greedy(prompt, 6) for prompt in PROMPTS]
    assert tokens(one, GREEDY) == expected
    assert tokens(four, GREEDY) == expected


@pytest.mark.more
def test_the_same_tokens_with_states(mesh, build_tiny):
    """Layers of every mixer with a state but the delta rules', by turns."""
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    space = {"kind": "mamba2", "num_heads": 4, "head_dim": 5, "state_size": 3}
    both = {
        "kind": "parallel_heads",
        "attention": attention,
        "mixer": space | {"num_groups": 2},
    }
    mixers = {
        "space": space,
        "scan": {"kind": "mamba", "d_inner": 12, "d_state": 3, "dt_rank": 2},
        "line": {"kind": "lightning", "num_heads": 4, "head_dim": 3},
        "both": both,
    }
    kinds = {name: {"mixer": mixer} for name, mixer in mixers.items()}
    kinds["conv"] = {"mixer": {"kind": "short_conv"}, "placement": "normed"}
    model = {"attention": attention, "kinds": kinds, "pattern": [*kinds]}
    one, four = (
        build_tiny("llama", m, num_layers=5, **model)
        for m in (mesh(), mesh(data=2, tensor=2))
    )
    with jax.set_mesh(mesh()):
        expected = [one.greedy(prompt, 6) for prompt in PROMPTS]
    assert tokens(one, GREEDY) == expected
    assert tokens(four, GREEDY) == expected


@pytest.mark.more
def test_the_same_scores_on_eight_devices_as_on_one(sharded, tinies):
    pairs = [(head, tail) for head in PROMPTS for tail in ([3], [1, 4, 1, 5], [9, 2])]

    def run(tiny):
        config = EngineConfig(**SMALL | {"max_length": 20})  # one context is cut
        return Scorer(Engine(tiny.model, tiny.params, config)).score(pairs)

    for ours, expected in zip(run(sharded), run(tinies["shallow"]), strict=True):
        assert ours.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert ours.is_greedy == expected.is_greedy


def check_split_caches(engine, shard):
    """A layer's pages of keys have shards of this shape, and no step sends keys or
    values."""
    shape = engine._inputs.list_shapes()[0]
    with jax.set_mesh(engine.mesh):
        key = engine._runner.state.caches["layers"][0].key
        assert {s.data.shape for s in key.addressable_shards} == {shard}
        inputs = engine._inputs.build(
            ScheduledStep(), shape, engine.scheduler.page_tables, {}
        )
        runner = engine._runner
        lowered = run_step.lower(
            engine.model, runner.spec, shape, runner.params, runner.state, inputs
        )
        step = lowered.compile()
    sent = re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-|collective-)\S+\(", step.as_text())
    assert sent  # the regular expression finds something: results of split maps
    # Neither a cache nor the new keys and values: [..., heads, ..., 6].
    assert [shape for shape in sent if re.fullmatch(r"(\d+,)+6", shape)] == []


def test_caches_stay_split_and_are_never_sent(sharded):
    engine = Engine(sharded.model, sharded.params, EngineConfig(**SMALL))
    check_split_caches(engine, (1, 17, 1, 4, 6))


@pytest.mark.more
def test_fewer_kv_heads_than_devices_are_kept_once_a_device(mesh, build_tiny):
    """Four devices have copies of two kv heads, one each; forward passes without a
    cache too."""
    attention = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 6}
    one = build_tiny("llama", mesh(), vocab_size=64, attention=attention)
    eight = mesh(data=2, tensor=4)
    settings = ShardingConfig(), ParallelConfig(), dict(eight.shape), jnp.float32
    placed = place_model(one.model.config, *settings, training=None)
    on_devices = jax.device_put(
        jax.device_get(one.params), NamedSharding(eight, PartitionSpec())
    )
    four = Tiny(placed.model, on_devices)
    assert tokens(four, GREEDY) == tokens(one, GREEDY)
    engine = Engine(four.model, four.params, EngineConfig(**SMALL))
    check_split_caches(engine, (1, 17, 1, 4, 6))
    ours, expected = (
        Embedder(tiny_model.model, tiny_model.params, m, 20).embed(PROMPTS[:3])
        for tiny_model, m in ((four, eight), (one, mesh()))
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_keys_that_lie_apart_from_their_queries_are_refused():
    config = DecoderConfig(**CONFIGS["llama"])
    sharding = ShardingConfig.model_validate({"compute": {"heads": None}})
    sizes = dict.fromkeys(MESH_AXES, 1) | {"tensor": 2}
    with pytest.raises(
        MaxlmError, match="heads are on mesh axes none, kv_heads on tensor=2"
    ):
        place_model(config, sharding, ParallelConfig(), sizes, "float32", training=None)
