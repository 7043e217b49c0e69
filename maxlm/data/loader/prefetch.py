"""Grain pipelines that make batches ahead of the train step, in threads and worker
processes.

The only module that imports Grain. Order is exact whatever the number of workers: Grain
deals steps to the workers in turn and collects them in turn.
"""

import atexit
import gc
import re
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Self, cast

import cloudpickle
import grain
import numpy as np
from absl import flags

from maxlm.config.errors import MaxlmError, ProcessLost
from maxlm.data.batch_source import Batch
from maxlm.data.loader.mixture import ENDLESS
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.pool import stop_with_parent
from maxlm.runtime.signals import (
    STOP_SIGNALS,
    ignore_signals,
    kill_starting_workers,
    start_resource_tracker,
)

MakeBatch = Callable[[int], Batch]
"""Returns the batch of a step."""

# Steps that threads make while worker processes start, which takes seconds.
THREAD_STEPS = 32
# For workers that have started to end a batch that they are making.
_CLOSE_SECONDS = 30.0
# Between looks at whether a stop was asked for, while workers start.
_POLL_SECONDS = 0.1
_THREADS = 2
# Grain says in words alone that a worker died; a negative code is the signal that
# killed it.
_KILLED = re.compile(r"terminated unexpectedly with exit code -(\d+)")
_LIKELY_CAUSES: dict[int, str] = {
    signal.SIGKILL: ", probably out of memory",
    signal.SIGBUS: ", probably because /dev/shm is full",
}


class Prefetcher(Iterator[Batch]):
    """Batches of steps [start, stop) in order, made ahead. Its whole state is `step`.

    Close it (or use it as a context manager) to end its workers at once. They also end
    by themselves when this process ends, however it ends.

    Args:
        make: returns the batch of a step; it must pickle if there are workers.
        stop: None: there is no end.
        workers: processes, which take over after `THREAD_STEPS` steps; 0: threads make
            all.
        prefetch: batches made ahead, by each worker.
        is_stop_requested: tells whether the run was asked to stop. From then on nothing
            waits for workers that have not started yet: this process makes the batches.
    """

    def __init__(
        self,
        make: MakeBatch,
        start: int,
        stop: int | None,
        *,
        workers: int,
        prefetch: int,
        is_stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.step = start
        """The step of the next batch."""
        self._make = make
        self._is_stop_requested = is_stop_requested
        self._stop = ENDLESS if stop is None else stop
        turn = min(start + THREAD_STEPS, self._stop) if workers else self._stop
        self._pipelines = [_Pipeline(_open_pipeline(make, start, turn, 0, prefetch))]
        if turn < self._stop:
            spilled = _SpilledFunction(make)
            iterator = _open_pipeline(spilled, turn, self._stop, workers, prefetch)
            self._pipelines.append(_Pipeline(iterator, workers, spilled))
            # Before all that waits for processes when the interpreter exits; once.
            atexit.unregister(kill_starting_workers)
            atexit.register(kill_starting_workers)
        self._makes_here = False
        # Also closes when the prefetcher is dropped, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close, self._pipelines)

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise ValueError("the batch iterator is closed")
        if self.step >= self._stop:
            self.close()
            raise StopIteration
        pipeline = self._pipelines[0]
        if self._makes_here or not self._wait_for_start(pipeline):
            self._makes_here = (
                True  # Also from now on: the workers' next batch is an earlier one.
            )
            batch = self._make(self.step)
            self.step += 1
            return batch
        try:
            batch = pipeline.take()
        except MaxlmError as error:
            # The thread's frames hold the iterator, whose shared memory Python would
            # call leaked.
            raise error.with_traceback(None) from None
        except RuntimeError as error:
            killed = _KILLED.search(str(error))
            if killed is None:
                raise
            raise _describe_death(int(killed[1])) from error
        if batch is None:  # Threads have made their last; workers go on.
            self._pipelines.pop(0)
            return next(self)
        self.step += 1
        return batch

    def _wait_for_start(self, pipeline: "_Pipeline") -> bool:
        """Waits until workers have begun to make batches. Returns False if a stop was
        requested before, and they still start."""
        while not pipeline.has_started:
            done, _ = wait([pipeline.next_batch], timeout=_POLL_SECONDS)
            if done:
                return True
            if self._is_stop_requested():
                return False
        return True

    def close(self) -> None:
        """Ends threads and workers. Calling it again does nothing.

        Workers that still start are not waited for: each ends when it has started, or
        when this process ends.
        """
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _SpilledFunction:
    """A function in a file, which a worker reads when it first calls it.

    What a process is started with goes through a pipe, and more than the pipe holds (64
    KiB; a store's manifest names each source file) keeps its parent until the worker
    has imported all it imports. The file goes with this object, or with the process, if
    it was not deleted before.
    """

    def __init__(self, function: MakeBatch):
        folder = Path(tempfile.gettempdir())
        with convert_write_errors(folder):
            descriptor, name = tempfile.mkstemp(prefix="maxlm-loader-", dir=folder)
            self._path = Path(name)
            self.delete_file = weakref.finalize(
                self, self._path.unlink, missing_ok=True
            )
            with open(descriptor, "wb") as file:
                cloudpickle.dump(function, file)
        self._function: MakeBatch | None = function

    def __call__(self, step: int) -> Batch:
        if self._function is None:
            self._function = cast(MakeBatch, cloudpickle.loads(self._path.read_bytes()))
        return self._function(step)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_function": None}


class _Pipeline:
    """A Grain iterator whose next batch is fetched in a thread.

    In a daemon thread, not an executor's: those are joined when the interpreter exits,
    and a fetch from a worker that still starts would keep it.
    """

    def __init__(
        self,
        iterator: grain.DatasetIterator,
        workers: int = 0,
        spilled: _SpilledFunction | None = None,
    ):
        self.iterator = iterator
        self.workers = workers
        self._spilled = spilled
        self._num_fetched = 0
        self.next_batch: Future[Batch | None] = Future()
        self._start_fetch()

    @property
    def has_started(self) -> bool:
        """Whether batches are being made: Grain deals steps to the workers in turn, so
        each has started once as many batches were fetched. Threads have from the
        first."""
        return self._num_fetched >= self.workers

    @property
    def ends_soon(self) -> bool:
        """Whether closing waits for no worker that still starts."""
        has_failed = self.next_batch.done() and self.next_batch.exception() is not None
        return self.has_started or has_failed

    def take(self) -> Batch | None:
        """Returns the next batch, in this process's own memory, or None at the end."""
        batch = self.next_batch.result()
        if batch is not None:
            self.next_batch = Future()
            self._start_fetch()
        return batch

    def fetch_until_started(self) -> None:
        """Waits until every worker has made a batch, or one of them has failed."""
        while self.next_batch.exception() is None and not self.has_started:
            if self.take() is None:
                return

    def _start_fetch(self) -> None:
        threading.Thread(target=self._fetch, name="next-batch", daemon=True).start()

    def _fetch(self) -> None:
        # Grain starts its workers in this thread or one of its own, which inherit the
        # mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            batch = _fetch_batch(self.iterator)
        except BaseException as error:
            self.next_batch.set_exception(error)
        else:
            # The end comes when every worker has come to its own.
            self._num_fetched = self.workers if batch is None else self._num_fetched + 1
            if self.has_started and self._spilled is not None:
                self._spilled.delete_file()
            self.next_batch.set_result(batch)


def _close(pipelines: list[_Pipeline]) -> None:
    """Ends the threads and workers of pipelines, and empties the list.

    A thread of its own closes: Grain waits for what a worker is making, and for ever
    for one that does not come to it. Only workers that end soon, since they have
    started, are waited for.
    """
    end_soon = all(pipeline.ends_soon for pipeline in pipelines)
    closing = threading.Thread(
        target=_close_pipelines, args=(pipelines[:],), name="close-batches", daemon=True
    )
    pipelines.clear()
    closing.start()
    if end_soon:
        closing.join(_CLOSE_SECONDS)


def _close_pipelines(pipelines: list[_Pipeline]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    has_workers = any(pipeline.workers for pipeline in pipelines)
    while pipelines:
        pipeline = pipelines.pop()
        # Grain loses workers that it is still starting when closed, and closing takes a
        # batch away from a fetch that waits for it: let them all start and the fetch
        # end first.
        pipeline.fetch_until_started()
        pipeline.iterator.close()
        del pipeline
    # Grain's iterators over workers are caught in cycles that hold semaphores and the
    # last batch's shared memory; left to the interpreter's end, they would fail loudly
    # there.
    if has_workers:
        gc.collect()


def _describe_death(signal_number: int) -> ProcessLost:
    name = signal.strsignal(signal_number)
    cause = _LIKELY_CAUSES.get(signal_number, "")
    return ProcessLost(
        f"a loader worker was killed by signal {signal_number} ({name}){cause}",
        where="data.workers",
        fix="run the same command to go on from the last checkpoint, with fewer "
        "data.workers or "
        "more memory if it happens again",
    )


def _fetch_batch(iterator: grain.DatasetIterator) -> Batch | None:
    """Returns an iterator's next batch in this process's own memory, or None at the
    end.

    Grain's arrays from a worker are views of shared memory: a file that outlives a
    process which still holds one when it ends, and that JAX on a CPU may alias.
    """
    batch = next(iterator, None)
    return batch and {name: np.array(array) for name, array in batch.items()}


def _open_pipeline(
    make: MakeBatch, start: int, stop: int, workers: int, prefetch: int
) -> grain.DatasetIterator:
    options = grain.ReadOptions(
        num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch
    )
    dataset = grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options)
    if workers:
        # Grain reads absl flags, which absl refuses before a command line was parsed;
        # ours never is.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        start_resource_tracker()
        processes = grain.MultiprocessingOptions(
            workers, per_worker_buffer_size=prefetch
        )
        dataset = dataset.mp_prefetch(processes, _start_worker)
    return dataset.__iter__()


def _start_worker(worker: int, workers: int) -> None:
    """Runs in each worker before its first batch."""
    del worker, workers
    ignore_signals()
    jax = sys.modules.get("jax")
    if jax is not None:  # Grain imports it.
        jax.config.update(
            "jax_platforms", "cpu"
        )  # Never touch the trainer's accelerator.
    stop_with_parent()  # Grain's workers wait for ever on one that was killed.
