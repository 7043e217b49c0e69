"""`maxlm smoke` tries recipes of policies, rollouts included."""

import jax
import numpy as np
import pytest

from maxlm.config.assets import list_shipped_configs
from maxlm.config.load import load_config
from maxlm.rl.rollouts import source
from maxlm.rl.tasks.policy import PolicyTask
from maxlm.run.config import RunConfig
from maxlm.train.smoke import shrink_config, smoke

# What policies of the demos begin with learns of data.
RECIPES = [
    name
    for name in list_shipped_configs()
    if name.startswith("rl/") and not name.endswith("_base")
]


def read(name: str, *settings: str) -> RunConfig:
    return load_config(RunConfig, name, ["compilation_cache=null", *settings]).value


@pytest.mark.parametrize("name", RECIPES)
def test_a_small_recipe_needs_no_files_and_is_small(name):
    run = read(name)
    small = shrink_config(run, 1)
    assert isinstance(small.task, PolicyTask)
    assert small.task.kind == run.task.kind
    assert small.task.files_setting is None
    assert small.task.validation is None
    assert small.task.max_new_tokens < 16
    assert small.task.engine.max_sequences < 16
    num_samples = small.data.batch_size * small.task.minibatches
    assert num_samples % small.task.num_samples == 0
    assert num_samples <= 16


@pytest.mark.heavy
@pytest.mark.more
def test_rollouts_are_drawn_once_and_teach(monkeypatch):
    """Of a recipe with several steps for a rollout and a reward that is a model; what
    is drawn in the middle of a rollout is read again."""
    jax.config.update("jax_disable_most_optimizations", True)
    advantages = []
    make = source.PolicyRollouts._make

    def record(self, number, state):
        arrays, metrics = make(self, number, state)
        advantages.append((number, arrays["batch_advantages"]))
        return arrays, metrics

    monkeypatch.setattr(source.PolicyRollouts, "_make", record)
    run = read("rl/llama3_8b_ppo")
    checks = list(smoke(run, jax.devices()[:1]))
    jax.config.update("jax_disable_most_optimizations", False)
    assert [check for check in checks if not check.passed] == []
    names = [check.name for check in checks]
    assert "restored steps repeat exactly" in names
    numbers = [number for number, _ in advantages]
    # Ten steps, four for a rollout.
    assert numbers == [0, 1, 2]
    assert all(np.ptp(arrays) > 0 for _, arrays in advantages)
