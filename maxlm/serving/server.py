"""Runs the server until it is stopped."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from maxlm.config import MaxlmError
from maxlm.serving.app import make_app
from maxlm.serving.deadlines import DeadlineProtocol
from maxlm.serving.server_state import ServerState


def bind_socket(host: str, port: int) -> socket.socket:
    """Takes an address, before anything is loaded; connections wait until the server
    runs. Raises MaxlmError: the port is in use, or the address is none of this
    machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) where the protocol is named, and waits 40 ms
    # elsewhere.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # so that no other process can listen here from now on
    except (OSError, UnicodeError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        message = f"cannot listen: {reason}"
        fix = "name another with --port (0: any free one) or --host"
        raise MaxlmError(message, where=f"{host}:{port}", fix=fix) from None
    return listener


def read_api_key(path: str | Path | None) -> str | None:
    """Returns the key that clients have to send: a file's text, else MAXLM_API_KEY's;
    None: none. Raises MaxlmError: a key is empty or not plain ASCII."""
    key = os.environ.get("MAXLM_API_KEY")
    where = "MAXLM_API_KEY"
    if path is not None:
        key = Path(path).read_text("utf-8", "replace").strip()
        where = str(path)
    if key is None:
        return None
    # A header has no other characters.
    is_printable = key.isascii() and key.isprintable()
    if not is_printable or not key.strip():
        message = "the key is empty or not printable ASCII"
        raise MaxlmError(message, where=where, fix="set another")
    return key


def run_server(
    state: ServerState, bound: socket.socket, announce: Callable[[str], None]
) -> None:
    """Serves until a signal: the first SIGTERM or Ctrl-C refuses new requests (503) and
    ends when those that run are answered, the second ends at once. ``announce``: called
    with the URL when requests are taken."""
    host, port = bound.getsockname()[:2]
    if ":" in host:  # an IPv6 address
        host = f"[{host}]"
    server = _DrainingServer(state, lambda: announce(f"http://{host}:{port}"))
    try:
        asyncio.run(server.serve([bound]))
    finally:
        state.engine_loop.stop()


def make_server_config(state: ServerState) -> uvicorn.Config:
    """Returns uvicorn's settings."""
    protocol: Any = partial(DeadlineProtocol, request_seconds=state.request_seconds)
    return uvicorn.Config(
        make_app(state),
        http=protocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


class _DrainingServer(uvicorn.Server):
    """Ends on a signal only when what runs is answered; uvicorn closes its sockets at
    once."""

    def __init__(self, state: ServerState, announce: Callable[[], None]):
        super().__init__(make_server_config(state))
        self._engine_loop = state.engine_loop
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        loop = self._engine_loop
        if loop.is_draining:
            self.should_exit = True
            self.force_exit = True
            # Answers that run are cancelled now; uvicorn logs each one's traceback.
            logging.getLogger("uvicorn.error").addFilter(lambda record: False)
            return
        loop.is_draining = True
        if loop.num_open:
            message = f"finishing {loop.num_open} that run; Ctrl-C ends now"
            print(message, file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        loop = self._engine_loop
        if loop.is_draining and not loop.num_open:
            self.should_exit = True
        return await super().on_tick(counter)
