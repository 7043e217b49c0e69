"""Grain pipelines that make batches ahead of the train step, in threads and worker processes.

The only module that imports Grain. Order is exact whatever the number of workers: Grain deals
steps to the workers in turn and collects them in turn.
"""

import gc
import re
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Self

import grain
import numpy as np
from absl import flags

from maxlm.config.errors import MaxlmError, ProcessLost
from maxlm.data.loader.batches import Batch
from maxlm.data.loader.mixture import ENDLESS
from maxlm.runtime.pool import stop_with_parent
from maxlm.runtime.signals import STOP_SIGNALS, ignore_signals, start_resource_tracker

MakeBatch = Callable[[int], Batch]
"""Returns the batch of a step."""
_Pipeline = tuple[grain.DatasetIterator, list[Future]]  # with its next batch

# Steps that threads make while worker processes start, which takes seconds.
THREAD_STEPS = 32
_CLOSE_SECONDS = 30.0
_THREADS = 2
# Grain says in words alone that a worker died; a negative code is the signal that killed it.
_KILLED = re.compile(r"terminated unexpectedly with exit code -(\d+)")
_LIKELY_CAUSES: dict[int, str] = {
    signal.SIGKILL: ", probably out of memory",
    signal.SIGBUS: ", probably because /dev/shm is full",
}


class Prefetcher(Iterator[Batch]):
    """Batches of steps [start, stop) in order, made ahead. Its whole state is `step`.

    Close it (or use it as a context manager) to end its workers at once. They also end by
    themselves when this process ends, however it ends.

    Args:
        make: returns the batch of a step; it must pickle if there are workers.
        stop: None: there is no end.
        workers: processes, which take over after `THREAD_STEPS` steps; 0: threads make all.
        prefetch: batches made ahead, by each worker.
    """

    def __init__(
        self, make: MakeBatch, start: int, stop: int | None, *, workers: int, prefetch: int
    ):
        self.step = start
        """The step of the next batch."""
        self._stop = ENDLESS if stop is None else stop
        turn = min(start + THREAD_STEPS, self._stop) if workers else self._stop
        pipelines = [_open_pipeline(make, start, turn, 0, prefetch)]
        if has_workers := turn < self._stop:
            pipelines.append(_open_pipeline(make, turn, self._stop, workers, prefetch))
        # Grain starts its workers in one of these threads, and they inherit its signal mask.
        block_signals = partial(signal.pthread_sigmask, signal.SIG_BLOCK, STOP_SIGNALS)
        threads = ThreadPoolExecutor(len(pipelines), "next-batch", initializer=block_signals)
        self._threads = threads
        self._pipelines = [(each, [threads.submit(_fetch, each)]) for each in pipelines]
        # Also closes when the prefetcher is dropped, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close, self._pipelines, threads, has_workers)

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise ValueError("the batch iterator is closed")
        if self.step >= self._stop:
            self.close()
            raise StopIteration
        iterator, next_batch = self._pipelines[0]
        try:
            batch = next_batch[0].result()
        except MaxlmError as error:
            # The thread's frames hold the iterator, whose shared memory Python would call leaked.
            raise error.with_traceback(None) from None
        except RuntimeError as error:
            if (killed := _KILLED.search(str(error))) is None:
                raise
            raise _describe_death(int(killed[1])) from error
        if batch is None:  # Threads have made their last; workers go on.
            self._pipelines.pop(0)
            return next(self)
        next_batch[0] = self._threads.submit(_fetch, iterator)
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends threads and workers. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(pipelines: list[_Pipeline], threads: ThreadPoolExecutor, has_workers: bool) -> None:
    while pipelines:
        iterator, next_batch = pipelines.pop()
        # Grain loses workers that it is still starting when closed: let the fetch end first.
        wait(next_batch, timeout=_CLOSE_SECONDS)
        next_batch.clear()
        iterator.close()
    del iterator
    threads.shutdown()
    # Grain's iterators over workers are caught in cycles that hold semaphores and the last batch's
    # shared memory; left to the interpreter's end, they would fail loudly there.
    if has_workers:
        gc.collect()


def _describe_death(signal_number: int) -> ProcessLost:
    name, cause = signal.strsignal(signal_number), _LIKELY_CAUSES.get(signal_number, "")
    return ProcessLost(
        f"a loader worker was killed by signal {signal_number} ({name}){cause}",
        where="data.workers",
        fix="run the same command to go on from the last checkpoint, with fewer data.workers or "
        "more memory if it happens again",
    )


def _fetch(iterator: grain.DatasetIterator) -> Batch | None:
    """Returns the next batch in this process's own memory, or None at the end.

    Grain's arrays from a worker are views of shared memory: a file that outlives a process which
    still holds one when it ends, and that JAX on a CPU may alias.
    """
    batch = next(iterator, None)
    return batch and {name: np.array(array) for name, array in batch.items()}


def _open_pipeline(
    make: MakeBatch, start: int, stop: int, workers: int, prefetch: int
) -> grain.DatasetIterator:
    options = grain.ReadOptions(num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options)
    if workers:
        # Grain reads absl flags, which absl refuses before a command line was parsed; ours never
        # is.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        start_resource_tracker()
        processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
        dataset = dataset.mp_prefetch(processes, _start_worker)
    return dataset.__iter__()


def _start_worker(worker: int, workers: int) -> None:
    """Runs in each worker before its first batch."""
    del worker, workers
    ignore_signals()
    if (jax := sys.modules.get("jax")) is not None:  # Grain imports it.
        jax.config.update("jax_platforms", "cpu")  # Never touch the trainer's accelerator.
    stop_with_parent()  # Grain's workers wait for ever on one that was killed.
