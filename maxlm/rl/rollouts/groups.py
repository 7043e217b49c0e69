"""Groups of samples of one prompt, drawn and scored."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from numpy.typing import NDArray

from maxlm.rl.advantages import find_zero_variance_groups
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.sampler import RolloutSampler
from maxlm.rl.samples import Prompt, Sample
from maxlm.runtime.collectives import run_on_process_0


@dataclass
class Group:
    """A prompt's samples, in the order of their numbers, and what they scored."""

    prompt: Prompt
    samples: list[Sample]
    scores: NDArray[np.float64]
    """Of each reward, [samples, rewards]; NaN: it gave none."""


@dataclass
class CollectedGroups:
    """The groups of a rollout."""

    groups: list[Group]
    next_prompt: int
    """Number of the prompt that the next rollout begins with."""
    num_left_out: int = 0
    """Groups without variance that others took the place of."""
    num_without_variance: int = 0
    """Groups among ``groups`` whose samples all score the same."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of ``generation``, and of ``scoring`` behind it: what scores took longer."""


class GroupCollector:
    """Draws and scores the groups of rollouts.

    Samples are scored while others are still drawn. On several hosts all processes draw
    the same samples together, and process 0 scores them.

    Args:
        runner: on process 0; None on others.
        on_work: called with each sample that is drawn.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        runner: RewardRunner | None,
        order: PromptOrder,
        config: RolloutConfig,
        num_samples: int,
        on_work: Callable[[], None],
    ):
        self.sampler = sampler
        self._runner = runner
        self._order = order
        self._config = config
        self._num_samples = num_samples
        self._on_work = on_work

    def collect(
        self, rollout_number: int, first_prompt: int, num_groups: int
    ) -> CollectedGroups:
        """Draws a rollout's groups, of the prompts from ``first_prompt`` on.

        Raises:
            MaxlmError: a reward or the environment failed.
        """
        collected = CollectedGroups([], first_prompt)
        collected.seconds = {"generation": 0.0, "scoring": 0.0}
        chosen: list[Group] = []
        others: list[Group] = []
        for _ in range(1 + self._config.max_resamples):
            num_missing = num_groups - len(chosen)
            prompts = self._order.take(collected.next_prompt, num_missing)
            collected.next_prompt += num_missing
            groups = self._draw_groups(prompts, rollout_number, collected.seconds)
            is_constant = find_zero_variance_groups(
                np.stack([group.scores for group in groups])
            )
            if self._config.zero_variance != "resample":
                collected.groups = groups
                collected.num_without_variance = int(is_constant.sum())
                return collected
            for group, without_variance in zip(groups, is_constant, strict=True):
                (others if without_variance else chosen).append(group)
            if len(chosen) == num_groups:
                break
        # As many as no prompt was found for that tells its samples apart.
        num_without_variance = num_groups - len(chosen)
        collected.groups = [*chosen, *others[:num_without_variance]]
        collected.num_without_variance = num_without_variance
        collected.num_left_out = len(others) - num_without_variance
        return collected

    def _draw_groups(
        self,
        prompts: Sequence[Prompt],
        rollout_number: int,
        seconds: dict[str, float],
    ) -> list[Group]:
        began = time.perf_counter()
        places = {id(prompt): place for place, prompt in enumerate(prompts)}
        samples: list[list[Sample | None]] = [
            [None] * self._num_samples for _ in prompts
        ]
        for sample in self.sampler.sample(prompts, rollout_number, self._num_samples):
            samples[places[id(sample.prompt)]][sample.number] = sample
            if self._runner is not None:
                self._runner.submit(sample)
            self._on_work()
        generated = time.perf_counter()
        complete = [[s for s in group if s is not None] for group in samples]
        flat = [sample for group in complete for sample in group]
        scores = self._score(flat)
        scores = scores.reshape(len(prompts), self._num_samples, -1)
        seconds["generation"] += generated - began
        seconds["scoring"] += time.perf_counter() - generated
        return [
            Group(prompt, group, group_scores)
            for prompt, group, group_scores in zip(
                prompts, complete, scores, strict=True
            )
        ]

    def _score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Returns the scores [samples, rewards] of samples that were submitted."""

        def collect() -> list[list[float]]:
            assert self._runner is not None
            return self._runner.collect(samples).tolist()

        if jax.process_count() == 1:
            return np.array(collect(), np.float64)
        return np.array(run_on_process_0(collect), np.float64)
