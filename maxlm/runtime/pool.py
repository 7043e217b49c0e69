"""Runs jobs in processes of this machine: picklable functions of picklable arguments."""

import itertools
import multiprocessing
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any, TypeVar

from maxlm.config import MaxlmError
from maxlm.runtime.signals import block_signals, ignore_signals, start_resource_tracker

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerPool:
    """Runs picklable functions in `workers` processes; use as a context manager.

    Processes are spawned, never forked (threads of JAX, tokenizers or TensorStore do not survive
    a fork), start with the first work, and do not outlive this process even when it is killed.
    Each keeps to one thread of the tokenizer, since the pool as a whole fills the cores. With
    one worker the work runs in this process, where the tokenizer may use threads of its own.
    """

    def __init__(self, workers: int | None = None):
        """``workers``: default: one a core."""
        self._workers = workers or count_usable_cores()
        self._started: tuple[int, ProcessPoolExecutor] | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind, value, trace) -> None:
        self._stop()

    def map_unordered(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Result]:
        """Yields `function(job)` for each job, in order of completion. A worker receives the
        function once, so what a callable object keeps in itself (an open model) is there for all
        the jobs that this worker does, and gone with the next function."""
        # What does one job is left to a worker that has imported its modules, if there is one.
        if self._workers == 1 or (len(jobs) < 2 and not self._started):
            yield from map(function, jobs)
            return
        count, pool = self._start(min(self._workers, len(jobs)))
        named, waiting = (uuid.uuid4(), pickle.dumps(function)), iter(jobs)
        busy, finished = set[Future[Result]](), False
        try:
            while True:
                with block_signals():  # Processes start with the first job.
                    for job in itertools.islice(waiting, 2 * count - len(busy)):
                        busy.add(pool.submit(_call, *named, job))
                if not busy:
                    finished = True
                    return
                done, busy = wait(busy, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise MaxlmError(
                "a worker process died, most likely for want of memory",
                fix="run it again with fewer workers; a script of your own must start under "
                "if __name__ == '__main__'",
            ) from error
        finally:
            if not finished:
                self._stop()

    def _start(self, count: int) -> tuple[int, ProcessPoolExecutor]:
        if self._started is None or self._started[0] < count:
            self._stop()
            start_resource_tracker()
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(count, context, initializer=_begin)
            self._started = count, pool
        return self._started

    def _stop(self) -> None:
        if self._started:
            _, pool = self._started
            self._started = None
            # Without their clearing up, which takes half a second: what is done is done.
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(cancel_futures=True)


def count_usable_cores() -> int:
    """Returns the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_one_tokenizer_thread() -> None:
    """Holds tokenizers' ``encode_batch`` to the calling thread, in this process from now on: N
    workers that each start a thread per core would run N² of them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def tokenizer_thread_count() -> int:
    """Number of threads that ``encode_batch`` may use in this process."""
    # The `tokenizers` library's own switch, as it reads it.
    serial = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no")
    return 1 if serial else os.cpu_count() or 1


def _begin() -> None:
    """Begins a worker."""
    use_one_tokenizer_thread()
    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


@lru_cache(maxsize=1)
def _unpickle(_: uuid.UUID, pickled: bytes) -> Any:
    return pickle.loads(pickled)


def _call(number: uuid.UUID, pickled: bytes, job: Any) -> Any:
    return _unpickle(number, pickled)(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
