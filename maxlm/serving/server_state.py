"""A running server's parts, and what every endpoint needs of them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from maxlm.data.tokenizer import Tokenizer
from maxlm.inference.adapter_slots import LoraWeights
from maxlm.inference.embedding import Embedder
from maxlm.serving.engine_loop import EngineLoop
from maxlm.serving.errors import ApiError
from maxlm.serving.metrics import ServerMetrics
from maxlm.serving.schemas import ApiBody

Body = TypeVar("Body", bound=ApiBody)


@dataclass
class ServerState:
    """A running server's parts: a model under the name that requests give it, and what runs it."""

    name: str
    tokenizer: Tokenizer
    max_length: int
    """Tokens of a prompt and its continuation together."""
    encode_prompt: Callable[[str], list[int]]
    """The ids that the model is given for a text."""
    engine_loop: EngineLoop
    embedder: Embedder | None = None
    api_key: str | None = None
    max_body_bytes: int = 16 << 20
    read_adapter: Callable[[str], LoraWeights] | None = None
    """Reads the adapter of a folder."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(lambda: self.engine_loop.stats)

    async def read_body(self, request: Request, schema: type[Body]) -> Body:
        """Reads and checks a JSON body.

        Raises:
            ApiError: no JSON, too large, a field that is not supported, another model's name.
            ValidationError: a wrong field.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site can send anything else without asking the browser first.
        if kind != "application/json":
            raise ApiError(400, "send the header content-type: application/json")
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self.max_body_bytes:
                raise ApiError(413, f"the body is larger than {self.max_body_bytes:,} bytes")
        body = schema.model_validate_json(bytes(data))
        self.find_adapter(body.model)
        request.state.ignored_fields = body.list_ignored_fields()
        return body

    def list_adapters(self) -> tuple[str, ...]:
        """Lists the names of loaded adapters."""
        engine = self.engine_loop.engine
        return () if engine is None else engine.adapters

    def find_adapter(self, model: str | None) -> str | None:
        """Returns the adapter of the model that a request names, ``base:adapter``; None: the base.

        Raises:
            ApiError: there is no such model.
        """
        known = {None: None, self.name: None}
        known |= {f"{self.name}:{adapter}": adapter for adapter in self.list_adapters()}
        if model not in known:
            names = ", ".join(repr(name) for name in known if name is not None)
            what = f"there is no model {str(model)[:200]!r} here, only {names}"
            raise ApiError(404, what, param="model", code="model_not_found")
        return known[model]

    def describe_model(self, adapter: str | None = None) -> dict[str, Any]:
        """Returns the model, or an adapter of it, as /v1/models does."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "maxlm"}
        own = {"id": f"{self.name}:{adapter}", "parent": self.name} if adapter else {}
        return {**about, **own, "max_model_len": self.max_length}

    async def encode_prompts(self, prompts: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
        """Returns the ids of prompts that may be texts or ids already; checks these."""

        def encode() -> list[tuple[int, ...]]:
            return [tuple(self.encode_prompt(p) if isinstance(p, str) else p) for p in prompts]

        found, last = await asyncio.to_thread(encode), self.tokenizer.vocab_size - 1
        for tokens in found:
            if not tokens:
                raise ApiError(400, "a prompt is empty", param="prompt")
            if min(tokens) < 0 or max(tokens) > last:
                raise ApiError(400, f"token ids lie from 0 to {last}", param="prompt")
        return found

    def resolve_max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        """Returns how many tokens a sequence may have; None asks for all that there is room for.

        Raises:
            ApiError: they do not fit the context.
        """
        limit = self.max_length
        room = limit - num_prompt_tokens
        if room < 1 or (asked or 0) > room:
            what = f"the context is {limit} tokens (max_length), the prompt has {num_prompt_tokens}"
            what += f"; {asked} more were asked for" if room >= 1 else ""
            raise ApiError(400, what, param="max_tokens", code="context_length_exceeded")
        return room if asked is None else max(asked, 1)
