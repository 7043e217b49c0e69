"""Promise: an engine generates with the parameters that it was given last, and nothing
that was computed with others is taken for theirs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.speculation import DraftModel
from tests.inference.conftest import Tiny

SMALL: dict[str, Any] = {
    "max_sequences": 3,
    "max_length": 32,
    "page_size": 4,
    "prefill_tokens": 8,
}
PROMPT = (5, 9, 2, 40, 3, 17, 8, 1, 1, 30)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=6)


def make_engine(tiny: Tiny, *, shares_params=False, decode_steps=8) -> Engine:
    config = EngineConfig(
        **SMALL, shares_params=shares_params, decode_steps=decode_steps
    )
    return Engine(tiny.model, tiny.params, config)


def change(tiny: Tiny) -> Tiny:
    """Other parameters, as a training step might leave them."""
    params = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x)[..., ::-1].copy(), x.sharding),
        tiny.params,
    )
    return Tiny(tiny.model, params)


def finish(engine: Engine) -> tuple[list[int], list[float], int]:
    """Tokens of the one request, their log-probabilities, and the prompt's tokens that
    were cached."""
    tokens = []
    logprobs = []
    num_cached = 0
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs]
            num_cached += output.num_cached_tokens
    return tokens, logprobs, num_cached


def generate(engine: Engine, sampling=GREEDY) -> tuple[list[int], list[float], int]:
    engine.add_request(GenerationRequest("a", PROMPT, sampling, top_logprobs=0))
    return finish(engine)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    highest = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - highest).sum(-1, keepdims=True)) + highest
    return wide - total


def check_logprobs(tiny: Tiny, tokens: list[int], logprobs: list[float], first: int):
    """Log-probabilities of tokens behind the prompt, from one on, are the model's."""
    text = [*PROMPT, *tokens]
    expected = log_softmax(tiny.logits(text))
    for number in range(first, len(tokens)):
        place = len(PROMPT) + number
        assert logprobs[number] == pytest.approx(
            expected[place - 1, text[place]], abs=4e-6
        )


@pytest.mark.heavy
@pytest.mark.parametrize("shares_params", [False, True])
def test_a_repeated_prompt_is_computed_anew_with_the_new_parameters(
    shallow, shares_params
):
    engine = make_engine(shallow, shares_params=shares_params)
    before = generate(engine)
    again = generate(engine)
    assert before[2] == 0
    assert again[2] == 8
    assert again[:2] == before[:2]

    changed = change(shallow)
    engine.set_params(changed.params)
    tokens, logprobs, num_cached = generate(engine)
    assert num_cached == 0
    assert tokens == changed.greedy(PROMPT, 6)
    assert tokens != before[0]
    check_logprobs(changed, tokens, logprobs, 0)
    # What was computed with the new parameters is shared as ever.
    assert generate(engine) == (tokens, logprobs, 8)
    assert engine.stats().num_free_pages == engine.stats().num_pages


@pytest.mark.heavy
def test_running_sequences_go_on_over_their_caches(shallow):
    """Sequences that wait, of the same request too, share nothing with what came
    before."""
    changed = change(shallow)
    engine = make_engine(shallow, decode_steps=1)
    sampling = SamplingConfig(temperature=0, max_new_tokens=8)
    engine.add_request(GenerationRequest("a", PROMPT, sampling, 1, top_logprobs=0))
    tokens = []
    while len(tokens) < 3:
        for output in engine.step():
            tokens += output.token_ids
    engine.set_params(changed.params)
    engine.add_request(GenerationRequest("b", PROMPT, sampling, 2, top_logprobs=0))
    rows = {("a", 0): tokens}
    cached = 0
    while engine.has_work:
        for output in engine.step():
            row = rows.setdefault((output.request_id, output.sequence_index), [])
            row += output.token_ids
            if output.request_id == "b":
                cached += output.num_cached_tokens
    fresh = changed.greedy(PROMPT, 8)
    assert rows["b", 0] == rows["b", 1] == fresh
    assert tokens[:3] == shallow.greedy(PROMPT, 3)
    # Old keys and values, new weights: neither model alone says this.
    assert len(tokens) == 8
    assert tokens not in (fresh, shallow.greedy(PROMPT, 8))
    assert engine.stats().num_free_pages == engine.stats().num_pages


@pytest.mark.heavy
def test_siblings_that_wait_share_nothing_with_one_that_runs(shallow):
    engine = make_engine(shallow, decode_steps=1)
    engine.add_request(GenerationRequest("a", PROMPT, GREEDY, 3))
    engine.step()  # the first 8 tokens of the prompt, for all three
    changed = change(shallow)
    engine.set_params(changed.params)
    rows = {}
    for output in engine.run([]):
        rows.setdefault(output.sequence_index, []).extend(output.token_ids)
    expected = changed.greedy(PROMPT, 6)
    assert rows[1] == rows[2] == expected
    assert rows[0] != expected


@pytest.mark.heavy
def test_preempted_sequences_are_computed_anew(shallow):
    engine = make_engine(shallow, decode_steps=1)
    engine.add_request(GenerationRequest("a", PROMPT, GREEDY, top_logprobs=0))
    tokens = []
    logprobs = []
    while len(tokens) < 3:
        for output in engine.step():
            tokens += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs]
    changed = change(shallow)
    engine.release_params()
    engine.release_caches()
    assert engine._runner._state is None
    engine.set_params(changed.params)
    more_tokens, more_logprobs, _ = finish(engine)
    text = tokens + more_tokens
    assert len(text) == 6
    assert changed.greedy((*PROMPT, *tokens), 3) == more_tokens
    check_logprobs(changed, text, logprobs + more_logprobs, 3)


@pytest.mark.heavy
def test_parameters_that_a_training_step_took_are_an_error_in_one_line(shallow):
    train_step = jax.jit(lambda params: jax.tree.map(lambda x: x * 1.5, params))
    donating = jax.jit(
        lambda params: jax.tree.map(lambda x: x * 1.5, params), donate_argnums=0
    )
    params = train_step(shallow.params)
    engine = make_engine(shallow, shares_params=True)
    engine.set_params(params)
    # The arrays are the trainer's own.
    arrays = jax.tree.leaves(params)
    assert all(
        x is y for x, y in zip(jax.tree.leaves(engine.params), arrays, strict=True)
    )
    params = donating(params)
    engine.add_request(GenerationRequest("a", PROMPT, GREEDY, top_logprobs=0))
    with pytest.raises(MaxlmError, match=r"given up.*\n?.*set_params"):
        engine.step()
    engine.release_params()
    with pytest.raises(MaxlmError, match=r"released.*\n?.*set_params"):
        engine.step()
    engine.set_params(params)
    assert finish(engine)[0] == Tiny(shallow.model, params).greedy(PROMPT, 6)


@pytest.mark.heavy
def test_a_copy_does_not_mind_what_a_training_step_takes(shallow):
    params = jax.tree.map(jnp.copy, shallow.params)
    engine = Engine(shallow.model, params, EngineConfig(**SMALL))
    jax.tree.map(lambda x: x.delete(), params)
    assert generate(engine)[0] == shallow.greedy(PROMPT, 6)


def test_parameters_of_another_model_are_refused(llama, shallow, gpt2):
    engine = make_engine(shallow)
    with pytest.raises(MaxlmError, match=r"layers.*has shape \[2, .*the model's \[1, "):
        engine.set_params(llama.params)
    with pytest.raises(MaxlmError, match=r"names differ.*bias"):
        engine.set_params(gpt2.params)
    with pytest.raises(MaxlmError, match="draft model"):
        engine.set_params(shallow.params, draft_params=shallow.params)


@pytest.mark.more
def test_a_draft_model_follows(llama, shallow):
    """All guesses of the model itself are right, and none depends on the draft model's
    old caches."""
    changed = change(llama)
    drafts = {"kind": "draft_model", "folder": "", "num_drafts": 2}
    config = EngineConfig(**SMALL, speculation=drafts)
    engine = Engine(
        llama.model, llama.params, config, draft=DraftModel(llama.model, llama.params)
    )
    generate(engine)
    engine.set_params(changed.params, draft_params=changed.params)
    before = engine.stats()
    assert generate(engine)[0] == changed.greedy(PROMPT, 6)
    after = engine.stats()
    drafted = after.drafted_tokens_total - before.drafted_tokens_total
    accepted = after.accepted_tokens_total - before.accepted_tokens_total
    assert accepted >= drafted - 1 > 0


@pytest.mark.heavy
def test_parameters_come_from_other_devices(mesh, build_tiny):
    """A trainer on four devices, the engine on the other four."""
    from jax.sharding import Mesh

    here = mesh(fsdp=2, tensor=2)
    devices = np.array(jax.devices()[4:8]).reshape(here.devices.shape)
    there = Mesh(devices, here.axis_names, axis_types=here.axis_types)
    trained = build_tiny("llama", here, num_layers=1)
    served = build_tiny("llama", there, num_layers=1)
    changed = change(trained)
    engine = make_engine(served)
    engine.set_params(changed.params)
    tokens, logprobs, _ = generate(engine)
    with jax.set_mesh(mesh()):
        one = build_tiny("llama", mesh(), num_layers=1)
        expected = change(one)
        assert tokens == expected.greedy(PROMPT, 6)
        check_logprobs(expected, tokens, logprobs, 0)
    assert {d for x in jax.tree.leaves(engine.params) for d in x.devices()} == set(
        jax.devices()[4:8]
    )
    # From the start too.
    engine = Engine(served.model, changed.params, EngineConfig(**SMALL), mesh=there)
    assert generate(engine)[0] == tokens
    shared = make_engine(served, shares_params=True)
    with pytest.raises(MaxlmError, match="another mesh"):
        shared.set_params(changed.params)
