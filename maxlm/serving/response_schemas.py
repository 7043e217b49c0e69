"""Bodies of /v1/responses, and the same conversations as bodies of
/v1/chat/completions."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from maxlm.runtime.json_types import JsonObject
from maxlm.serving.errors import ApiError
from maxlm.serving.schemas import SAMPLING_FIELDS, ApiBody, ApiModel


class ResponseContent(ApiModel):
    """A part of an item's content."""

    type: Literal["input_text", "output_text", "reasoning_text", "text", "refusal"]
    text: str = ""


class ResponseItem(ApiModel):
    """An item of a conversation in /v1/responses: a message, thoughts, a call, or its
    result."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = (
        "message"
    )
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ResponseContent] = ""
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ResponseContent] = ""

    @model_validator(mode="after")
    def _check_parts(self) -> "ResponseItem":
        needed = {
            "message": ("role",),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id",),
        }
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"an item of type {self.type} needs {name}")
        return self


class ResponseFunction(ApiModel):
    """A function that a model may call, in /v1/responses."""

    type: Literal["function"] = "function"
    name: str
    description: str | None = None
    parameters: JsonObject | None = None


class ResponseToolChoice(ApiModel):
    """The function to call."""

    type: Literal["function"] = "function"
    name: str


class ResponseTextFormat(ApiModel):
    """The form that the text must have, in /v1/responses."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")


class ResponseText(ApiModel):
    """Settings of the text."""

    format: ResponseTextFormat = ResponseTextFormat()


class ResponsesBody(ApiBody):
    """A request to /v1/responses."""

    input: str | Annotated[list[ResponseItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: list[ResponseFunction] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: ResponseText = ResponseText()
    stream: bool = False
    store: bool = True
    previous_response_id: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    truncation: Literal["auto", "disabled"] = "disabled"
    chat_template_kwargs: JsonObject = Field(default_factory=dict)

    def to_chat(self) -> JsonObject:
        """Returns the same request as a body of /v1/chat/completions."""
        extra = self.model_extra or {}
        chat: JsonObject = {
            name: extra[name] for name in extra if name in SAMPLING_FIELDS
        }
        chat |= {
            "model": self.model,
            "messages": self._list_messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        if self.truncation == "auto":
            chat["truncate_prompt_tokens"] = -1
        if isinstance(self.tool_choice, ResponseToolChoice):
            function = {"name": self.tool_choice.name}
            chat["tool_choice"] = {"type": "function", "function": function}
        elif self.tools or self.tool_choice != "auto":
            chat["tool_choice"] = self.tool_choice
        tools: list[JsonObject] = []
        for tool in self.tools:
            function = tool.model_dump(include={"name", "description", "parameters"})
            tools.append({"type": "function", "function": function})
        chat["tools"] = tools
        form = self.text.format
        if form.type == "json_object":
            chat["response_format"] = {"type": "json_object"}
        if form.type == "json_schema":
            if form.schema_ is None:
                message = "json_schema has no schema"
                raise ApiError(400, message, param="text.format.schema")
            chat["response_format"] = {
                "type": "json_schema",
                "json_schema": {"schema": form.schema_},
            }
        return chat

    def describe_tool_choice(self) -> str | JsonObject:
        """Returns ``tool_choice`` as it came."""
        choice = self.tool_choice
        return choice if isinstance(choice, str) else choice.model_dump()

    def _list_messages(self) -> list[JsonObject]:
        """The conversation as messages: what an assistant thought, said and called is
        one."""
        messages: list[JsonObject] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if item.type == "function_call_output":
                text = _join_parts(item.output)
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": text}
                )
                continue
            if item.type == "message" and item.role != "assistant":
                messages.append(
                    {"role": item.role, "content": _join_parts(item.content)}
                )
                continue
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            message = messages[-1]
            if item.type == "reasoning":
                text = message.get("reasoning_content", "") + _join_parts(item.content)
                message["reasoning_content"] = text
            elif item.type == "message":
                message["content"] += _join_parts(item.content)
            else:
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
        return messages


def _join_parts(content: str | list[ResponseContent]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content)
