"""Settings of the server: defaults of sampling, origins, a log; messages that are
continued."""

import json

import openai
import pytest

from maxlm.config import MaxlmError
from maxlm.serving.program import read_sampling_defaults
from tests.serving.running import run_in_thread, train_chat_tokenizer

HELLO = [{"role": "user", "content": "hi"}]


def test_sampling_left_out_is_the_models_own(chat_tokenizer):
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    with run_in_thread(chat_tokenizer, sampling_defaults=defaults) as server:
        server.client.chat.completions.create(model="fake", messages=HELLO, top_p=0.5)
        server.client.completions.create(model="fake", prompt="x", temperature=0)
        first, second = (request.sampling for request in server.engine.requests)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.5, 20)
    assert (second.temperature, second.top_p, second.top_k) == (0, 0.9, 20)


def test_generation_configs_are_read_as_far_as_they_name_sampling():
    tokenizer = train_chat_tokenizer()
    assert read_sampling_defaults(tokenizer) == {}
    values = {
        "temperature": 0.6,
        "top_k": 20,
        "eos_token_id": 2,
        "do_sample": True,
        "min_p": None,
    }
    tokenizer.extra_files["generation_config.json"] = json.dumps(values).encode()
    assert read_sampling_defaults(tokenizer) == {"temperature": 0.6, "top_k": 20}
    tokenizer.extra_files["generation_config.json"] = b'{"top_p": 7}'
    with pytest.raises(MaxlmError, match=r"top_p=7.*--generation-config none"):
        read_sampling_defaults(tokenizer)


def test_pages_of_allowed_origins_may_ask_and_no_others(chat_tokenizer):
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    with run_in_thread(
        chat_tokenizer, allowed_origins=("https://a.example",)
    ) as server:
        for origin, status in (("https://a.example", 200), ("https://b.example", 400)):
            headers = {"origin": origin, **preflight}
            answer = server.http.options("/v1/chat/completions", headers=headers)
            assert answer.status_code == status
        answer = server.http.get("/v1/models", headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
    with run_in_thread(chat_tokenizer) as server:
        answer = server.http.get("/v1/models", headers={"origin": "https://a.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_requests_are_printed_if_that_is_asked_for(chat_tokenizer, capsys):
    with run_in_thread(chat_tokenizer, prints_requests=True) as server:
        server.http.get("/v1/models")
        server.http.get("/v1/models/none")
        server.http.get("/nothing")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 2)[2].rsplit(" ", 2)[0] for line in lines] == [
        "127.0.0.1 GET '/v1/models' 200",
        "127.0.0.1 GET '/v1/models/none' 404",
        "127.0.0.1 GET '/nothing' 404",
    ]


def test_an_assistants_message_is_continued(chat_tokenizer):
    messages = [*HELLO, {"role": "assistant", "content": "<|im_end|> Hello "}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    with run_in_thread(chat_tokenizer) as server:
        ask = {"model": "fake", "extra_body": extra}
        server.client.chat.completions.create(**ask, messages=messages)
        prompt = server.engine.requests[-1].prompt_tokens
        with pytest.raises(openai.BadRequestError) as refused:
            server.client.chat.completions.create(**ask, messages=HELLO)
        assert refused.value.body["param"] == "continue_final_message"
        server.client.chat.completions.create(
            model="fake", messages=HELLO, extra_body={"add_generation_prompt": False}
        )
        bare = server.engine.requests[-1].prompt_tokens
    text = chat_tokenizer.decode(prompt)
    assert text.endswith("<|im_start|>assistant\n<|im_end|> Hello ")
    # The literal in the message is text: two turns end, as the template has it, and no
    # third.
    ends = [
        token
        for token in prompt
        if token == chat_tokenizer.special_tokens["<|im_end|>"]
    ]
    assert len(ends) == 1
    assert chat_tokenizer.decode(bare).endswith("hi<|im_end|>\n")
