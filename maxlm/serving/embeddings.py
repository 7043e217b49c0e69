"""/v1/embeddings, /v1/score and /v1/rerank."""

import asyncio
import base64
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from uuid import uuid4

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maxlm.inference.embedding import Embedder, EmbeddingProgram, PaddedBatch, Pooling
from maxlm.inference.scoring import make_score_request, read_score
from maxlm.runtime.json_types import JsonObject
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
            message = f"the model's vectors have {vectors.shape[1]} dimensions"
            raise ApiError(400, message, param="dimensions")
        vectors = vectors[:, : body.dimensions]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.maximum(norms, 1e-12)
    data: list[JsonObject] = []
    for index, vector in enumerate(vectors):
        if body.encoding_format == "base64":
            # As OpenAI's clients decode it: little-endian fp32.
            embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        else:
            embedding = vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "model": state.name,
            "usage": _describe_usage(rows),
        }
    )


async def create_scores(state: ServerState, request: Request) -> Response:
    """Answers /v1/score: how well each text_2 follows from, or is like, its text_1."""
    body = await state.read_body(request, ScoreBody)
    firsts = list_prompts(body.text_1)
    seconds = list_prompts(body.text_2)
    if len(firsts) == 1:
        firsts = [*firsts] * len(seconds)
    if len(firsts) != len(seconds):
        message = (
            f"text_1 has {len(firsts)} texts, text_2 {len(seconds)}: give one, or as "
            "many"
        )
        raise ApiError(400, message, param="text_1")
    rows, scores = await score_pairs(state, request, firsts, seconds, body)
    data = [
        {"index": index, "object": "score", "score": score}
        for index, score in enumerate(scores)
    ]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "model": body.model or state.name,
            "usage": _describe_usage(rows),
            "id": f"score-{uuid4().hex}",
        }
    )


async def create_ranking(state: ServerState, request: Request) -> Response:
    """Answers /v1/rerank: documents by how well they fit a query, the best first."""
    body = await state.read_body(request, RerankBody)
    documents = body.list_texts()
    method = body.resolve_method(state.engine_loop.engine is not None)
    firsts = documents
    if method == "loglikelihood":
        firsts = [_ask_for_query(document) for document in documents]
    queries = [body.query] * len(documents)
    rows, scores = await score_pairs(
        state, request, firsts, queries, body, ("documents", "query")
    )
    if method == "loglikelihood":
        scores = [math.exp(score) for score in scores]
    order = sorted(range(len(documents)), key=lambda index: -scores[index])
    results: list[JsonObject] = []
    for index in order[: body.top_n]:
        result: JsonObject = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": documents[index]}
        results.append(result)
    return JSONResponse(
        {
            "id": f"rerank-{uuid4().hex}",
            "model": body.model or state.name,
            "usage": _describe_usage(rows),
            "results": results,
        }
    )


def _ask_for_query(document: str) -> str:
    """Returns the text whose continuation by the query is the more likely the better
    the document fits it (Sachan et al. 2022, arXiv 2204.07496, §2)."""
    return (
        f"Passage: {document}\n"
        "Please write a question based on this passage.\n"
        "Question: "
    )


async def score_pairs(
    state: ServerState,
    request: Request,
    firsts: Sequence[str | list[int]],
    seconds: Sequence[str | list[int]],
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
        # Vectors have length 1: their products are cosines.
        products = vectors[: len(firsts)] * vectors[len(firsts) :]
        scores = np.sum(products, axis=1).tolist()
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
    score_requests = []
    for index, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        score_request = make_score_request(f"{name}-{index}", head, [tail])
        score_requests.append(replace(score_request, adapter=adapter))
    scores = [0.0] * len(tails)

    async def collect() -> None:
        async for output in stream:
            index = int(output.request_id.rpartition("-")[2])
            tail = tails[index]
            scores[index] = read_score(output, tail).logprob / len(tail)

    stream = await cancel_on_disconnect(
        request, state.engine_loop.submit(score_requests)
    )
    with stream:
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
                # Further rows are padding.
                vectors.update(zip(indices, values, strict=False))
                if loop.is_generating:
                    await asyncio.sleep(seconds)
        return np.stack([vectors[index] for index in range(len(rows))])

    return await cancel_on_disconnect(request, compute())


def _describe_usage(rows: Rows) -> dict[str, int]:
    num_tokens = sum(map(len, rows))
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
