"""Promise: a batch of unequal prompts gives to the token what each prompt gives alone."""

import jax
import numpy as np
import pytest

from maxlm.inference import generate as generation
from maxlm.inference.generate import generate
from maxlm.inference.sampling import SamplingConfig
from maxlm.models.params import bind
from tests.errors import message

PROMPTS = [[1], [5, 9, 2, 40, 3, 8, 8], [7, 7], list(range(20, 33))]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=9)
SAMPLED = SamplingConfig(temperature=3.0, top_k=60, top_p=0.98, max_new_tokens=8)


def steps(tiny, prompts, sampling, *, eos_id=None, seed=0, **options):
    key = jax.random.key(seed)
    options = {"cache_length": 32, **options}  # one size, few compilations
    return generate(tiny.model, tiny.params, prompts, sampling, eos_id=eos_id, key=key, **options)


def rows(tiny, prompts, sampling, **how) -> list[list[int]]:
    """Each prompt's new tokens, with the Nones checked to be a tail."""
    found = steps(tiny, prompts, sampling, **how)
    columns = [list(column) for column in zip(*found, strict=True)]
    kept = [[token for token in column if token is not None] for column in columns]
    assert all(c == k + [None] * (len(c) - len(k)) for c, k in zip(columns, kept, strict=True))
    return kept


def test_greedy_rows_equal_full_forward_passes(tiny):
    expected = [tiny.greedy(prompt, 9) for prompt in PROMPTS]
    assert rows(tiny, PROMPTS, GREEDY) == expected
    assert len(set(map(tuple, expected))) == len(expected)


def test_sampled_rows_do_not_depend_on_their_batch(tiny):
    together = rows(tiny, PROMPTS, SAMPLED, seed=4)
    for stream, prompt in enumerate(PROMPTS):
        assert rows(tiny, [prompt], SAMPLED, seed=4, streams=[stream]) == [together[stream]]
    reordered = rows(tiny, PROMPTS[::-1], SAMPLED, seed=4, streams=[3, 2, 1, 0])
    assert reordered == together[::-1]


def test_angles_that_grow_with_the_sequence_are_each_row_s_own(one_device_mesh, build_tiny):
    """Some rows are beyond the original length and some are not; none sees another's padding."""
    scaling = {"kind": "dynamic_ntk", "factor": 8.0, "original_length": 6}
    prompts = [*PROMPTS, [3, 1, 4, 1, 5, 9, 2, 6] * 5]
    with jax.set_mesh(one_device_mesh):
        tiny = build_tiny("llama", one_device_mesh, positions={"scaling": scaling})
        together = rows(tiny, prompts, GREEDY, cache_length=64)

        @jax.jit
        def forward(params, ids, places, segments):
            bound = bind(tiny.model, params)
            return bound.logits(bound(ids, places, segments)[0])

        for prompt, row in zip(prompts, together, strict=True):
            assert rows(tiny, [prompt], GREEDY, cache_length=64) == [row]
            # A forward pass of just the prompt: padding is of no segment, and at 0.
            ids, places, segments = np.zeros((3, 1, 40), np.int32)
            size = len(prompt)
            ids[0, :size], places[0, :size], segments[0, :size] = prompt, range(size), 1
            logits = forward(tiny.params, ids, places, segments)
            assert logits[0, size - 1].argmax() == row[0]
        plain = rows(build_tiny("llama", one_device_mesh), prompts, GREEDY, cache_length=64)
    assert [a == b for a, b in zip(plain, together, strict=True)] != [True] * len(prompts)


def test_seeds_and_streams_give_different_text_and_repeat(llama):
    a, b, *_ = rows(llama, [[1]] * 4, SAMPLED, seed=1)
    assert a != b
    assert rows(llama, [[1]], SAMPLED, seed=1) == [a]
    assert rows(llama, [[1]], SAMPLED, seed=2) != [a]


def test_ids_the_tokenizer_lacks_are_never_drawn_and_every_position_has_its_own_key(llama):
    uniform = SamplingConfig(temperature=1e6, max_new_tokens=8)
    drawn = rows(llama, PROMPTS, uniform, vocab_size=40)
    assert 35 < max(map(max, drawn)) < 40
    assert all(len(set(row)) > 4 for row in drawn)


def test_a_row_stops_at_eos_and_the_others_go_on(llama):
    full = rows(llama, PROMPTS, GREEDY)
    eos = full[1][3]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    assert len(expected[1]) < 9
    assert rows(llama, PROMPTS, GREEDY, eos_id=eos) == expected
    assert list(steps(llama, [PROMPTS[1]], GREEDY, eos_id=full[1][0])) == [[full[1][0]]]


def test_nothing_compiles_after_the_second_token_or_for_a_similar_prompt(llama):
    def compiled():
        return generation._start._cache_size(), generation._advance._cache_size()

    before = compiled()
    options = {"cache_length": 27}  # no other test's
    rows(llama, [[1, 2, 3], [4]], GREEDY, **options)
    once = tuple(n + 1 for n in before)
    assert compiled() == once
    other = SamplingConfig(temperature=0, max_new_tokens=5, seed=8)
    rows(llama, [[1], [4, 5, 6, 7, 8]], other, seed=3, **options)
    assert compiled() == once


def test_the_first_tokens_come_before_the_last_are_computed(llama, monkeypatch):
    dispatched = []
    original = generation._advance
    monkeypatch.setattr(
        generation, "_advance", lambda *a, **k: dispatched.append(1) or original(*a, **k)
    )
    found = steps(llama, [[1]], GREEDY)
    for count in (1, 2):
        next(found)
        assert len(dispatched) == count


@pytest.mark.parametrize(("length", "new"), [(17, 1), (16, 3)])
def test_a_cache_filled_to_its_last_slot(llama, length, new):
    prompt = np.random.default_rng(length).integers(0, 66, length).tolist()
    sampling = SamplingConfig(temperature=0, max_new_tokens=new)
    found = rows(llama, [prompt], sampling, cache_length=length + new)
    assert found == [llama.greedy(prompt, new)]


def refusal(tiny, prompts, **options) -> str:
    # At the call, not at the first step.
    return message(steps, tiny, prompts, GREEDY, **{"cache_length": None, **options})


def test_rope_goes_past_max_seq_len(llama):
    assert rows(llama, [[1] * 45], GREEDY, cache_length=None) == [llama.greedy([1] * 45, 9)]


def test_learned_positions_up_to_the_last_one(gpt2):
    prompts = [list(range(31)), [3]]
    expected = [gpt2.greedy(prompt, 9) for prompt in prompts]
    assert rows(gpt2, prompts, GREEDY, cache_length=None) == expected


def test_past_the_learned_positions_and_past_the_cache(llama, gpt2):
    assert refusal(gpt2, [[1], [1] * 35]) == (
        "generate: a prompt of 35 tokens and 9 new ones make 44; the model has positions "
        "for 40; ask for at most 5 new tokens"
    )
    assert refusal(gpt2, [[1] * 40]).endswith("positions for 40; shorten the prompt")
    assert refusal(llama, [[1] * 8], cache_length=16) == (
        "generate: a prompt of 8 tokens and 9 new ones make 17; the cache has slots for 16; "
        "ask for at most 8 new tokens"
    )


def test_bad_prompts(llama):
    assert refusal(llama, []) == "generate: no prompts; give at least one"
    assert refusal(llama, [[1], []]) == "prompt 2: no tokens; start it with bos"
    for token in (66, -1):
        assert refusal(llama, [[1, token]]) == (
            f"prompt 1: token {token} is outside the model's vocabulary of 66; "
            "use the tokenizer the model was trained with"
        )
