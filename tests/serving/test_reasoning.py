"""Promise: thoughts and answer are told apart the same however the text is cut into
pieces."""

import pytest

from maxlm.serving.reasoning import (
    ReasoningFormat,
    ReasoningParser,
    detect_reasoning_format,
)
from tests.serving.running import run_in_thread, train_chat_tokenizer

MARKS = ReasoningFormat("<think>", "</think>")
CASES = [
    (
        "<think>\nA <b>\n\nand more\n</think>\n\nThe end",
        False,
        "A <b>\n\nand more",
        "The end",
    ),
    ("\n<think>a</think>b</think>c", False, "a", "b</think>c"),
    ("a thought</think>\n\nanswer", True, "a thought", "answer"),
    ("no thought <think>x</think>", False, "", "no thought <think>x</think>"),
    ("<thin", False, "", "<thin"),
    ("cut </thi", True, "cut </thi", ""),
    ("<think>\n\n</think>\n\nplain", False, "", "plain"),
    ("<think>only", False, "only", ""),
    ("", False, "", ""),
    ("  spaced", False, "", "  spaced"),
]


@pytest.mark.parametrize(("text", "is_inside", "reasoning", "content"), CASES)
def test_pieces_of_any_size_are_read_alike(text, is_inside, reasoning, content):
    for size in (1, 2, 3, 5, 8, max(len(text), 1)):
        parser = ReasoningParser(MARKS, is_inside)
        pieces = [
            text[start : start + size] for start in range(0, len(text), size)
        ] or [""]
        read = [parser.push(piece) for piece in pieces[:-1]]
        read.append(parser.push(pieces[-1], final=True))
        assert "".join(part.reasoning for part in read) == reasoning
        assert "".join(part.content for part in read) == content


def test_without_marks_all_is_content():
    assert ReasoningParser(None).push("<think>a</think>", final=True) == (
        "",
        "<think>a</think>",
    )


@pytest.mark.parametrize(
    ("template", "opener"),
    [("{{ '<think>\\n' }}", "<think>"), ("a[/THINK]b", "[THINK]"), ("{{ x }}", None)],
)
def test_the_template_says_which_marks_there_are(template, opener):
    marks = detect_reasoning_format(template)
    assert (marks and marks.opener) == opener


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% "
    "endfor %}"
    "<|im_start|>assistant\n{% if opened is defined %}<think>\n{% endif %}{# <think> #}"
)
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def thinking_tokenizer():
    tokenizer = train_chat_tokenizer()
    tokenizer.extra_files["chat_template.jinja"] = TEMPLATE.encode()
    return tokenizer


def test_chats_tell_thoughts_apart_whole_and_streamed(thinking_tokenizer):
    reply = "<think>\nhm, hm\n</think>\n\nHello there!"
    with run_in_thread(thinking_tokenizer, lambda text, request: reply) as server:
        ask = {"model": "fake", "messages": HELLO}
        whole = server.client.chat.completions.create(**ask)
        assert whole.choices[0].message.content == "Hello there!"
        assert whole.choices[0].message.reasoning_content == "hm, hm"
        details = whole.usage.completion_tokens_details
        assert 0 < details.reasoning_tokens < whole.usage.completion_tokens
        reasoning = content = ""
        for event in server.client.chat.completions.create(**ask, stream=True):
            delta = event.choices[0].delta
            reasoning += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
        assert (reasoning, content) == ("hm, hm", "Hello there!")
        response = server.client.responses.create(model="fake", input="hi")
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.output_text == "Hello there!"
        plain = server.client.chat.completions.create(
            **ask, extra_body={"separate_reasoning": False}
        )
        assert plain.choices[0].message.content == reply
        silent = server.client.chat.completions.create(
            **ask, extra_body={"include_reasoning": False}
        )
        assert silent.choices[0].message.content == "Hello there!"
        assert not hasattr(silent.choices[0].message, "reasoning_content")


def test_thoughts_that_the_prompt_opens_are_thoughts_and_end_before_a_form(
    thinking_tokenizer,
):
    def reply(text: str, request) -> str:
        return '{"a": 1}' if text.endswith("</think>\n\n") else "hm</think>yes"

    with run_in_thread(thinking_tokenizer, reply) as server:
        extra = {"chat_template_kwargs": {"opened": True}}
        ask = {"model": "fake", "messages": HELLO, "extra_body": extra}
        message = server.client.chat.completions.create(**ask).choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "yes")
        formed = server.client.chat.completions.create(
            **ask, response_format={"type": "json_object"}
        )
        assert formed.choices[0].message.content == '{"a": 1}'


def test_a_message_that_is_continued_within_its_thoughts_goes_on_with_them(
    thinking_tokenizer,
):
    with run_in_thread(
        thinking_tokenizer, lambda text, request: " sure</think>\n\nYes"
    ) as server:
        messages = [*HELLO, {"role": "assistant", "content": "<think>\nI was"}]
        extra = {"continue_final_message": True}
        answer = server.client.chat.completions.create(
            model="fake", messages=messages, extra_body=extra
        )
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (" sure", "Yes")
