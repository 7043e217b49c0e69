"""/v1/embeddings, /v1/score and /v1/rerank."""

import asyncio
import base64
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maxlm.inference.embedding import Embedder, EmbeddingProgram, PaddedBatch, Pooling
from maxlm.inference.scoring import make_score_request, read_score
from maxlm.serving.errors import ApiError
from maxlm.serving.generation import cancel_on_disconnect
from maxlm.serving.schemas import (
    EmbeddingBody,
    PairBody,
    RerankBody,
    ScoreBody,
    list_prompts,
)
from maxlm.serving.server_state import ServerState

Rows = list[tuple[int, ...]]
"""Token ids of texts."""


async def create_embeddings(state: ServerState, request: Request) -> Response:
    """Answers /v1/embeddings."""
    body = await state.read_body(request, EmbeddingBody)
    embedder = _find_embedder(state, state.find_adapter(body.model))
    max_tokens = embedder.max_length
    rows = await state.encode_prompts(
        list_prompts(body.input), "input", max_tokens=max_tokens
    )
    vectors = await _embed(state, embedder, request, rows, body.pooling)
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            what = f"the model's vectors have {vectors.shape[1]} dimensions"
            raise ApiError(400, what, param="dimensions")
        vectors = vectors[:, : body.dimensions]
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    written: list[Any] = vectors.tolist()
    if body.encoding_format == "base64":
        written = [
            base64.b64encode(each.astype("<f4").tobytes()).decode() for each in vectors
        ]
    data = [
        {"object": "embedding", "index": n, "embedding": e}
        for n, e in enumerate(written)
    ]
    return _respond(state, rows, data)


async def create_scores(state: ServerState, request: Request) -> Response:
    """Answers /v1/score: how well each text_2 follows from, or is like, its text_1."""
    body = await state.read_body(request, ScoreBody)
    firsts, seconds = list_prompts(body.text_1), list_prompts(body.text_2)
    if len(firsts) == 1:
        firsts = [*firsts] * len(seconds)
    if len(firsts) != len(seconds):
        what = f"text_1 has {len(firsts)} texts, text_2 {len(seconds)}: give one, or as many"
        raise ApiError(400, what, param="text_1")
    rows, scores = await score_pairs(state, request, firsts, seconds, body)
    data = [
        {"index": n, "object": "score", "score": score}
        for n, score in enumerate(scores)
    ]
    return _respond(
        state, rows, data, id=f"score-{uuid4().hex}", model=body.model or state.name
    )


async def create_ranking(state: ServerState, request: Request) -> Response:
    """Answers /v1/rerank: documents by how well they fit a query, the best first."""
    body = await state.read_body(request, RerankBody)
    documents = body.list_texts()
    method = body.resolve_method(state.engine_loop.engine is not None)
    rows, scores = await score_pairs(
        state,
        request,
        documents
        if method == "cosine"
        else [_ask_for_query(text) for text in documents],
        [body.query] * len(documents),
        body,
        ("documents", "query"),
    )
    if method == "loglikelihood":
        scores = [math.exp(score) for score in scores]
    order = sorted(range(len(documents)), key=lambda index: -scores[index])
    results: list[dict[str, Any]] = []
    for index in order[: body.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": documents[index]}
        results.append(result)
    usage = {"prompt_tokens": sum(map(len, rows)), "total_tokens": sum(map(len, rows))}
    about = {
        "id": f"rerank-{uuid4().hex}",
        "model": body.model or state.name,
        "usage": usage,
    }
    return JSONResponse({**about, "results": results})


def _ask_for_query(document: str) -> str:
    """Returns the text whose continuation by the query is the more likely the better
    the document fits it (Sachan et al. 2022, arXiv 2204.07496, §2)."""
    return f"Passage: {document}\nPlease write a question based on this passage.\nQuestion: "


async def score_pairs(
    state: ServerState,
    request: Request,
    firsts: Sequence[Any],
    seconds: Sequence[Any],
    body: PairBody,
    fields: tuple[str, str] = ("text_1", "text_2"),
) -> tuple[Rows, list[float]]:
    """Returns the tokens of pairs of texts, and how well each second one follows from
    its first (mean log-probability of a token, natural) or is like it (cosine).

    Args:
        fields: the request's fields that have the texts, to name in errors.
    """
    adapter = state.find_adapter(body.model)
    if body.resolve_method(state.engine_loop.engine is not None) == "cosine":
        embedder = _find_embedder(state, adapter)
        max_tokens = embedder.max_length
        heads = await state.encode_prompts(firsts, fields[0], max_tokens=max_tokens)
        tails = await state.encode_prompts(seconds, fields[1], max_tokens=max_tokens)
        rows = [*heads, *tails]
        vectors = await _embed(state, embedder, request, rows, None)
        scores = np.sum(
            vectors[: len(firsts)] * vectors[len(firsts) :], axis=1
        ).tolist()
    else:
        heads = await state.encode_prompts(firsts, fields[0])
        encode = state.tokenizer.encode
        tails = [
            await state.encode_text(str(text), fields[1], encode=encode)
            for text in seconds
        ]
        rows = [(*head, *tail) for head, tail in zip(heads, tails, strict=True)]
        scores = await _score_tails(state, adapter, request, heads, tails, fields)
    return rows, scores


async def _score_tails(
    state: ServerState,
    adapter: str | None,
    request: Request,
    heads: Rows,
    tails: Rows,
    fields: tuple[str, str],
) -> list[float]:
    """Returns the mean log-probability of each tail's tokens behind its head."""
    if not all(tails):
        raise ApiError(400, "a text is empty", param=fields[1])
    for head, tail in zip(heads, tails, strict=True):
        state.resolve_max_tokens(len(head) + len(tail), 1, fields[1])
    name = uuid4().hex
    asked = [
        replace(make_score_request(f"{name}-{n}", head, [tail]), adapter=adapter)
        for n, (head, tail) in enumerate(zip(heads, tails, strict=True))
    ]
    scores = [0.0] * len(tails)

    async def collect() -> None:
        async for output in stream:
            index = int(output.request_id.rpartition("-")[2])
            scores[index] = read_score(output, tails[index]).logprob / len(tails[index])

    with await cancel_on_disconnect(request, state.engine_loop.submit(asked)) as stream:
        await cancel_on_disconnect(request, collect())
    return scores


def _find_embedder(state: ServerState, adapter: str | None) -> Embedder:
    """Returns what embeds texts. Raises ApiError: nothing does, or an adapter was asked
    for."""
    if adapter is not None:
        message = f"embeddings are those of {state.name}, without an adapter"
        raise ApiError(400, message, param="model", code="unsupported")
    if state.embedder is None:
        raise ApiError(400, "this model makes no embeddings", code="unsupported")
    return state.embedder


async def _embed(
    state: ServerState,
    embedder: Embedder,
    request: Request,
    rows: Rows,
    pooling: Pooling | None,
) -> np.ndarray:
    """Returns the rows' vectors, fp32 [len(rows), D]. Sequences that are being
    generated go on between batches, and have as much time as these take."""
    loop = state.engine_loop
    vectors: dict[int, np.ndarray] = {}

    def run_timed(
        program: EmbeddingProgram, batch: PaddedBatch
    ) -> tuple[np.ndarray, float]:
        _, tokens, lengths = batch
        start = time.monotonic()
        values = program(tokens, lengths)
        return values, time.monotonic() - start

    async def compute() -> np.ndarray:
        with loop.admit():
            for batch in embedder.iterate_batches(rows, lambda: loop.is_generating):
                indices, tokens, _ = batch
                # Not in the engine's thread: sequences would stand until it is
                # compiled.
                program = await asyncio.to_thread(
                    embedder.compile_program, tokens.shape, pooling
                )
                values, seconds = await loop.call(partial(run_timed, program, batch))
                vectors.update(
                    zip(indices, values, strict=False)
                )  # further rows are padding
                if loop.is_generating:
                    await asyncio.sleep(seconds)
        return np.stack([vectors[index] for index in range(len(rows))])

    return await cancel_on_disconnect(request, compute())


def _respond(state: ServerState, rows: Rows, data: list[Any], **more: Any) -> Response:
    total = sum(map(len, rows))
    usage = {"prompt_tokens": total, "total_tokens": total}
    about = {"object": "list", "data": data, "model": state.name, "usage": usage}
    return JSONResponse(about | more)
