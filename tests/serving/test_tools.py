"""Calls are read from an answer's text however it is cut into pieces, in each way to write them."""

import json
import random

import pytest

from maxlm.serving.tools import ToolCallParser, detect_tool_format

FORMATS = pytest.mark.parametrize("tool_format", ["hermes", "mistral", "llama3"])
ARGUMENTS = ['{"a": [1, {"b": "}]"}], "c": "\\\\\\"{"}', "{}", '{"ü": "</tool_call>"}']


def read(tool_format: str, text: str, seed: int, **how) -> tuple[str, list[tuple[str, str]]]:
    """Content, and (name, arguments) of calls, of a text in random pieces."""
    parser = ToolCallParser(tool_format, ["f", "g"], **how)
    draw, content, calls = random.Random(seed), "", []
    while text:
        size = draw.randint(1, 1 + seed)
        part, text = parser.push(text[:size], final=size >= len(text)), text[size:]
        content += part.content
        for index, call in part.calls.items():
            if "id" in call:
                assert index == len(calls)
                calls.append((call["function"]["name"], ""))
            name, before = calls[index]
            calls[index] = (name, before + call["function"]["arguments"])
    return content, calls


def write(tool_format: str, calls: list[tuple[str, str]]) -> str:
    key = "parameters" if tool_format == "llama3" else "arguments"
    found = [f'{{"name": {json.dumps(name)}, "{key}": {value}}}' for name, value in calls]
    if tool_format == "mistral":
        return f"[TOOL_CALLS] [{', '.join(found)}]"
    if tool_format == "llama3":
        return "<|python_tag|>" + "; ".join(found)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in found)


@FORMATS
@pytest.mark.parametrize("seed", [0, 1, 3, 10, 200])
def test_calls_are_read_in_any_pieces(tool_format, seed):
    for values in (ARGUMENTS[:1], ARGUMENTS, ARGUMENTS[1:2] * 3):
        calls = [("fg"[n % 2], value) for n, value in enumerate(values)]
        text = write(tool_format, calls)
        assert read(tool_format, text, seed) == ("", calls)
        assert read(tool_format, text, seed, max_calls=1) == ("", calls[:1])
        if tool_format != "llama3":  # there a call is the whole answer
            assert read(tool_format, f"Well, <x>\n{text}", seed) == ("Well, <x>", calls)
        else:
            assert read(tool_format, text.removeprefix("<|python_tag|>"), seed) == ("", calls)


TEXTS = ["plain [TOOL text <tool_", "a < b\n", '{"a": 1}', "{", "  x  ", "[TOOL_CALLS] none"]
TEXTS += ["<|pyth", '<tool_call>{"name": "f", "argu', "<tool_call>nonsense</tool_call> and more"]
TEXTS += ['{"name": "unknown", "arguments": {}}', '[TOOL_CALLS] [{"name": "h", "arguments": {}}]']


@FORMATS
@pytest.mark.parametrize("seed", [0, 2, 100])
def test_what_is_no_call_is_content_unchanged(tool_format, seed):
    for text in TEXTS:
        assert read(tool_format, text, seed) == (text, [])


def test_a_forced_call_begins_at_once():
    calls = [("f", ARGUMENTS[2])]
    text = write("hermes", calls).removeprefix("<tool_call>")
    assert read("hermes", text, 3, forced=True) == ("", calls)


def test_formats_are_told_by_the_template():
    llama = "<|start_header_id|>{{ role }} {% if tools %}"
    assert detect_tool_format(llama) == "llama3"
    assert detect_tool_format("{% if tools %}[TOOL_CALLS]") == "mistral"
    for template in (llama + "<tool_call>", "<|im_start|>", "<|start_header_id|>"):
        assert detect_tool_format(template) == "hermes"
