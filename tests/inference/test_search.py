"""Promise: searches find what their definitions say, by plain forward passes and by
hand; they keep to their budget of tokens, and give all pages back."""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest, TokenLogprob
from maxlm.inference.search.answers import (
    parse_boxed,
    parse_choice,
    parse_gsm8k,
    parse_last_number,
)
from maxlm.inference.search.beam import Beam, BeamSearch, BeamSearchConfig, beam_search
from maxlm.inference.search.best_of_n import (
    best_of_n,
    rank_by_answer,
    self_consistency,
)
from maxlm.inference.search.continuations import Continuation, TokenBudget
from maxlm.inference.search.tree import TreeSearchConfig, diverse_verifier_tree_search
from maxlm.inference.speculation import PromptLookupConfig
from tests.errors import message
from tests.inference.test_encoder_decoder import built, forward

PROMPT = [5, 9, 2, 40, 3, 8, 8]
SAMPLED = SamplingConfig(temperature=20.0, max_new_tokens=8, seed=3)
SMALL: dict[str, Any] = {
    "max_sequences": 8,
    "max_length": 48,
    "page_size": 4,
    "prefill_tokens": 16,
}


class Letters:
    """Ids 0 to 2: a, line feed and the end."""

    vocab_size = 3
    stop_ids = (2,)
    texts = (b"a", b"\n", b"</s>")
    bos_id = 2
    prefix_ids = ()

    def decode_bytes(self, ids, *, continued=False):
        return b"".join(self.texts[i] for i in ids)


def make_engine(tiny, tokenizer=None, **settings) -> Engine:
    """One vocabulary and few sizes, so that tests share what they compile."""
    return Engine(
        tiny.model, tiny.params, EngineConfig(**{**SMALL, **settings}), tokenizer, 3
    )


def check_pages(engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_pages == stats.num_pages
    assert stats.preemptions_total == 0
    assert not engine._outputs._outputs


@pytest.fixture(scope="module")
def deep(one_device_mesh, build_tiny):
    return build_tiny("llama", one_device_mesh, num_layers=3)


@pytest.fixture
def llama(deep, one_device_mesh):
    """A model whose likeliest continuations lie where some searches do not look."""
    with jax.set_mesh(one_device_mesh):
        yield deep


@pytest.fixture
def logprobs(llama):
    """``logprobs(tokens)``: of each next token, by a forward pass."""

    @cache
    def compute(tokens):
        logits = llama.logits(tokens)[-1].astype(np.float64)
        return logits - np.log(np.exp(logits).sum())

    return lambda tokens: compute(tuple(tokens))


def search_naively(
    logprobs, prompt, vocab, stop, config
) -> list[tuple[tuple[int, ...], float]]:
    """Beam search as transformers has it: a table of all continuations of all beams."""
    running = [((), 0.0)]
    finished = []
    n = config.num_beams
    for length in range(1, config.max_new_tokens + 1):
        table = []
        for tokens, total in running:
            scores = logprobs([*prompt, *tokens])[:vocab]
            table += [((*tokens, t), total + score) for t, score in enumerate(scores)]
        table = sorted(table, key=lambda row: -row[1])[: 2 * n]
        for tokens, total in table[:n]:
            if tokens[-1] == stop or length == config.max_new_tokens:
                finished.append((tokens, total / length**config.length_penalty))
        finished = sorted(finished, key=lambda row: -row[1])[:n]
        running = [row for row in table if row[0][-1] != stop][:n]
        if len(finished) == n:
            longest = config.early_stopping == "never" and config.length_penalty > 0
            best = running[0][1] / (config.max_new_tokens if longest else length) ** (
                config.length_penalty
            )
            if config.early_stopping is True or best <= finished[-1][1]:
                break
    return finished


def read(result) -> list[tuple[tuple[int, ...], Any]]:
    return [
        (output.token_ids, pytest.approx(output.score, abs=1e-4, rel=1e-5))
        for output in result.outputs
    ]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "penalty", [pytest.param(0.0, marks=pytest.mark.more), 1.0, 2.5]
)
def test_wide_beams_find_the_best_of_all_continuations(llama, logprobs, penalty):
    """Three tokens, the last of which ends an output: 31 outputs of four tokens at
    most."""
    engine = make_engine(llama)
    config = BeamSearchConfig(
        num_beams=8,
        max_new_tokens=4,
        length_penalty=penalty,
        early_stopping="never",
        num_return_sequences=8,
    )
    (result,) = beam_search(engine, [PROMPT], config, stop_token_ids=[2])
    scores = {}
    for length in range(1, 5):
        for body in product((0, 1), repeat=length - 1):
            for last in (2,) if length < 4 else (0, 1, 2):
                tokens = (*body, last)
                total = sum(
                    logprobs([*PROMPT, *tokens[:i]])[t] for i, t in enumerate(tokens)
                )
                scores[tokens] = total / length**penalty
    best = sorted(scores.items(), key=lambda row: -row[1])
    assert read(result) == best[:8]
    check_pages(engine)


@pytest.mark.more
@pytest.mark.heavy
def test_penalties_and_rules_of_ending_equal_a_naive_search(llama, logprobs):
    """And so they do where the engine guesses tokens: not those of beams."""
    engine = make_engine(llama, speculation=PromptLookupConfig())
    best = {}
    prompts = [PROMPT, [1], list(range(20, 43))]
    for penalty, early in product((-1.0, 0.0, 1.0, 2.0), (True, False, "never")):
        config = BeamSearchConfig(
            num_beams=3,
            max_new_tokens=9,
            length_penalty=penalty,
            early_stopping=early,
            num_return_sequences=3,
        )
        results = beam_search(engine, prompts, config, stop_token_ids=[2])
        for prompt, result in zip(prompts, results, strict=True):
            assert read(result) == search_naively(logprobs, prompt, 3, 2, config)
            assert {o.finish_reason for o in result.outputs} <= {"stop", "length"}
        best[penalty, early] = [result.outputs for result in results]
        check_pages(engine)
    assert best[1.0, False] not in (best[2.0, False], best[1.0, True])


def test_equally_likely_beams_go_by_rank():
    search = BeamSearch(
        BeamSearchConfig(num_beams=2), frozenset({9}), TokenBudget(None)
    )
    search.beams = [Beam(4, (5,), -1.0), Beam(2, (6,), -1.5)]
    tops = {4: ((1, -1.0), (3, -1.0), (9, -1.0)), 2: ((8, -0.5), (7, -0.5), (0, -0.5))}
    beams = search.advance(
        {index: TokenLogprob(0, 0.0, top) for index, top in tops.items()}
    )
    assert beams == [Beam(4, (5, 1), -2.0), Beam(4, (5, 3), -2.0)]
    assert not search.finished  # the end is likely, but third


@pytest.mark.more
def test_beams_of_a_window_and_of_more_prompts_than_there_is_room_for(gpt2):
    """Beams of a prompt are those that it has alone; one or two prompts fit at once, of
    five."""
    config = BeamSearchConfig(num_beams=4, max_new_tokens=10, num_return_sequences=4)
    prompts = [[1], PROMPT, [7, 7], list(range(20, 33)), [3]]
    scarce = make_engine(gpt2, num_pages=25, decode_steps=1)
    together = beam_search(scarce, prompts, config)
    check_pages(scarce)
    assert together == [beam_search(scarce, [prompt], config)[0] for prompt in prompts]
    for prompt, result in zip(prompts, together, strict=True):

        def logprobs(tokens):
            return np.log(jax.nn.softmax(gpt2.logits(tokens)[-1]))

        assert read(result) == search_naively(logprobs, prompt, 3, None, config)


@pytest.mark.heavy
def test_beams_of_an_encoder_s_prompt(one_device_mesh):
    """Beams are forked with the row of the encoder's output."""
    with jax.set_mesh(one_device_mesh):
        model, params = built()

        def logprobs(tokens):
            return np.log(jax.nn.softmax(forward(model, params, PROMPT, tokens)[-1]))

        engine = Engine(model, params, EngineConfig(**SMALL, decode_steps=1))
        config = BeamSearchConfig(num_beams=3, max_new_tokens=6, num_return_sequences=3)
        (result,) = beam_search(engine, [PROMPT], config)
        assert read(result) == search_naively(logprobs, [4], 53, None, config)
        check_pages(engine)


@pytest.mark.heavy
def test_budgets_are_kept_to(llama):
    engine = make_engine(llama)
    config = BeamSearchConfig(num_beams=3, max_new_tokens=6, num_return_sequences=3)
    for budget in range(1, 20):
        (cut,) = beam_search(
            engine, [PROMPT], config, stop_token_ids=[2], budget=budget
        )
        steps = sum(spent <= budget for spent in (1, 3, 6, 9, 12, 15))
        shorter = config.model_copy(update={"max_new_tokens": steps})
        (whole,) = beam_search(engine, [PROMPT], shorter, stop_token_ids=[2])
        assert cut == whole
        assert cut.num_tokens <= budget
    engine = make_engine(llama, Letters())
    tree = TreeSearchConfig(
        num_subtrees=2, beam_width=2, max_step_tokens=4, step_delimiters=("\n",)
    )
    counts = set()
    for budget in (8, 9, 15, 16, 31, 40, 70):
        before = engine.stats().generated_tokens_total
        sampled = best_of_n(engine, PROMPT, 6, SAMPLED, budget=budget)
        searched = diverse_verifier_tree_search(
            engine, PROMPT, score_letters, tree, SAMPLED, budget=budget
        )
        generated = engine.stats().generated_tokens_total - before
        assert generated == sampled.num_tokens + searched.num_tokens
        assert max(sampled.num_tokens, searched.num_tokens) <= budget
        assert sampled.num_tokens == sum(len(o.token_ids) for o in sampled.outputs)
        assert len(sampled.outputs) == 6 or sampled.num_tokens > budget - 8
        counts.add(len(sampled.outputs))
    assert len(counts) > 2
    check_pages(engine)


@pytest.mark.heavy
def test_best_of_n_by_a_true_verifier_is_pass_at_n(llama):
    engine = make_engine(llama, Letters())
    for number in range(8):
        sampling = SAMPLED.model_copy(update={"seed": number})
        passed = []
        for n in (1, 4, 9):
            result = best_of_n(
                engine,
                [number, 1],
                n,
                sampling,
                lambda _, outputs: ["aa\n" in o.text for o in outputs],
            )
            assert len(result.outputs) == n
            assert result.outputs[0].score == any(
                "aa\n" in o.text for o in result.outputs
            )
            passed.append({o.token_ids for o in result.outputs})
        assert passed[0] <= passed[1] <= passed[2]  # the first samples are the same
        assert len(passed[2]) > 3
    best = best_of_n(engine, PROMPT, 9, SAMPLED)
    means = [o.logprob / len(o.token_ids) for o in best.outputs]
    assert means == sorted(means, reverse=True)
    check_pages(engine)


def test_votes_by_hand(llama):
    continuations = [
        Continuation((i,), 0.0, score=s)
        for i, s in enumerate((0.5, 0.9, 0.1, 0.3, 0.2, 1.0))
    ]
    answers = ["7", "8", "7", None, "7", None]
    answer, ranked = rank_by_answer(continuations, answers)  # 7: 0.8, 8: 0.9
    assert (answer, [o.token_ids[0] for o in ranked]) == ("8", [1, 0, 4, 2, 5, 3])
    answer, ranked = rank_by_answer(
        [replace(continuation, score=1.0) for continuation in continuations], answers
    )
    assert (answer, [o.token_ids[0] for o in ranked]) == ("7", [0, 2, 4, 1, 3, 5])
    assert rank_by_answer(continuations[:2], [None, None]) == (
        None,
        [continuations[1], continuations[0]],
    )
    assert message(
        rank_by_answer, [replace(continuations[0], score=-1.0)], ["7"]
    ).startswith("scorer: ")
    engine = make_engine(llama, Letters())

    def parse(text):
        return str(text.count("a"))

    voted = self_consistency(engine, PROMPT, 11, SAMPLED, parse)
    texts = [o.text for o in best_of_n(engine, PROMPT, 11, SAMPLED).outputs]
    counts = {
        continuation: [parse(t) for t in texts].count(continuation)
        for continuation in map(parse, texts)
    }
    assert counts[str(voted.answer)] == max(counts.values()) > 1
    assert parse(voted.outputs[0].text) == voted.answer

    def score(_, outputs):
        return [100.0 * (parse(o.text) == "0") for o in outputs]

    assert best_of_n(engine, PROMPT, 11, SAMPLED, score, parse).answer == "0"
    check_pages(engine)


def score_letters(prompt, outputs):
    return [output.text.count("a") - 0.01 * len(output.text) for output in outputs]


def test_a_tree_keeps_each_path_s_best_step(llama):
    engine = make_engine(llama, Letters())
    finished = 0
    tree = TreeSearchConfig(
        num_subtrees=1,
        beam_width=4,
        max_steps=3,
        max_step_tokens=2,
        step_delimiters=("\n",),
    )
    for seed in range(6):
        sampling = SAMPLED.model_copy(update={"max_new_tokens": 30, "seed": seed})
        calls = []

        def score(prompt, outputs, calls=calls):
            calls.append(outputs)
            return score_letters(prompt, outputs)

        result = diverse_verifier_tree_search(engine, PROMPT, score, tree, sampling)
        path = ()
        for number, outputs in enumerate(calls, 1):
            assert len(outputs) == 4
            for output in outputs:
                step = output.token_ids[len(path) :]
                assert output.token_ids[: len(path)] == path
                letters = [
                    Letters.texts[t].decode() for t in output.token_ids if t != 2
                ]
                assert output.text == "".join(letters)
                if number < 3:
                    assert 1 not in step[:-1]
                    assert len(step) <= 2
                if output.finish_reason is None:
                    assert step[-1] == 1 or len(step) == 2
                else:
                    assert step[-1] == 2 or len(output.token_ids) == 30
            best = max(outputs, key=lambda output: score_letters(None, [output])[0])
            path = best.token_ids
            assert (best.finish_reason is None) == (number < len(calls))
        finished += len(calls) < 3
        assert result.outputs[0].token_ids == path
        assert {o.token_ids for o in result.outputs} == {o.token_ids for o in calls[-1]}
        wide = tree.model_copy(update={"num_subtrees": 3})
        several = diverse_verifier_tree_search(
            engine, PROMPT, score_letters, wide, sampling
        )
        scores = [output.score for output in several.outputs]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 12
        # Paths do not look at each other.
        assert {o.token_ids for o in result.outputs} <= {
            o.token_ids for o in several.outputs
        }
    assert 0 < finished < 6
    check_pages(engine)


def test_answers():
    assert [
        parse_last_number(t) for t in ("so 3-5 = -2.", "$1,234.50", "1, 2,3", "none")
    ] == [
        "-2",
        "1234.5",
        "3",
        None,
    ]
    assert parse_gsm8k("#### 5\nno:\n#### $1,000") == "1000"
    assert parse_gsm8k("the answer is 5") is None
    assert (
        parse_boxed(r"\boxed{1} then \boxed{ \frac{1}{2} } and \boxed{3")
        == r"\frac{1}{2}"
    )
    assert parse_boxed("42") is None
    texts = (
        "The answer is (B), not C.",
        "A or D? answer: **D**",
        "Only (C) is, as E said",
        "no",
    )
    assert [parse_choice(text) for text in texts] == ["B", "D", "C", None]


def test_bad_input(llama):
    engine = make_engine(llama)
    cold = SamplingConfig(temperature=0, max_new_tokens=4)
    assert "all alike" in message(best_of_n, engine, PROMPT, 2, cold)
    assert "less than one sample" in message(
        best_of_n, engine, PROMPT, 2, SAMPLED, budget=7
    )
    assert "one number for each" in message(
        best_of_n, engine, PROMPT, 2, SAMPLED, lambda *_: [1]
    )
    assert "more rows" in message(
        beam_search, engine, [PROMPT], BeamSearchConfig(num_beams=9)
    )
    config = BeamSearchConfig(num_beams=2, num_return_sequences=3)
    assert message(beam_search, engine, [PROMPT], config).startswith(
        "num_return_sequences: "
    )
    tree = TreeSearchConfig()
    sampling = SAMPLED.model_copy(update={"max_new_tokens": 10})
    call = diverse_verifier_tree_search
    assert "tokenizer" in message(call, engine, PROMPT, score_letters, tree, sampling)
    engine.add_request(GenerationRequest("other", (1,), cold))
    assert "other requests" in message(
        beam_search, engine, [PROMPT], BeamSearchConfig()
    )
    list(engine.run(()))
    check_pages(engine)
