"""Environments: where prompts come from, and what answers the policy's turns.

To add one, write an :class:`Environment` and register its class:
``ENVIRONMENTS.register("kind")`` decorates it, and an installed package names its class
in an entry point of the group ``maxlm.environments``.
"""

from typing import Annotated

from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.rl.environments.environment import (
    Environment,
    GeneratedRows,
    PromptRows,
    Reply,
)
from maxlm.rl.environments.single_turn import SingleTurnEnvironment

ENVIRONMENTS = Registry[type[Environment]](
    "environment",
    {
        "single_turn": "maxlm.rl.environments.single_turn:SingleTurnEnvironment",
        "addition": "maxlm.rl.environments.addition:AdditionEnvironment",
        "calculator": "maxlm.rl.environments.calculator:CalculatorEnvironment",
        "python_tool": "maxlm.rl.environments.python_tool:PythonToolEnvironment",
        "reasoning_gym": (
            "maxlm.rl.environments.reasoning_gym:ReasoningGymEnvironment"
        ),
    },
)
EnvironmentConfig = Annotated[
    Environment, RegisteredConfig(ENVIRONMENTS, Environment, default="single_turn")
]

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "EnvironmentConfig",
    "GeneratedRows",
    "PromptRows",
    "Reply",
    "SingleTurnEnvironment",
]
