"""Promise: a batch of unequal prompts gives to the token what each prompt gives alone."""

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.inference import generate as generation
from maxlm.inference.generate import bucket, generate
from maxlm.inference.sampling import SamplingConfig

PROMPTS = [[1], [5, 9, 2, 40, 3, 8, 8], [7, 7], list(range(20, 39))]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=9)


def rows(tiny, prompts, sampling, *, eos_id=None, seed=0, **options) -> list[list[int]]:
    """Each prompt's new tokens, with the Nones checked to be a tail."""
    steps = list(
        generate(
            tiny.model, tiny.params, prompts, sampling, eos_id=eos_id,
            key=jax.random.key(seed), **options,
        )
    )  # fmt: skip
    columns = [list(column) for column in zip(*steps, strict=True)]
    kept = [[token for token in column if token is not None] for column in columns]
    assert all(c == k + [None] * (len(c) - len(k)) for c, k in zip(columns, kept, strict=True))
    return kept


def test_greedy_rows_equal_full_forward_passes(tiny):
    expected = [tiny.greedy(prompt, 9) for prompt in PROMPTS]
    assert rows(tiny, PROMPTS, GREEDY) == expected
    assert len(set(map(tuple, expected))) == len(expected)


@pytest.mark.parametrize("knobs", [{}, {"top_k": 9}, {"temperature": 1.5, "top_p": 0.8}])
def test_sampled_rows_do_not_depend_on_their_batch(tiny, knobs):
    sampling = SamplingConfig(max_new_tokens=8, **knobs)
    together = rows(tiny, PROMPTS, sampling, seed=4)
    for stream, prompt in enumerate(PROMPTS):
        assert rows(tiny, [prompt], sampling, seed=4, streams=[stream]) == [together[stream]]
    reordered = rows(tiny, PROMPTS[::-1], sampling, seed=4, streams=[3, 2, 1, 0])
    assert reordered == together[::-1]


def test_seeds_and_streams_give_different_text_and_repeat(tiny):
    sampling = SamplingConfig(max_new_tokens=8)
    a, b = rows(tiny, [[1], [1]], sampling, seed=1)
    assert a != b
    assert rows(tiny, [[1]], sampling, seed=1) == [a]
    assert rows(tiny, [[1]], sampling, seed=2) != [a]


def test_a_row_stops_at_eos_and_the_others_go_on(tiny):
    full = rows(tiny, PROMPTS, GREEDY)
    eos = full[1][3]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    assert len(expected[1]) < 9
    assert rows(tiny, PROMPTS, GREEDY, eos_id=eos) == expected


def test_generation_ends_with_the_last_row(tiny):
    (row,) = rows(tiny, [[5, 9]], GREEDY)
    steps = generate(
        tiny.model, tiny.params, [[5, 9]], GREEDY, eos_id=row[0], key=jax.random.key(0)
    )
    assert list(steps) == [[row[0]]]


def test_nothing_compiles_after_the_first_step_or_for_a_similar_prompt(tiny, monkeypatch):
    traced = []
    original = type(tiny.model).__call__
    monkeypatch.setattr(
        type(tiny.model), "__call__", lambda *a, **k: traced.append(1) or original(*a, **k)
    )
    with jax.log_compiles(False):
        rows(tiny, [[1, 2, 3], [4]], GREEDY)
        assert len(traced) == 2  # prefill, decode
        compiled = generation._start._cache_size(), generation._advance._cache_size()
        rows(tiny, [[1], [4, 5, 6, 7, 8]], SamplingConfig(temperature=0, max_new_tokens=5, seed=8))
    assert len(traced) == 2
    assert (generation._start._cache_size(), generation._advance._cache_size()) == compiled


def test_the_first_tokens_come_before_the_last_are_computed(tiny, monkeypatch):
    dispatched = []
    original = generation._advance
    monkeypatch.setattr(
        generation, "_advance", lambda *a, **k: dispatched.append(1) or original(*a, **k)
    )
    steps = generate(tiny.model, tiny.params, [[1]], GREEDY, eos_id=None, key=jax.random.key(0))
    next(steps)
    assert len(dispatched) == 1
    next(steps)
    assert len(dispatched) == 2


@pytest.mark.parametrize("length", [1, 8, 16, 17, 40])
def test_a_context_filled_to_its_last_position(tiny, length):
    """Prompts as wide as their bucket, and buckets cut at the last learned position."""
    limit = 40
    prompt = np.random.default_rng(length).integers(0, 67, length).tolist()
    new = max(1, limit - length - 20) if length < limit else 0
    if new:
        sampling = SamplingConfig(temperature=0, max_new_tokens=new)
        options = {"cache_length": length + new}
        assert rows(tiny, [prompt], sampling, **options) == [tiny.greedy(prompt, new)]


def test_learned_positions_up_to_the_last_one(tiny):
    prompt = list(range(33))
    sampling = SamplingConfig(temperature=0, max_new_tokens=7)
    assert rows(tiny, [prompt, [3]], sampling) == [tiny.greedy(prompt, 7), tiny.greedy([3], 7)]


@pytest.mark.parametrize(
    ("n", "size"), [(1, 16), (16, 16), (17, 32), (65, 128), (128, 128), (129, 256), (700, 768)]
)
def test_buckets(n, size):
    assert bucket(n) == size


def refusal(tiny, prompts, sampling=GREEDY, **options) -> str:
    with pytest.raises(MaxlmError) as refused:  # at the call, not at the first step
        generate(
            tiny.model, tiny.params, prompts, sampling, eos_id=None,
            key=jax.random.key(0), **options,
        )  # fmt: skip
    return str(refused.value)


def test_past_the_learned_positions(tiny):
    if tiny.model.config.positions.kind == "rope":  # goes as far as the cache
        assert rows(tiny, [[1] * 45], GREEDY) == [tiny.greedy([1] * 45, 9)]
        return
    assert refusal(tiny, [[1], [1] * 35]) == (
        "generate: a prompt of 35 tokens and 9 new ones make 44; the model has learned positions "
        "for 40; ask for at most 5 new tokens"
    )
    assert refusal(tiny, [[1] * 40]) == (
        "generate: a prompt of 40 tokens and 9 new ones make 49; the model has learned positions "
        "for 40; shorten the prompt"
    )


def test_past_the_cache(tiny):
    assert refusal(tiny, [[1] * 8], cache_length=16) == (
        "generate: a prompt of 8 tokens and 9 new ones make 17; the cache has slots for 16; "
        "ask for at most 8 new tokens"
    )


def test_bad_prompts(tiny):
    assert refusal(tiny, []) == "generate: no prompts; give at least one"
    assert refusal(tiny, [[1], []]) == "prompt 2: no tokens; start it with bos"
    for token in (67, -1):
        assert refusal(tiny, [[1, token]]) == (
            f"prompt 1: token {token} is outside the model's vocabulary of 67; "
            "use the tokenizer the model was trained with"
        )
