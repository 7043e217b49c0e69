"""/v1/responses: OpenAI's newer form of conversations, over the same answers as
/v1/chat/completions. Nothing is stored: a conversation is sent whole each time."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from maxlm.inference.requests import SequenceOutput
from maxlm.runtime.json_types import JsonObject
from maxlm.serving.chat import ChatAnswer, ParsedAnswer, prepare_chat_answer
from maxlm.serving.engine_loop import RequestGroupStream
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

Event = tuple[str, JsonObject]
"""Its type, and its fields but for ``type`` and ``sequence_number``."""


@dataclass(eq=False)
class OutputItems:
    """Items of a response, made of an answer's parts as they come: thoughts, a message,
    calls."""

    items: list[JsonObject] = field(default_factory=list)
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
            call = {**place, "name": item["name"], "arguments": item["arguments"]}
            events.append(("response.function_call_arguments.done", call))
        else:
            # A message, or reasoning: an item with a single part.
            part = item["content"][0]
            part_place = {**place, "content_index": 0}
            text = {**part_place, "text": part["text"]}
            if part["type"] == "output_text":
                text["logprobs"] = []
            events.append((f"response.{part['type']}.done", text))
            events.append(("response.content_part.done", {**part_place, "part": part}))
        whole_item = {"output_index": place["output_index"], "item": item}
        events.append(("response.output_item.done", whole_item))
        return events

    def _add_arguments(self, call: JsonObject) -> list[Event]:
        """Adds a piece of a call's arguments to the last item."""
        piece = call["function"].get("arguments", "")
        if not piece:
            return []
        self.items[-1]["arguments"] += piece
        fields = {**self._place(), "delta": piece}
        return [("response.function_call_arguments.delta", fields)]

    def _add_text(self, kind: str, part_kind: str, text: str) -> list[Event]:
        """Adds text to the last item, or to a new one where that is of another kind."""
        events: list[Event] = []
        is_open = self.items and self.items[-1]["status"] == "in_progress"
        if not is_open or self.items[-1]["type"] != kind:
            events += self.finish()
            events += self._open_text(kind, part_kind)
        self.items[-1]["content"][0]["text"] += text
        delta = {**self._place(), "content_index": 0, "delta": text}
        if part_kind == "output_text":
            delta["logprobs"] = []
        events.append((f"response.{part_kind}.delta", delta))
        return events

    def _open_text(self, kind: str, part_kind: str) -> list[Event]:
        """Begins an item with one part, still without text."""
        part: JsonObject = {"type": part_kind, "text": ""}
        item: JsonObject = {"type": kind, "status": "in_progress"}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
            item |= {"id": f"msg_{uuid4().hex}", "role": "assistant"}
        else:
            item |= {"id": f"rs_{uuid4().hex}", "summary": []}
        item_added = self._open({**item, "content": []})
        # A copy: the part that the item has gains text later.
        part_fields = {**self._place(), "content_index": 0, "part": dict(part)}
        part_added = ("response.content_part.added", part_fields)
        self.items[-1]["content"].append(part)
        return [item_added, part_added]

    def _open(self, item: JsonObject) -> Event:
        """Begins an item."""
        self.items.append(item)
        # A copy: what is added to the item later is not in this event.
        copied = json.loads(json.dumps(item))
        fields = {"output_index": len(self.items) - 1, "item": copied}
        return "response.output_item.added", fields

    def _place(self) -> JsonObject:
        """Returns the fields by which an event names the last item."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


@dataclass(eq=False)
class ResponsesAnswer(ChatAnswer):
    """The answer to /v1/responses."""

    id_prefix = "resp"
    object_names = ("response", "response")
    responses_body: ResponsesBody | None = None
    """The body as it came; ``body`` is the same conversation as a chat's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = OutputItems()

    async def _write_events(self, stream: RequestGroupStream) -> AsyncIterator[str]:
        number = 0

        def write(kind: str, fields: JsonObject) -> str:
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
            status = _ITEM_STATUS.get(reason, "completed")
            for kind, fields in self.output.finish(status):
                yield write(kind, fields)
            response = self._describe_response(reason)
            yield write(f"response.{response['status']}", {"response": response})
        except Exception as error:
            # The status 200 is sent already: an error can only be the last event.
            api_error = convert_error(error).to_json()["error"]
            fields = {name: api_error[name] for name in ("code", "message", "param")}
            yield write("error", fields)

    def describe_all_items(self, output: SequenceOutput) -> JsonObject:
        """Returns the response that an answer without a stream is."""
        self.output.add(self.parse(0, output))
        reason = self.get_finish_reason(0, output)
        self.output.finish(_ITEM_STATUS.get(reason, "completed"))
        return self._describe_response(reason)

    async def _collect(self, stream: RequestGroupStream) -> JsonObject:
        whole: SequenceOutput | None = None
        async for _, output in self._read(stream):
            if whole is None:
                whole = output
            else:
                whole.append(output)
        assert whole is not None, "a sequence has one output at least"
        return self.describe_all_items(whole)

    def _describe_response(self, finish_reason: str | None) -> JsonObject:
        """Returns the response; ``finish_reason`` None: it goes on."""
        body = self.responses_body
        assert body is not None
        status = "in_progress"
        incomplete_details = None
        usage = None
        if finish_reason is not None:
            status = "completed"
            usage = self._describe_response_usage()
        cause = _CAUSES.get(finish_reason)
        if cause is not None:
            status = "incomplete"
            incomplete_details = {"reason": cause}
        text_format = body.text.format.model_dump(by_alias=True, exclude_none=True)
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools]
        return {
            "id": self._about["id"],
            "object": "response",
            "created_at": self._about["created"],
            "status": status,
            "error": None,
            "incomplete_details": incomplete_details,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": self._about["model"],
            "output": self.output.items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self._get_sampling("temperature"),
            "text": {"format": text_format},
            "tool_choice": body.describe_tool_choice(),
            "tools": tools,
            "top_p": self._get_sampling("top_p"),
            "truncation": body.truncation,
            "usage": usage,
        }

    def _get_sampling(self, name: str) -> float:
        """Returns a setting of sampling as it is used: the request's, the model's own,
        or OpenAI's."""
        default = self.state.sampling_defaults.get(name, 1.0)
        extra = self.body.model_extra or {}
        return extra.get(name, default)

    def _describe_response_usage(self) -> JsonObject:
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
    all_ignored = dict.fromkeys([*request.state.ignored_fields, *ignored])
    request.state.ignored_fields = list(all_ignored)
    answer = await prepare_chat_answer(state, chat_body, ResponsesAnswer)
    assert isinstance(answer, ResponsesAnswer)
    answer.responses_body = body
    return await answer.respond(request)
