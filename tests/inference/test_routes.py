"""Promise: the experts that the engine reports are those that a training pass over the
whole text chooses, however prompts are cut, cached, preempted and guessed at; and a
training pass that is given them comes as close to the engine as its other arithmetic
lets it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.models.params import bind
from tests.inference.conftest import CONFIGS, VOCAB, Tiny, build

EXPERTS = CONFIGS["llama"] | {
    "mlp": None,
    "moe": {"num_experts": 7, "experts_per_token": 3, "d_ff": 10},
}
PREFIX = list(range(20, 43))
PROMPTS = [[5, 9, 2, 40, 3, 8, 8], [*PREFIX, 7], [*PREFIX, 7, 11, 3], [1]]
SAMPLED = SamplingConfig(temperature=2.0, top_k=50, max_new_tokens=9, seed=4)
# Two tokens alone, either of which is as likely: texts repeat themselves now and then.
TWO_TOKENS = SAMPLED.model_copy(update={"logit_bias": {3: 100.0, 7: 100.0}})
SMALL = {
    "max_sequences": 3,
    "max_length": 48,
    "page_size": 4,
    "prefill_tokens": 8,
    "max_chunks": 2,
    "decode_steps": 4,
    "record_routes": True,
}
Sequences = dict[tuple[str, int], SequenceOutput]


@pytest.fixture(scope="module")
def experts(one_device_mesh) -> Tiny:
    return build(EXPERTS, one_device_mesh)


@partial(jax.jit, static_argnums=0)
def choose_routes(model, params, ids):
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    _, aux = bind(model, params)(ids, positions, record_routes=True)
    return aux.routes


def generate(
    engine: Engine,
    prompts=PROMPTS,
    sampling=SAMPLED,
    num_sequences: int = 1,
    top_logprobs: int | None = None,
) -> Sequences:
    requests = [
        GenerationRequest(
            str(i),
            tuple(prompt),
            sampling,
            num_sequences=num_sequences,
            top_logprobs=top_logprobs,
            routes=True,
        )
        for i, prompt in enumerate(prompts)
    ]
    sequences: Sequences = {}
    for output in engine.run(requests):
        key = (output.request_id, output.sequence_index)
        if key in sequences:
            sequences[key].append(output)
        else:
            sequences[key] = output
    return sequences


def check_routes(tiny: Tiny, sequences: Sequences, prompts=PROMPTS) -> None:
    """Compares all of them with those of a training pass over prompt and output."""
    for (request_id, _), output in sequences.items():
        text = [*prompts[int(request_id)], *output.token_ids]
        ids = np.zeros((1, 48), np.int32)  # one width, one compilation
        ids[0, : len(text)] = text
        want = choose_routes(tiny.model, tiny.params, ids)[0]
        # The last token is never read.
        np.testing.assert_array_equal(output.routes, want[: len(text) - 1])


@pytest.mark.heavy
def test_routes_are_those_of_a_training_pass(experts, one_device_mesh):
    """A prompt in three chunks, then one that finds most of its tokens cached; several
    tokens a dispatch."""
    with jax.set_mesh(one_device_mesh):
        config = EngineConfig(**SMALL | {"max_sequences": 1})
        engine = Engine(experts.model, experts.params, config)
        sequences = generate(engine, PROMPTS[1:3])
        check_routes(experts, sequences, PROMPTS[1:3])
    cached = sequences["1", 0]
    assert cached.num_cached_tokens == 24
    assert cached.routes is not None
    assert cached.routes.shape == (len(PROMPTS[2]) + 8, 2, 3)
    assert cached.routes.dtype == np.int8


@pytest.mark.more
def test_sequences_that_run_together_have_theirs(experts, one_device_mesh):
    """Of several prompts, and several of one prompt."""
    with jax.set_mesh(one_device_mesh):
        engine = Engine(experts.model, experts.params, EngineConfig(**SMALL))
        check_routes(experts, generate(engine))
        several = generate(engine, PROMPTS[2:3], num_sequences=3)
        assert len(several) == 3
        check_routes(experts, several, PROMPTS[2:3])


@pytest.mark.more
@pytest.mark.parametrize(
    "settings",
    [
        {"num_pages": 14, "prefix_cache": False, "prefill_tokens": 3},
        {"num_pages": 14, "prefill_tokens": 3},
        {"speculation": {"kind": "prompt_lookup", "num_drafts": 3}},
    ],
)
def test_preempted_and_guessed_tokens_have_theirs(experts, one_device_mesh, settings):
    prompts = [PROMPTS[1], [7, 3, 7, 3, 7, 3, 7], PROMPTS[2]]
    with jax.set_mesh(one_device_mesh):
        config = EngineConfig(**SMALL | settings)
        engine = Engine(experts.model, experts.params, config)
        sampling = TWO_TOKENS if "speculation" in settings else SAMPLED
        check_routes(experts, generate(engine, prompts, sampling), prompts)
    stats = engine.stats()
    if "num_pages" in settings:
        assert stats.preemptions_total > 0
    else:
        assert stats.drafted_tokens_total > stats.accepted_tokens_total > 0


@pytest.mark.more
def test_routes_on_a_mesh_are_those_of_one_device(experts, one_device_mesh, mesh):
    """With a dense layer before those with experts."""
    several = mesh(data=2, expert=2, tensor=2)
    settings = EXPERTS | {
        "num_layers": 3,
        "dense_layers": 1,
        "mlp": CONFIGS["llama"]["mlp"],
        "moe": EXPERTS["moe"] | {"num_experts": 8},
    }
    with jax.set_mesh(several):
        config = EngineConfig(**SMALL | {"max_sequences": 1})
        split = build(settings, several)
        sequences = generate(Engine(split.model, split.params, config))
    with jax.set_mesh(one_device_mesh):
        whole = build(settings, one_device_mesh)
        check_routes(whole, sequences)


def test_routes_are_refused_where_there_are_none(experts, llama):
    with pytest.raises(
        MaxlmError, match="record_routes for a model that is no decoder"
    ):
        Engine(llama.model, llama.params, EngineConfig(**SMALL))
    config = EngineConfig(**SMALL | {"record_routes": False})
    engine = Engine(experts.model, experts.params, config)
    with pytest.raises(MaxlmError, match="routes, which the engine does not record"):
        engine.add_request(GenerationRequest("0", (1,), SAMPLED, routes=True))


@partial(jax.jit, static_argnums=0)
def compute_logprobs(model, params, ids, routes):
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    bound = bind(model, params)
    hidden, aux = bound(ids, positions, routes=routes)
    logprobs = jax.nn.log_softmax(bound.logits(hidden)[0, :-1])
    chosen = jnp.take_along_axis(logprobs, ids[0, 1:, None], axis=1)[:, 0]
    return chosen, aux.sums


@pytest.mark.more
def test_replay_brings_a_training_pass_to_an_engine_of_lower_precision(
    one_device_mesh,
):
    """An engine in bf16 beside a training pass in fp32. Where all experts serve every
    token, routers choose nothing: their difference is that of the arithmetic alone."""
    many = {"num_experts": 16, "experts_per_token": 4, "d_ff": 10}
    differences = {}
    rerouted = 0.0
    prompts = np.random.default_rng(0).integers(0, VOCAB, (12, 20)).tolist()
    for name, moe in {"some": many, "all": many | {"experts_per_token": 16}}.items():
        config = EXPERTS | {
            "num_layers": 5,
            "dense_layers": 1,
            "mlp": CONFIGS["llama"]["mlp"],
            "moe": moe,
            "init_std": 0.4,
        }
        with jax.set_mesh(one_device_mesh):
            low = build(config, one_device_mesh, jnp.bfloat16)
            full = build(config, one_device_mesh)
            settings = EngineConfig(**SMALL | {"max_sequences": 1})
            engine = Engine(low.model, low.params, settings)
            sequences = generate(engine, prompts, top_logprobs=0)
            for (request_id, _), output in sequences.items():
                prompt = prompts[int(request_id)]
                ids = np.asarray([[*prompt, *output.token_ids]], np.int32)
                routes = np.full((1, ids.shape[1], *output.routes.shape[1:]), -1)
                own_logprobs, _ = compute_logprobs(full.model, full.params, ids, routes)
                routes[0, :-1] = output.routes
                replayed, sums = compute_logprobs(full.model, full.params, ids, routes)
                sampled = [token.logprob for token in output.logprobs]
                first = len(prompt) - 1
                for kind, logprobs in {
                    "own": own_logprobs,
                    "replayed": replayed,
                }.items():
                    difference = np.abs(np.asarray(logprobs)[first:] - sampled)
                    differences.setdefault((name, kind), []).append(difference)
                if name == "some":
                    load = sums["expert_load"]
                    rerouted += sums["expert_rerouted"] / load / len(prompts)
    means = {key: np.mean(values) for key, values in differences.items()}
    assert means["all", "own"] == pytest.approx(means["all", "replayed"], rel=1e-3)
    assert rerouted > 0.005
    assert means["some", "own"] > 1.4 * means["all", "own"]
    assert means["some", "replayed"] < 1.1 * means["all", "own"]
    largest = {key: np.max(values) for key, values in differences.items()}
    assert largest["some", "own"] > 3 * largest["some", "replayed"]
