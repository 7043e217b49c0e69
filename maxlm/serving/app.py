"""The server's paths."""

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from maxlm.serving.chat import create_chat_completion, encode_conversation
from maxlm.serving.completions import create_completion
from maxlm.serving.embeddings import create_embeddings, create_ranking, create_scores
from maxlm.serving.errors import ApiError, convert_error
from maxlm.serving.responses import create_response
from maxlm.serving.schemas import (
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from maxlm.serving.server_state import ServerState

Endpoint = Callable[[ServerState, Request], Awaitable[Response]]
# A name or IPv4 address, or an IPv6 address in brackets, and maybe a port (RFC 9110,
# 7.2).
_HOST = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{0,5})?", re.ASCII
)
_OPEN_PATHS = ("/", "/markdown.js", "/health")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def make_app(state: ServerState) -> Starlette:
    """Returns the server as an ASGI application."""
    paths: dict[str, tuple[str, Endpoint]] = {
        "/": ("GET", show_page),
        "/markdown.js": ("GET", send_markdown_reader),
        "/health": ("GET", report_health),
        "/metrics": ("GET", report_metrics),
        "/v1/models": ("GET", list_models),
        "/v1/models/{name:path}": ("GET", describe_model),
        "/v1/completions": ("POST", create_completion),
        "/v1/chat/completions": ("POST", create_chat_completion),
        "/v1/responses": ("POST", create_response),
        "/v1/embeddings": ("POST", create_embeddings),
        "/v1/score": ("POST", create_scores),
        "/v1/rerank": ("POST", create_ranking),
        "/v1/load_lora_adapter": ("POST", load_lora_adapter),
        "/v1/unload_lora_adapter": ("POST", unload_lora_adapter),
        "/tokenize": ("POST", tokenize),
        "/detokenize": ("POST", detokenize),
    }
    routes = [
        Route(path, partial(_answer, state, endpoint, path), methods=[method])
        for path, (method, endpoint) in paths.items()
    ]
    middleware: list[Middleware] = []
    if state.allowed_origins:
        cross_origin = Middleware(
            CORSMiddleware,
            allow_origins=state.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=[
                "*"
            ],  # clients send names of their own; the origin is the guard
            expose_headers=["x-maxlm-ignored", "retry-after"],
        )
        middleware.append(cross_origin)
    handlers: Any = {HTTPException: partial(_refuse_path, state)}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def _answer(
    state: ServerState, endpoint: Endpoint, path: str, request: Request
) -> Response:
    """Calls an endpoint; every exception becomes an answer in OpenAI's form."""
    start = time.monotonic()
    try:
        _check_host(state, request)
        given = request.headers.get("authorization", "").encode()
        is_open = not state.api_key or path in _OPEN_PATHS
        if not is_open and not hmac.compare_digest(
            given, f"Bearer {state.api_key}".encode()
        ):
            raise ApiError(401, "send the header authorization: Bearer KEY")
        response = await endpoint(state, request)
        if ignored := getattr(request.state, "ignored_fields", None):
            response.headers["x-maxlm-ignored"] = ", ".join(ignored)
    except ClientDisconnect:
        response = Response(status_code=499)  # nobody reads it; as nginx counts them
    except Exception as error:
        response = make_error_response(error)
    state.metrics.requests.labels(path, response.status_code).inc()
    if state.prints_requests:
        # Of a stream the time until its first bytes.
        _print_request(request, response.status_code, time.monotonic() - start)
    return response


def _print_request(request: Request, status: int, seconds: float) -> None:
    client = request.client.host if request.client else "-"
    line = (
        f"{client} {request.method} {request.url.path[:200]!r} {status} {seconds:.3f} s"
    )
    with suppress(OSError, ValueError):  # nobody reads standard output any more
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", flush=True)


def _check_host(state: ServerState, request: Request) -> None:
    """Raises ApiError: a request calls the server by a name that is none of its own. A
    page of another site may have its own name lead here (DNS rebinding)."""
    if state.allowed_hosts is None:
        return
    # Read here: Starlette takes the socket's address where it cannot parse the header.
    header = request.headers.get("host", "")
    match = _HOST.fullmatch(header)
    host = match["name"].strip("[]").lower() if match else None
    if host not in state.allowed_hosts:
        message = f"the host {header[:200]!r} is none of this server's: start it with an API key"
        raise ApiError(403, message)


async def _refuse_path(
    state: ServerState, request: Request, error: Exception
) -> Response:
    status = getattr(error, "status_code", 404)
    if state.prints_requests:
        _print_request(request, status, 0.0)
    what = f"{request.method} {request.url.path[:200]}: no such path, or not by this method"
    response = make_error_response(ApiError(status, what))
    response.headers.update(getattr(error, "headers", None) or {})  # Allow, beside 405
    return response


def make_error_response(error: Exception) -> Response:
    """Returns an error in OpenAI's form."""
    found = convert_error(error)
    headers = {"retry-after": str(found.retry_after)} if found.retry_after else None
    return JSONResponse(found.to_json(), found.status, headers)


def make_page_response(path: Path) -> Response:
    """Returns a page that needs nothing but itself and this server."""
    headers = {"content-security-policy": _PAGE_POLICY, "cache-control": "no-cache"}
    return FileResponse(path, headers=headers)


async def show_page(state: ServerState, request: Request) -> Response:
    """Answers / with the chat page."""
    return make_page_response(Path(__file__).with_name("page.html"))


async def send_markdown_reader(state: ServerState, request: Request) -> Response:
    """Answers /markdown.js, which the chat page loads."""
    path = Path(__file__).with_name("markdown.js")
    headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
    return FileResponse(path, media_type="text/javascript", headers=headers)


async def report_health(state: ServerState, request: Request) -> Response:
    """Answers /health: 200 while requests are taken; the first ones may wait for
    programs that are not compiled yet, whose number is ``programs_left``."""
    loop = state.engine_loop
    status = "failed" if loop.failure else "stopping" if loop.is_draining else "ok"
    programs_left = loop.engine.num_programs_left if loop.engine is not None else 0
    about = {"status": status, "programs_left": programs_left}
    return JSONResponse(about, 200 if status == "ok" else 503)


async def report_metrics(state: ServerState, request: Request) -> Response:
    """Answers /metrics."""
    numbers = generate_latest(state.metrics.registry)
    return Response(numbers, media_type="text/plain; version=0.0.4; charset=utf-8")


async def list_models(state: ServerState, request: Request) -> Response:
    """Answers /v1/models."""
    data = [state.describe_model(adapter) for adapter in (None, *state.list_adapters())]
    return JSONResponse({"object": "list", "data": data})


async def describe_model(state: ServerState, request: Request) -> Response:
    """Answers /v1/models/NAME."""
    return JSONResponse(
        state.describe_model(state.find_adapter(request.path_params["name"]))
    )


async def tokenize(state: ServerState, request: Request) -> Response:
    """Answers /tokenize: a prompt's or a conversation's ids."""
    body = await state.read_body(request, TokenizeBody)
    if (body.prompt is None) == (not body.messages):
        raise ApiError(400, "give prompt or messages", param="prompt")
    if body.messages:
        tokenizer = state.get_tokenizer(body.model)
        conversation = await encode_conversation(state, tokenizer, body.messages)
        tokens = conversation.tokens
    else:
        encode = (
            state.encode_prompt if body.add_special_tokens else state.tokenizer.encode
        )
        encode = partial(encode, allow_special=body.parse_special)
        tokens = await state.encode_text(body.prompt or "", "prompt", encode=encode)
    about = {"count": len(tokens), "max_model_len": state.max_length}
    return JSONResponse(about | {"tokens": list(tokens)})


async def detokenize(state: ServerState, request: Request) -> Response:
    """Answers /detokenize: the text of ids."""
    body = await state.read_body(request, DetokenizeBody)
    text = await asyncio.to_thread(state.tokenizer.decode, body.tokens)
    return JSONResponse({"prompt": text})


async def load_lora_adapter(state: ServerState, request: Request) -> Response:
    """Answers /v1/load_lora_adapter: loads a folder's adapter beside the model."""
    body = await state.read_body(request, LoadAdapterBody)
    engine = state.engine_loop.engine
    if engine is None or state.read_adapter is None:
        raise ApiError(
            400, "no adapters are loaded beside this model", code="unsupported"
        )
    with state.engine_loop.admit():
        found = await asyncio.to_thread(state.read_adapter, body.lora_path)
        await state.engine_loop.call(
            partial(engine.load_adapter, body.lora_name, found.weights)
        )
        if found.tokenizer is not None:
            state.adapter_tokenizers[body.lora_name] = found.tokenizer
    return JSONResponse(state.describe_model(body.lora_name))


async def unload_lora_adapter(state: ServerState, request: Request) -> Response:
    """Answers /v1/unload_lora_adapter."""
    body = await state.read_body(request, UnloadAdapterBody)
    name, engine = body.lora_name, state.engine_loop.engine
    state.find_adapter(f"{state.name}:{name}")
    assert engine is not None, "it has an adapter"
    with state.engine_loop.admit():
        await state.engine_loop.call(partial(engine.unload_adapter, name))
        state.adapter_tokenizers.pop(name, None)
    return JSONResponse(
        {"id": f"{state.name}:{name}", "object": "model", "deleted": True}
    )
