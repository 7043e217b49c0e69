"""From a body to its answer, whole or as a stream of events: shared by /v1/completions
and /v1/chat/completions. An answer ends when its client hangs up."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.runtime.json_types import JsonObject
from maxlm.serving.beam_search import check_beam_body, search_beams
from maxlm.serving.engine_loop import RequestGroupStream
from maxlm.serving.errors import convert_error
from maxlm.serving.schemas import GenerationBody
from maxlm.serving.server_state import ServerState

T = TypeVar("T")
LOWEST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(eq=False)
class Answer(ABC):
    """An answer to a body, made of the outputs of its requests."""

    id_prefix: ClassVar[str]
    object_names: ClassVar[tuple[str, str]]
    """The kinds of object that a whole answer is, and an event."""
    state: ServerState
    body: GenerationBody
    prompts: Sequence[tuple[int, ...]]
    """One request is made for each; the ``n`` sequences of prompt 0 come first."""

    def __post_init__(self) -> None:
        body = self.body
        self.completion_tokens = 0
        self._cached_tokens: dict[str, int] = {}
        answer_kind, event_kind = self.object_names
        self._about: JsonObject = {
            "id": f"{self.id_prefix}-{uuid4().hex}",
            "object": event_kind if body.stream else answer_kind,
            "created": int(time.time()),
            "model": body.model or self.state.name,
        }
        self._adapter = self.state.find_adapter(body.model)

    @abstractmethod
    def make_request(
        self, request_id: str, prompt: tuple[int, ...]
    ) -> GenerationRequest:
        """Returns the engine's request for a prompt."""

    @abstractmethod
    def describe(self, index: int, output: SequenceOutput) -> JsonObject:
        """Returns a choice, of an answer or event: what an output adds to sequence
        ``index``."""

    @property
    def num_sequences(self) -> int:
        """Sequences that are drawn for each prompt."""
        return self.body.n

    def describe_all(self, outputs: Mapping[int, SequenceOutput]) -> list[JsonObject]:
        """Returns the choices of an answer that does not stream, from its sequences'
        outputs."""
        return [self.describe(index, outputs[index]) for index in sorted(outputs)]

    async def respond(self, request: Request) -> Response:
        """Returns the answer to a client that has sent its body."""
        engine_requests = []
        for number, prompt in enumerate(self.prompts):
            engine_request = self.make_request(f"{self._about['id']}-{number}", prompt)
            engine_requests.append(replace(engine_request, adapter=self._adapter))
        if self.body.use_beam_search:
            check_beam_body(self.body)
            answer = await cancel_on_disconnect(request, self._search(engine_requests))
            return JSONResponse(answer)
        # Also while it waits for the engine's thread: who hung up leaves its place in
        # the queue.
        stream = await cancel_on_disconnect(
            request, self.state.engine_loop.submit(engine_requests)
        )
        if self.body.stream:
            return EventStream(stream, self._write_events(stream))
        with stream:
            answer = await cancel_on_disconnect(request, self._collect(stream))
            return JSONResponse(answer)

    async def _write_events(self, stream: RequestGroupStream) -> AsyncIterator[str]:
        def write(choices: list[JsonObject], usage: JsonObject | None = None) -> str:
            event = {**self._about, "choices": choices, "usage": usage}
            data = json.dumps(event, ensure_ascii=False, allow_nan=False)
            return f"data: {data}\n\n"

        try:
            async for index, output in self._read(stream):
                yield write([self.describe(index, output)])
            if self.body.stream_options.include_usage:
                yield write([], self._describe_usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            # The status 200 is sent already: an error can only be the last event.
            yield f"data: {json.dumps(convert_error(error).to_json())}\n\n"

    async def _collect(self, stream: RequestGroupStream) -> JsonObject:
        outputs: dict[int, SequenceOutput] = {}
        async for index, output in self._read(stream):
            if index in outputs:
                outputs[index].append(output)
            else:
                outputs[index] = output
        choices = self.describe_all(outputs)
        return {**self._about, "choices": choices, "usage": self._describe_usage()}

    async def _search(self, requests: Sequence[GenerationRequest]) -> JsonObject:
        choices: list[JsonObject] = []
        for request in requests:
            num_beams = max(self.num_sequences, self.body.n)
            outputs = await search_beams(self.state, self.body, request, num_beams)
            for output in outputs:
                self.completion_tokens += len(output.token_ids)
                choices.append(self.describe(len(choices), output))
        return {**self._about, "choices": choices, "usage": self._describe_usage()}

    async def _read(
        self, stream: RequestGroupStream
    ) -> AsyncIterator[tuple[int, SequenceOutput]]:
        async for output in self.state.metrics.time_outputs(stream):
            self.completion_tokens += len(output.token_ids)
            request_id = output.request_id
            # A request's sequences share its prompt, which is counted once.
            num_cached = self._cached_tokens.get(request_id, 0)
            self._cached_tokens[request_id] = max(output.num_cached_tokens, num_cached)
            prompt_index = int(request_id.rpartition("-")[2])
            yield prompt_index * self.num_sequences + output.sequence_index, output

    def _describe_usage(self) -> JsonObject:
        """The numbers of tokens; of prompts as they came, and of all sequences that
        were drawn."""
        prompt_tokens = sum(map(len, self.prompts))
        cached_tokens = sum(self._cached_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


def decode_token(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes]:
    """Returns a token as text, U+FFFD for parts of characters, and as the bytes that it
    is."""
    data = tokenizer.decode_bytes([token_id], continued=True)
    return data.decode("utf-8", "replace"), data


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Returns what ``work`` does, or cancels it when the client hangs up; call it once
    the body is read. Raises ClientDisconnect: the client hung up."""
    task = asyncio.ensure_future(work)
    # Behind the whole body nothing can be received but that the client hung up.
    hang_up = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        hang_up.cancel()


class EventStream(StreamingResponse):
    """Server-sent events: each object as ``data: {json}``, at the end ``data: [DONE]``,
    or an object with an ``error`` if one comes up on the way. ``stream``: what the
    events are made of; released whatever happens."""

    def __init__(self, stream: RequestGroupStream, events: AsyncIterator[str]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await super().__call__(scope, receive, send)
