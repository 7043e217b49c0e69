"""How well a policy answers prompts that it does not learn from."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.rl.advantages import sum_scores
from maxlm.rl.environments import EnvironmentConfig
from maxlm.rl.rewards.reward import Reward
from maxlm.rl.samples import Sample


class ValidationConfig(Config):
    """Prompts that are answered every ``train.eval_every`` steps, and at the end."""

    environment: EnvironmentConfig
    """Where they come from: other files than training's; an environment that draws
    prompts draws others by a seed of its own."""
    num_prompts: int = Field(default=128, gt=0)
    """The first so many, always the same; all if there are fewer."""
    num_samples: int = Field(default=1, gt=0)
    """Answers to each; more tell how often one of them is right."""
    temperature: float = Field(default=0.0, ge=0)
    """0: the likeliest tokens; above: answers are drawn by the same random numbers
    every time. Other settings of sampling are those of ``task.rollouts``."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            message = f"{self.num_samples} answers to a prompt at temperature 0, which "
            message += "are all alike"
            fix = "set validation.temperature=1, or validation.num_samples=1"
            raise MaxlmError(message, where="task.validation.num_samples", fix=fix)
        return self


def describe_validation(
    rewards: Sequence[Reward],
    samples: Sequence[Sample],
    scores: NDArray[np.float64],
    num_samples: int,
) -> dict[str, float]:
    """Returns what is logged of an evaluation: ``eval_reward``, each reward's own mean,
    and where there are several samples of a prompt the mean of its best.

    Args:
        scores: [prompts · num_samples, rewards], samples of a prompt side by side.
    """
    totals = sum_scores(scores, [reward.weight for reward in rewards])
    lengths = [sample.num_sampled for sample in samples]
    metrics = {
        "eval_reward": float(totals.mean()),
        "eval_response_length": float(np.mean(lengths)),
        "eval_complete": float(np.mean([sample.is_complete for sample in samples])),
    }
    if num_samples > 1:
        best = totals.reshape(-1, num_samples).max(axis=1)
        metrics[f"eval_best_of_{num_samples}"] = float(best.mean())
    if len(rewards) > 1:
        for index, reward in enumerate(rewards):
            reward_scores = scores[:, index]
            if not np.isnan(reward_scores).all():
                metrics[f"eval_reward/{reward.name}"] = float(np.nanmean(reward_scores))
    return metrics
