"""The thread that owns the engine, and the asyncio side's way to it.

Nothing but this thread touches the engine or the device: steps, requests, aborts and
other computations are done one after the other.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from maxlm.config import MaxlmError
from maxlm.inference.engine import Engine, EngineStats
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.serving.errors import ApiError

T = TypeVar("T")
# Of a step that ended a sequence, where none waits: a client that got its answer often
# asks again at once, and would wait for the whole next step.
_PAUSE_SHARE = 0.04


class RequestStream(AbstractContextManager["RequestStream"]):
    """Outputs of some requests as they come; a context that aborts what is unfinished
    when left."""

    def __init__(
        self, requests: Sequence[GenerationRequest], release: Callable[[], None]
    ):
        self.request_ids = [request.request_id for request in requests]
        self.num_open = sum(request.num_sequences for request in requests)
        self.start_time = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.outputs: asyncio.Queue[SequenceOutput | Exception] = asyncio.Queue()
        self._release = release

    def __exit__(self, *_: object) -> None:
        self._release()

    async def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        while self.num_open:
            output = await self.outputs.get()
            if isinstance(output, Exception):
                raise output
            self.num_open -= output.finish_reason is not None
            yield output


@dataclass
class EngineLoop:
    """Runs an engine in a thread of its own.

    Args:
        engine: None serves computations alone, such as embeddings.
        max_open_sequences: those that run and wait together; more are refused with 429.
    """

    engine: Engine | None
    max_open_sequences: int = 256
    num_open: int = 0
    """Sequences, and requests of other kinds, that run or wait."""
    is_draining: bool = False
    """Whether new work is refused (503), because the server is about to stop."""
    failure: str | None = None
    """The error after which the engine could not go on."""
    stats: EngineStats | None = None
    """The engine's after the last thing that it did."""
    _executor: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "engine")
    )
    _streams: dict[str, RequestStream] = field(
        default_factory=dict
    )  # of the thread alone
    _is_step_due: bool = False

    def __post_init__(self) -> None:
        self.stats = None if self.engine is None else self.engine.stats()

    @property
    def is_generating(self) -> bool:
        """Whether the engine has sequences to go on with, as of its last step."""
        return self.engine is not None and self.engine.has_work

    def stop(self) -> None:
        """Ends the thread after its step; what still runs is dropped."""
        self._executor.shutdown(cancel_futures=True)

    async def submit(
        self, requests: Sequence[GenerationRequest], *, is_admitted: bool = False
    ) -> RequestStream:
        """Hands requests to the engine, all or none; to be used with ``with``. Raises
        ApiError: 429, 503, or 500 after a failure; MaxlmError: the engine cannot take a
        request.

        Args:
            is_admitted: whether :meth:`admit` holds places for them.
        """
        count = 0 if is_admitted else sum(request.num_sequences for request in requests)

        def release() -> None:
            self.num_open -= count
            self._executor.submit(self._run, lambda: self._abort(stream))

        self._raise_failure()
        if not is_admitted:
            self._take_places(count)
        stream = RequestStream(requests, release)
        try:
            await self.call(lambda: self._add(requests, stream))
        except BaseException:
            release()
            raise
        return stream

    @contextmanager
    def admit(self, count: int = 1) -> Iterator[None]:
        """Holds places in the queue for work that goes through :meth:`call`, or
        :meth:`submit` in several steps, until it is done. Raises ApiError: as
        :meth:`submit` does."""
        self._take_places(count)
        try:
            yield
        finally:
            self.num_open -= count

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function in the engine's thread, between two steps, and returns its
        value."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, self._run, function
        )

    def _raise_failure(self) -> None:
        if self.failure:
            raise ApiError(500, f"the engine has stopped: {self.failure}")

    def _take_places(self, count: int) -> None:
        self._raise_failure()
        if self.is_draining:
            raise ApiError(503, "the server is stopping", retry_after=5)
        # A request that is larger than the queue is taken when nothing else runs.
        if self.num_open and self.num_open + count > self.max_open_sequences:
            what = f"{self.num_open} sequences run or wait; the queue is full"
            raise ApiError(429, what, retry_after=1)
        self.num_open += count

    # What follows runs in the thread.

    def _run(self, function: Callable[[], T]) -> T:
        """Calls a function; a step comes next if the engine has work."""
        try:
            return function()
        finally:
            if self.engine is not None:
                self.stats = self.engine.stats()
                if self.engine.has_work and not self._is_step_due:
                    self._is_step_due = True
                    self._executor.submit(self._run, self._step)

    def _step(self) -> None:
        """Delivers a step's outputs; on a fault of the engine's its requests fail,
        others go on."""
        self._is_step_due, start, ended = False, time.monotonic(), False
        assert self.engine is not None, "it had work"
        try:
            outputs = self.engine.step()
            self.stats = self.engine.stats()
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    _send(stream, output)
                    ended |= output.finish_reason is not None
            if ended and not self.stats.num_waiting:
                time.sleep(_PAUSE_SHARE * (time.monotonic() - start))
        except Exception as error:
            self._fail_requests(
                " ".join(f"{type(error).__name__}: {error}".split())[:500]
            )

    def _fail_requests(self, reason: str) -> None:
        print(f"error: the engine failed: {reason}", file=sys.stderr, flush=True)
        for stream in {*self._streams.values()}:
            _send(stream, ApiError(500, f"the engine failed: {reason}"))
            try:
                self._abort(stream)
            except Exception:  # an engine that cannot even abort serves nothing more
                self.failure = reason
                self.engine = None

    def _add(
        self, requests: Sequence[GenerationRequest], stream: RequestStream
    ) -> None:
        if self.engine is None:
            raise MaxlmError("this model generates no text", fix="use /v1/embeddings")
        for request in requests:
            self.engine.add_request(request)
            self._streams[request.request_id] = stream

    def _abort(self, stream: RequestStream) -> None:
        for request_id in stream.request_ids:
            if (
                self._streams.pop(request_id, None) is not None
                and self.engine is not None
            ):
                self.engine.abort(request_id)


def _send(stream: RequestStream, item: SequenceOutput | Exception) -> None:
    with suppress(RuntimeError):  # its event loop is closed
        stream.loop.call_soon_threadsafe(stream.outputs.put_nowait, item)
