"""What is logged of a rollout."""

from collections.abc import Sequence

import numpy as np

from maxlm.data.batch_source import Batch
from maxlm.rl.advantages import sum_scores
from maxlm.rl.rewards.reward import Reward
from maxlm.rl.rollouts.groups import CollectedGroups


def describe_groups(
    collected: CollectedGroups, rewards: Sequence[Reward]
) -> dict[str, float]:
    """Returns what is logged of samples and their scores."""
    samples = collected.list_samples()
    scores = np.concatenate([group.scores for group in collected.groups])
    lengths = np.array([sample.num_sampled for sample in samples])
    num_groups = len(collected.groups)
    metrics = {
        "response_length": float(lengths.mean()),
        "max_response_length": float(lengths.max()),
        "complete": float(np.mean([sample.is_complete for sample in samples])),
        "environment_errors": float(len(collected.environment_errors)),
    }
    if rewards:
        totals = sum_scores(scores, [reward.weight for reward in rewards])
        metrics["reward"] = float(np.nanmean(totals))
        metrics["reward_std"] = float(np.nanstd(totals))
    # One sample has no others to differ from.
    if rewards and len(samples) > num_groups:
        metrics["zero_variance_groups"] = collected.num_without_variance / num_groups
        metrics["resampled_groups"] = float(collected.num_left_out)
    for name, count in collected.reward_failures.items():
        metrics[name] = float(count)
    for index, reward in enumerate(rewards):
        own_scores = scores[:, index]
        if not np.isnan(own_scores).all():
            metrics[f"reward/{reward.name}"] = float(np.nanmean(own_scores))
    return metrics


def describe_staleness(
    batch: Batch, step: int, updates_per_rollout: int, num_under_way: int
) -> dict[str, float]:
    """Returns what is logged of tokens that older parameters drew.

    Args:
        batch: with ``versions``, the steps whose parameters drew each target.
        step: the first that trains on the rollout.
        num_under_way: samples that a later rollout takes and that are not drawn yet.
    """
    versions = batch["versions"]
    is_drawn = (batch["weights"] > 0) & (versions >= 0)
    ages = (step - versions[is_drawn]) / updates_per_rollout
    return {
        "staleness": float(ages.mean()) if ages.size else 0.0,
        "max_staleness": float(ages.max()) if ages.size else 0.0,
        "samples_under_way": float(num_under_way),
    }


def describe_engine_work(collected: CollectedGroups) -> dict[str, float]:
    """Returns what is logged of the work and the time that a rollout took."""
    seconds = collected.seconds
    timings = {f"{phase}_seconds": value for phase, value in seconds.items()}
    num_tokens = sum(sample.num_sampled for sample in collected.list_samples())
    return timings | {
        "generated_tokens_per_second": num_tokens / max(seconds["generation"], 1e-9),
        "generated_tokens_per_step": num_tokens / max(collected.engine_steps, 1),
        "engine_steps": float(collected.engine_steps),
    }
