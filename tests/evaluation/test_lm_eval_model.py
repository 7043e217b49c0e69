"""What the harness is answered: log-likelihoods as of plain forward passes, texts as
asked for."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation.lm_eval_model import MaxlmModel
from maxlm.inference.engine import Engine, EngineConfig
from tests.inference.conftest import CONFIGS, build
from tests.serving.running import train_chat_tokenizer

MAX_LENGTH = 37


@pytest.fixture(scope="module")
def tokenizer():
    return train_chat_tokenizer()


@pytest.fixture(scope="module")
def tiny(one_device_mesh, tokenizer):
    sizes = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 64, "num_layers": 2}
    return build(CONFIGS["llama"] | sizes, one_device_mesh)


@pytest.fixture(scope="module")
def engine(tiny, tokenizer):
    sizes = {"max_sequences": 3, "page_size": 8, "prefill_tokens": 24, "max_chunks": 1}
    config = EngineConfig(max_length=MAX_LENGTH, decode_steps=1, **sizes)
    return Engine(tiny.model, tiny.params, config, tokenizer)


@pytest.fixture(scope="module")
def model(engine):
    return MaxlmModel(engine)


@pytest.fixture(autouse=True)
def in_mesh(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        yield


def ask(*arguments):
    return [SimpleNamespace(args=request_arguments) for request_arguments in arguments]


def score_directly(tiny, context, tail):
    """In float64, of the tokens that fit behind the last ``MAX_LENGTH`` that are
    read."""
    row = [*context, *tail][-(MAX_LENGTH + 1) :]
    logits = tiny.logits(row[:-1]).astype(np.float64)[-len(tail) :]
    logprobs = logits - np.log(
        np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    logprobs -= logits.max(-1, keepdims=True)
    chosen = logprobs[np.arange(len(tail)), tail]
    return chosen.sum(), bool((logits.argmax(-1) == tail).all())


@pytest.mark.heavy
def test_loglikelihoods_are_those_of_plain_forward_passes(model, tiny, tokenizer):
    texts = [
        ("the model", " answers what"),
        ("", "it is"),
        ("x " * 30, "asked"),  # longer than the model reads
        ("the model ", "a"),  # the space is the continuation's
        ("the model", " answers the"),
    ]
    done = []
    model.on_progress = lambda count, total: done.append((count, total))
    scores = model.loglikelihood(ask(*texts))
    for (context, continuation), (logprob, is_greedy) in zip(
        texts, scores, strict=True
    ):
        head = [tokenizer.bos_id, *tokenizer.encode(context.rstrip())]
        tail = tokenizer.encode(context[len(context.rstrip()) :] + continuation)
        if context:  # encoded together, then cut
            whole = tokenizer.encode(context + continuation)
            tail = whole[len(head) - 1 :]
        expected, flag = score_directly(tiny, head, tail)
        assert logprob == pytest.approx(expected, abs=2e-4)
        assert is_greedy == flag
    assert done[-1] == (5, 5)


@pytest.mark.heavy
def test_a_continuation_is_greedy_if_all_its_tokens_are(model, tiny, tokenizer):
    head = [tokenizer.bos_id, *tokenizer.encode("ab")]
    likeliest = tiny.greedy(head, 3)
    other = [*likeliest[:2], (likeliest[2] + 1) % tokenizer.vocab_size]
    scores = model._loglikelihood_tokens([(None, head, likeliest), (None, head, other)])
    assert [is_greedy for _, is_greedy in scores] == [True, False]


def test_rolling_predicts_each_token_once(model, tiny, tokenizer, monkeypatch):
    texts = ["q", "the model answers " * 9, "what it is asked " * 5]
    pairs = []
    score = model._scorer.score
    monkeypatch.setattr(
        model._scorer,
        "score",
        lambda scored_pairs, *rest: (
            pairs.extend(scored_pairs) or score(scored_pairs, *rest)
        ),
    )
    totals = model.loglikelihood_rolling(ask(*((text,) for text in texts)))
    ids = [
        token for text in texts for token in [tokenizer.bos_id, *tokenizer.encode(text)]
    ]
    assert [token for _, tail in pairs for token in tail] == ids[:]
    assert all(len(context) + len(tail) <= MAX_LENGTH + 1 for context, tail in pairs)
    sums = [score_directly(tiny, *pair)[0] for pair in pairs]
    assert sum(totals) == pytest.approx(sum(sums), abs=1e-3)
    single = score_directly(
        tiny, [tokenizer.bos_id], [tokenizer.bos_id, *tokenizer.encode("q")]
    )
    assert totals[0] == pytest.approx(single[0], abs=1e-4)


@pytest.mark.more
def test_generation_stops_where_it_is_told(model, tiny, tokenizer):
    prompt = [tokenizer.bos_id, *tokenizer.encode("the model ")]
    ids = tiny.greedy(prompt, 12)
    whole = tokenizer.decode(
        i for i in ids if i not in tokenizer.special_tokens.values()
    )
    stop = whole[3:5]
    long = "what it is asked " * 6
    cut = [tokenizer.bos_id, *tokenizer.encode(long)][-(MAX_LENGTH - 5) :]
    answers = model.generate_until(
        ask(
            ("the model ", {"until": [], "max_gen_toks": 12, "do_sample": False}),
            ("the model ", {"until": [stop], "max_gen_toks": 12, "temperature": 0.0}),
            ("the model ", {"until": "", "max_gen_toks": 3}),
            (long, {"until": [], "max_gen_toks": 5}),
            *[
                (
                    "the model ",
                    {"max_gen_toks": 9, "do_sample": True, "temperature": 2.0},
                )
            ]
            * 2,
        )
    )
    assert answers[:2] == [whole, whole[: whole.index(stop)]]
    assert answers[2] == tokenizer.decode(ids[:3])
    assert answers[3] == tokenizer.decode(tiny.greedy(cut, 5))
    assert answers[4] != answers[5]  # repeats of a request are draws of their own


def test_settings_that_cannot_be_met(model):
    with pytest.raises(MaxlmError, match="num_beams: no setting"):
        model.generate_until(ask(("a", {"num_beams": 4})))
    with pytest.raises(MaxlmError, match="leaves a prompt no room in max_length=37"):
        model.generate_until(ask(("a", {"max_gen_toks": 37})))


def test_bos_is_written_once(engine, model, tokenizer):
    ids = tokenizer.encode("the")
    assert model.tok_encode("the") == [tokenizer.bos_id, *ids]
    assert model.tok_encode("the", add_special_tokens=False) == ids
    opened = tokenizer.decode([tokenizer.bos_id]) + "the"
    assert model.tok_encode(opened) == [tokenizer.bos_id, *ids]
    assert MaxlmModel(engine, add_bos_token=False).tok_encode("the") == ids
    tokenizer.opens_with_bos = False  # as GPT-2's and SmolLM2's
    try:
        assert model.tok_encode("the") == ids
        assert (
            MaxlmModel(engine, add_bos_token=True).tok_encode("the")[0]
            == tokenizer.bos_id
        )
    finally:
        tokenizer.opens_with_bos = True


def test_conversations_end_open_for_an_answer(model):
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "It is "},
    ]
    opened = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(turns[:1]) == opened
    assert (
        model.apply_chat_template(turns, add_generation_prompt=False)
        == opened + "It is "
    )
    assert "im_start" in model.chat_template(True)
