"""Promise: a sample is the tokens that the policy drew, each from the tokens before it,
whatever else runs, however long an environment takes, and wherever it was cut."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from maxlm.data.tokenizer.chat import render_chat
from maxlm.rl.environments import Reply
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.records import (
    RolloutFiles,
    episodes_from_arrays,
    episodes_to_arrays,
)
from maxlm.rl.rollouts.sampler import find_max_prompt_length
from tests.errors import message
from tests.inference.conftest import Tiny, _forward
from tests.rl.rollouts.conftest import (
    NUM_TURNS,
    TEMPERATURE,
    EchoEnvironment,
    SlowEchoEnvironment,
    assert_same,
    by_name,
)

pytestmark = pytest.mark.heavy
NUM_SAMPLES = 3


@pytest.fixture
def expected(make_sampler, prompts):
    """All samples of one rollout, drawn together."""
    sampler = make_sampler()
    samples = []
    sampler.add(prompts, NUM_SAMPLES)
    while sampler.num_unfinished:
        samples += sampler.advance(1)
        # Turns that go on come before samples that have not begun.
        begun = [e for e in sampler.list_unfinished() if e.sample.num_sampled]
        # A group of NUM_SAMPLES begins together.
        assert len(begun) < sampler.engine.config.max_sequences + NUM_SAMPLES
    assert len(samples) == NUM_SAMPLES * len(prompts)
    return samples


def test_samples_do_not_depend_on_what_else_runs(
    expected, make_sampler, prompts, engine
):
    # There are too few pages for three long sequences.
    num_preemptions = engine.stats().preemptions_total
    assert num_preemptions > 0
    alone = []
    for prompt in prompts:
        alone += make_sampler().sample([prompt], 1)
    assert_same(alone, [sample for sample in expected if sample.number == 0])
    assert engine.stats().preemptions_total == num_preemptions
    backwards = [*make_sampler().sample(prompts[::-1], NUM_SAMPLES)]
    assert_same(backwards, expected)
    # Samples of a prompt differ, and so do those of other seeds, and those of a row
    # that comes again.
    texts = {tuple(s.tokens) for s in expected}
    assert len(texts) == len(expected)
    for seed, number in ((4, 0), (3, 99)):
        prompt = replace(prompts[0], number=number)
        others = make_sampler(seed=seed).sample([prompt], 1)
        assert next(others).tokens != by_name(expected)[0, 0].tokens


def test_tokens_are_never_encoded_again(expected, policy, chat_tokenizer):
    """The tokens of a sample are the conversation's text; those that were drawn stand
    as they were drawn, with the log-probabilities of a plain forward pass over all of
    them, at the temperature of the rollouts and without filters."""
    num_turns = []
    num_rewritten = 0
    for sample in expected:
        turns = [turn for turn in sample.turns if turn[0] == "assistant"]
        num_turns.append(len(turns))
        question = {"role": "user", "content": sample.prompt.row["prompt"]}
        messages = [{"role": role, "content": text} for role, text in sample.turns]
        text = render_chat(chat_tokenizer, [question, *messages])
        decoded = chat_tokenizer.decode(sample.tokens)
        end = "<|im_end|>\n"
        if sample.is_complete:
            # Any token that ends turns may stand where the template writes its own.
            for stop_id in chat_tokenizer.stop_ids:
                decoded = decoded.replace(chat_tokenizer.decode([stop_id]), end.strip())
            text = text.replace("<|endoftext|>", end.strip())
            assert decoded == text.removesuffix("\n")
        drawn = [
            token
            for token, is_drawn in zip(sample.tokens, sample.is_sampled, strict=True)
            if is_drawn
        ]
        if chat_tokenizer.encode(chat_tokenizer.decode(drawn)) != drawn:
            num_rewritten += 1
        logits = compute_logits(policy, sample.tokens)
        log_probs = log_softmax(logits.astype(np.float64) / TEMPERATURE, axis=-1)
        for place, is_drawn in enumerate(sample.is_sampled):
            token = sample.tokens[place]
            exact = log_probs[place - 1, token] if is_drawn else 0
            assert sample.log_probs[place] == pytest.approx(exact, abs=3e-5)
            assert sample.versions[place] == (0 if is_drawn else -1)
        # A literal of a special token that the environment writes is ordinary text.
        num_ends = sample.tokens.count(chat_tokenizer.special.ids["<|im_end|>"])
        assert num_ends <= 1 + 2 * len(turns)
        assert sample.environment_reward == len(sample.last_answer)
    # Some ran out of room before their last turn.
    assert NUM_TURNS in num_turns
    assert min(num_turns) < NUM_TURNS
    assert {True, False} == {sample.is_complete for sample in expected}
    assert num_rewritten > len(expected) // 2


def compute_logits(policy: Tiny, tokens: list[int]) -> np.ndarray:
    """Of every position, by a plain forward pass: [S, V]. One width, one
    compilation."""
    ids = np.zeros((1, policy.model.config.max_seq_len), np.int32)
    ids[0, : len(tokens)] = tokens
    return np.asarray(_forward(policy.model, policy.params, ids))[0]


def test_slow_environments_lose_no_sample(expected, make_sampler, prompts):
    """Longer turns come back much later: the samples are the same, all of them."""
    sampler = make_sampler(SlowEchoEnvironment(), reply_threads=2)
    assert_same([*sampler.sample(prompts, NUM_SAMPLES)], expected)


@pytest.mark.parametrize("num_dispatches", [1, 5])
def test_samples_under_way_survive_a_restart(
    expected, make_sampler, prompts, policy, chat_tokenizer, tmp_path, num_dispatches
):
    first = make_sampler()
    params = policy.params
    first.engine.set_params(params)
    first.add(prompts, NUM_SAMPLES)
    samples = first.advance(num_dispatches)
    files = RolloutFiles(tmp_path)
    files.write(1, episodes_to_arrays(first.list_unfinished()))
    for request_id, _ in list(first._drawing):  # the process dies
        first.engine.abort(request_id)
    first.engine.step()

    arrays = files.read(1)
    assert arrays is not None
    rows = PromptOrder(
        EchoEnvironment(), chat_tokenizer, seed=0, max_prompt_length=99, shuffle=False
    )
    second = make_sampler()
    second.engine.set_params(params)
    second.set_version(1)
    second.restore(episodes_from_arrays(arrays, rows))
    begun = {
        (e.sample.prompt.row_number, e.sample.number): len(e.sample.tokens)
        for e in second.list_unfinished()
    }
    samples += second.advance()
    assert_same(samples, expected)
    for name, num_before in begun.items():
        sample = by_name(samples)[name]
        drawn = np.array(sample.is_sampled)
        versions = np.array(sample.versions)
        before = np.arange(len(versions)) < num_before
        assert (versions[drawn & before] == 0).all()
        assert (versions[drawn & ~before] == 1).all()
    # The process that goes on does the same.
    going_on = make_sampler()
    going_on.engine.set_params(params)
    going_on.add(prompts, NUM_SAMPLES)
    straight = going_on.advance(num_dispatches)
    going_on.engine.set_params(params)
    going_on.set_version(1)
    straight += going_on.advance()
    assert_same(straight, samples)
    for name, sample in by_name(straight).items():
        assert sample.versions == by_name(samples)[name].versions
        assert sample.log_probs == by_name(samples)[name].log_probs


def test_a_stop_string_across_a_restart_ends_the_turn(
    make_sampler, prompts, chat_tokenizer
):
    """Of two characters that are two tokens; the turn is cut between them."""
    samples = make_sampler().sample(prompts[1:2], 20)
    start = len(prompts[1].tokens)
    starts = [(s.number, s.tokens[start : start + 2]) for s in samples]
    # Whole characters, behind which the first token does not come again.
    number, tokens = next(
        (number, tokens)
        for number, tokens in starts
        if chat_tokenizer.decode(tokens).isprintable()
        and "\ufffd" not in chat_tokenizer.decode(tokens)
        and tokens[0] not in chat_tokenizer.stop_ids
        and tokens[1] not in chat_tokenizer.stop_ids
    )
    stop = chat_tokenizer.decode(tokens)
    stopping = EchoEnvironment(stop_strings=(stop,))
    straight = by_name([*make_sampler(stopping).sample(prompts[1:2], 20)])[1, number]
    assert straight.turns[0] == ("assistant", stop)

    cut = make_sampler(stopping)
    cut.add(prompts[1:2], 20)
    episode = cut.list_unfinished()[number]
    episode.sample.tokens.append(straight.tokens[start])
    episode.sample.is_sampled.append(True)
    episode.sample.log_probs.append(straight.log_probs[start])
    episode.sample.versions.append(0)
    assert_same([by_name(cut.advance())[1, number]], [straight])


def test_an_environment_that_fails_loses_nothing(expected, make_sampler, prompts):
    sampler = make_sampler(EchoEnvironment(fails_at=(1, 3)))
    sampler.add(prompts, NUM_SAMPLES)
    error = message(sampler.advance)
    assert "environment.kind=echo, row 1: the environment failed at turn 1" in error
    assert "KeyError: 'no\\nanswer'" in error
    # Called again, the environment is asked again.
    message(sampler.advance)
    sampler.environment = EchoEnvironment()
    sampler._calls._environment = EchoEnvironment()
    assert_same(sampler.advance(), expected)

    sampler = make_sampler(
        EchoEnvironment(fails_at=(1, 3)), environment_errors="end_episode"
    )
    samples = by_name([*sampler.sample(prompts, NUM_SAMPLES)])
    assert samples.keys() == by_name(expected).keys()
    for name, sample in by_name(expected).items():
        ended = samples[name]
        has_failed = name[0] in (1, 3) and len(sample.turns) > 1
        assert len(ended.turns) == (1 if has_failed else len(sample.turns))
        assert ended.is_complete == (sample.is_complete and not has_failed)
    assert sampler.take_environment_errors()
    assert not sampler.take_environment_errors()


def test_an_environment_that_hangs_holds_up_no_other(expected, make_sampler, prompts):
    class Hanging(SlowEchoEnvironment):
        kind: str = "hanging"

        def respond(self, sample) -> Reply | None:
            if (sample.prompt.row_number, sample.number) == (2, 0):
                jax.numpy.zeros(1).block_until_ready()
                import time

                time.sleep(20)
            return super().respond(sample)

    sampler = make_sampler(
        Hanging(),
        environment_errors="end_episode",
        reply_seconds=1,
        reply_threads=2,
    )
    samples = by_name([*sampler.sample(prompts, NUM_SAMPLES)])
    hung = samples.pop((2, 0))
    assert not hung.is_complete
    assert "no answer within 1 s" in sampler.take_environment_errors()[0]
    others = by_name(expected)
    del others[2, 0]
    assert_same([*samples.values()], [*others.values()])


def test_no_sample_is_longer_than_its_row(expected, make_sampler, prompts):
    """They are those without the limit up to where the policy had no room."""
    limit = 100
    sampler = make_sampler(max_length=limit)
    samples = by_name([*sampler.sample(prompts, NUM_SAMPLES)])
    num_cut = 0
    for name, whole in by_name(expected).items():
        sample = samples[name]
        length = len(sample.tokens)
        assert length <= limit
        assert sample.tokens == whole.tokens[:length]
        if length < len(whole.tokens):
            num_cut += 1
            assert not sample.is_complete
    assert num_cut


def test_settings_that_leave_no_room(make_sampler, prompts):
    sampler = make_sampler(max_prompt_length=20)
    error = message(sampler.add, prompts, 1)
    assert "row 1 of prompts: a prompt of" in error
    assert not sampler.num_unfinished
    config = RolloutConfig(max_prompt_length=100)
    where = "task.rollouts.sampling.max_new_tokens: 256 leave no room for"
    error = message(find_max_prompt_length, config, 300)
    assert f"{where} max_prompt_length=100 in the 300 tokens" in error
    error = message(find_max_prompt_length, RolloutConfig(), 256)
    assert f"{where} a prompt in the 256 tokens" in error
    assert "raise data.seq_len" in error
    assert find_max_prompt_length(config, 356) == 100
    assert find_max_prompt_length(RolloutConfig(), 300) == 44
    assert find_max_prompt_length(RolloutConfig(), 257) == 1
