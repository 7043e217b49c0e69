"""A deadline for requests: connections whose head or body does not come are closed.

Without it whoever opens connections and sends a byte now and then holds them for good,
until the server has no file descriptors left. uvicorn itself only limits the time
between requests.
"""

import asyncio

import h11
from starlette.responses import JSONResponse
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from maxlm.runtime.json_types import JsonObject
from maxlm.serving.errors import ApiError

DEFAULT_REQUEST_SECONDS = 20.0
"""Time that a request's head and body may take, beside that for its bytes."""
MIN_BYTES_PER_SECOND = 65_536
"""The slowest that a body may come once that time is over: 16 MB in 4 minutes."""


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, which answers 408 and closes where a request is
    not complete in time: ``request_seconds`` after the connection is made, or its first
    byte comes, and as many more as its bytes take at ``MIN_BYTES_PER_SECOND``."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: JsonObject,
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        request_seconds: float,
    ):
        super().__init__(config, server_state, app_state, _loop)
        self._request_seconds = request_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._start_time = 0.0
        self._num_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_request()

    def data_received(self, data: bytes) -> None:
        if self._timer is None:
            self._start_request()
        self._num_bytes += len(data)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_timer()  # the request is complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_request(self) -> None:
        self._start_time = self.loop.time()
        self._num_bytes = 0
        self._timer = self.loop.call_later(self._request_seconds, self._close_if_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_if_late(self) -> None:
        allowed = self._request_seconds + self._num_bytes / MIN_BYTES_PER_SECOND
        seconds_left = self._start_time + allowed - self.loop.time()
        if seconds_left > 0:
            self._timer = self.loop.call_later(seconds_left, self._close_if_late)
            return
        self._timer = None
        if self.transport.is_closing():
            return
        # A client that has sent nothing is told nothing, nor is one within another
        # answer.
        if self._num_bytes and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            message = f"the request was not complete after {allowed:.0f} s"
            self._send_error(ApiError(408, message))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _send_error(self, error: ApiError) -> None:
        response = JSONResponse(error.to_json(), error.status, {"connection": "close"})
        head = h11.Response(
            status_code=error.status,
            headers=response.raw_headers,
            reason=b"Request Timeout",
        )
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            data = self.conn.send(event)
            if data:
                self.transport.write(data)
