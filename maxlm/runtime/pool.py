"""Runs jobs in processes of this machine, or on a Ray cluster.

Jobs are picklable functions of picklable arguments that pass data on by files, on a disk that all
machines share; so both engines give the same files.
"""

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
from typing import Any, Literal, Protocol, TypeVar

from maxlm.config import MaxlmError
from maxlm.runtime.signals import block_signals, ignore_signals, start_resource_tracker

Job = TypeVar("Job")
Result = TypeVar("Result")

ExecutorName = Literal["local", "ray"]


class Executor(Protocol):
    """Runs functions over jobs."""

    def map_unordered(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Result]:
        """Yield `function(job)` for each job, in order of completion."""
        ...


def open_executor(name: ExecutorName, workers: int | None) -> AbstractContextManager[Executor]:
    """Opens the engine `name`, as a context, of at most so many processes; None: as many as there
    are cores (local) or as the cluster has CPUs (ray)."""
    if name == "local":
        return WorkerPool(workers or count_usable_cores())
    return RayExecutor(workers)


class WorkerPool:
    """Runs picklable functions in `workers` processes; use as a context manager.

    Processes are spawned, never forked (threads of JAX, tokenizers or TensorStore do not survive
    a fork), start with the first work, and do not outlive this process even when it is killed.
    Each keeps to one thread of the tokenizer, since the pool as a whole fills the cores. With
    one worker the work runs in this process, where the tokenizer may use threads of its own.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._started: tuple[int, ProcessPoolExecutor] | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind, value, trace) -> None:
        self._stop()

    def map_unordered(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Result]:
        """See `Executor`. A worker receives the function once, so what a callable object keeps in
        itself (an open model) is there for all the jobs that this worker does, and gone with the
        next function."""
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


class RayExecutor:
    """Runs jobs as Ray tasks, on the cluster that this process is connected to or finds.

    `ray.init()` follows RAY_ADDRESS; without one and without a running cluster it starts one on
    this machine.
    """

    def __init__(self, workers: int | None = None):
        self._workers = workers
        self._started = False

    def __enter__(self) -> "RayExecutor":
        try:
            import ray
        except ImportError as error:
            what = "engine: ray needs Ray, which is not installed"
            raise MaxlmError(what, fix="pip install 'maxlm[ray]', or set engine: local") from error
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                fix = "check RAY_ADDRESS, or set engine: local"
                reason = str(error).splitlines()[0]
                raise MaxlmError(f"no Ray cluster to be reached: {reason}", fix=fix) from error
            self._started = True
        return self

    def __exit__(self, kind, value, trace) -> None:
        import ray

        if self._started:
            ray.shutdown()

    def map_unordered(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Result]:
        """See `Executor`. Ray runs a task again whose worker or node died, which does no harm: jobs
        write files that appear when complete."""
        import ray
        from ray import exceptions

        task, here = ray.remote(_call_in), os.getcwd()
        most = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, busy = iter(jobs), []
        try:
            while True:
                free = (2 * most if self._workers is None else most) - len(busy)
                busy += [
                    task.remote(here, function, job) for job in itertools.islice(waiting, free)
                ]
                if not busy:
                    return
                done, busy = ray.wait(busy)
                yield ray.get(done[0])
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except exceptions.RayError as error:
            fix = "look at the cluster's memory, or run it again with fewer workers"
            raise MaxlmError(f"a Ray worker died: {str(error).splitlines()[0]}", fix=fix) from error
        finally:
            for each in busy:
                ray.cancel(each, force=True)


def _call_in(folder: str, function: Callable[[Job], Result], job: Job) -> Result:
    """Call where relative paths mean what they meant for whoever wrote the job."""
    try:
        os.chdir(folder)
    except OSError as error:
        what = f"a Ray worker cannot see this folder ({error.strerror})"
        raise MaxlmError(what, where=folder, fix="run it on a disk that all nodes share") from error
    return function(job)


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
