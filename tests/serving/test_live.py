"""The server over the engine itself: what a client gets is what the engine alone
gives."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.search.beam import BeamSearchConfig, beam_search
from tests.inference.conftest import CONFIGS, build
from tests.serving.running import run_in_thread

NUM_HANG_UPS = int(os.environ.get("NUM_HANG_UPS", 40))
SIZES = EngineConfig(
    max_sequences=4,
    max_length=768,
    page_size=8,
    prefill_tokens=32,
    max_chunks=1,
    decode_steps=2,
)


@pytest.fixture(scope="module")
def tiny(one_device_mesh, chat_tokenizer):
    return build(
        CONFIGS["llama"]
        | {"vocab_size": chat_tokenizer.vocab_size, "max_seq_len": 256},
        one_device_mesh,
    )


@pytest.fixture(scope="module")
def server(tiny, chat_tokenizer):
    engine = Engine(tiny.model, tiny.params, SIZES, chat_tokenizer)
    with run_in_thread(
        chat_tokenizer, make_engine=lambda _: engine, max_length=768
    ) as running:
        yield running


@pytest.mark.heavy
def test_mixed_requests_at_once_are_as_alone(server, tiny, chat_tokenizer):
    def make_body(number: int) -> dict:
        sampling = (
            {"temperature": 0} if number % 2 else {"temperature": 0.7, "seed": number}
        )
        return {
            "prompt": f"p{number} " * (number + 1),
            "max_tokens": 5 + number,
            **sampling,
        }

    def ask(number: int) -> str:
        body = {**make_body(number), "stream": number % 3 == 0}
        completion = server.client.completions.create(model="fake", **body)
        events = completion if body["stream"] else [completion]
        return "".join(event.choices[0].text for event in events)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    alone = Engine(tiny.model, tiny.params, SIZES, chat_tokenizer)
    for number, text in enumerate(texts):
        body = make_body(number)
        prompt = (chat_tokenizer.bos_id, *chat_tokenizer.encode(body.pop("prompt")))
        sampling = SamplingConfig(max_new_tokens=body.pop("max_tokens"), **body)
        outputs = alone.run([GenerationRequest("x", prompt, sampling)])
        assert text == "".join(output.text for output in outputs)


@pytest.mark.heavy
def test_a_seed_repeats_an_answer_and_without_one_each_differs(server):
    def ask(**settings: int) -> str:
        completion = server.client.completions.create(
            model="fake", prompt="x", **settings
        )
        return completion.choices[0].text

    assert ask(seed=5) == ask(seed=5) != ask(seed=6)
    assert ask() != ask()


@pytest.mark.heavy
def test_echoed_prompts_have_logprobs_in_each_of_n(server, chat_tokenizer):
    ask = {
        "model": "fake",
        "prompt": ["the model", "is"],
        "n": 3,
        "echo": True,
        "logprobs": 1,
    }
    ask |= {"max_tokens": 2, "temperature": 0}
    choices = server.client.completions.create(**ask).choices
    streamed: dict[int, list[float]] = {}
    for event in server.client.completions.create(**ask, stream=True):
        if event.choices:
            event_choice = event.choices[0]
            streamed.setdefault(event_choice.index, []).extend(
                event_choice.logprobs.token_logprobs
            )
    for choice in choices:
        count = 1 + len(chat_tokenizer.encode(ask["prompt"][choice.index // 3])) + 2
        logprobs = choice.logprobs.token_logprobs
        assert len(logprobs) == count
        assert logprobs == choices[choice.index // 3 * 3].logprobs.token_logprobs
        assert streamed[choice.index] == logprobs


def test_ids_that_no_model_has_stop_nothing(server):
    for token in (2**31 - 1, 300):
        body = {
            "prompt": "x",
            "max_tokens": 2,
            "stop_token_ids": [token],
            "ignore_eos": True,
        }
        answer = server.http.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 2


def test_a_schema_is_kept_and_a_bad_one_is_a_400(server):
    properties = {"n": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["n", "ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    def check(text: str) -> None:
        value = json.loads(text)
        assert {name: type(field) for name, field in value.items()} == {
            "n": int,
            "ok": bool,
        }
        assert value["n"] <= 99

    ask = {"messages": [{"role": "user", "content": "go"}], "model": "fake", "seed": 1}
    completion = server.client.chat.completions.create(**ask, response_format=form)
    check(completion.choices[0].message.content)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    completion = server.client.chat.completions.create(
        **ask, tools=[tool], tool_choice="required"
    )
    (call,) = completion.choices[0].message.tool_calls
    check(call.function.arguments)
    form["json_schema"]["schema"] = {"type": "nonsense"}
    answer = server.http.post(
        "/v1/chat/completions", json={**ask, "response_format": form}
    )
    assert answer.status_code == 400, answer.text


@pytest.mark.heavy
def test_scores_are_log_likelihoods(server, tiny, chat_tokenizer, one_device_mesh):
    head = [chat_tokenizer.bos_id, *chat_tokenizer.encode("ab")]
    tail = chat_tokenizer.encode(" the end")
    with jax.set_mesh(one_device_mesh):
        logits = tiny.logits([*head, *tail])
    logprobs = np.asarray(jax.nn.log_softmax(logits))[len(head) - 1 : -1]
    expected = logprobs[np.arange(len(tail)), tail].mean()
    answer = server.http.post(
        "/v1/score", json={"text_1": "ab", "text_2": " the end"}
    ).json()
    assert answer["data"][0]["score"] == pytest.approx(expected, abs=1e-4)


def test_random_hang_ups_leave_no_page(server):
    random = np.random.default_rng(0)

    def ask(number: int) -> None:
        body = {
            "prompt": f"q{number}",
            "max_tokens": 60,
            "n": 1 + number % 3,
            "model": "fake",
        }
        with server.client.completions.create(**body, stream=True) as stream:
            for _ in zip(range(random.integers(1, 5)), stream, strict=False):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(NUM_HANG_UPS)))
    while server.loop.num_open or server.engine.has_work:
        time.sleep(0.01)
    after = server.engine.stats()
    assert (after.num_running, after.num_waiting) == (0, 0)
    assert after.num_free_pages == after.num_pages


@pytest.mark.parametrize("early_stopping", [True, False])
def test_beams_over_http_are_those_of_the_engine_alone(
    server, tiny, chat_tokenizer, early_stopping
):
    texts = ["the model", "answers what it is"]
    ask = {"model": "fake", "prompt": texts, "n": 2, "best_of": 3, "max_tokens": 9}
    extra = {
        "use_beam_search": True,
        "length_penalty": 0.5,
        "early_stopping": early_stopping,
    }
    choices = server.client.completions.create(**ask, extra_body=extra).choices
    alone = Engine(tiny.model, tiny.params, SIZES, chat_tokenizer)
    config = BeamSearchConfig(
        num_beams=3,
        length_penalty=0.5,
        early_stopping=early_stopping,
        max_new_tokens=9,
        num_return_sequences=2,
    )
    prompts = [(chat_tokenizer.bos_id, *chat_tokenizer.encode(text)) for text in texts]
    expected = [
        (output.text, output.finish_reason)
        for result in beam_search(alone, prompts, config)
        for output in result.outputs
    ]
    assert [(choice.text, choice.finish_reason) for choice in choices] == expected
    assert [choice.index for choice in choices] == [0, 1, 2, 3]


def test_the_best_of_several_are_those_with_the_highest_mean_logprob(server):
    ask = {"model": "fake", "prompt": ["the model", "is"], "max_tokens": 6, "seed": 3}
    drawn = server.client.completions.create(**ask, n=5, logprobs=0).choices
    best = server.client.completions.create(**ask, n=2, best_of=5).choices
    expected: list[str] = []
    for start in (0, 5):
        means = {
            c.index: np.mean(c.logprobs.token_logprobs)
            for c in drawn[start : start + 5]
        }
        order = sorted(means, key=lambda index: -means[index])
        expected += [drawn[index].text for index in order[:2]]
    assert [choice.text for choice in best] == expected
    assert all(choice.logprobs is None for choice in best)


def test_the_best_of_several_have_their_prompts_logprobs(server, chat_tokenizer):
    ask = {
        "model": "fake",
        "prompt": "the model",
        "max_tokens": 3,
        "seed": 3,
        "logprobs": 1,
    }
    choice = server.client.completions.create(**ask, echo=True, best_of=5).choices[0]
    count = 1 + len(chat_tokenizer.encode("the model")) + 3
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == count


def test_what_no_beam_search_has_is_refused_and_one_that_runs_is_finished(server):
    ask = {"prompt": "x", "use_beam_search": True, "max_tokens": 4}
    for field, value in {"logit_bias": {"5": -100}, "repetition_penalty": 1.5}.items():
        answer = server.http.post("/v1/completions", json={**ask, field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    answer = server.http.post("/v1/completions", json={**ask, "length_penalty": 1e6})
    assert answer.status_code == 400
    submit = server.loop.submit

    def submit_and_drain(requests, *, is_admitted):
        server.loop.is_draining = True
        return submit(requests, is_admitted=is_admitted)

    server.loop.submit = submit_and_drain
    try:
        answer = server.http.post("/v1/completions", json={**ask, "n": 2})
    finally:
        server.loop.is_draining = False
        server.loop.submit = submit
    assert len(answer.json()["choices"]) == 2
    assert server.loop.num_open == 0


def test_forms_that_bad_words_make_impossible_end(server):
    extra = {"regex": "[ab]{4}", "bad_words": ["a", "b", "ab", "ba", "aa", "bb"]}
    ask = {"model": "fake", "prompt": "x", "max_tokens": 9}
    choice = server.client.completions.create(**ask, extra_body=extra).choices[0]
    assert (choice.text, choice.finish_reason) == ("", "stop")


def test_bad_words_never_come_and_forms_hold_beside_them(server):
    ask = {"model": "fake", "prompt": "the model", "max_tokens": 40, "temperature": 0}
    text = server.client.completions.create(**ask).choices[0].text
    words = [text[start : start + 3] for start in (1, 9, 20)]
    extra = {"bad_words": words}
    other = server.client.completions.create(**ask, extra_body=extra).choices[0].text
    assert other != text
    extra["regex"] = "[ab]{12}"
    extra["bad_words"] = ["ab"]
    formed = server.client.completions.create(**ask, extra_body=extra).choices[0].text
    assert re.fullmatch("[ab]{12}", formed)


def test_prompts_are_cut_to_their_ends_where_that_is_asked_for(server, chat_tokenizer):
    text = "one two three four " * 400
    assert len(chat_tokenizer.encode(text)) > 768
    ask = {"model": "fake", "max_tokens": 3, "temperature": 0, "echo": True}
    extra = {"truncate_prompt_tokens": 50}
    cut = server.client.completions.create(**ask, prompt=text, extra_body=extra)
    assert cut.usage.prompt_tokens == 50
    ids = [chat_tokenizer.bos_id, *chat_tokenizer.encode(text)[-49:]]
    expected = server.client.completions.create(**{**ask, "prompt": ids, "echo": False})
    end = chat_tokenizer.decode(ids)
    assert cut.choices[0].text == end + expected.choices[0].text
    extra = {"truncate_prompt_tokens": -1}
    full = server.client.completions.create(**ask, prompt=text, extra_body=extra)
    assert full.usage.prompt_tokens == 768 - 3
    messages = [{"role": "user", "content": text}]
    chat = server.client.chat.completions.create(
        model="fake",
        messages=messages,
        max_tokens=3,
        extra_body={"truncate_prompt_tokens": 99},
    )
    assert chat.usage.prompt_tokens == 99


@pytest.mark.heavy
def test_documents_are_ranked_by_how_likely_the_query_is_behind_them(
    server, chat_tokenizer
):
    documents = ["the model", "an answer of some length", "x"]
    query = "what it is asked"
    body = {"query": query, "documents": documents, "top_n": 2}
    ranking = server.http.post("/v1/rerank", json=body).json()
    passages = [
        f"Passage: {text}\nPlease write a question based on this passage.\nQuestion: "
        for text in documents
    ]
    body = {"text_1": passages, "text_2": [query] * 3}
    scores = [
        score["score"]
        for score in server.http.post("/v1/score", json=body).json()["data"]
    ]
    order = sorted(range(3), key=lambda index: -scores[index])[:2]
    assert [result["index"] for result in ranking["results"]] == order
    relevance = [result["relevance_score"] for result in ranking["results"]]
    np.testing.assert_allclose(
        relevance, np.exp([scores[index] for index in order]), rtol=1e-5
    )
    assert ranking["results"][0]["document"]["text"] == documents[order[0]]
