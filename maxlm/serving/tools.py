"""Tools in chat: how a model is told of them, and how its text is read back as calls.

Three ways to write a call are known, and told apart by the chat template:

- hermes (Hermes, Qwen, SmolLM3): ``<tool_call>{"name": ..., "arguments":
  {...}}</tool_call>``
- mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``
- llama3: the answer is ``{"name": ..., "parameters": {...}}``, maybe behind
  ``<|python_tag|>``
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal
from uuid import uuid4

from maxlm.inference.outputs import count_begun
from maxlm.inference.requests import GrammarSpec
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.serving.errors import ApiError
from maxlm.serving.schemas import Tool, ToolFunction

ToolFormat = Literal["hermes", "mistral", "llama3"]

_OPENERS: dict[ToolFormat, str] = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "llama3": "",
}
_CLOSER = "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_BEFORE_HEAD = re.compile(rf"(?:[\s\[]|{re.escape(_PYTHON_TAG)})*")
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MAX_HEAD_CHARS = 1000
# Nothing is at this address: schemas need an absolute one to be found by.
_TOOL_SCHEMAS = "json-schema:///tools/"
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_INSTRUCTIONS = (
    "You may call functions to help with the user's query. Their signatures, as JSON, "
    "one a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call one, answer with a JSON object with its name and arguments, within tags:\n"
    '<tool_call>\n{{"name": <name>, "arguments": <arguments>}}\n</tool_call>'
)


def detect_tool_format(template: str) -> ToolFormat:
    """Returns the way in which models of a chat template write calls; hermes if it does
    not say."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    is_llama = "<|start_header_id|>" in template and "tool" in template
    if is_llama and "<tool_call>" not in template:
        return "llama3"
    return "hermes"


def describe_tools_in_text(
    messages: Sequence[JsonMapping], tools: Sequence[JsonMapping]
) -> list[JsonObject]:
    """Returns a conversation in which tools, calls and their results are plain text,
    for a chat template that knows no tools."""
    plain_messages: list[JsonObject] = []
    for message in messages:
        role = message["role"]
        content = message["content"]
        for call in message.get("tool_calls", ()):
            function = call["function"]
            call_text = _to_json(
                {"name": function["name"], "arguments": function["arguments"]}
            )
            content += f"\n<tool_call>\n{call_text}\n</tool_call>"
        if role == "tool":
            role = "user"
            content = f"<tool_response>\n{content}\n</tool_response>"
        plain_messages.append({"role": role, "content": content.strip("\n")})
    if tools:
        instructions = _INSTRUCTIONS.format(tools="\n".join(map(_to_json, tools)))
        if plain_messages[0]["role"] == "system":
            plain_messages[0]["content"] += f"\n\n{instructions}"
        else:
            system_message = {"role": "system", "content": instructions}
            plain_messages.insert(0, system_message)
    return plain_messages


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def make_tool_grammar(
    tools: Sequence[Tool], tool_format: ToolFormat, *, parallel: bool
) -> GrammarSpec:
    """Returns the form of a call of one of the tools, behind :func:`get_forced_prefix`.
    Raises ApiError: parameters that are no schema of an object, or two schemas with one
    ``$id``."""
    key = "parameters" if tool_format == "llama3" else "arguments"
    calls: list[JsonObject] = []
    schema_ids: set[str] = set()
    for index, tool in enumerate(tools):
        parameters = _make_parameters_schema(tool.function, index)
        if parameters["$id"] in schema_ids:
            message = f"two tools' parameters have the $id {parameters['$id'][:200]!r}"
            raise ApiError(400, message, param="tools")
        schema_ids.add(parameters["$id"])
        call = {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, key: parameters},
            "required": ["name", key],
            "additionalProperties": False,
        }
        calls.append(call)
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if tool_format == "mistral":
        schema = {"type": "array", "items": schema, "minItems": 1}
        if not parallel:
            schema["maxItems"] = 1
    return GrammarSpec("json_schema", json.dumps(schema), "tools")


def _make_parameters_schema(function: ToolFunction, index: int) -> JsonObject:
    """Returns a function's parameters as a schema that keeps its meaning within
    another: its ``$id`` makes it a resource, and ``#`` and ``#/...`` begin there (JSON
    Schema, 8.2)."""
    where = f"the parameters of the tool {function.name}"
    if function.parameters is None:
        # As OpenAI has it: no parameters are an empty list of them.
        schema: JsonObject = {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }
    else:
        schema = dict(function.parameters)
    for place in ("$defs", "definitions"):
        if not isinstance(schema.get(place, {}), dict):
            raise ApiError(400, f"{place} of {where} is no object", param="tools")
    # Arguments are an object, whatever else a schema lets through.
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise ApiError(400, f"{where} must be of type object", param="tools")
    # llguidance takes nothing beside a reference that leads back to it.
    if "$ref" not in schema:
        schema["type"] = "object"
    if not isinstance(schema.setdefault("$id", f"{_TOOL_SCHEMAS}{index}"), str):
        raise ApiError(400, f"$id of {where} is no text", param="tools")
    if "draft-04" in str(schema.get("$schema")):
        del schema["$schema"]  # it has no $id, by which its references are found
    return schema


def get_forced_prefix(tool_format: ToolFormat) -> str:
    """Returns what opens a call, to end the prompt with where the model has to make
    one."""
    opener = _OPENERS[tool_format]
    return f"{opener}\n" if tool_format == "hermes" else opener


@dataclass
class ParsedText:
    """Content and calls, as far as a piece of an answer's text makes them certain."""

    content: str = ""
    calls: dict[int, JsonObject] = field(default_factory=dict)
    """Calls by number, as OpenAI has them: where one begins with its id and name, and
    then the next part of its arguments' JSON text."""


@dataclass(eq=False)
class ToolCallParser:
    """Reads an answer's text, as it comes, as content and calls; what proves to be no
    call of a known tool is content."""

    tool_format: ToolFormat
    names: Collection[str]
    forced: bool = False
    """Whether the prompt opened a call already."""
    max_calls: int | None = None
    """Further ones are dropped."""

    def __post_init__(self) -> None:
        self.num_calls = 0
        self._opener = _OPENERS[self.tool_format] if self.names else ""
        self._text = ""
        """What is not told apart yet."""
        self._held = ""
        """The opener of a call that may still prove to be none: then it is content."""
        self._arguments = ""
        self._parsed = ParsedText()
        starts_with_head = self.forced or (self.names and self.tool_format == "llama3")
        self._state = self._read_head if starts_with_head else self._read_content

    def push(self, text: str, *, final: bool = False) -> ParsedText:
        """Takes more text; returns what is certain with it. ``final``: no more will
        come."""
        self._text += text
        self._parsed = ParsedText()
        # A state is a method that reads as far as it can; until it stays the same.
        state = None
        while state != self._state:
            state = self._state
            state(final)
        return self._parsed

    def _read_content(self, final: bool) -> None:
        content = self._text
        opener = self._opener
        if opener and opener in content:
            content, _, self._text = content.partition(opener)
            content = content.rstrip()
            self._held = opener
            self._state = self._read_head
        elif final or not opener:
            self._text = ""
            is_after_calls = final and self.num_calls > 0
            if is_after_calls and content.isspace():
                content = ""
        else:  # space before a call is no content, nor is what may begin one
            num_sure = len(content) - count_begun(content, opener)
            content = content[:num_sure].rstrip()
            self._text = self._text[len(content) :]
        self._parsed.content += content

    def _read_head(self, final: bool) -> None:
        plain = _BEFORE_HEAD.sub("", self._text, count=1)
        may_begin = plain.startswith("{") or _PYTHON_TAG.startswith(plain)
        match = _HEAD.match(plain)
        if match and match[1] in self.names:
            self._text = plain[match.end() :]
            self._arguments = ""
            self._state = self._read_arguments
            self._parsed.calls[self.num_calls] = {
                "id": f"call_{uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": match[1], "arguments": ""},
            }
        elif match or final or not may_begin or len(plain) > _MAX_HEAD_CHARS:
            self._text = self._held + self._text
            self._opener = ""
            self._state = self._read_content

    def _read_arguments(self, final: bool) -> None:
        num_sent = len(self._arguments)
        self._arguments += self._text
        end = _find_object_end(self._arguments)
        piece = self._arguments[num_sent:end]
        if piece:
            continued_call = {"function": {"arguments": ""}}
            call = self._parsed.calls.setdefault(self.num_calls, continued_call)
            call["function"]["arguments"] += piece
        if not end:
            self._text = ""
            return
        self._text = self._arguments[end:]
        self.num_calls += 1
        self._held = ""
        is_last = self.num_calls == self.max_calls
        self._state = self._drop_rest if is_last else self._read_between

    def _read_between(self, final: bool) -> None:
        if self._opener == _OPENERS["hermes"]:
            _, closed, rest = self._text.partition(_CLOSER)
            if closed:
                self._text = rest
                self._state = self._read_content
            return
        text = self._text.lstrip("}],; \n\t")
        if text:
            self._text = text
            self._state = self._read_head if text[0] == "{" else self._read_content

    def _drop_rest(self, final: bool) -> None:
        self._text = ""


def _find_object_end(text: str) -> int | None:
    """Where the JSON object that begins a text ends, if it does."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "{[":
            depth += 1
        elif match[0] in "}]":
            depth -= 1
        if depth == 0:
            return match.end()
    return None
