"""A page to compare models blindly: two answers side by side, a vote, then the
names."""

import json
import random
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from maxlm.config import MaxlmError
from maxlm.evaluation.endpoint import ChatEndpoint
from maxlm.evaluation.ratings import BATTLE_COLUMNS, compute_leaderboard, read_battles
from maxlm.serving.app import make_error_response, make_page_response
from maxlm.serving.errors import ApiError

MAX_OPEN_BATTLES = 10_000
"""Battles without a vote that are remembered; the oldest are forgotten."""
_Messages = Annotated[list[dict[str, str]], Field(min_length=1)]


class AnswerBody(BaseModel):
    """A conversation to go on with, by one side of a battle; a new name begins a
    battle."""

    battle: str
    side: Literal["a", "b"]
    messages: _Messages


class VoteBody(BaseModel):
    """A battle's only vote, with what was said."""

    battle: str
    winner: Literal["model_a", "model_b", "tie", "tie (bothbad)"]
    conversation_a: _Messages
    conversation_b: _Messages


class Arena:
    """Battles between models; those with a vote are in an SQLite file. Before the vote
    nothing that is sent to a browser names a model."""

    def __init__(
        self, endpoints: Sequence[ChatEndpoint], database: Path, **options: float
    ):
        self._endpoints = {endpoint.model: endpoint for endpoint in endpoints}
        if len(self._endpoints) < max(2, len(endpoints)):
            what = "an arena needs two models or more, of different names"
            raise MaxlmError(
                what, where=", ".join(self._endpoints), fix="serve with --name"
            )
        self._database, self._options = database, options
        self._battles: dict[
            str, list[str]
        ] = {}  # both models; none are left after the vote
        self._execute(
            f"create table if not exists battles ({', '.join(BATTLE_COLUMNS)})"
        )

    def make_app(self) -> Starlette:
        """Returns the page's server."""
        gets: Any = {
            "/": self._show_page,
            "/leaderboard": self._show_page,
            "/ratings": self._rate,
        }
        routes = [Route(path, answer) for path, answer in gets.items()]
        posts: Any = {"/answer": self._answer, "/vote": self._vote}
        routes += [
            Route(path, answer, methods=["POST"]) for path, answer in posts.items()
        ]
        handlers = dict.fromkeys(
            (ApiError, ValidationError), lambda _, e: make_error_response(e)
        )
        return Starlette(routes=routes, exception_handlers=handlers)

    def _execute(self, statement: str, *values: Any) -> None:
        with closing(sqlite3.connect(self._database)) as connection, connection:
            connection.execute(statement, values)

    async def _show_page(self, request: Request) -> Response:
        return make_page_response(Path(__file__).with_name("arena.html"))

    async def _rate(self, request: Request) -> Response:
        found = await run_in_threadpool(
            lambda: compute_leaderboard(read_battles(self._database))
        )
        return JSONResponse(found)

    async def _answer(self, request: Request) -> Response:
        """Answers with a text as it comes, and a NUL behind it if it is complete."""
        body = AnswerBody.model_validate_json(await request.body())
        if len(body.messages) == 1:
            self._battles.setdefault(
                body.battle, random.sample(list(self._endpoints), 2)
            )
            while len(self._battles) > MAX_OPEN_BATTLES:
                del self._battles[next(iter(self._battles))]
        models = self._battles.get(body.battle)
        if not models:  # also one from before a restart
            raise ApiError(409, "this battle is over")
        model = models["ab".index(body.side)]

        def stream() -> Iterator[str]:
            try:
                yield from self._endpoints[model].stream(body.messages, **self._options)
                yield "\0"
            except (
                Exception
            ) as error:  # Its text may name the model: it is for the server alone.
                print(f"{model}: {error}", file=sys.stderr, flush=True)

        return StreamingResponse(stream(), media_type="text/plain")

    async def _vote(self, request: Request) -> Response:
        body = VoteBody.model_validate_json(await request.body())
        models = self._battles.get(body.battle)
        if not models:
            raise ApiError(409, "no battle without a vote")
        talks = (
            json.dumps(talk) for talk in (body.conversation_a, body.conversation_b)
        )
        values = (*models, body.winner, time.time(), *talks)
        self._execute("insert into battles values (?, ?, ?, ?, ?, ?)", *values)
        self._battles[body.battle] = []
        return JSONResponse(models)
