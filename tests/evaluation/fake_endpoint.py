"""A fake OpenAI-compatible endpoint on a free port."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from maxlm.evaluation.endpoint import ChatEndpoint, open_endpoint


@dataclass
class FakeEndpoint:
    """``reply(body)`` returns a text, or an int: a status to refuse with; None: the
    connection is cut. ``bodies`` holds the bodies of the requests."""

    url: str
    reply: Callable[[dict[str, Any]], str | int | None]
    name: str
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def open(self, max_retries: int = 0) -> ChatEndpoint:
        return open_endpoint(f"{self.url}#{self.name}", max_retries=max_retries)


@contextmanager
def run_endpoint(
    reply: Callable[[dict[str, Any]], str | int | None], name: str = "fake"
) -> Iterator[FakeEndpoint]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(
            self, status: int, text: str, kind: str = "application/json"
        ) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            self.answer(200, json.dumps({"data": [{"id": fake.name}, {"id": "other"}]}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fake.bodies.append(body)
            text = fake.reply(body)
            if isinstance(text, int):
                self.answer(
                    text, json.dumps({"error": {"message": f"{fake.name} refuses"}})
                )
            elif text is None:
                self.close_connection = True
            elif body.get("stream"):
                pieces = [
                    {"delta": {"content": f"{piece} "}} for piece in text.split(" ")
                ]
                pieces.append({"delta": {}, "finish_reason": "stop"})
                events = [{"choices": [piece], "model": fake.name} for piece in pieces]
                lines = [f"data: {json.dumps(event)}\n\n" for event in events]
                self.answer(
                    200, "".join(lines) + "data: [DONE]\n\n", "text/event-stream"
                )
            else:
                choice = {"index": 0, "message": {"content": text}}
                self.answer(200, json.dumps({"choices": [choice]}))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = FakeEndpoint(f"http://127.0.0.1:{server.server_port}/v1", reply, name)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
