"""Asks an environment about many episodes, some of which it answers slowly or never."""

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from time import monotonic

import jax

from maxlm.config import MaxlmError
from maxlm.rl.environments.environment import Environment, Reply
from maxlm.rl.rollouts.episode import Episode
from maxlm.rl.samples import Sample
from maxlm.runtime.collectives import broadcast_from_process_0

Answer = Reply | MaxlmError | None
"""What an environment says to a turn; None: the episode is over; an error: it failed."""


@dataclass(eq=False)
class _Call:
    episode: Episode
    future: Future[Reply | None] = field(default_factory=Future)
    deadline: float | None = None
    """On the monotonic clock, in seconds; None: it has not started."""

    @property
    def is_running(self) -> bool:
        if self.deadline is None or self.future.done():
            return False
        return monotonic() < self.deadline

    @property
    def has_ended(self) -> bool:
        """Whether there is an answer, or the time for it is over."""
        return self.deadline is not None and not self.is_running


class EnvironmentCalls:
    """Calls ``Environment.respond`` for episodes, and collects what it says.

    An environment that replies at once is called in order when answers are collected.
    Others are called in threads; one that hangs is left alone after ``seconds``, and
    holds up no other. On several hosts process 0 makes the calls, and all collect the
    same answers at the same point: for them it waits for every call.

    Args:
        max_threads: calls at the same time.
        seconds: of a call at most.
    """

    def __init__(self, environment: Environment, max_threads: int, seconds: float):
        self._environment = environment
        self._max_threads = max_threads
        self._seconds = seconds
        self._calls: list[_Call] = []

    @property
    def episodes(self) -> list[Episode]:
        """Those whose answers were not collected yet, in the order of asking."""
        return [call.episode for call in self._calls]

    def ask(self, episode: Episode) -> None:
        """Asks about an episode's last turn."""
        self._calls.append(_Call(episode))
        if jax.process_index() == 0 and not self._environment.replies_at_once:
            self._start_threads()

    def collect(self, *, wait_for_any: bool) -> list[tuple[Episode, Answer]]:
        """Returns the answers that are there, in the order of asking.

        Args:
            wait_for_any: whether to wait until there is one.
        """
        if not self._calls:
            return []
        is_only_process = jax.process_count() == 1
        ended: list[_Call] = []
        answers: list[Answer] = []
        if jax.process_index() == 0:
            if self._environment.replies_at_once:
                ended = list(self._calls)
                answers = [self._call_now(call) for call in ended]
            else:
                self._wait(
                    0 if not wait_for_any else 1, wait_for_all=not is_only_process
                )
                ended = [call for call in self._calls if call.has_ended]
                answers = [self._read_answer(call) for call in ended]
        if not is_only_process:
            # It has waited for all of them.
            ended = list(self._calls)
            texts = broadcast_from_process_0([_to_json(answer) for answer in answers])
            answers = [_from_json(text) for text in texts]
        self._calls = [call for call in self._calls if call not in ended]
        return [
            (call.episode, answer) for call, answer in zip(ended, answers, strict=True)
        ]

    def _wait(self, min_answers: int, *, wait_for_all: bool) -> None:
        """Waits for so many answers, or all."""
        if wait_for_all:
            min_answers = len(self._calls)
        while True:
            self._start_threads()
            num_ended = sum(call.has_ended for call in self._calls)
            if num_ended >= min_answers:
                return
            running = [call for call in self._calls if call.is_running]
            deadlines = [call.deadline for call in running if call.deadline is not None]
            seconds = max(0.0, min(deadlines, default=0.0) - monotonic())
            futures = [call.future for call in running]
            wait(futures, timeout=seconds, return_when=FIRST_COMPLETED)

    def _start_threads(self) -> None:
        num_running = sum(call.is_running for call in self._calls)
        for call in self._calls:
            if num_running >= self._max_threads:
                return
            if call.deadline is None:
                call.deadline = monotonic() + self._seconds
                # Not of a pool, whose threads the interpreter waits for at its end: this
                # one may hang for ever.
                arguments = (self._environment, call.episode.sample, call.future)
                thread = threading.Thread(target=_respond, args=arguments, daemon=True)
                thread.start()
                num_running += 1

    def _call_now(self, call: _Call) -> Answer:
        call.deadline = monotonic()
        _respond(self._environment, call.episode.sample, call.future)
        return self._read_answer(call)

    def _read_answer(self, call: _Call) -> Answer:
        """The answer of a call that has ended."""
        if not call.future.done():
            reason = f"no answer within {self._seconds:g} s"
            return make_environment_error(self._environment, call.episode, reason)
        error = call.future.exception()
        if error is not None:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, MaxlmError):
                reason = str(error)
            return make_environment_error(self._environment, call.episode, reason)
        reply = call.future.result()
        # An environment may be anyone's.
        if reply is not None and not isinstance(reply, Reply):
            reason = f"its answer is of type {type(reply).__name__}, no Reply"
            return make_environment_error(self._environment, call.episode, reason)
        return reply


def score_episodes(
    environment: Environment, episodes: Sequence[Episode]
) -> list[MaxlmError | None]:
    """Gives samples that are over the environment's own reward, on process 0 alone,
    where samples are scored. Returns on all processes what was wrong with each that it
    failed to score."""
    if not episodes:
        return []
    errors: list[MaxlmError | None] = []
    if jax.process_index() == 0:
        errors = [_score_episode(environment, episode) for episode in episodes]
    if jax.process_count() == 1:
        return errors
    answers = broadcast_from_process_0([_to_json(error) for error in errors])
    return [_read_error(values) for values in answers]


def _score_episode(environment: Environment, episode: Episode) -> MaxlmError | None:
    sample = episode.sample
    try:
        sample.environment_reward = environment.score(sample)
    # It is a program of someone else's: it may raise anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        line = make_environment_error(environment, episode, reason)
        line.__cause__ = error
        return line
    return None


def _read_error(values: Sequence[str]) -> MaxlmError | None:
    answer = _from_json(values)
    return answer if isinstance(answer, MaxlmError) else None


def make_environment_error(
    environment: Environment, episode: Episode, reason: str
) -> MaxlmError:
    """Returns the one line of an environment that failed with an episode."""
    reason = " ".join(reason.split())
    row_number = episode.sample.prompt.row_number
    where = f"environment.kind={environment.kind}, row {row_number}"
    message = f"the environment failed at turn {episode.num_policy_turns}: {reason}"
    fix = "correct it or the row, or set environment_errors=end_episode"
    return MaxlmError(message, where=where, fix=fix)


def _respond(
    environment: Environment, sample: Sample, future: Future[Reply | None]
) -> None:
    try:
        future.set_result(environment.respond(sample))
    # It is a program of someone else's: it may raise anything.
    except Exception as error:
        future.set_exception(error)


def _to_json(answer: Answer) -> Sequence[str | None]:
    """An answer as it is sent to other processes."""
    if isinstance(answer, MaxlmError):
        return ["error", answer.message, answer.where, answer.fix]
    if answer is None:
        return ["end"]
    return ["reply", answer.text, answer.role]


def _from_json(values: Sequence[str]) -> Answer:
    kind, *rest = values
    if kind == "error":
        message, where, fix = rest
        return MaxlmError(message, where=where, fix=fix)
    if kind == "end":
        return None
    text, role = rest
    return Reply(text, "user" if role == "user" else "tool")
