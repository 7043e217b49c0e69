"""A running server's parts, and what every endpoint needs of them."""

import asyncio
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request

from maxlm.data.tokenizer.bounds import make_token_count_bound
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.adapter_slots import ServedAdapter
from maxlm.inference.embedding import Embedder
from maxlm.inference.engine import EngineStats
from maxlm.inference.requests import SequenceOutput
from maxlm.runtime.json_types import JsonObject
from maxlm.serving.deadlines import DEFAULT_REQUEST_SECONDS
from maxlm.serving.engine_loop import EngineLoop, RequestGroupStream
from maxlm.serving.errors import ApiError
from maxlm.serving.schemas import ApiBody

Body = TypeVar("Body", bound=ApiBody)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Bounds of the histograms' buckets."""


@dataclass
class ServerState:
    """A running server's parts: a model under the name that requests give it, and what
    runs it."""

    name: str
    tokenizer: Tokenizer
    max_length: int
    """Tokens of a prompt and its continuation together: the engine's setting of that
    name."""
    encode_prompt: Callable[..., list[int]]
    """Returns the ids that the model is given for a text; ``allow_special``: as the
    tokenizer's ``encode`` takes it."""
    engine_loop: EngineLoop
    embedder: Embedder | None = None
    api_key: str | None = None
    max_body_bytes: int = 16 << 20
    read_adapter: Callable[[str], ServedAdapter] | None = None
    adapter_tokenizers: dict[str, Tokenizer] = field(default_factory=dict)
    """Tokenizers of loaded adapters that have one of their own, by the adapter's
    name."""
    allowed_hosts: Collection[str] | None = None
    """Names that requests may call the server by; None: any."""
    request_seconds: float = DEFAULT_REQUEST_SECONDS
    """Time that a request's head and body may take; see ``DeadlineProtocol``."""
    model_max_length: int | None = None
    """Tokens that the model was made for; None: not known."""
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    """Settings of sampling where a request says nothing."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may ask, such as ``https://chat.example``; ``*``: all."""
    prints_requests: bool = False
    """Whether each request is a line on standard output."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(lambda: self.engine_loop.stats)
        self._count_least_tokens = make_token_count_bound(self.tokenizer)

    async def read_body(self, request: Request, schema: type[Body]) -> Body:
        """Reads and checks a JSON body. Raises ApiError: no JSON, too large, a field
        that is not supported, another model's name; ValidationError: a wrong field."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site can send anything else without asking the browser
        # first.
        if kind != "application/json":
            raise ApiError(400, "send the header content-type: application/json")
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self.max_body_bytes:
                message = f"the body is larger than {self.max_body_bytes:,} bytes"
                raise ApiError(413, message)
        body = schema.model_validate_json(bytes(data))
        self.find_adapter(body.model)
        request.state.ignored_fields = body.list_ignored_fields()
        return body

    def list_adapters(self) -> tuple[str, ...]:
        """Lists the names of loaded adapters."""
        engine = self.engine_loop.engine
        return () if engine is None else engine.adapters

    def find_adapter(self, model: str | None) -> str | None:
        """Returns the adapter of the model that a request names, ``base:adapter``;
        None: the base. Raises ApiError: there is no such model."""
        known = {None: None, self.name: None}
        known |= {f"{self.name}:{adapter}": adapter for adapter in self.list_adapters()}
        if model not in known:
            names = ", ".join(repr(name) for name in known if name is not None)
            message = f"there is no model {str(model)[:200]!r} here, only {names}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return known[model]

    def get_tokenizer(self, model: str | None) -> Tokenizer:
        """Returns the tokenizer of the model that a request names: its adapter's own,
        or the base's."""
        adapter = self.find_adapter(model)
        return self.adapter_tokenizers.get(adapter or "", self.tokenizer)

    def describe_model(self, adapter: str | None = None) -> JsonObject:
        """Returns the model, or an adapter of it, as /v1/models does."""
        model: JsonObject = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "maxlm",
        }
        if adapter:
            model["id"] = f"{self.name}:{adapter}"
            model["parent"] = self.name
        model["max_model_len"] = self.max_length
        return model

    async def encode_prompts(
        self,
        prompts: Sequence[str | list[int]],
        prompt_field: str,
        *,
        max_tokens: int | None = None,
        allow_special: bool = False,
        kept_tokens: int | None = None,
    ) -> list[tuple[int, ...]]:
        """Returns the ids of prompts that may be texts or ids already; checks these.
        Raises ApiError: a prompt is empty, too long, or of ids that are none.

        Args:
            prompt_field: the request's field that has the prompts, to name in errors.
            max_tokens: of each prompt; default: ``max_length``.
            kept_tokens: so many last tokens of each prompt are taken; None: all.
        """
        encode = partial(self.encode_prompt, allow_special=allow_special)
        last = self.tokenizer.vocab_size - 1
        encoded: list[tuple[int, ...]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                tokens = await self.encode_text(
                    prompt,
                    prompt_field,
                    encode=encode,
                    max_tokens=max_tokens,
                    kept_tokens=kept_tokens,
                )
            elif kept_tokens is not None:
                tokens = tuple(prompt[-kept_tokens:])
            else:
                self.check_prompt_length(
                    len(prompt), prompt_field, max_tokens=max_tokens
                )
                tokens = tuple(prompt)
            if not tokens:
                raise ApiError(400, "a prompt is empty", param=prompt_field)
            if max(tokens) > last:
                raise ApiError(
                    400, f"token ids lie from 0 to {last}", param=prompt_field
                )
            encoded.append(tokens)
        return encoded

    async def encode_text(
        self,
        text: str,
        prompt_field: str,
        *,
        encode: Callable[[str], list[int]],
        max_tokens: int | None = None,
        kept_tokens: int | None = None,
    ) -> tuple[int, ...]:
        """Returns a text's ids by ``encode``, in a thread of its own. Raises ApiError:
        the text can never fit, which is told before it is encoded.

        Args:
            kept_tokens: the last ones alone are taken, behind the token that begins
                texts.
        """
        if kept_tokens is not None:
            return await asyncio.to_thread(self._encode_end, text, encode, kept_tokens)

        def check_and_encode() -> list[int]:
            least = self._count_least_tokens(text)
            self.check_prompt_length(
                least, prompt_field, max_tokens=max_tokens, is_least=True
            )
            return encode(text)

        return tuple(await asyncio.to_thread(check_and_encode))

    def _encode_end(
        self, text: str, encode: Callable[[str], list[int]], num_tokens: int
    ) -> tuple[int, ...]:
        # So much text has more tokens than are kept; what stands before it is not
        # looked at.
        longest_token = max(map(len, self.tokenizer.codec.token_bytes))
        max_chars = (num_tokens + 64) * longest_token
        tokens = encode(text[-max_chars:])
        if len(tokens) <= num_tokens:
            return tuple(tokens)
        has_bos = tokens[0] == self.tokenizer.bos_id
        if has_bos and num_tokens > 1:
            return (tokens[0], *tokens[1 - num_tokens :])
        return tuple(tokens[-num_tokens:])

    def resolve_truncation(
        self, kept_tokens: int | None, max_new_tokens: int | None
    ) -> int | None:
        """Returns how many last tokens of a prompt are kept, None: all must fit. Raises
        ApiError: fewer than one.

        Args:
            kept_tokens: the request's ``truncate_prompt_tokens``; -1 asks for all that
                there is room for beside ``max_new_tokens``; where these are not given,
                beside an answer of a quarter of the context.
        """
        if kept_tokens is None:
            return None
        if kept_tokens == 0:
            message = "keep one token at least, or -1"
            raise ApiError(400, message, param="truncate_prompt_tokens")
        room = self.max_length - (max_new_tokens or self.max_length // 4)
        if kept_tokens == -1:
            kept_tokens = room
        return max(1, min(kept_tokens, room))

    def check_prompt_length(
        self,
        num_tokens: int,
        prompt_field: str,
        *,
        max_tokens: int | None = None,
        is_least: bool = False,
    ) -> None:
        """Raises ApiError: a prompt of so many tokens is too long for the context, or
        for ``max_tokens``; ``is_least``: it has so many at least."""
        if num_tokens > (max_tokens or self.max_length):
            count = f"at least {num_tokens}" if is_least else str(num_tokens)
            context = self._describe_context(max_tokens)
            raise ApiError(
                400,
                f"the prompt has {count} tokens; {context}",
                param=prompt_field,
                code="context_length_exceeded",
            )

    def resolve_max_tokens(
        self, num_prompt_tokens: int, max_tokens: int | None, prompt_field: str
    ) -> int:
        """Returns how many new tokens a sequence may have; ``max_tokens`` None asks for
        all that there is room for. Raises ApiError: they do not fit the context;
        ``prompt_field`` is the request's field that has the prompt, to name there."""
        room = self.max_length - num_prompt_tokens
        if room < 1 or (max_tokens or 0) > room:
            message = f"the prompt has {num_prompt_tokens} tokens"
            field_at_fault = prompt_field
            if room >= 1:
                message += f" and {max_tokens} more were asked for"
                field_at_fault = "max_tokens"
            message += f"; {self._describe_context()}"
            raise ApiError(
                400, message, param=field_at_fault, code="context_length_exceeded"
            )
        if max_tokens is None:
            return room
        return max(max_tokens, 1)  # the engine makes one at least

    def _describe_context(self, max_tokens: int | None = None) -> str:
        """Says how long the context is, and by which setting."""
        limit = max_tokens or self.max_length
        text = f"the context is {limit} (the server's setting max_length"
        if self.model_max_length is not None and self.model_max_length > limit:
            text += f"; the model was made for {self.model_max_length}"
        return f"{text})"


class ServerMetrics(Collector):
    """Counters and histograms of one server, in a registry of their own.
    ``read_stats``: returns the engine's ``EngineStats``, or None; each of its fields is
    a gauge ``maxlm_NAME``, and a counter where the name ends in ``_total``."""

    def __init__(self, read_stats: Callable[[], EngineStats | None]):
        self.registry = CollectorRegistry()
        self._read_stats = read_stats
        self.registry.register(self)
        self.requests = Counter(
            "requests",
            "Answers, by path and status",
            ["path", "code"],
            namespace="maxlm",
            registry=self.registry,
        )
        self._first = self._make_histogram(
            "time_to_first_token_seconds", "From a request to a sequence's first token"
        )
        self._between = self._make_histogram(
            "inter_token_seconds",
            "Between tokens of a sequence; a step's tokens share its time",
        )
        self._duration = self._make_histogram(
            "request_seconds", "From a request to its last token"
        )

    def _make_histogram(self, name: str, description: str) -> Histogram:
        return Histogram(
            name,
            description,
            buckets=_SECONDS,
            namespace="maxlm",
            registry=self.registry,
        )

    async def time_outputs(
        self, stream: RequestGroupStream
    ) -> AsyncIterator[SequenceOutput]:
        """Passes a stream's outputs on, and observes when they come."""
        last: dict[tuple[str, int], float] = {}
        async for output in stream:
            now = time.monotonic()
            key = (output.request_id, output.sequence_index)
            num_tokens = len(output.token_ids)
            if num_tokens:
                if key not in last:
                    self._first.observe(now - stream.start_time)
                else:
                    seconds = (now - last[key]) / num_tokens
                    for _ in range(num_tokens):
                        self._between.observe(seconds)
                last[key] = now
            yield output
        self._duration.observe(time.monotonic() - stream.start_time)

    def collect(self) -> Iterator[Metric]:
        """Yields the engine's numbers."""
        stats = self._read_stats()
        if stats is None:
            return
        for name, value in stats._asdict().items():
            words = name.removeprefix("num_").replace("_total", " since the start")
            description = f"Engine: {words.replace('_', ' ')}"
            if name.endswith("_total"):
                yield CounterMetricFamily(f"maxlm_{name}", description, value=value)
            else:
                yield GaugeMetricFamily(f"maxlm_{name}", description, value=value)
