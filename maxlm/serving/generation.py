"""From a body to its answer, whole or as a stream of events: shared by /v1/completions
and /v1/chat/completions. An answer ends when its client hangs up."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from maxlm.data.tokenizer import Tokenizer
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.serving.beam_search import check_beam_body, search_beams
from maxlm.serving.engine_loop import RequestStream
from maxlm.serving.errors import convert_error
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
    body: Any
    """A ``GenerationBody``."""
    prompts: Sequence[tuple[int, ...]]
    """One request is made for each; the ``n`` sequences of prompt 0 come first."""

    def __post_init__(self) -> None:
        body = self.body
        self.completion_tokens = 0
        self._cached_tokens: dict[str, int] = {}
        about = {
            "id": f"{self.id_prefix}-{uuid4().hex}",
            "object": self.object_names[body.stream],
        }
        self._about = about | {
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
    def describe(self, index: int, output: SequenceOutput) -> dict[str, Any]:
        """Returns a choice, of an answer or event: what an output adds to sequence
        ``index``."""

    @property
    def num_sequences(self) -> int:
        """Sequences that are drawn for each prompt."""
        return self.body.n

    def describe_all(
        self, outputs: Mapping[int, SequenceOutput]
    ) -> list[dict[str, Any]]:
        """Returns the choices of an answer that does not stream, from its sequences'
        outputs."""
        return [self.describe(index, outputs[index]) for index in sorted(outputs)]

    async def respond(self, request: Request) -> Response:
        """Returns the answer to a client that has sent its body."""
        own = self._adapter
        asked = [
            replace(
                self.make_request(f"{self._about['id']}-{number}", prompt), adapter=own
            )
            for number, prompt in enumerate(self.prompts)
        ]
        if self.body.use_beam_search:
            check_beam_body(self.body)
            return JSONResponse(
                await cancel_on_disconnect(request, self._search(asked))
            )
        # Also while it waits for the engine's thread: who hung up leaves its place in
        # the queue.
        stream = await cancel_on_disconnect(
            request, self.state.engine_loop.submit(asked)
        )
        if self.body.stream:
            return EventStream(stream, self._write_events(stream))
        with stream:
            return JSONResponse(
                await cancel_on_disconnect(request, self._collect(stream))
            )

    async def _write_events(self, stream: RequestStream) -> AsyncIterator[str]:
        def write(choices: list[Any], usage: Any = None) -> str:
            event = self._about | {"choices": choices, "usage": usage}
            return f"data: {json.dumps(event, ensure_ascii=False, allow_nan=False)}\n\n"

        try:
            async for index, output in self._read(stream):
                yield write([self.describe(index, output)])
            if self.body.stream_options.include_usage:
                yield write([], self._describe_usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {json.dumps(convert_error(error).to_json())}\n\n"

    async def _collect(self, stream: RequestStream) -> dict[str, Any]:
        whole: dict[int, SequenceOutput] = {}
        async for index, output in self._read(stream):
            own = whole.setdefault(index, output)
            if own is not output:
                own.append(output)
        choices = self.describe_all(whole)
        return self._about | {"choices": choices, "usage": self._describe_usage()}

    async def _search(self, asked: Sequence[GenerationRequest]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for request in asked:
            num_beams = max(self.num_sequences, self.body.n)
            outputs = await search_beams(self.state, self.body, request, num_beams)
            for output in outputs:
                self.completion_tokens += len(output.token_ids)
                choices.append(self.describe(len(choices), output))
        return self._about | {"choices": choices, "usage": self._describe_usage()}

    async def _read(
        self, stream: RequestStream
    ) -> AsyncIterator[tuple[int, SequenceOutput]]:
        async for output in self.state.metrics.time_outputs(stream):
            self.completion_tokens += len(output.token_ids)
            cached = self._cached_tokens.get(output.request_id, 0)
            self._cached_tokens[output.request_id] = max(
                output.num_cached_tokens, cached
            )
            prompt_index = int(output.request_id.rpartition("-")[2])
            yield prompt_index * self.num_sequences + output.sequence_index, output

    def _describe_usage(self) -> dict[str, Any]:
        """The numbers of tokens; of prompts as they came, and of all sequences that
        were drawn."""
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(self._cached_tokens.values())
            },
        }


def decode_token(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes]:
    """Returns a token as text, U+FFFD for parts of characters, and as the bytes that it
    is."""
    data = tokenizer.decode_bytes([token_id], continued=True)
    return data.decode("utf-8", "replace"), data


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Returns what ``work`` does, or cancels it when the client hangs up; call it once
    the body is read. Raises ClientDisconnect: the client hung up."""
    task, hang_up = (
        asyncio.ensure_future(work),
        asyncio.ensure_future(request.receive()),
    )
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

    def __init__(self, stream: RequestStream, events: AsyncIterator[str]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await super().__call__(scope, receive, send)
