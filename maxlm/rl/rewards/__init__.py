"""Rewards: what samples of a policy are scored by, each a config of a kind.

To add one, write a :class:`Reward` here and name it in ``REWARDS``, or register it from
outside: ``REWARDS.register("kind")`` decorates its class, and an installed package
names its class in an entry point of the group ``maxlm.rewards``. For one function
without settings there is the kind ``python``.
"""

from typing import Annotated

from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.rl.rewards.reward import Reward

REWARDS = Registry[type[Reward]](
    "reward",
    {
        "exact_match": "maxlm.rl.rewards.exact_match:ExactMatchReward",
        "math": "maxlm.rl.rewards.mathematics:MathReward",
        "code": "maxlm.rl.rewards.code:CodeReward",
        "reasoning_gym": "maxlm.rl.rewards.reasoning_gym:ReasoningGymReward",
        "json_schema": "maxlm.rl.rewards.json_schema:JsonSchemaReward",
        "format": "maxlm.rl.rewards.forms:FormatReward",
        "length": "maxlm.rl.rewards.forms:LengthReward",
        "environment": "maxlm.rl.rewards.forms:EnvironmentReward",
        "reward_model": "maxlm.rl.rewards.reward_model:RewardModelReward",
        "judge": "maxlm.rl.rewards.judge:JudgeReward",
        "python": "maxlm.rl.rewards.function:FunctionReward",
    },
)
RewardConfig = Annotated[Reward, RegisteredConfig(REWARDS, Reward)]

__all__ = ["REWARDS", "Reward", "RewardConfig"]
