"""Grain pipelines that make batches ahead of the train step, in threads or worker processes.

The only module that imports Grain. Order is exact whatever the number of workers: Grain deals
steps to the workers in turn and collects them in turn.
"""

import gc
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing import parent_process
from typing import Self

import grain
import numpy as np
from absl import flags

from maxlm.config.errors import Lost, MaxlmError
from maxlm.data.loader.batches import Batch
from maxlm.runtime.signals import STOP_SIGNALS, ignore_signals, start_resource_tracker

# Steps made by threads of this process while the workers start, which takes them seconds.
WARM_UP_STEPS = 8
# Stands for "no end". Grain counts steps in Python ints and C ssize_t.
ENDLESS = 1 << 62
_CLOSE_SECONDS = 30.0
_THREADS = 2
# Grain says in words alone that a worker died; a negative code is the signal that killed it.
_KILLED = re.compile(r"terminated unexpectedly with exit code -(\d+)")
_LIKELY_CAUSES: dict[int, str] = {
    signal.SIGKILL: ", probably out of memory",
    signal.SIGBUS: ", probably because /dev/shm is full",
}


class BatchIterator(Iterator[Batch]):
    """Batches of steps [start, stop) in order, made ahead. Its whole state is `step`.

    Close it (or use it as a context manager) to end its workers at once. They also end by
    themselves when this process ends, however it ends.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        start: int,
        stop: int | None,
        *,
        workers: int,
        prefetch: int,
    ):
        """`make(step)` is a batch; it must pickle if there are workers."""
        self.step = start
        """The step of the next batch."""
        self._stop = ENDLESS if stop is None else stop
        self._handover = min(start + WARM_UP_STEPS, self._stop) if workers else self._stop
        self._near = _Ahead(_threaded(make, start, self._handover, prefetch))
        self._far = (
            _Ahead(_in_processes(make, self._handover, self._stop, workers, prefetch))
            if self._handover < self._stop
            else None
        )
        # Also closes when the iterator is dropped, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close_all, self._near, self._far)

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise ValueError("the batch iterator is closed")
        if self.step >= self._stop:
            self.close()
            raise StopIteration
        batch = self._current().take()
        self.step += 1
        if self.step == self._handover:
            self._near.close()
        return batch

    def close(self) -> None:
        """Ends threads and workers. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _current(self) -> "_Ahead":
        if self.step < self._handover or self._far is None:
            return self._near
        return self._far


class _Ahead:
    """Holds the next batch of an iterator, or is fetching it in a thread of its own."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator: grain.DatasetIterator | None = iterator
        # Grain starts its workers in it, which inherit this.
        deaf = {"initializer": signal.pthread_sigmask, "initargs": (signal.SIG_BLOCK, STOP_SIGNALS)}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-batch", **deaf)
        self._next = self._thread.submit(_fetch, iterator)

    def take(self) -> Batch:
        assert self._iterator is not None, "closed"
        try:
            batch = self._next.result()
        except MaxlmError as error:
            # The thread's frames hold the iterator, whose shared memory Python would call leaked.
            raise error.with_traceback(None) from None
        except RuntimeError as error:
            if (killed := _KILLED.search(str(error))) is None:
                raise
            number = int(killed[1])
            name, cause = signal.strsignal(number), _LIKELY_CAUSES.get(number, "")
            raise Lost(
                f"a loader worker was killed by signal {number} ({name}){cause}",
                where="data.workers",
                fix="run the same command to go on from the last checkpoint, with fewer "
                "data.workers or more memory if it happens again",
            ) from error
        if batch is None:
            raise RuntimeError("the Grain pipeline ended before the last step")
        self._next = self._thread.submit(_fetch, self._iterator)
        return batch

    def close(self) -> None:
        if self._iterator is not None:
            # Grain loses workers that it is still starting when closed: let the fetch come home.
            wait([self._next], timeout=_CLOSE_SECONDS)
            self._iterator.close()
            self._iterator = None
            self._thread.shutdown()


def _close_all(near: _Ahead, far: _Ahead | None) -> None:
    near.close()
    if far is not None:
        far.close()
        # Grain's iterators are caught in cycles that hold semaphores and the last batch's shared
        # memory; left to the interpreter's end, they would fail loudly there.
        gc.collect()


def _fetch(iterator: grain.DatasetIterator) -> Batch | None:
    """The next batch in this process's own memory, or None at the end.

    Grain's arrays from a worker are views of shared memory: a file that outlives a process which
    still holds one when it ends, and that JAX on a CPU may alias.
    """
    batch = next(iterator, None)
    return batch and {name: np.array(array) for name, array in batch.items()}


def _threaded(
    make: Callable[[int], Batch], start: int, stop: int, prefetch: int
) -> grain.DatasetIterator:
    return _dataset(make, start, stop, prefetch).__iter__()


def _in_processes(
    make: Callable[[int], Batch], start: int, stop: int, workers: int, prefetch: int
) -> grain.DatasetIterator:
    # Grain reads absl flags, which absl refuses before a command line was parsed; ours never is.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    start_resource_tracker()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    dataset = _dataset(make, start, stop, prefetch).mp_prefetch(options, _start_worker)
    return dataset.__iter__()


def _dataset(
    make: Callable[[int], Batch], start: int, stop: int, prefetch: int
) -> grain.IterDataset:
    options = grain.ReadOptions(num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch)
    return grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options)


def _start_worker(worker: int, workers: int) -> None:
    """Runs in each worker before its first batch."""
    del worker, workers
    ignore_signals()
    if (jax := sys.modules.get("jax")) is not None:  # Grain imports it.
        jax.config.update("jax_platforms", "cpu")  # Never touch the trainer's accelerator.
    # Grain's workers wait for ever on a parent that was killed.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
