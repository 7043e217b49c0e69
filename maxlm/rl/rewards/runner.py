"""Scores samples as they come, by all rewards of a task."""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.rl.rewards.reward import BatchScorer, Reward
from maxlm.rl.rewards.workers import (
    ScoreOutcome,
    WorkerThreads,
    check_outcome,
    describe_failure,
    score_sample,
    start_processes,
    start_threads,
)
from maxlm.rl.samples import Prompt, Sample
from maxlm.runtime.json_types import JsonMapping
from maxlm.runtime.pool import count_usable_cores

SampleKey = tuple[int, int, int]
"""A sample: its prompt's row number, its number, and which object it is: a row may be
drawn from twice at a time."""


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Checks a list of rewards. Raises MaxlmError: two have one name."""
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            message = f"two rewards are called {name}"
            fix = "give each a name of its own, which metrics have"
            raise MaxlmError(message, where="rewards", fix=fix)


def check_row(rewards: Sequence[Reward], row: JsonMapping, place: str) -> None:
    """Checks that a prompt's row, at a place, has what rewards read. Raises MaxlmError
    naming the reward and the place."""
    for reward in rewards:
        try:
            reward.check_row(row)
        except MaxlmError as error:
            raise _locate(error, f"reward {reward.name}, {place}") from None


class RewardRunner(AbstractContextManager["RewardRunner"]):
    """Scores samples by rewards, each sample by itself; use as a context manager, in
    any thread.

    A sample whose reward hangs delays no other. A reward that fails ends training with
    one line, or counts as a score (``on_error``, ``on_timeout``), and ``num_failed``
    and ``num_timed_out`` say how often.

    Args:
        workers: processes that score at once, at first; default: one a core.
    """

    def __init__(self, rewards: Sequence[Reward], *, workers: int | None = None):
        check_rewards(rewards)
        self.rewards = tuple(rewards)
        self.num_timed_out = {reward.name: 0 for reward in rewards}
        """Samples that took too long, by the reward's name, of all so far."""
        self.num_failed = {reward.name: 0 for reward in rewards}
        """Samples whose reward failed and counted as ``on_error``."""
        self._num_workers = workers or count_usable_cores()
        self._processes: WorkerThreads | None = None
        self._threads: WorkerThreads | None = None
        self._batch_scorers: dict[int, BatchScorer] = {}
        self._futures: dict[SampleKey, list[Future[ScoreOutcome] | None]] = {}
        self._submitted: dict[SampleKey, Sample] = {}
        """Kept, so that no other object gets their identity."""

    def __exit__(self, kind, value, trace) -> None:
        self.close()

    def count_failures(self) -> dict[str, int]:
        """Returns how many samples so far took too long or failed, of the rewards that
        count these as a score; by names of metrics."""
        counts = {}
        for reward in self.rewards:
            takes_time = reward.worker in ("process", "thread")
            if takes_time and reward.on_timeout is not None:
                counts[f"reward_timeouts/{reward.name}"] = self.num_timed_out[
                    reward.name
                ]
            if reward.on_error is not None:
                counts[f"reward_failures/{reward.name}"] = self.num_failed[reward.name]
        return counts

    def close(self) -> None:
        """Ends what is under way, and all workers."""
        for workers in (self._processes, self._threads):
            if workers is not None:
                workers.close()
        self._processes = None
        self._threads = None
        self._batch_scorers.clear()
        self._futures.clear()
        self._submitted.clear()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Checks this machine, and that the rows of prompts have what rewards read.
        Raises MaxlmError naming the reward and the row."""
        self.check_setup()
        for prompt in prompts:
            check_row(self.rewards, prompt.row, f"row {prompt.row_number}")

    def check_setup(self) -> None:
        """Checks this machine. Raises MaxlmError naming the reward."""
        for reward in self.rewards:
            try:
                reward.check_setup()
            except MaxlmError as error:
                raise _locate(error, f"reward {reward.name}") from None

    def submit(self, sample: Sample) -> None:
        """Begins to score a sample, whose scores :meth:`collect` returns."""
        key = _make_key(sample)
        if key in self._futures:
            raise ValueError(f"sample {key} was submitted before")
        self._submitted[key] = sample
        self._futures[key] = [
            self._start(number, reward, sample)
            for number, reward in enumerate(self.rewards)
        ]

    def collect(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Returns the scores of samples that were submitted, float64 [samples,
        rewards], in their order; waits for them. Rewards that score batches score these
        samples together, now.

        Raises:
            MaxlmError: a reward failed, or took too long for every sample: it names the
                reward, the row and the sample. Scores of other samples are kept.
        """
        scores = np.empty((len(samples), len(self.rewards)), np.float64)
        has_timed_out = np.zeros(scores.shape, bool)
        batches = {
            number: self._score_batch(number, samples)
            for number, reward in enumerate(self.rewards)
            if reward.worker == "batch"
        }
        for place, sample in enumerate(samples):
            futures = self._futures[_make_key(sample)]
            for number, future in enumerate(futures):
                if future is None:
                    outcome = batches[number][place]
                else:
                    outcome = future.result()
                reward = self.rewards[number]
                has_timed_out[place, number] = outcome.status == "timed_out"
                scores[place, number] = self._settle(reward, sample, outcome)
        self._check_timeouts(has_timed_out)
        for sample in samples:
            del self._futures[_make_key(sample)]
            del self._submitted[_make_key(sample)]
        return scores

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Submits samples, and returns what :meth:`collect` does."""
        for sample in samples:
            self.submit(sample)
        return self.collect(samples)

    def _start(
        self, number: int, reward: Reward, sample: Sample
    ) -> "Future[ScoreOutcome] | None":
        if reward.worker == "batch":
            return None
        if reward.worker == "process":
            if self._processes is None:
                self._processes = start_processes(self.rewards, self._num_workers)
            return self._processes.submit(number, sample)
        if reward.worker == "thread":
            if self._threads is None:
                self._threads = start_threads(self.rewards)
            return self._threads.submit(number, sample)
        future: Future[ScoreOutcome] = Future()
        future.set_result(score_sample(reward.score, sample))
        return future

    def _score_batch(
        self, number: int, samples: Sequence[Sample]
    ) -> list[ScoreOutcome]:
        reward = self.rewards[number]
        if number not in self._batch_scorers:
            self._batch_scorers[number] = reward.open_batch()
        scores = self._batch_scorers[number](samples)
        if len(scores) != len(samples):
            message = f"returned {len(scores)} scores for {len(samples)} samples"
            fix = "return one for each, in their order"
            raise MaxlmError(message, where=f"reward {reward.name}", fix=fix)
        outcomes = []
        for score in scores:
            if isinstance(score, Exception):
                outcomes.append(describe_failure(score))
            else:
                outcomes.append(check_outcome(score))
        return outcomes

    def _settle(self, reward: Reward, sample: Sample, outcome: ScoreOutcome) -> float:
        """Returns the score that an outcome counts as."""
        if outcome.status == "scored":
            return outcome.score
        where = f"reward {reward.name}, row {sample.prompt.row_number}, "
        where += f"sample {sample.number}"
        if outcome.status == "timed_out":
            self.num_timed_out[reward.name] += 1
            if reward.on_timeout is not None:
                return reward.on_timeout
            message = f"took longer than {reward.time_limit:g} s"
            fix = "raise time_limit, or set on_timeout to a score of such samples"
            raise MaxlmError(message, where=where, fix=fix)
        self.num_failed[reward.name] += 1
        if reward.on_error is not None:
            return reward.on_error
        fix = outcome.fix or "correct it"
        fix += ", or set on_error to a score of such samples"
        raise MaxlmError(outcome.message, where=where, fix=fix)

    def _check_timeouts(self, has_timed_out: NDArray[np.bool_]) -> None:
        """Refuses a reward that says nothing of any of several samples: it would teach
        nothing, and no one would know."""
        num_samples = len(has_timed_out)
        if num_samples < 2:
            return
        for number, reward in enumerate(self.rewards):
            if has_timed_out[:, number].all():
                message = f"all {num_samples} samples took longer than "
                message += f"{reward.time_limit:g} s"
                fix = "raise time_limit, or correct the reward"
                raise MaxlmError(message, where=f"reward {reward.name}", fix=fix)


def _make_key(sample: Sample) -> SampleKey:
    return (sample.prompt.row_number, sample.number, id(sample))


def _locate(error: MaxlmError, where: str) -> MaxlmError:
    where = f"{where}, {error.where}" if error.where else where
    return MaxlmError(error.message, where=where, fix=error.fix)
