"""/v1/responses: OpenAI's newer form of conversations, over the same answers as
/v1/chat/completions. Nothing is stored: a conversation is sent whole each time."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from maxlm.inference.requests import SequenceOutput
from maxlm.serving.chat import ChatAnswer, ParsedAnswer, prepare_chat_answer
from maxlm.serving.engine_loop import RequestStream
from maxlm.serving.errors import ApiError, convert_error
from maxlm.serving.response_schemas import ResponsesBody
from maxlm.serving.schemas import ChatBody
from maxlm.serving.server_state import ServerState

# By why an answer ended before its end.
_CAUSES: dict[str | None, str] = {
    "length": "max_output_tokens",
    "abort": "content_filter",
}
_ITEM_STATUS: dict[str | None, str] = dict.fromkeys(_CAUSES, "incomplete")

Event = tuple[str, dict[str, Any]]
"""Its type, and its fields but for ``type`` and ``sequence_number``."""


@dataclass(eq=False)
class OutputItems:
    """Items of a response, made of an answer's parts as they come: thoughts, a message,
    calls."""

    items: list[dict[str, Any]] = field(default_factory=list)
    _call_number: int | None = None
    """The number of the call that the last item is."""

    def add(self, parsed: ParsedAnswer) -> list[Event]:
        """Adds what is certain of an answer; returns the events that say so."""
        events: list[Event] = []
        calls = dict(parsed.calls)
        # The end of a call that is open stands before whatever follows it.
        if self._call_number in calls:
            events += self._add_arguments(calls.pop(self._call_number))
        if parsed.reasoning:
            events += self._add_text("reasoning", "reasoning_text", parsed.reasoning)
        if parsed.content:
            events += self._add_text("message", "output_text", parsed.content)
        for number, call in calls.items():
            events += self.finish()
            self._call_number = number
            item = {
                "id": f"fc_{uuid4().hex}",
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": "",
                "status": "in_progress",
            }
            events.append(self._open(item))
            events += self._add_arguments(call)
        return events

    def finish(self, status: str = "completed") -> list[Event]:
        """Closes the last item, if it is open; returns the events that say so."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        place = self._place()
        item["status"] = status
        self._call_number = None
        events: list[Event] = []
        if item["type"] == "function_call":
            about = {**place, "name": item["name"], "arguments": item["arguments"]}
            events.append(("response.function_call_arguments.done", about))
        else:
            part = item["content"][0]
            at = {**place, "content_index": 0}
            done = {**at, "text": part["text"]}
            if part["type"] == "output_text":
                done["logprobs"] = []
            events.append((f"response.{part['type']}.done", done))
            events.append(("response.content_part.done", {**at, "part": part}))
        about = {"output_index": place["output_index"], "item": item}
        events.append(("response.output_item.done", about))
        return events

    def _add_arguments(self, call: dict[str, Any]) -> list[Event]:
        piece = call["function"].get("arguments", "")
        if not piece:
            return []
        self.items[-1]["arguments"] += piece
        return [
            (
                "response.function_call_arguments.delta",
                {**self._place(), "delta": piece},
            )
        ]

    def _add_text(self, kind: str, part_kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        is_open = self.items and self.items[-1]["status"] == "in_progress"
        if not is_open or self.items[-1]["type"] != kind:
            events += self.finish()
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            item: dict[str, Any] = {"type": kind, "status": "in_progress"}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
                item |= {"id": f"msg_{uuid4().hex}", "role": "assistant"}
            else:
                item |= {"id": f"rs_{uuid4().hex}", "summary": []}
            events.append(self._open({**item, "content": []}))
            at = {**self._place(), "content_index": 0}
            events.append(("response.content_part.added", {**at, "part": dict(part)}))
            self.items[-1]["content"].append(part)
        self.items[-1]["content"][0]["text"] += text
        delta = {**self._place(), "content_index": 0, "delta": text}
        if part_kind == "output_text":
            delta["logprobs"] = []
        events.append((f"response.{part_kind}.delta", delta))
        return events

    def _open(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        # What comes later is not in this event.
        shown = json.loads(json.dumps(item))
        return "response.output_item.added", {
            "output_index": len(self.items) - 1,
            "item": shown,
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


@dataclass(eq=False)
class ResponsesAnswer(ChatAnswer):
    """The answer to /v1/responses."""

    id_prefix = "resp"
    object_names = ("response", "response")
    asked: ResponsesBody | None = None
    """The body as it came; ``body`` is the same conversation as a chat's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = OutputItems()

    async def _write_events(self, stream: RequestStream) -> AsyncIterator[str]:
        number = 0

        def write(kind: str, fields: dict[str, Any]) -> str:
            nonlocal number
            event = {"type": kind, "sequence_number": number, **fields}
            number += 1
            data = json.dumps(event, ensure_ascii=False, allow_nan=False)
            return f"event: {kind}\ndata: {data}\n\n"

        try:
            started = self._describe_response(None)
            yield write("response.created", {"response": started})
            yield write("response.in_progress", {"response": started})
            reason = None
            async for index, output in self._read(stream):
                for kind, fields in self.output.add(self.parse(index, output)):
                    yield write(kind, fields)
                reason = self.get_finish_reason(index, output)
            for kind, fields in self.output.finish(
                _ITEM_STATUS.get(reason, "completed")
            ):
                yield write(kind, fields)
            response = self._describe_response(reason)
            yield write(f"response.{response['status']}", {"response": response})
        except Exception as error:
            about = convert_error(error).to_json()["error"]
            yield write(
                "error", {name: about[name] for name in ("code", "message", "param")}
            )

    def describe_all_items(self, output: SequenceOutput) -> dict[str, Any]:
        """Returns the response that an answer without a stream is."""
        self.output.add(self.parse(0, output))
        reason = self.get_finish_reason(0, output)
        self.output.finish(_ITEM_STATUS.get(reason, "completed"))
        return self._describe_response(reason)

    async def _collect(self, stream: RequestStream) -> dict[str, Any]:
        whole: SequenceOutput | None = None
        async for _, output in self._read(stream):
            if whole is None:
                whole = output
            else:
                whole.append(output)
        assert whole is not None, "a sequence has one output at least"
        return self.describe_all_items(whole)

    def _describe_response(self, finish_reason: str | None) -> dict[str, Any]:
        """The response; ``finish_reason`` None: it goes on."""
        asked = self.asked
        assert asked is not None
        status = "in_progress" if finish_reason is None else "completed"
        cause = _CAUSES.get(finish_reason)
        if cause is not None:
            status = "incomplete"
        form = asked.text.format
        return {
            "id": self._about["id"],
            "object": "response",
            "created_at": self._about["created"],
            "status": status,
            "error": None,
            "incomplete_details": None if cause is None else {"reason": cause},
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": self._about["model"],
            "output": self.output.items,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self._get_sampling("temperature"),
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": asked.describe_tool_choice(),
            "tools": [tool.model_dump(exclude_unset=True) for tool in asked.tools],
            "top_p": self._get_sampling("top_p"),
            "truncation": asked.truncation,
            "usage": None if finish_reason is None else self._describe_response_usage(),
        }

    def _get_sampling(self, name: str) -> float:
        """A setting of sampling as it is used: the request's, the model's own, or
        OpenAI's."""
        return (self.body.model_extra or {}).get(
            name, self.state.sampling_defaults.get(name, 1.0)
        )

    def _describe_response_usage(self) -> dict[str, Any]:
        usage = self._describe_usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }


async def create_response(state: ServerState, request: Request) -> Response:
    """Answers /v1/responses."""
    body = await state.read_body(request, ResponsesBody)
    if body.previous_response_id is not None:
        message = "responses are not stored: send the whole conversation in input"
        raise ApiError(400, message, param="previous_response_id", code="unsupported")
    chat_body = ChatBody.model_validate(body.to_chat(), strict=True)
    ignored = chat_body.list_ignored_fields()
    request.state.ignored_fields = [
        *dict.fromkeys([*request.state.ignored_fields, *ignored])
    ]
    answer = await prepare_chat_answer(state, chat_body, ResponsesAnswer)
    assert isinstance(answer, ResponsesAnswer)
    answer.asked = body
    return await answer.respond(request)
