"""Runs the server until it is stopped."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
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
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen()  # so that no other process can listen here from now on
    except (OSError, UnicodeError, OverflowError) as error:
        taken.close()
        reason = getattr(error, "strerror", None) or str(error)
        fix = "name another with --port (0: any free one) or --host"
        raise MaxlmError(
            f"cannot listen: {reason}", where=f"{host}:{port}", fix=fix
        ) from None
    return taken


def read_api_key(path: str | Path | None) -> str | None:
    """Returns the key that clients have to send: a file's text, else MAXLM_API_KEY's;
    None: none. Raises MaxlmError: a key is empty or not plain ASCII."""
    key = os.environ.get("MAXLM_API_KEY")
    where = "MAXLM_API_KEY"
    if path is not None:
        key = Path(path).read_text("utf-8", "replace").strip()
        where = str(path)
    if key is not None and (
        not key.isascii() or not key.isprintable() or not key.strip()
    ):
        raise MaxlmError(
            "the key is empty or not printable ASCII", where=where, fix="set another"
        )
    return key


def run_server(
    state: ServerState, bound: socket.socket, announce: Callable[[str], None]
) -> None:
    """Serves until a signal: the first SIGTERM or Ctrl-C refuses new requests (503) and
    ends when those that run are answered, the second ends at once. ``announce``: called
    with the URL when requests are taken."""
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        asyncio.run(_DrainingServer(state, lambda: announce(url)).serve([bound]))
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

    def handle_exit(self, sig: int, frame: Any) -> None:
        loop = self._engine_loop
        if loop.is_draining:
            self.should_exit = True
            self.force_exit = True
            # Answers that run are cancelled now; uvicorn logs each one's traceback.
            logging.getLogger("uvicorn.error").addFilter(lambda record: False)
            return
        loop.is_draining = True
        if loop.num_open:
            what = f"finishing {loop.num_open} that run; Ctrl-C ends now"
            print(what, file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= (
            self._engine_loop.is_draining and not self._engine_loop.num_open
        )
        return await super().on_tick(counter)
