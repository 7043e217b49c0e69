"""/v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's bodies."""

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maxlm.serving.errors import ApiError
from maxlm.serving.schemas import LoadAdapterBody, UnloadAdapterBody
from maxlm.serving.server_state import ServerState


async def load_lora_adapter(state: ServerState, request: Request) -> Response:
    """Answers /v1/load_lora_adapter: loads a folder's adapter beside the model."""
    body = await state.read_body(request, LoadAdapterBody)
    engine = state.engine_loop.engine
    if engine is None or state.read_adapter is None:
        raise ApiError(400, "no adapters are loaded beside this model", code="unsupported")
    found = await asyncio.to_thread(state.read_adapter, body.lora_path)
    await state.engine_loop.call(partial(engine.load_adapter, body.lora_name, found))
    return JSONResponse(state.describe_model(body.lora_name))


async def unload_lora_adapter(state: ServerState, request: Request) -> Response:
    """Answers /v1/unload_lora_adapter."""
    body = await state.read_body(request, UnloadAdapterBody)
    name, engine = body.lora_name, state.engine_loop.engine
    state.find_adapter(f"{state.name}:{name}")
    assert engine is not None, "it has an adapter"
    await state.engine_loop.call(partial(engine.unload_adapter, name))
    return JSONResponse({"id": f"{state.name}:{name}", "object": "model", "deleted": True})
