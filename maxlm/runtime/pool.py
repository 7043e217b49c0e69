"""A pool of spawned worker processes that end with their parent."""

import atexit
import multiprocessing
import multiprocessing.util  # before any pool: what it does at exit comes last
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
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

    def __init__(self, workers: int):
        self._workers = workers
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind, value, trace) -> None:
        self._stop()

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield `function(job)` for each job, in order of completion.

        A worker receives the function once, so what a callable object keeps in itself (an open
        model) is there for all the jobs that this worker does, and gone with the next function.
        """
        # What does one job is left to a worker that has imported its modules, if there is one.
        if self._workers == 1 or (len(jobs) < 2 and not self._processes):
            yield from map(function, jobs)
            return
        self._start(min(self._workers, len(jobs)))
        waiting, finished = iter(jobs), False
        busy: set[Connection] = set()
        told: set[Connection] = set()

        def feed(connection: Connection) -> None:
            for job in waiting:
                connection.send((None if connection in told else function, job))
                told.add(connection)
                busy.add(connection)
                return

        try:
            for connection in self._processes:
                feed(connection)
            while busy:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    result, error = connection.recv()
                    busy.remove(connection)
                    if error is not None:
                        raise error
                    feed(connection)
                    yield result
            finished = True
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise MaxlmError(
                "a worker process died, most likely for want of memory",
                fix="run it again with fewer workers; a script of your own must start under "
                "if __name__ == '__main__'",
            ) from error
        finally:
            # Else a later map would be handed the answers still on their way.
            if not finished:
                self._stop()

    def _start(self, count: int) -> None:
        start_resource_tracker()
        # Python's own end of daemons asks them by SIGTERM to end, which these ignore, and waits.
        atexit.register(self._stop)
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with block_signals():
                process.start()
            # Only the worker must hold its end, or its death would go unseen.
            theirs.close()
            self._processes[ours] = process

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        # Without their clearing up, which takes half a second: what is done is done.
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.join()
        self._processes = {}


def count_workers() -> int:
    """The number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_one_thread() -> None:
    """Holds tokenizers' ``encode_batch`` to the calling thread, in this process from now on: N
    workers that each start a thread per core would run N² of them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def thread_count() -> int:
    """Number of threads that ``encode_batch`` may use in this process."""
    # The `tokenizers` library's own switch, as it reads it.
    serial = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no")
    return 1 if serial else os.cpu_count() or 1


def _serve(connection: Connection) -> None:
    use_one_thread()
    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function: Any = None
    while True:
        try:
            new, job = connection.recv()
        except EOFError:
            return
        function = function if new is None else new
        try:
            reply = function(job), None
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            reply = None, error
        try:
            connection.send(reply)
        except Exception as error:  # An answer that cannot be pickled, such as some errors.
            what = f"a worker's answer cannot be sent ({error}): {reply[1] or reply[0]!r}"
            connection.send((None, MaxlmError(what)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
