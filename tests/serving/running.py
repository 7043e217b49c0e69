"""A server on a free port of this process, over a fake engine."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.serving.engine_loop import EngineLoop
from maxlm.serving.server import bind_socket, make_server_config
from maxlm.serving.server_state import ServerState
from tests.serving.fake_engine import FakeEngine


@dataclass
class RunningServer:
    """A server, its engine, and clients of it."""

    url: str
    engine: Any
    loop: EngineLoop
    http: httpx.Client
    client: openai.OpenAI


def train_chat_tokenizer() -> Tokenizer:
    """Bytes, a few merges, and ChatML's special tokens."""
    config = TokenizerConfig(vocab_size=280, chat="chatml")
    return train_tokenizer(config, ["the model answers what it is asked\n"] * 20)


ServerSetting = (
    str | float | tuple[str, ...] | Mapping[str, Any] | Callable[..., Any] | None
)
"""A value of a field of ``ServerState``."""


@contextmanager
def run_in_thread(
    tokenizer: Tokenizer,
    reply: Callable[..., str] = lambda text, request: "Hello there!",
    *,
    make_engine: Callable[[Tokenizer], Any] | None = None,
    embedder: Any = None,
    max_open: int = 64,
    max_length: int = 2048,
    **settings: ServerSetting,
) -> Iterator[RunningServer]:
    """``make_engine`` may make a real engine; ``settings`` are those of
    ``ServerState``."""

    def encode(text: str, **options: bool) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode(text, **options)]

    if make_engine is None:
        engine = FakeEngine(tokenizer, reply)
    else:
        engine = make_engine(tokenizer)
    loop = EngineLoop(engine, max_open)
    state = ServerState(
        "fake", tokenizer, max_length, encode, loop, embedder, **settings
    )
    bound = bind_socket("127.0.0.1", 0)
    server = uvicorn.Server(make_server_config(state))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    key = settings.get("api_key") or "none"
    client = openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300
    )
    try:
        with httpx.Client(base_url=url, timeout=300) as http, client:
            yield RunningServer(url, engine, loop, http, client)
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        loop.stop()
