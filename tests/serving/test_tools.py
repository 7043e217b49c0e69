"""Calls are read from an answer's text however it is cut into pieces, in each way to
write them; a forced call's grammar takes the arguments that jsonschema takes, and no
others."""

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from maxlm.inference.grammar import GrammarCompiler
from maxlm.inference.requests import GrammarSpec
from maxlm.serving.errors import ApiError
from maxlm.serving.schemas import Tool
from maxlm.serving.tools import ToolCallParser, detect_tool_format, make_tool_grammar

FORMATS = pytest.mark.parametrize("tool_format", ["hermes", "mistral", "llama3"])
ARGUMENTS = ['{"a": [1, {"b": "}]"}], "c": "\\\\\\"{"}', "{}", '{"ü": "</tool_call>"}']


def read(
    tool_format: str, text: str, seed: int, **options: bool
) -> tuple[str, list[tuple[str, str]]]:
    """Content, and (name, arguments) of calls, of a text in random pieces."""
    parser = ToolCallParser(tool_format, ["f", "g"], **options)
    draw = random.Random(seed)
    content = ""
    calls = []
    while text:
        size = draw.randint(1, 1 + seed)
        part = parser.push(text[:size], final=size >= len(text))
        text = text[size:]
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
    parsed = [
        f'{{"name": {json.dumps(name)}, "{key}": {value}}}' for name, value in calls
    ]
    if tool_format == "mistral":
        return f"[TOOL_CALLS] [{', '.join(parsed)}]"
    if tool_format == "llama3":
        return "<|python_tag|>" + "; ".join(parsed)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in parsed)


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
            assert read(tool_format, text.removeprefix("<|python_tag|>"), seed) == (
                "",
                calls,
            )


TEXTS = [
    "plain [TOOL text <tool_",
    "a < b\n",
    '{"a": 1}',
    "{",
    "  x  ",
    "[TOOL_CALLS] none",
]
TEXTS += [
    "<|pyth",
    '<tool_call>{"name": "f", "argu',
    "<tool_call>nonsense</tool_call> and more",
]
TEXTS += [
    '{"name": "unknown", "arguments": {}}',
    '[TOOL_CALLS] [{"name": "h", "arguments": {}}]',
]


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


INTEGER_NAMED = {"type": "object", "properties": {"b": {"$ref": "#/$defs/x"}}}
INTEGER_NAMED |= {"$defs": {"x": {"type": "integer"}}, "additionalProperties": False}
NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}},
    "required": ["v"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "root": NODE,
    "property": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}},
        "additionalProperties": False,
    },
    "integers": INTEGER_NAMED,
    "strings": INTEGER_NAMED | {"$defs": {"x": {"type": "string"}}},
    "draft_7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"b": {"$ref": "#/definitions/x"}},
        "definitions": {"x": {"type": "integer"}},
        "additionalProperties": False,
    },
    "identified": INTEGER_NAMED
    | {"$id": "https://example.com/s", "properties": {"b": {"$ref": "/s#/$defs/x"}}},
    "defined": {"$ref": "#/$defs/Node", "$defs": {"Node": NODE}},
    "untyped": {"properties": {"v": {"type": "integer"}}},
    "anything": {},
}
CALL = {"name": "root", "arguments": {"v": 1}}
VALUES: list[Any] = [
    {},
    {"v": 1},
    {"v": ""},
    {"v": 1, "next": {"v": 2, "next": {"v": 3}}},
    CALL,
]
VALUES += [
    {"v": 1, "next": {}},
    {"v": 1, "next": CALL},
    {"a": 1, "b": 2},
    {"a": 1, "b": "x"},
]
VALUES += [{"b": 1}, {"b": "x"}, {"c": 1}]


def make_tool(name: str, parameters: Any) -> Tool:
    return Tool.model_validate({"function": {"name": name, "parameters": parameters}})


@pytest.fixture(scope="module")
def accepts_call(chat_tokenizer) -> Callable[..., bool]:
    """``accepts_call(grammar, name, key, value)``: whether a grammar lets a whole call
    through."""
    compiler = GrammarCompiler(chat_tokenizer)

    def accepts(grammar: GrammarSpec, name: str, key: str, value: Any) -> bool:
        matcher = compiler.compile(grammar)
        tokens = chat_tokenizer.encode(json.dumps({"name": name, key: value}))
        return all(matcher.accept(token) for token in tokens) and matcher.is_finished

    return accepts


def test_a_forced_call_takes_what_its_schema_takes_alone_and_among_others(accepts_call):
    tools = [make_tool(name, parameters) for name, parameters in PARAMETERS.items()]
    together = make_tool_grammar(tools, "hermes", parallel=True)
    for tool, (name, schema) in zip(tools, PARAMETERS.items(), strict=True):
        alone = make_tool_grammar([tool], "llama3", parallel=True)
        for value in VALUES:
            is_valid = jsonschema.Draft202012Validator(schema).is_valid(value)
            got = accepts_call(together, name, "arguments", value)
            assert got == is_valid, (name, value)
            got = accepts_call(alone, name, "parameters", value)
            assert got == is_valid, (name, value)
        # Arguments are an object, else they could not be read back as a call.
        assert not accepts_call(together, name, "arguments", 5)


def test_a_tool_without_parameters_has_no_arguments(accepts_call):
    for parameters in ({}, {"parameters": None}):
        tool = Tool.model_validate({"function": {"name": "now", **parameters}})
        grammar = make_tool_grammar([tool], "hermes", parallel=True)
        assert accepts_call(grammar, "now", "arguments", {})
        assert not accepts_call(grammar, "now", "arguments", {"a": 1})


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ([{"type": "string"}], "must be of type object"),
        ([{"$id": 5}], "$id of the parameters of the tool f is no text"),
        ([{"$defs": []}], "$defs of the parameters of the tool f is no object"),
        ([{"$id": "https://example.com/a"}] * 2, "have the $id"),
    ],
)
def test_parameters_that_describe_no_arguments_are_refused(parameters, text):
    tools = [make_tool("f", schema) for schema in parameters]
    with pytest.raises(ApiError) as caught:
        make_tool_grammar(tools, "hermes", parallel=True)
    assert (caught.value.status, caught.value.param) == (400, "tools")
    assert text in caught.value.message
