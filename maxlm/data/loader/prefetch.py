"""Batches made ahead of the train step, in threads or worker processes.

Order is exact: threads and workers take steps in turn, and batches are collected in turn.
"""

import os
import signal
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Self

from maxlm.config.errors import Lost
from maxlm.data.loader.batches import Batch
from maxlm.runtime.signals import block_signals, ignore_signals, start_resource_tracker

MakeBatch = Callable[[int], Batch]
"""Returns the batch of a step."""

# Runs of at most so many steps start no workers.
SHORT_RUN_STEPS = 32
_THREADS = 2
_LIKELY_CAUSES = {signal.SIGKILL: ", probably out of memory"}


class Prefetcher(Iterator[Batch]):
    """Batches of steps [start, stop) in order, made ahead. Its whole state is `step`.

    Close it (or use it as a context manager) to end its workers at once. They also end by
    themselves when this process ends, however it ends.

    Args:
        make: returns the batch of a step; it must pickle if there are workers.
        stop: None: there is no end.
        workers: processes; 0, or a short run, uses threads of this process.
        prefetch: batches made ahead, by each worker.
    """

    def __init__(
        self, make: MakeBatch, start: int, stop: int | None, *, workers: int, prefetch: int
    ):
        self.step = start
        """The step of the next batch."""
        self._stop = stop
        if stop is not None and stop - start <= SHORT_RUN_STEPS:
            workers = 0
        self._prefetch = prefetch * max(workers, 1)
        processes = [_Worker(make) for _ in range(workers)]
        self._makers: Sequence[MakeBatch] = processes or [make] * min(_THREADS, prefetch)
        self._threads = [ThreadPoolExecutor(1, "batches") for _ in self._makers]
        self._batches: deque[Future[Batch]] = deque()
        # Also closes when the prefetcher is dropped, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close, self._threads, self._batches, processes)
        self._submit()

    def _submit(self) -> None:
        while len(self._batches) < self._prefetch:
            step = self.step + len(self._batches)
            if self._stop is not None and step >= self._stop:
                return
            turn = step % len(self._makers)
            self._batches.append(self._threads[turn].submit(self._makers[turn], step))

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise ValueError("the batch iterator is closed")
        if not self._batches:
            self.close()
            raise StopIteration
        batch = self._batches[0].result()
        self._batches.popleft()
        self.step += 1
        self._submit()
        return batch

    def close(self) -> None:
        """Ends threads and workers. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(
    threads: Sequence[ThreadPoolExecutor],
    batches: deque[Future[Batch]],
    workers: Sequence["_Worker"],
) -> None:
    for batch in batches:
        batch.cancel()
    for worker in workers:
        worker.process.kill()
    for thread in threads:
        thread.shutdown()
    for worker in workers:
        worker.process.join()


class _Worker:
    """A process that makes batches. Until it has started they are made here, so that the first
    step does not wait for it."""

    def __init__(self, make: MakeBatch):
        start_resource_tracker()
        context = get_context("spawn")
        self._make, self._started = make, False
        self._connection, its_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, its_end), daemon=True)
        with block_signals():
            self.process.start()
        its_end.close()  # Else its death would go unseen.

    def __call__(self, step: int) -> Batch:
        try:
            if not self._started and self._connection.poll():
                self._started = self._connection.recv()
            if not self._started:
                return self._make(step)
            self._connection.send(step)
            batch, error = self._connection.recv()
        except (EOFError, ConnectionError) as lost:
            self.process.join()
            raise _describe_death(self.process.exitcode) from lost
        if error is not None:
            raise error
        return batch


def _describe_death(exit_code: int | None) -> Lost:
    how = f"ended with exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        name, cause = signal.strsignal(-exit_code), _LIKELY_CAUSES.get(-exit_code, "")
        how = f"was killed by signal {-exit_code} ({name}){cause}"
    return Lost(
        f"a loader worker {how}",
        where="data.workers",
        fix="run the same command to go on from the last checkpoint, with fewer data.workers or "
        "more memory if it happens again",
    )


def _serve(make: MakeBatch, connection: Connection) -> None:
    """Runs in a worker: makes the batch of each step that it receives."""
    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if (jax := sys.modules.get("jax")) is not None:  # A task may import it.
        jax.config.update("jax_platforms", "cpu")  # Never touch the trainer's accelerator.
    connection.send(True)
    while True:
        try:
            step = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = make(step), None
        except Exception as error:
            error.add_note(f"in a loader worker:\n{traceback.format_exc()}")
            answer = None, error
        connection.send(answer)


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
