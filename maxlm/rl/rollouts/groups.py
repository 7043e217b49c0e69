"""Groups of samples of one prompt, drawn and scored."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.episode import Episode, end_episode
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.sampler import RolloutSampler
from maxlm.rl.rollouts.scoring import collect_scores, count_reward_failures
from maxlm.rl.samples import Prompt, Sample

FindWithoutVariance = Callable[
    [NDArray[np.float64], NDArray[np.integer], NDArray[np.bool_]], NDArray[np.bool_]
]


@dataclass
class Group:
    """A prompt's samples, in the order of their numbers, and what they scored."""

    prompt: Prompt
    samples: list[Sample]
    scores: NDArray[np.float64]
    """Of each reward, [samples, rewards]; NaN: it gave none."""

    @property
    def is_complete(self) -> list[bool]:
        """Whether the policy ended each sample itself."""
        return [sample.is_complete for sample in self.samples]

    @property
    def response_lengths(self) -> list[int]:
        """Tokens that the policy drew of each sample."""
        return [sample.num_sampled for sample in self.samples]


@dataclass
class CollectedGroups:
    """The groups of a rollout."""

    groups: list[Group]
    num_left_out: int = 0
    """Groups without variance that others took the place of."""
    num_without_variance: int = 0
    """Groups among ``groups`` whose samples all score the same."""
    environment_errors: list[str] = field(default_factory=list)
    """What was wrong where an episode ended because the environment failed."""
    reward_failures: dict[str, int] = field(default_factory=dict)
    """Samples whose reward failed or took too long and counted as a score, by names of
    metrics."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of ``generation``, and of ``scoring`` behind it: what scores took longer."""
    engine_steps: int = 0
    """Steps of the engine meanwhile, also those of groups that were begun ahead."""

    def list_samples(self) -> list[Sample]:
        """Returns the samples of all groups, in their order."""
        return [sample for group in self.groups for sample in group.samples]


@dataclass
class GroupQueue:
    """Where the groups of a run stand between two rollouts."""

    next_prompt: int
    """Number of the prompt that the next rollout begins with."""
    num_begun: int
    """Prompts of the run that were begun, all before this number."""
    episodes: list[Episode]
    """Samples of the prompts from ``next_prompt`` on: those that are drawn, and then
    those that are under way, the oldest first."""


class GroupCollector:
    """Draws and scores the groups of rollouts, in the order of the run's prompts.

    Samples are scored while others are still drawn. A rollout takes its groups in their
    order, however long each takes: taking those that are done first would train on
    short and quick samples more often than the policy draws them. While the last of
    them are waited for, up to ``num_ahead`` prompts behind them are begun, which a
    later rollout takes. On several hosts all processes draw the same samples together,
    and process 0 scores them.

    Args:
        runner: on process 0; None on others.
        num_samples: of each prompt.
        num_ahead: prompts that are begun behind those of a rollout.
        find_without_variance: says of each group, by their scores [groups, samples,
            rewards], their samples' lengths and whether the policy ended them, whether
            its samples all score the same.
        on_work: called with each dispatch of the engine.

    Attributes:
        next_prompt: number of the prompt that the next rollout begins with.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        runner: RewardRunner | None,
        order: PromptOrder,
        config: RolloutConfig,
        num_samples: int,
        num_ahead: int,
        find_without_variance: FindWithoutVariance,
        on_work: Callable[[], None],
    ):
        self.sampler = sampler
        self.next_prompt = 0
        self._num_begun = 0
        self._open: dict[int, list[Sample | None]] = {}
        """The samples of prompts that were begun, by the prompt's number; None: under
        way."""
        self._prompts: dict[int, Prompt] = {}
        self._runner = runner
        self._order = order
        self._config = config
        self._num_samples = num_samples
        self._num_ahead = num_ahead
        self._find_without_variance = find_without_variance
        self._on_work = on_work

    def collect(self, num_groups: int) -> CollectedGroups:
        """Draws the groups of the next rollout.

        Raises:
            MaxlmError: a reward or the environment failed.
        """
        failures_before = count_reward_failures(self._runner)
        steps_before = self.sampler.engine.stats().steps_total
        collected = self._collect(num_groups)
        steps = self.sampler.engine.stats().steps_total
        collected.engine_steps = steps - steps_before
        collected.environment_errors = self.sampler.take_environment_errors()
        collected.reward_failures = {
            name: count - failures_before[name]
            for name, count in count_reward_failures(self._runner).items()
        }
        return collected

    def _collect(self, num_groups: int) -> CollectedGroups:
        collected = CollectedGroups([])
        collected.seconds = {"generation": 0.0, "scoring": 0.0}
        chosen: list[Group] = []
        others: list[Group] = []
        for _ in range(1 + self._config.max_resamples):
            num_missing = num_groups - len(chosen)
            groups = self._take_groups(num_missing, collected.seconds)
            is_constant = self._find_without_variance(
                np.stack([group.scores for group in groups]),
                np.array([group.response_lengths for group in groups]),
                np.array([group.is_complete for group in groups]),
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

    @property
    def num_under_way(self) -> int:
        """Samples that a later rollout takes and that are not drawn yet."""
        return self.sampler.num_unfinished

    def get_queue(self) -> GroupQueue:
        """Returns where groups stand; to be called between two rollouts."""
        drawn = [
            end_episode(sample)
            for samples in self._open.values()
            for sample in samples
            if sample is not None
        ]
        episodes = [*drawn, *self.sampler.list_unfinished()]
        return GroupQueue(self.next_prompt, self._num_begun, episodes)

    def restore(self, queue: GroupQueue) -> None:
        """Goes on where the groups of another process stood. Samples that it had drawn
        are scored once more."""
        self.next_prompt = queue.next_prompt
        self._num_begun = queue.num_begun
        for episode in queue.episodes:
            self._open_group(episode.sample.prompt)
        self.sampler.restore(queue.episodes)

    def skip_to(self, prompt_number: int) -> None:
        """Begins the next rollout at a prompt; nothing may be under way."""
        assert not self._open, "groups are open"
        self.next_prompt = prompt_number
        self._num_begun = prompt_number

    def _open_group(self, prompt: Prompt) -> None:
        self._prompts[prompt.number] = prompt
        self._open.setdefault(prompt.number, [None] * self._num_samples)

    def _is_drawn(self, prompt_number: int) -> bool:
        """Whether all samples of a prompt are drawn."""
        return all(sample is not None for sample in self._open[prompt_number])

    def _begin_until(self, stop: int) -> None:
        """Begins all prompts before a number that were not begun."""
        num_missing = stop - self._num_begun
        if num_missing <= 0:
            return
        prompts = self._order.take(self._num_begun, num_missing)
        for prompt in prompts:
            self._open_group(prompt)
        self.sampler.add(prompts, self._num_samples)
        self._num_begun = stop

    def _take_groups(self, count: int, seconds: dict[str, float]) -> list[Group]:
        """Returns the next groups in order, drawn and scored."""
        began = time.perf_counter()
        numbers = range(self.next_prompt, self.next_prompt + count)
        self._begin_until(numbers.stop + self._num_ahead)
        while not all(self._is_drawn(number) for number in numbers):
            for sample in self.sampler.advance(1):
                self._open[sample.prompt.number][sample.number] = sample
                if self._runner is not None:
                    self._runner.submit(sample)
            self._on_work()
        self.next_prompt = numbers.stop
        generated = time.perf_counter()
        groups = [
            [sample for sample in self._open.pop(number) if sample is not None]
            for number in numbers
        ]
        scores = collect_scores(
            self._runner, [sample for group in groups for sample in group]
        )
        scores = scores.reshape(count, self._num_samples, -1)
        seconds["generation"] += generated - began
        seconds["scoring"] += time.perf_counter() - generated
        prompts = [self._prompts.pop(number) for number in numbers]
        return [
            Group(prompt, group, group_scores)
            for prompt, group, group_scores in zip(prompts, groups, scores, strict=True)
        ]
