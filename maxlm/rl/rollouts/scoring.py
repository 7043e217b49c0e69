"""Scores of drawn samples, the same on all processes, and samples as people read them."""

from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.rl.advantages import sum_scores
from maxlm.rl.rewards.reward import Reward
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.records import ScoredSample
from maxlm.rl.samples import Sample
from maxlm.runtime.collectives import run_on_process_0


def collect_scores(
    runner: RewardRunner | None, samples: Sequence[Sample]
) -> NDArray[np.float64]:
    """Returns the scores [samples, rewards] of samples that were submitted; NaN: a
    reward gave none. All processes call it together.

    Args:
        runner: what they were submitted to, on process 0; None on others.

    Raises:
        MaxlmError: a reward failed.
    """

    def collect() -> list[list[float]]:
        assert runner is not None
        return runner.collect(samples).tolist()

    rows = collect() if jax.process_count() == 1 else run_on_process_0(collect)
    return np.array(rows, np.float64).reshape(len(samples), -1)


def count_reward_failures(runner: RewardRunner | None) -> dict[str, int]:
    """Returns what :meth:`RewardRunner.count_failures` does, on all processes, which
    call it together. ``runner``: on process 0; None on others."""

    def count_failures() -> dict[str, int]:
        assert runner is not None
        return runner.count_failures()

    if jax.process_count() == 1:
        return count_failures()
    return run_on_process_0(count_failures)


def list_scored(
    samples: Sequence[Sample],
    scores: NDArray[np.float64],
    rewards: Sequence[Reward],
    tokenizer: Tokenizer,
    advantages: Sequence[float] | None = None,
) -> list[ScoredSample]:
    """Returns samples as people read them.

    Args:
        scores: [samples, rewards], NaN: none.
        advantages: of each sample; None: they are not learnt from.
    """
    names = [reward.name for reward in rewards]
    totals = sum_scores(scores, [reward.weight for reward in rewards])
    if advantages is None:
        advantages = [0.0] * len(samples)
    return [
        ScoredSample(
            sample,
            tokenizer.decode(sample.prompt.tokens),
            dict(zip(names, sample_scores.tolist(), strict=True)),
            float(total),
            advantage,
        )
        for sample, sample_scores, total, advantage in zip(
            samples, scores, totals, advantages, strict=True
        )
    ]
