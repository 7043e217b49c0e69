"""Workers that score samples: processes that are killed when one takes too long, and
threads that wait for others."""

import math
import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, Protocol

from maxlm.config import MaxlmError
from maxlm.rl.rewards.reward import (
    NoScoreError,
    Reward,
    Scorer,
    describe_text,
    read_score,
)
from maxlm.rl.samples import Sample
from maxlm.runtime.pool import stop_with_parent, use_one_tokenizer_thread
from maxlm.runtime.signals import block_signals, ignore_signals, start_resource_tracker

OPENING_LIMIT = 300.0
"""Seconds that a worker may take to import and open what a reward needs."""
_PATIENCE = 0.5
"""Seconds after which a sample no longer holds up those behind it: they get a worker
more."""
_MAX_WORKERS_PER_CORE = 8


@dataclass(frozen=True)
class ScoreOutcome:
    """What became of one score of one sample."""

    status: Literal["scored", "timed_out", "failed"]
    score: float = math.nan
    message: str = ""
    """What failed."""
    fix: str | None = None


class ScoringWorkers(Protocol):
    """Score samples at once, each without waiting for another."""

    def submit(self, number: int, sample: Sample) -> "Future[ScoreOutcome]":
        """Lets the reward of that number score a sample."""
        ...

    def close(self) -> None:
        """Ends all work."""
        ...


def score_sample(scorer: Scorer, sample: Sample) -> ScoreOutcome:
    """Scores a sample; whatever a reward raises or returns is an outcome."""
    try:
        score = scorer(sample)
    except Exception as error:  # of code that is the user's
        return describe_failure(error)
    return check_outcome(score)


def check_outcome(score: object) -> ScoreOutcome:
    """Returns the outcome of what a reward returned."""
    try:
        return ScoreOutcome("scored", read_score(score))
    except NoScoreError as error:
        return ScoreOutcome(
            "failed", message=str(error), fix="return one finite number"
        )


def describe_failure(error: Exception) -> ScoreOutcome:
    """Returns the outcome of an error: one of ours as it is, another with where it was
    raised."""
    if isinstance(error, MaxlmError):
        where = f"{error.where}: " if error.where else ""
        return ScoreOutcome("failed", message=f"{where}{error.message}", fix=error.fix)
    message = f"raised {type(error).__name__}"
    text = describe_text(str(error), 200)
    if text:
        message += f": {text}"
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        message += f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return ScoreOutcome("failed", message=message)


@dataclass(frozen=True)
class _Job:
    number: int
    sample: Sample
    future: "Future[ScoreOutcome]"


class WorkerThreads:
    """Threads that take samples from a queue, each samples after samples; more are
    started while all are busy for long.

    Args:
        make_worker: called by each thread, once; returns what scores a sample, and what
            closes it.
        num_threads: threads there are at first.
        max_threads: threads there may be.
    """

    def __init__(
        self,
        make_worker: Callable[["WorkerThreads"], "_Worker"],
        num_threads: int,
        max_threads: int,
    ):
        self._make_worker = make_worker
        self._num_threads = num_threads
        self._max_threads = max_threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._num_idle = 0
        self.is_closed = False

    def submit(self, number: int, sample: Sample) -> "Future[ScoreOutcome]":
        """See :class:`ScoringWorkers`."""
        future: Future[ScoreOutcome] = Future()
        self._jobs.put(_Job(number, sample, future))
        self._start_thread(self._num_threads)
        return future

    def help_waiting(self) -> None:
        """Starts a thread if samples wait, for one is being scored for long."""
        self._start_thread(self._max_threads)

    def close(self) -> None:
        """See :class:`ScoringWorkers`."""
        with self._lock:
            self.is_closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.close()
            self._jobs.put(None)
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.future.cancel()
                else:
                    self._jobs.put(None)
                    break

    def _start_thread(self, max_threads: int) -> None:
        with self._lock:
            is_needed = self._jobs.qsize() > self._num_idle
            if self.is_closed or not is_needed or len(self._workers) >= max_threads:
                return
            worker = self._make_worker(self)
            self._workers.append(worker)
            self._num_idle += 1
        name = f"maxlm-reward-{len(self._workers)}"
        threading.Thread(
            target=self._work, args=(worker,), name=name, daemon=True
        ).start()

    def _work(self, worker: "_Worker") -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                break
            if self.is_closed:
                job.future.cancel()
                break
            with self._lock:
                self._num_idle -= 1
            try:
                outcome = worker.score(job.number, job.sample)
            except Exception as error:  # a bug of ours: whoever waits is to see it
                job.future.set_exception(error)
            else:
                job.future.set_result(outcome)
            with self._lock:
                self._num_idle += 1
        worker.close()


class _Worker(Protocol):
    def score(self, number: int, sample: Sample) -> ScoreOutcome: ...

    def close(self) -> None: ...


def start_processes(rewards: Sequence[Reward], num_workers: int) -> WorkerThreads:
    """Returns workers that score in processes of their own, of which there are
    ``num_workers``, and more while those are busy for long."""
    max_workers = max(16, num_workers * _MAX_WORKERS_PER_CORE)
    return WorkerThreads(
        lambda threads: _ProcessWorker(rewards, threads), num_workers, max_workers
    )


def start_threads(rewards: Sequence[Reward]) -> WorkerThreads:
    """Returns workers that score in threads, as many at once as rewards allow
    (``concurrency``)."""
    num_threads = sum(
        reward.concurrency for reward in rewards if reward.worker == "thread"
    )
    opener = _Opener(rewards)
    return WorkerThreads(
        lambda _: _ThreadWorker(rewards, opener), num_threads, num_threads
    )


class _ProcessWorker:
    """A process that scores one sample after another. It starts with the first; one
    that is killed is replaced with the next."""

    def __init__(self, rewards: Sequence[Reward], threads: WorkerThreads):
        self._rewards = rewards
        self._threads = threads
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def score(self, number: int, sample: Sample) -> ScoreOutcome:
        reward = self._rewards[number]
        if self._process is None:
            self._start()
            if self._threads.is_closed:
                self._kill()
                return ScoreOutcome("failed", message="was closed")
        connection = self._connection
        assert connection is not None
        try:
            connection.send((number, sample))
            # Without more workers while it opens: they would have to do the same.
            if not connection.poll(OPENING_LIMIT):
                self._kill()
                message = f"does not open within {OPENING_LIMIT:g} s"
                return ScoreOutcome("failed", message=message)
            failure = connection.recv()
            if failure is not None:
                return failure
            if not self._wait(connection, reward.time_limit):
                self._kill()
                return ScoreOutcome("timed_out")
            return connection.recv()
        except (EOFError, OSError):
            process = self._process
            self._kill()
            code = None if process is None else process.exitcode
            message = f"its process ended (exit code {code})"
            fix = "see what it prints; -9 is most likely for want of memory"
            return ScoreOutcome("failed", message=message, fix=fix)

    def close(self) -> None:
        # The pipe is left to the thread that may be reading it.
        process = self._process
        if process is not None:
            process.kill()
            process.join()

    def _wait(self, connection: Connection, seconds: float) -> bool:
        if connection.poll(min(seconds, _PATIENCE)):
            return True
        deadline = time.monotonic() + seconds - _PATIENCE
        while not self._threads.is_closed:
            # Again and again: samples may come that have no worker.
            self._threads.help_waiting()
            remaining = deadline - time.monotonic()
            if connection.poll(max(0.0, min(remaining, _PATIENCE))):
                return True
            if remaining <= 0:
                return False
        return False

    def _start(self) -> None:
        start_resource_tracker()
        context = multiprocessing.get_context("spawn")
        connection, worker_connection = context.Pipe()
        # Spawned, never forked: threads of JAX do not survive a fork.
        process = context.Process(
            target=_serve_scores,
            args=(worker_connection, tuple(self._rewards)),
            daemon=True,
        )
        with block_signals():
            process.start()
        worker_connection.close()
        self._process = process
        self._connection = connection

    def _kill(self) -> None:
        process = self._process
        connection = self._connection
        self._process = None
        self._connection = None
        if process is not None:
            process.kill()
            process.join()
        if connection is not None:
            connection.close()


def _serve_scores(connection: Connection, rewards: Sequence[Reward]) -> None:
    """Runs in a process: answers each sample with None, or why the reward cannot be
    opened, and then with its outcome."""
    use_one_tokenizer_thread()
    ignore_signals()
    stop_with_parent()
    # The kernel's alarm ends this process: no thread of Python's runs while, for
    # example, a regular expression holds the interpreter, though the parent was killed.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    scorers: dict[int, Scorer] = {}
    while True:
        try:
            number, sample = connection.recv()
        except EOFError:
            return
        failure = None
        if number not in scorers:
            try:
                scorers[number] = rewards[number].open()
            except Exception as error:  # of code that is the user's
                failure = describe_failure(error)
        connection.send(failure)
        if failure is not None:
            continue
        signal.alarm(math.ceil(rewards[number].time_limit) + 5)
        outcome = score_sample(scorers[number], sample)
        signal.alarm(0)
        connection.send(outcome)


class _Opener:
    """Opens each reward once, for all threads."""

    def __init__(self, rewards: Sequence[Reward]):
        self._rewards = rewards
        self._lock = threading.Lock()
        self._scorers: dict[int, Scorer] = {}

    def open(self, number: int) -> Scorer:
        with self._lock:
            if number not in self._scorers:
                self._scorers[number] = self._rewards[number].open()
            return self._scorers[number]


class _ThreadWorker:
    """Scores in a thread that is left alone when it takes too long: what it waits for
    has limits of its own."""

    def __init__(self, rewards: Sequence[Reward], opener: _Opener):
        self._rewards = rewards
        self._opener = opener

    def score(self, number: int, sample: Sample) -> ScoreOutcome:
        future: Future[ScoreOutcome] = Future()

        def run() -> None:
            try:
                scorer = self._opener.open(number)
            except Exception as error:  # of code that is the user's
                future.set_result(describe_failure(error))
                return
            future.set_result(score_sample(scorer, sample))

        threading.Thread(target=run, daemon=True).start()
        try:
            return future.result(self._rewards[number].time_limit)
        except TimeoutError:
            return ScoreOutcome("timed_out")

    def close(self) -> None:
        pass
