"""Settings of rollouts."""

from typing import Literal

from pydantic import Field

from maxlm.config import Config
from maxlm.config.sampling import SamplingConfig
from maxlm.rl.rollouts.prompts import LongPrompts


class RolloutConfig(Config):
    """How the policy answers prompts."""

    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256)
    """How tokens are drawn; ``max_new_tokens`` counts those of all turns of an
    episode. ``seed`` has no effect: random streams come from the run's seed."""
    max_prompt_length: int | None = Field(default=None, gt=0)
    """Tokens of a prompt at most; null: as many as leave room for
    ``sampling.max_new_tokens``."""
    long_prompts: LongPrompts = "refuse"
    """Longer prompts: ``refuse``: the run does not start; ``leave_out``: they are left
    out, and counted."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Prompts whose samples all score the same, so that comparing them teaches nothing:
    ``keep``: their tokens and samples count in what the loss is divided by, and in its
    divergence and entropy; ``drop``: the loss is as though they had not been drawn;
    ``resample``: the next prompts take their place (dynamic sampling, DAPO, Yu et al.
    2025, arXiv 2503.14476, §3.2), and what is left at the end is kept."""
    max_resamples: int = Field(default=3, ge=0)
    """Rounds of such prompts in a rollout at most, with zero_variance=resample."""
    max_turns: int | None = Field(default=None, gt=0)
    """Turns of the policy in an episode at most; null: as many as the environment
    has."""
    staleness: int = Field(default=0, ge=0)
    """Rollouts that are begun ahead. While the slowest samples of a rollout are waited
    for, the engine goes on with the prompts of so many after it, and with what is left
    of these after the next updates; no token that is trained on is older than so many
    rollouts. 0: synchronous, every token is drawn by the parameters that the
    rollout's first step begins with."""
    update_in_flight: Literal["recompute", "keep_caches"] = "recompute"
    """Samples that are under way when the parameters are replaced: ``recompute``: the
    new ones read what is there anew, so that they draw from their own distribution, and
    a run that is killed and resumed is the same run; ``keep_caches``: they go on over
    the keys and values of the old ones, which costs nothing, but behind a resume or a
    validation, which have them computed anew as above."""
    keep_records: int | None = Field(default=None, gt=0)
    """Newest rollouts whose arrays stay in the run's folder, besides those that its
    checkpoints need; null: all."""
    environment_errors: Literal["stop", "end_episode"] = "stop"
    """An environment that fails to answer: ``stop`` ends the run with one line;
    ``end_episode``: the sample ends where it is, incomplete, and the metric
    ``environment_errors`` counts it."""
    reply_seconds: float = Field(default=120.0, gt=0)
    """An environment that takes longer to answer has failed."""
    reply_threads: int | None = Field(default=None, gt=0)
    """Answers that an environment works out at once; null: one a core."""
