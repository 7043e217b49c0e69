"""The openai client, and plain HTTP, are answered as OpenAI's API does."""

import json

import numpy as np
import openai
import pytest

from maxlm.data.tokenizer.chat import encode_chat
from tests.serving.fake_engine import FakeEmbedder

HELLO = [{"role": "user", "content": "hi"}]
PLACE = {"type": "object", "properties": {"place": {"$ref": "#/$defs/place"}}}
PLACE["$defs"] = {"place": {"type": "string"}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PLACE}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Köln {}\\" 🐈"}}\n</tool_call>'


def read_events(server, path: str, body: dict) -> list:
    """The events of a stream, which is checked to be framed as OpenAI's is."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(response.iter_raw())
    *events, last, rest = raw.split(b"\n\n")
    assert (last, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    return [json.loads(event.removeprefix(b"data: ").decode()) for event in events]


def test_models(start_server):
    client = start_server().client
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "maxlm"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_chat_answers_and_settings_reach_the_engine(start_server):
    server = start_server()
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 2**40 + 3,
        "n": 2,
        "stop": ["xx", "y"],
    }
    extra = {"top_k": 5, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.2}
    extra |= {"no_repeat_ngram_size": 3, "min_tokens": 2, "regex": "H.*"}
    settings |= {
        "frequency_penalty": 0.25,
        "presence_penalty": -0.5,
        "logit_bias": {"65": -100},
    }
    settings |= {"messages": [{"role": "developer", "content": "Be kind."}, *HELLO]}
    settings |= {"max_completion_tokens": 100, "model": "fake"}
    completion = server.client.chat.completions.create(**settings, extra_body=extra)
    assert [choice.message.content for choice in completion.choices] == [
        "Hello there!"
    ] * 2
    assert [choice.finish_reason for choice in completion.choices] == ["stop"] * 2
    (request,) = server.engine.requests
    tokenizer = server.engine.tokenizer
    assert completion.usage.prompt_tokens == len(request.prompt_tokens)
    assert completion.usage.completion_tokens == 2 * (
        len(tokenizer.encode("Hello there!")) + 1
    )
    assert tokenizer.decode(request.prompt_tokens) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    del extra["min_tokens"], extra["regex"]
    expected = extra | {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "logit_bias": {65: -100},
    }
    expected |= {"frequency_penalty": 0.25, "presence_penalty": -0.5}
    expected |= {"min_new_tokens": 2, "max_new_tokens": 100}
    assert request.sampling.model_dump() == expected
    assert (request.num_sequences, request.stop_strings) == (2, ("xx", "y"))
    assert (request.grammar.kind, request.grammar.text) == ("regex", "H.*")


def test_unknown_fields_are_named_and_null_is_a_default(start_server):
    body = {
        "messages": HELLO,
        "n": None,
        "tools": None,
        "stop": None,
        "top_q": 1,
        "user": "me",
    }
    answer = start_server().http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.headers["x-maxlm-ignored"]) == (
        200,
        "top_q, user",
    )


def test_every_event_of_a_chat_stream(start_server):
    server = start_server(lambda text, request: "猫 🐈 é")
    body = {"messages": HELLO, "n": 2, "stream_options": {"include_usage": True}}
    body |= {"logprobs": True, "top_logprobs": 1}
    *events, usage = read_events(server, "/v1/chat/completions", body)
    assert (
        len(
            {(e["id"], e["created"], e["object"], e["model"]) for e in [*events, usage]}
        )
        == 1
    )
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 2
    assert all(
        event["usage"] is None and len(event["choices"]) == 1 for event in events
    )
    for index in range(2):
        choices = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices] == [None] * (
            len(choices) - 1
        ) + ["stop"]
        assert (
            "".join(choice["delta"].get("content", "") for choice in choices)
            == "猫 🐈 é"
        )
        assert not any(
            "\ufffd" in choice["delta"].get("content", "") for choice in choices
        )
        entries = [
            e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]
        ]
        assert bytes(b for e in entries[:-1] for b in e["bytes"]).decode() == "猫 🐈 é"
        assert [e["logprob"] for e in entries] == [
            -n for n in range(1, len(entries) + 1)
        ]
        assert all(len(entry["top_logprobs"]) == 1 for entry in entries)
    whole = server.http.post(
        "/v1/chat/completions", json={**body, "stream": False}
    ).json()
    assert [choice["logprobs"]["content"] for choice in whole["choices"]] == [
        entries
    ] * 2


def test_stop_strings_never_leak_and_max_tokens_is_length(start_server):
    server = start_server(lambda text, request: "one STOP two")
    body = {"messages": HELLO, "stop": "STOP"}
    events = read_events(server, "/v1/chat/completions", body)
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert (text, events[-1]["choices"][0]["finish_reason"]) == ("one ", "stop")
    completion = server.client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=3
    )
    assert (
        completion.choices[0].message.content,
        completion.choices[0].finish_reason,
    ) == (
        "one",
        "length",
    )


def test_completions_of_many_prompts(start_server):
    server = start_server(
        lambda text, request: f"{text.removeprefix('<|endoftext|>')}!"
    )
    tokens = server.engine.tokenizer.encode("ids")
    for prompt, texts in (
        ("a", ["a!"]),
        (["a", "b"], ["a!", "b!"]),
        (tokens, ["ids!"]),
    ):
        completion = server.client.completions.create(
            model="fake", prompt=prompt, n=2, max_tokens=9
        )
        assert [choice.text for choice in completion.choices] == [
            t for t in texts for _ in range(2)
        ]
        assert [choice.index for choice in completion.choices] == [
            *range(2 * len(texts))
        ]
    both = server.client.completions.create(model="fake", prompt=[tokens, tokens[:1]])
    assert [choice.text for choice in both.choices] == ["ids!", "i!"]
    events = read_events(
        server, "/v1/completions", {"prompt": ["x", "yz"], "max_tokens": 9}
    )
    texts = {0: "", 1: ""}
    for choice in (event["choices"][0] for event in events):
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "x!", 1: "yz!"}


def test_echo_and_logprobs_as_harnesses_read_them(start_server):
    """lm_eval scores by echo, logprobs and one token more, or none."""
    server = start_server(lambda text, request: "bc")
    tokenizer = server.engine.tokenizer
    prompt = tokenizer.encode("é the")
    settings = {"model": "fake", "prompt": prompt, "echo": True, "logprobs": 2}
    for count in (1, 0):
        (choice,) = server.client.completions.create(
            **settings, max_tokens=count
        ).choices
        assert choice.text == "é the" + "b" * count
        logprobs = choice.logprobs
        assert logprobs.token_logprobs == [
            None,
            *[-0.5] * (len(prompt) - 1),
            *[-1.0] * count,
        ]
        assert logprobs.tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]
        assert logprobs.top_logprobs[0] is None
        rows = zip(
            logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
        )
        for token, value, top in [*rows][1:]:
            assert max(top.values()) == value == top[token]
        assert logprobs.text_offset[0] == 0
        assert sorted(logprobs.text_offset) == logprobs.text_offset
    events = read_events(server, "/v1/completions", {**settings, "max_tokens": 2})
    assert "".join(e["choices"][0]["text"] for e in events) == "é thebc"


def test_each_prompt_gets_n_choices(start_server):
    server = start_server()
    completion = server.client.completions.create(model="fake", prompt=["x", "y"], n=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert [request.num_sequences for request in server.engine.requests] == [2, 2]


def test_json_schemas_reach_the_grammar(start_server):
    server = start_server(lambda text, request: "{}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema, "strict": True},
    }
    create = server.client.chat.completions.create
    create(model="fake", messages=HELLO, response_format=form)
    create(model="fake", messages=HELLO, response_format={"type": "json_object"})
    first, second = (request.grammar for request in server.engine.requests)
    assert (first.kind, json.loads(first.text)) == ("json_schema", schema)
    assert second.kind == "json_object"


def test_keywords_that_no_grammar_keeps_are_named(start_server):
    server = start_server(lambda text, request: "{}")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for body, expected in (
        ({"response_format": form}, "response_format.uniqueItems"),
        ({"tools": [tool], "tool_choice": "required"}, "tools.uniqueItems"),
        ({"tools": [tool]}, None),  # nothing is forced
    ):
        answer = server.http.post(
            "/v1/chat/completions", json={"messages": HELLO, **body}
        )
        assert (answer.status_code, answer.headers.get("x-maxlm-ignored")) == (
            200,
            expected,
        )


def test_tools_are_told_called_and_answered(start_server):
    server = start_server(lambda text, request: f"Let me see.\n{CALL}")
    create = server.client.chat.completions.create
    settings = {"model": "fake", "messages": HELLO, "tools": [WEATHER]}
    choice = create(**settings).choices[0]
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt_tokens)
    assert '"name": "get_weather"' in prompt.partition("user\n")[0]
    assert (choice.finish_reason, choice.message.content) == (
        "tool_calls",
        "Let me see.",
    )
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"place": 'Köln {}" 🐈'}

    parts = []
    for event in create(**settings, stream=True):
        parts += event.choices[0].delta.tool_calls or []
    assert (parts[0].function.name, parts[0].id[:5], parts[0].index) == (
        "get_weather",
        "call_",
        0,
    )
    assert all(part.id is None and part.function.name is None for part in parts[1:])
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert len(parts) > 5  # they come as they are written

    answered = [*HELLO, choice.message.model_dump(exclude_none=True)]
    answered.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    create(model="fake", messages=answered, tools=[WEATHER], tool_choice="none")
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt_tokens)
    assert "<tool_response>\nsunny\n</tool_response>" in prompt
    assert "Köln" in prompt
    assert "<tools>" not in prompt


def test_a_call_is_forced_by_grammar(start_server):
    text = '{"name": "get_weather", "arguments": {"place": "x"}}'
    server = start_server(lambda *_: text)
    settings = {"model": "fake", "messages": HELLO, "tools": [WEATHER]}
    for choice in (
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
    ):
        completion = server.client.chat.completions.create(
            **settings, tool_choice=choice
        )
        (call,) = completion.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == (
            "get_weather",
            '{"place": "x"}',
        )
        request = server.engine.requests[-1]
        schema = json.loads(request.grammar.text)
        assert schema["properties"]["name"] == {"const": "get_weather"}
        assert schema["properties"]["arguments"]["$defs"] == PLACE["$defs"]
        assert server.engine.tokenizer.decode(request.prompt_tokens).endswith(
            "<tool_call>\n"
        )


def test_embeddings_and_scores(start_server):
    server = start_server(embedder=FakeEmbedder())
    texts = ["x" * n for n in range(11)]
    create = server.client.embeddings.create
    expected = np.array(
        [FakeEmbedder.embed(n + 1) for n in range(11)]
    )  # bos before each
    embeddings = create(model="fake", input=texts, encoding_format="float")
    np.testing.assert_allclose(
        [embedding.embedding for embedding in embeddings.data], expected, atol=1e-6
    )
    assert embeddings.usage.prompt_tokens == sum(range(1, 12))
    embeddings = create(model="fake", input=texts)  # in base64, which the client reads
    np.testing.assert_allclose(
        [embedding.embedding for embedding in embeddings.data], expected, atol=1e-6
    )
    short = np.array(create(model="fake", input="xxx", dimensions=2).data[0].embedding)
    np.testing.assert_allclose(short, np.array([4, 1]) / 17**0.5, atol=1e-6)

    score = {"text_1": "ab", "text_2": ["c", "qz"]}
    answer = server.http.post("/v1/score", json=score).json()
    assert [score["score"] for score in answer["data"]] == [-0.5, -0.5]
    engine_request = server.engine.requests[-1]
    tokens = [*engine_request.prompt_tokens, *engine_request.continuations[0]]
    assert server.engine.tokenizer.decode(tokens) == "<|endoftext|>abqz"
    answer = server.http.post("/v1/score", json={**score, "method": "cosine"}).json()
    expected = [FakeEmbedder.embed(3) @ FakeEmbedder.embed(n) for n in (2, 3)]
    assert [score["score"] for score in answer["data"]] == pytest.approx(
        expected, abs=1e-6
    )


def test_tokenize_and_back(start_server):
    server = start_server()
    tokenizer = server.engine.tokenizer
    for extra, prefix in (
        ({}, [tokenizer.bos_id]),
        ({"add_special_tokens": False}, []),
    ):
        answer = server.http.post(
            "/tokenize", json={"prompt": "Straße", **extra}
        ).json()
        assert answer["tokens"] == [*prefix, *tokenizer.encode("Straße")]
        assert (answer["count"], answer["max_model_len"]) == (
            len(answer["tokens"]),
            2048,
        )
    text = server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert text == {"prompt": "Straße"}
    turn = {"prompt": "<|im_start|>a", "add_special_tokens": False}
    assert len(server.http.post("/tokenize", json=turn).json()["tokens"]) > 2
    answer = server.http.post("/tokenize", json=turn | {"parse_special": True}).json()
    assert answer["tokens"] == tokenizer.encode("<|im_start|>a", allow_special=True)
    create = server.client.completions.create
    create(model="fake", prompt="<|im_start|>a", extra_body={"parse_special": True})
    assert [*server.engine.requests[-1].prompt_tokens[1:]] == answer["tokens"]
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    chat = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert chat == encode_chat(tokenizer, messages, add_generation_prompt=True)
