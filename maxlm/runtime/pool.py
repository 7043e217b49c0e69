"""Runs jobs in processes of this machine: picklable functions of picklable
arguments."""

import itertools
import multiprocessing
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from maxlm.config import MaxlmError
from maxlm.runtime.signals import block_signals, ignore_signals, start_resource_tracker

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerPool(AbstractContextManager["WorkerPool"]):
    """Runs picklable functions in `workers` processes; use as a context manager.

    Processes are spawned, never forked (threads of JAX, tokenizers or TensorStore do
    not survive a fork), start with the first work, and do not outlive this process even
    when it is killed. Each keeps to one thread of the tokenizer, since the pool as a
    whole fills the cores. With one worker the work runs in this process, where the
    tokenizer may use threads of its own.
    """

    def __init__(self, workers: int | None = None):
        """``workers``: default: one a core."""
        self._workers = workers or count_usable_cores()
        self._pool: ProcessPoolExecutor | None = None

    def __exit__(self, kind, value, trace) -> None:
        self._stop()

    def map_unordered(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Result]:
        """See `TaskExecutor` (`maxlm.runtime.executor`)."""
        # A single job does not pay for starting a process, but one that runs already has
        # imported what it needs.
        if self._workers == 1 or (len(jobs) < 2 and not self._pool):
            yield from map(function, jobs)
            return
        if self._pool is None:
            start_resource_tracker()
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._workers, context, initializer=_prepare_worker
            )
        pool = self._pool
        function_id = uuid.uuid4()
        pickled = pickle.dumps(function)
        waiting_jobs = iter(jobs)
        futures: set[Future[Result]] = set()
        has_finished = False
        try:
            while True:
                num_free = 2 * self._workers - len(futures)
                # Processes start with the first jobs, no more than there are.
                with block_signals():
                    for job in itertools.islice(waiting_jobs, num_free):
                        futures.add(pool.submit(run_pickled, function_id, pickled, job))
                if not futures:
                    has_finished = True
                    return
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise MaxlmError(
                "a worker process died, most likely for want of memory",
                fix="run it again with fewer workers; a script of your own must start "
                "under if __name__ == '__main__'",
            ) from error
        finally:
            if not has_finished:
                self._stop()

    def require_on_workers(self, shared_folder: Path, packages: Sequence[str]) -> None:
        """See `TaskExecutor`: processes of this machine have all that this one has."""

    def _stop(self) -> None:
        if self._pool:
            # Without their clearing up, which takes half a second: what is done is
            # done.
            processes = self._pool._processes or {}
            for process in list(processes.values()):
                process.kill()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def count_usable_cores() -> int:
    """Returns the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_one_tokenizer_thread() -> None:
    """Holds tokenizers' ``encode_batch`` to the calling thread, in this process from
    now on: N workers that each start a thread per core would run N² of them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def tokenizer_thread_count() -> int:
    """Number of threads that ``encode_batch`` may use in this process."""
    # The `tokenizers` library's own switch, as it reads it.
    switch = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    if switch in ("0", "false", "off", "no"):
        return 1
    return os.cpu_count() or 1


def _prepare_worker() -> None:
    use_one_tokenizer_thread()
    ignore_signals()
    stop_with_parent()


@lru_cache(maxsize=1)
def _unpickle(_: uuid.UUID, pickled: bytes) -> Callable[[object], object]:
    return pickle.loads(pickled)


def run_pickled(function_id: uuid.UUID, pickled: bytes, job: object) -> Any:
    """Calls a pickled function, which is unpickled once for all calls in a row with its
    id."""
    return _unpickle(function_id, pickled)(job)


def stop_with_parent() -> None:
    """Lets this process, a worker, end when its parent does, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
