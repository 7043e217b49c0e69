"""``maxlm chat`` and ``maxlm serve``: a conversation by lines, and mistakes in one."""

import io
import itertools
import json
import signal
import socket
import sys
from types import SimpleNamespace

import pytest

import maxlm.serving.program  # noqa: F401  (before its names are replaced)
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import train_chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_chat_tokenizer()


@pytest.fixture
def talk(monkeypatch, run, tokenizer):
    """``talk(lines, *arguments)``: the outcome, and the engine."""

    def reply(text, request) -> str:
        turns = text.split("<|im_start|>user\n")
        return f"{len(turns) - 1}:{turns[-1].partition('<|im_end|>')[0]} 🐈"

    def talking(lines: str, *arguments: str, max_length=2048, before_step=lambda: None):
        engine = FakeEngine(
            tokenizer, reply, max_length=max_length, before_step=before_step
        )
        engine.config = SimpleNamespace(max_length=engine.max_length)
        config = SimpleNamespace(compilation_cache=None)
        loaded = SimpleNamespace(tokenizer=tokenizer, config=config)
        monkeypatch.setattr("maxlm.serving.program.load_model", lambda *_, **__: loaded)
        monkeypatch.setattr(
            "maxlm.serving.program.make_engine", lambda *_, **__: engine
        )
        stdin = io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        return run("chat", "runs/x", *arguments), engine

    return talking


def test_a_conversation_by_lines(talk, tmp_path):
    saved = tmp_path / "talk.json"
    lines = (
        f"hällo\n\nagain\n/save {saved}\n/reset\nanew\n/nonsense\n/save\n/quit\nnever\n"
    )
    (code, out, err), engine = talk(
        lines, "--system", "Be kind.", "temperature=0.5", "seed=7"
    )
    assert (code, out) == (0, "1:hällo 🐈\n2:again 🐈\n1:anew 🐈\n")
    assert err.count("tokens/s") == 3
    assert "no command '/nonsense'" in err
    assert "/save needs a word more" in err
    assert [(m["role"], m["content"]) for m in json.loads(saved.read_text())] == [
        *[("system", "Be kind."), ("user", "hällo"), ("assistant", "1:hällo 🐈")],
        *[("user", "again"), ("assistant", "2:again 🐈")],
    ]
    prompts = [
        engine.tokenizer.decode(request.prompt_tokens) for request in engine.requests
    ]
    assert all(prompt.startswith("<|im_start|>system\nBe kind.") for prompt in prompts)
    assert "hällo" in prompts[1]
    assert "hällo" not in prompts[2]
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9]
    assert {request.sampling.temperature for request in engine.requests} == {0.5}
    for request in engine.requests:
        # An answer may fill the context.
        room = engine.max_length - len(request.prompt_tokens)
        assert request.sampling.max_new_tokens == room


def test_an_interrupt_stops_the_answer_and_not_the_program(talk):
    steps = itertools.count(1)

    def interrupt() -> None:
        if next(steps) == 4:
            signal.raise_signal(signal.SIGINT)

    (code, out, _), engine = talk("first\nsecond\n", before_step=interrupt)
    assert {request.sampling.temperature for request in engine.requests} == {0.7}
    assert (code, out) == (0, "1:fi\n2:second 🐈\n")
    assert not engine.sequences
    assert "1:fi<|im_end|>" in engine.tokenizer.decode(engine.requests[1].prompt_tokens)


def test_a_conversation_that_is_too_long_can_be_reset(talk):
    (code, out, err), _ = talk("a" * 60 + "\n/reset\nb\n", max_length=60)
    assert (code, out[:3]) == (0, "1:b")
    assert "tokens, the context 60; /reset forgets it" in err


def test_a_model_without_a_chat_template(talk, tokenizer):
    template = tokenizer.extra_files.pop("chat_template.jinja")
    try:
        (code, _, err), _ = talk("hi\n")
    finally:
        tokenizer.extra_files["chat_template.jinja"] = template
    assert (code, err.count("\n")) == (2, 1)
    assert "no chat template" in err
    assert "--chat-template FILE" in err


def test_serve_says_what_is_wrong_before_it_loads(tmp_path, check_refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = f"127.0.0.1:{port}: cannot listen: Address already in use...--port..."
        check_refused(tmp_path, ["serve", "runs/none", "--port", port], message)
    for option in ("--api-key-file", "--chat-template"):
        for name, fault in (("no", "does not exist"), (".", "is a directory")):
            arguments = ["serve", "runs/none", option, f"{tmp_path}/{name}"]
            message = f"maxlm serve: invalid value for '{option}': file...{fault}..."
            check_refused(tmp_path, arguments, message)
    for verb in (["serve", "--port", "0"], ["chat"]):
        check_refused(
            tmp_path, [*verb, f"{tmp_path}/no"], f"{tmp_path}/no: no such folder..."
        )
        check_refused(
            tmp_path, [*verb, f"{tmp_path}"], f"{tmp_path}: neither config.yaml..."
        )
