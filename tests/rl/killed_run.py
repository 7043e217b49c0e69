"""Trains a run that is killed on the way, as by ``kill -9``.

    python -m tests.rl.killed_run CONFIG [PLACE COUNT]

PLACE is one of ``PLACES``: the process dies when it gets there for the COUNT-th time.
"""

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from tests.rl.policy_runs import train

# Where a process may die: (module, class, method, whether behind it).
PLACES = {
    "generation": ("maxlm.rl.rollouts.sampler", "RolloutSampler", "advance", False),
    "scoring": ("maxlm.rl.rewards.runner", "RewardRunner", "collect", False),
    "logging": ("maxlm.rl.rollouts.records", "SampleLog", "append", False),
    "recording": ("maxlm.rl.rollouts.records", "RolloutFiles", "write", False),
    "recorded": ("maxlm.rl.rollouts.records", "RolloutFiles", "write", True),
    "step": ("maxlm.rl.rollouts.source", "PolicyRollouts", "rows", True),
    "saving": ("maxlm.checkpoint.folder", "FolderTier", "save", False),
    # The save goes on in the background.
    "being saved": ("maxlm.checkpoint.folder", "FolderTier", "save", True),
}


def die_at(place: str, count: int) -> None:
    """Lets this process die when it gets to a place for the ``count``-th time."""
    module_name, class_name, method_name, is_behind = PLACES[place]
    owner = getattr(importlib.import_module(module_name), class_name)
    method: Callable[..., Any] = getattr(owner, method_name)
    num_calls = 0

    @functools.wraps(method)
    def die_or_call(*arguments: object, **keywords: object) -> object:
        nonlocal num_calls
        num_calls += 1
        is_last = num_calls == count
        if is_last and not is_behind:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments, **keywords)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, method_name, die_or_call)


if __name__ == "__main__":
    path, *place_and_count = sys.argv[1:]
    if place_and_count:
        die_at(place_and_count[0], int(place_and_count[1]))
    train(path)
