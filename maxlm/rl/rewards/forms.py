"""Rewards of an answer's form: its length and format; and an environment's own score."""

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from maxlm.config import MaxlmError
from maxlm.rl.rewards.answers import check_pattern
from maxlm.rl.rewards.reward import Reward, Worker
from maxlm.rl.samples import Sample


class FormatReward(Reward):
    """1 where a regular expression matches the whole of the policy's last turn, but for
    spaces around it; 0 elsewhere."""

    kind: str = "format"
    pattern: str = r"<think>.*</think>\s*<answer>.*\S.*</answer>"
    """The expression; a dot matches the end of a line too."""

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        check_pattern(pattern)
        return pattern

    def score(self, sample: Sample) -> float:
        text = sample.last_answer.strip()
        return float(re.fullmatch(self.pattern, text, re.DOTALL) is not None)


class LengthReward(Reward):
    """A soft penalty of long answers (DAPO, Yu et al. 2503.14476, equation 13): 0 up to
    ``max_length`` - ``buffer`` tokens that the policy drew, from there linearly down to
    -1 at ``max_length``, and -1 beyond."""

    kind: str = "length"
    max_length: int = Field(gt=0)
    """Tokens from which on the penalty is -1."""
    buffer: int = Field(gt=0)
    """Tokens over which it grows."""

    @model_validator(mode="after")
    def _check_buffer(self) -> Self:
        if self.buffer > self.max_length:
            message = (
                f"buffer={self.buffer} is longer than max_length={self.max_length}"
            )
            raise MaxlmError(message, where="buffer", fix="shorten it")
        return self

    @property
    def worker(self) -> Worker:
        return "caller"

    def score(self, sample: Sample) -> float:
        excess = sample.num_sampled - (self.max_length - self.buffer)
        return 0.0 - min(max(excess / self.buffer, 0.0), 1.0)


class EnvironmentReward(Reward):
    """The score that the environment gave."""

    kind: str = "environment"

    @property
    def worker(self) -> Worker:
        return "caller"

    def score(self, sample: Sample) -> float:
        if sample.environment_reward is None:
            fix = "leave the reward out, or use an environment that scores"
            raise MaxlmError("the environment gave no score", fix=fix)
        return sample.environment_reward
