"""Whatever a request holds, the answer is a 4xx in OpenAI's form, and the server
lives."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from maxlm.data.tokenizer.codec import Tokenizer
from tests.serving.fake_engine import FakeEmbedder

GOOD = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
    },
    "/v1/embeddings": {"input": "x"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
}
NUMBERS = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "n",
]
NUMBERS += [
    "frequency_penalty",
    "presence_penalty",
    "no_repeat_ngram_size",
    "min_tokens",
]
NUMBERS += ["max_tokens"]
FIELDS = {
    "stop_token_ids": [[-1], [2**31], ["a"], 5, [None], [2**80]],
    "stop": [[""], 5, [5], ["a"] * 17, {"a": 1}],
    "logit_bias": [[1], {"a": 1}, {"-1": 1}, {"5": "x"}, {"5": 1e300}, {str(2**40): 1}],
    "response_format": [{"type": "x"}, 5, "json", {"type": "json_schema"}, {}],
    "stream_options": [5, [], {"include_usage": "yes"}],
    "seed": ["x", 1.5, [1], {}],
    "messages": [
        [{"role": "user", "content": [5]}],
        [{"role": "tool", "tool_calls": [{}]}],
        [[]],
    ],
    "tools": [5, [{}], [{"function": 5}], [{"function": {"name": "a b"}}], ["f"]],
    "tool_choice": ["maybe", 5, {"function": {"name": "none"}}, "required"],
    "chat_template_kwargs": [5, {"messages": []}, [1]],
}
WRONG = [
    "x",
    [],
    {},
    [[]],
    True,
    -7,
    1e300,
    "\ud83d",
    {"a": {"b": [None]}},
    [1, "a"],
    2**70 * -1,
]


def check_error(answer, *statuses: int) -> dict:
    assert answer.status_code in (statuses or range(400, 500)), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"]
    assert "\n" not in error["message"]
    return error


def send(server, path: str, body) -> object:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http.post(
        path, content=data, headers={"content-type": "application/json"}
    )


def draw_bad(draw: random.Random) -> tuple[str, object]:
    """A path and a body that is wrong in one way."""
    path = draw.choice([*GOOD])
    body = dict(GOOD[path])
    required = next(iter(body))
    whole = json.dumps(body).encode()
    kind = draw.randrange(8)
    if kind == 0:
        return path, whole[: draw.randrange(len(whole))]
    if kind == 1:
        place = draw.randrange(len(whole))
        # A byte that no JSON has, in a string or outside.
        return path, whole[:place] + bytes([draw.choice([0, 1, 0x80, 0xFF])]) + whole[
            place:
        ]
    if kind == 2:
        return path, draw.choice(
            [[], "text", 5, None, [body], b"NaN", b"[" * 5000, b"{}", b""]
        )
    if kind == 3 and path.startswith("/v1/c"):
        return path, body | {
            draw.choice(NUMBERS): draw.choice([v for v in WRONG if v != 1e300])
        }
    if kind == 4:
        return path, body | {"model": draw.choice(["other", 3, ["fake"], {}])}
    if kind == 7 and path.startswith("/v1/c"):
        field, wrong = draw.choice([*FIELDS.items()])
        return "/v1/chat/completions", GOOD["/v1/chat/completions"] | {
            field: draw.choice(wrong)
        }
    if kind == 5:
        return path, {key: value for key, value in body.items() if key != required}
    wrong = [
        5,
        True,
        {},
        [[]],
        [None],
        [1.5],
        {"role": "user"},
        [{"role": "king"}],
        [-1],
        [2**40],
    ]
    return path, body | {required: draw.choice(wrong)}


@pytest.mark.heavy
def test_a_thousand_malformed_requests(start_server):
    server = start_server()
    draw = random.Random(0)
    for number in range(1000):
        path, body = draw_bad(draw)
        try:
            check_error(send(server, path, body))
        except AssertionError as error:
            raise AssertionError(
                f"request {number}: {path} {str(body)[:300]}"
            ) from error
    assert send(server, "/v1/completions", GOOD["/v1/completions"]).status_code == 200
    assert not server.loop.num_open
    assert not server.engine.sequences


BROKEN_TOOL = {"name": "f", "parameters": {"type": "object", "$defs": 5}}
IMAGE = {"role": "user", "content": [{"type": "image_url"}]}


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("completions", {"stream": 5}, "stream"),
        ("completions", {"prompt": "x" * 3000}, "prompt"),
        ("completions", {"stop_token_ids": [2**31]}, "stop_token_ids.0"),
        ("completions", {"stop": ["a"] * 17}, "stop"),
        ("completions", {"max_tokens": 5000}, "max_tokens"),
        ("completions", {"prompt": [5, 280]}, "prompt"),
        ("completions", {"suffix": "end"}, "suffix"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logit_bias": {"280": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"5": 101}}, "logit_bias.5"),
        ("completions", {"stop": ["a", ""]}, "stop.1"),
        ("completions", {"temperature": -1}, "temperature"),
        ("completions", {"regex": "a", "lark": "b"}, "regex"),
        ("completions", {"min_tokens": 17}, "min_tokens"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        (
            "chat/completions",
            {"messages": [{"role": "king", "content": ""}]},
            "messages.0.role",
        ),
        ("chat/completions", {"messages": [IMAGE]}, "messages.0.content.0.type"),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
        (
            "chat/completions",
            {"chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs",
        ),
        (
            "chat/completions",
            {"tools": [{"function": BROKEN_TOOL}], "tool_choice": "required"},
            "tools",
        ),
        ("score", {"text_2": "x" * 3000}, "text_2"),
        ("embeddings", {"input": "x"}, None),
    ],
)
def test_the_field_at_fault_is_named(start_server, path, change, param):
    path = f"/v1/{path}"
    assert (
        check_error(send(start_server(), path, GOOD[path] | change), 400)["param"]
        == param
    )


LONG = "the model answers what it is asked " * 10_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["x", LONG], "parse_special": True}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 100_000}, "prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": LONG}]},
            "messages",
        ),
        ("/v1/embeddings", {"input": LONG}, "input"),
        ("/v1/score", {"text_1": LONG, "text_2": "x"}, "text_1"),
        ("/v1/score", {"text_1": "x", "text_2": LONG}, "text_2"),
        ("/v1/score", {"text_1": "x", "text_2": LONG, "method": "cosine"}, "text_2"),
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ],
)
def test_a_prompt_that_can_never_fit_is_refused_before_it_is_encoded(
    start_server, monkeypatch, path, body, param
):
    sizes: list[int] = []
    encode = Tokenizer._encode

    def record(self: Tokenizer, texts: Sequence[str | bytes], *arguments: Any) -> Any:
        sizes.extend(map(len, texts))
        return encode(self, texts, *arguments)

    monkeypatch.setattr(Tokenizer, "_encode", record)
    server = start_server(embedder=FakeEmbedder(), model_max_length=8192)
    error = check_error(send(server, path, body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "max_length; the model was made for 8192" in error["message"]
    assert max(sizes, default=0) < 100


def test_the_longest_text_that_fits_is_taken(start_server, chat_tokenizer):
    """Of as few tokens to a text as there are; no bound on its bytes may stop it."""
    texts = (
        chat_tokenizer.decode([token]) for token in range(chat_tokenizer.vocab_size)
    )
    longest = max((text for text in texts if not text.startswith("<|")), key=len)
    server = start_server(max_length=200)
    text = longest * 198
    assert (
        len(chat_tokenizer.encode(text)) == 198
    )  # and bos, and a token to be generated
    body = {"prompt": text, "max_tokens": 1}
    assert send(server, "/v1/completions", body).status_code == 200
    body["prompt"] += longest
    assert check_error(send(server, "/v1/completions", body), 400)["param"] == "prompt"
    content = [{"role": "user", "content": text}]
    assert send(server, "/tokenize", {"messages": content}).status_code == 200


def test_paths_methods_sizes_and_types_of_bodies(start_server):
    server = start_server(max_body_bytes=1000)
    check_error(server.http.get("/v1/nothing"), 404)
    answer = server.http.get("/v1/completions")
    check_error(answer, 405)
    assert answer.headers["allow"] == "POST"
    check_error(send(server, "/tokenize", {"prompt": "x" * 1000}), 413)
    error = check_error(send(server, "/tokenize", {"prompt": "x", "model": "y"}), 404)
    assert error["code"] == "model_not_found"
    # A page of another site can send a form or plain text without asking.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        body = {"content": b'{"prompt": "x"}', "headers": {"content-type": kind}}
        check_error(server.http.post("/v1/completions", **body), 400)


def test_a_tokenizer_without_template_is_a_400(start_server, chat_tokenizer):
    server = start_server()
    template = chat_tokenizer.extra_files.pop("chat_template.jinja")
    try:
        answer = send(server, "/v1/chat/completions", GOOD["/v1/chat/completions"])
    finally:
        chat_tokenizer.extra_files["chat_template.jinja"] = template
    assert "no chat template" in check_error(answer, 400)["message"]
