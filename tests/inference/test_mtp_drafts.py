"""Promise: a model's own modules of ``mtp`` guess what they would guess of the whole
text, whatever was rejected before, and change no output."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.params import bind, flatten_names
from tests.inference.conftest import VOCAB, Tiny

pytestmark = pytest.mark.heavy

GREEDY = SamplingConfig(temperature=0, max_new_tokens=13)
SAMPLED = SamplingConfig(temperature=1.3, top_p=0.9, max_new_tokens=13, seed=5)
PROMPTS = [
    [1, 2],
    [5, 9, 2, 40, 3, 61, 7, 7, 7, 12, 9],
    [7],
    list(range(3, 23)),
    [*range(3, 15), 50, 51],
]
SMALL = {"max_sequences": 3, "max_length": 37, "page_size": 4, "prefill_tokens": 8}


@pytest.fixture(scope="module")
def build_mtp(one_device_mesh, build_tiny):
    """Builds a tiny model with modules."""
    return partial(build_mtp_on, build_tiny, one_device_mesh)


def build_mtp_on(
    build_tiny, mesh, num_modules: int, settings: Mapping[str, object] | None = None
) -> Tiny:
    all_settings = {"mtp": {"num_modules": num_modules}, **(settings or {})}
    return build_tiny("llama", mesh, **all_settings)


def make_engine(
    tiny: Tiny, num_drafts: int | None, settings: Mapping[str, object] | None = None
) -> Engine:
    """Builds an engine with ``num_drafts`` guesses, None: without speculation."""
    speculation = None
    if num_drafts is not None:
        speculation = {"kind": "mtp", "num_drafts": num_drafts}
    all_settings = {**SMALL, "speculation": speculation, **(settings or {})}
    config = EngineConfig.model_validate(all_settings)
    return Engine(tiny.model, tiny.params, config)


def run(
    engine: Engine, sampling: SamplingConfig, *, num_sequences: int = 1
) -> dict[tuple[str, int], list[int]]:
    requests = [
        GenerationRequest(str(i), tuple(prompt), sampling, num_sequences=num_sequences)
        for i, prompt in enumerate(PROMPTS)
    ]
    tokens: dict[tuple[str, int], list[int]] = {}
    for output in engine.run(requests):
        key = (output.request_id, output.sequence_index)
        tokens.setdefault(key, []).extend(output.token_ids)
    return tokens


def guess_from_whole_text(tiny: Tiny, text: list[int], num_drafts: int) -> list[int]:
    """Guesses behind a text with a token drawn last, by training's passes of all of
    it."""
    hidden, logits_of, apply = _run_whole(tiny, text[:-1])
    following = list(text[1:])
    drafts: list[int] = []
    for _ in range(num_drafts):
        states = apply(hidden, following)
        last = states[len(following) - 1]
        drafts.append(int(logits_of(last).argmax()))
        hidden = np.concatenate([hidden, last[None]])
        following.append(drafts[-1])
    return drafts


WIDTH = 48


@partial(jax.jit, static_argnums=0)
def _hidden(model, params, ids):
    bound = bind(model, params)
    return bound(ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None])[0]


@partial(jax.jit, static_argnums=0)
def _ahead(model, params, hidden, following):
    bound = bind(model, params)
    positions = jnp.arange(following.shape[1], dtype=jnp.int32)[None]
    ahead = bound.predict_ahead(
        hidden, positions, None, following, jnp.ones(following.shape)
    )
    states = ahead.predictions[0].hidden
    return states, bound.logits(states)


def _run_whole(tiny, tokens):
    ids = np.zeros((1, WIDTH), np.int32)
    ids[0, : len(tokens)] = tokens
    hidden = np.asarray(_hidden(tiny.model, tiny.params, ids))[0, : len(tokens)]
    logits_by_state = {}

    def apply(hidden, following):
        padding = ((0, WIDTH - len(following)), (0, 0))
        padded = np.pad(hidden, padding)[None]
        ids = np.zeros((1, WIDTH), np.int32)
        ids[0, : len(following)] = following
        states, logits = _ahead(tiny.model, tiny.params, padded, ids)
        last = len(following) - 1
        logits_by_state[np.asarray(states)[0, last].tobytes()] = np.asarray(logits)[
            0, last
        ]
        return np.asarray(states)[0]

    return hidden, lambda state: logits_by_state[state.tobytes()], apply


def test_guesses_are_those_of_the_whole_text_whatever_was_rejected(
    build_mtp, one_device_mesh
):
    """A prompt in chunks, whose last is another's only one; page borders. Nearly all
    guesses of a random model are rejected, so a cache that kept them would show. Outputs
    are those of whole passes of the model, which guess nothing."""
    prompts = [PROMPTS[3], [41, 3, 8, 60]]
    with jax.set_mesh(one_device_mesh):
        tiny = build_mtp(1, {"num_layers": 1})
        engine = make_engine(tiny, 1, {"prefix_cache": False, "max_sequences": 2})
        # Ends while both decode, so that two programs are compiled.
        check_guesses(tiny, engine, prompts, num_drafts=1, num_tokens=17, at_most=26)


@pytest.mark.more
def test_guesses_of_many_requests_and_of_the_module_s_own_guesses(
    build_mtp, one_device_mesh
):
    """Chunks beside rows that decode, several requests a row, to the end."""
    with jax.set_mesh(one_device_mesh):
        tiny = build_mtp(1)
        engine = make_engine(tiny, 3, {"prefix_cache": False})
        num_tokens = GREEDY.max_new_tokens
        check_guesses(tiny, engine, PROMPTS, num_drafts=3, num_tokens=num_tokens)
        assert not engine.has_work


def check_guesses(
    tiny: Tiny,
    engine: Engine,
    prompts: list[list[int]],
    *,
    num_drafts: int,
    num_tokens: int,
    at_most: int = 1000,
) -> None:
    """Runs requests until ``at_most`` steps of a sequence were compared."""
    sampling = GREEDY.model_copy(update={"max_new_tokens": num_tokens})
    for i, prompt in enumerate(prompts):
        engine.add_request(GenerationRequest(str(i), tuple(prompt), sampling))
    num_compared = 0
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_work and num_compared < at_most:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        for sequence in engine.scheduler.running:
            if not sequence.next_drafts or not sequence.is_decoding:
                continue
            expected = guess_from_whole_text(tiny, sequence.tokens, num_drafts)
            num_left = sequence.num_tokens_left - 1
            assert sequence.next_drafts[:num_left] == expected[:num_left]
            num_compared += 1
    assert num_compared > 25
    for i, prompt in enumerate(prompts):
        output_tokens = tokens[str(i)]
        assert len(output_tokens) >= num_tokens // 2
        assert output_tokens == tiny.greedy(prompt, len(output_tokens))
    counted = engine.stats()
    assert counted.accepted_tokens_total < counted.drafted_tokens_total / 2


EXPERTS = {
    "mlp": None,
    "moe": {"num_experts": 4, "experts_per_token": 2, "d_ff": 12, "activation": "silu"},
}


@pytest.mark.more
@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        ({"data": 2, "tensor": 2}, {}),
        ({"fsdp": 2, "tensor": 2}, {}),
        ({"data": 2, "fsdp": 2}, {"mtp": {"num_modules": 2, "layer": {"window": 5}}}),
        ({"expert": 2, "tensor": 2}, EXPERTS),
    ],
)
def test_outputs_on_meshes_are_those_of_one_device_without_guesses(
    build_tiny, one_device_mesh, mesh, axes, settings
):
    """Sequences are split over the axes of the batch, each with its modules' caches."""
    with jax.set_mesh(one_device_mesh):
        tiny = build_mtp_on(build_tiny, one_device_mesh, 2, settings)
        plain = run(make_engine(tiny, None), GREEDY)
    several = mesh(**axes)
    with jax.set_mesh(several):
        split = build_mtp_on(build_tiny, several, 2, settings)
        engine = make_engine(split, 3)
        assert run(engine, GREEDY) == plain
        counted = engine.stats()
    assert counted.drafted_tokens_total > 50


def make_exact(tiny: Tiny) -> Tiny:
    """The same model without what layers add: a token's logits follow from the token
    alone, and a module that passes the token ahead on knows those of the next."""
    flat = flatten_names(tiny.params)
    d_model = tiny.model.config.d_model
    for name, value in flat.items():
        if name.endswith((".out.kernel", ".down.kernel")):
            flat[name] = value * 0
        if name.endswith("norm.scale"):
            flat[name] = value * 0 + 1
        if name == "mtp.join.kernel":
            identity = jnp.eye(2 * d_model, d_model)[None]
            flat[name] = jnp.broadcast_to(identity, value.shape)
    structure = jax.tree.structure(tiny.params)
    return Tiny(tiny.model, jax.tree.unflatten(structure, list(flat.values())))


@pytest.mark.more
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_module_that_knows_the_next_token_has_all_guesses_taken(
    build_mtp, one_device_mesh, sampling
):
    with jax.set_mesh(one_device_mesh):
        tiny = make_exact(build_mtp(1))
        engine = make_engine(tiny, 2)
        tokens = run(engine, sampling)
        plain = run(make_engine(tiny, None), sampling)
        counted = engine.stats()
    assert tokens == plain
    assert counted.accepted_tokens_total == counted.drafted_tokens_total > 20
    assert VOCAB > len({token for row in tokens.values() for token in row}) > 1


def test_a_model_without_modules_or_with_a_state_is_refused(
    build_tiny, build_mtp, one_device_mesh
):
    with jax.set_mesh(one_device_mesh):
        with pytest.raises(MaxlmError, match="no modules that predict further tokens"):
            make_engine(build_tiny("llama", one_device_mesh), 1)
        evicting = {"kind": "sinks", "budget": 8}
        with pytest.raises(MaxlmError, match="cannot take tokens back"):
            make_engine(build_mtp(1), 1, {"cache": evicting})
