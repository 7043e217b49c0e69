"""``maxlm rl`` with an environment that notes which process asks it, and that may kill
one: a program as ``tests/train/faults_worker.py`` is."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from maxlm.rl.environments import ENVIRONMENTS, Environment, GeneratedRows, Reply
from maxlm.rl.rewards import REWARDS
from maxlm.rl.rewards.reward import Reward, Worker
from maxlm.rl.samples import Sample
from tests.rl.call_notes import note, read_notes
from tests.train import faults_worker

QUESTIONS = ("a", "the sun rises", "grey gulls turn slowly", "12 + 7 =", "?")
NUM_TURNS = 2


@ENVIRONMENTS.register("test_noting")
class NotingEnvironment(Environment):
    """Says how long each turn was; asked in threads."""

    kind: str = "test_noting"
    folder: str
    """Where ``calls-PROCESS.txt`` are."""

    @property
    def max_turns(self) -> int:
        return NUM_TURNS

    def open_prompts(self, seed: int) -> GeneratedRows:
        return GeneratedRows(
            lambda number: {"prompt": QUESTIONS[number]}, "noting", len(QUESTIONS)
        )

    def respond(self, sample: Sample) -> Reply | None:
        note(self.folder, "respond")
        # Answers come in another order than they were asked for.
        time.sleep(0.01 * (5 - len(sample.last_answer) % 5))
        num_turns = sum(role == "assistant" for role, _ in sample.turns)
        if num_turns == NUM_TURNS:
            return None
        return Reply(f" {len(sample.last_answer)} ", "user")

    def score(self, sample: Sample) -> float:
        note(self.folder, "score")
        return float(len(sample.last_answer) % 3)


@REWARDS.register("test_killing")
class KillingReward(Reward):
    """The environment's score; kills a process when it has given so many."""

    kind: str = "test_killing"
    folder: str
    num_samples: int | None = None
    """Samples until it kills process 1; null: it does not."""

    @property
    def worker(self) -> Worker:
        return "caller"

    def score(self, sample: Sample) -> float:
        note(self.folder, "reward")
        num_scored = len(read_notes(self.folder, 0, "reward"))
        if num_scored == self.num_samples:
            [victim] = read_notes(self.folder, 1, "process")
            os.kill(int(victim), signal.SIGKILL)
        assert sample.environment_reward is not None
        return sample.environment_reward


def note_process(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has a source note its process when it opens."""

    def open_noting(self: Any, context: Any) -> Any:
        note(self.task.environment.folder, "process", str(os.getpid()))
        return original(self, context)

    return open_noting


if __name__ == "__main__":
    from maxlm.rl.rollouts.source import PolicyRolloutSource

    PolicyRolloutSource.open = note_process(PolicyRolloutSource.open)
    faults_worker.run()
