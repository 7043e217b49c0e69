"""A separate value model starts as its run or the policy did, is in checkpoints, and is
left out where the policy is used; the plan counts it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import layer_group_shapes
from maxlm.config import MaxlmError
from maxlm.config.show import to_yaml
from maxlm.models.params import AUXILIARY, drop_auxiliary, flatten_names
from maxlm.plan.predict import plan_run
from maxlm.rl.tasks.ppo import PpoTask
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from maxlm.run.warm_start import init_or_warm_start_state
from maxlm.sharding import MESH_AXES
from tests.train import cells


def make_config(cell: cells.Cell = cells.ALONE, **settings: Any) -> RunConfig:
    config = cells.config_of("ppo", cell)
    task = PpoTask.model_validate(
        {
            "rewards": [{"kind": "exact_match"}],
            "kl_coef": 0.0,
            "rollouts": {"sampling": {"max_new_tokens": 5}},
        }
        | settings
    )
    heads = dict(task.required_heads)
    model = config.model.model_copy(update={"heads": heads})
    return config.model_copy(update={"task": task, "model": model})


@pytest.mark.heavy
def test_a_value_model_starts_as_the_policy_and_stays_in_training(tmp_path):
    config = make_config(value_model="separate")
    setup = set_up_run(config, jax.devices()[:1])
    state = init_or_warm_start_state(setup)
    policy = flatten_names(drop_auxiliary(state.params))
    value = flatten_names(state.params[AUXILIARY]["value"])
    assert value.keys() == policy.keys() | {"heads.value.kernel"}
    for name, array in policy.items():
        np.testing.assert_array_equal(value[name], array)

    groups = layer_group_shapes(setup.specs)
    with FolderTier(tmp_path / "checkpoints", layer_groups=groups) as tier:
        tier.save(0, state, {"config": config.model_dump(mode="json")})
        tier.wait()
        restored = tier.restore(0, setup.abstract_state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        used = set_up_run(config, jax.devices()[:1], for_training=False)
        params = tier.restore(0, used.abstract_state.params, "params")
    loaded = flatten_names(params)
    assert loaded.keys() == policy.keys()
    for name, array in policy.items():
        np.testing.assert_array_equal(loaded[name], array)


def save_run(folder: Path, heads: dict[str, int]) -> dict[str, np.ndarray]:
    """Saves a run of a model with heads; returns its parameters by name."""
    config = cells.config_of("mha", cells.ALONE)
    model = config.model.model_copy(update={"heads": heads})
    setup = set_up_run(
        config.model_copy(update={"model": model, "seed": 7}), jax.devices()[:1]
    )
    state = setup.init_train_state()
    with FolderTier(folder / "checkpoints") as tier:
        tier.save(0, state, {"config": setup.config.model_dump(mode="json")})
    (folder / "config.yaml").write_text(to_yaml(setup.config))
    return {name: np.asarray(x) for name, x in flatten_names(state.params).items()}


@pytest.mark.heavy
def test_a_value_model_starts_as_its_run(tmp_path):
    """Its head has another name there."""
    stored = save_run(tmp_path / "reward", {"score": 1})
    config = make_config(value_model="separate", value_run=str(tmp_path / "reward"))
    state = init_or_warm_start_state(set_up_run(config, jax.devices()[:1]))
    value = flatten_names(state.params[AUXILIARY]["value"])
    stored["heads.value.kernel"] = stored.pop("heads.score.kernel")
    assert value.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(value[name], array)

    save_run(tmp_path / "several", {"score": 1, "tone": 3})
    config = make_config(value_model="separate", value_run=str(tmp_path / "several"))
    setup = set_up_run(config, jax.devices()[:1])
    with pytest.raises(MaxlmError, match=r"heads that the one .* not: tone of 3"):
        init_or_warm_start_state(setup)


def test_the_plan_counts_a_value_model():
    sizes = dict.fromkeys(MESH_AXES, 1)
    alone = plan_run(make_config(), None, sizes=sizes)
    both = plan_run(make_config(value_model="separate"), None, sizes=sizes)
    for part in ("parameters", "optimizer"):
        ratio = getattr(both.memory, part) / getattr(alone.memory, part)
        assert ratio == pytest.approx(2, rel=0.01)
    assert both.memory.activations == pytest.approx(2 * alone.memory.activations)
    names = [phase.name for phase in both.extra.phases]
    assert names[-1] == "values"


def test_what_a_value_model_cannot_be_is_one_line():
    with pytest.raises(MaxlmError, match="starts from no run") as caught:
        make_config(value_run="runs/reward")
    assert caught.value.where == "task.value_run"
    cell = cells.CELLS["cp ring in order × pp 1f1b"]
    config = make_config(cell, value_model="separate")
    with pytest.raises(MaxlmError, match="a pipeline cannot run"):
        set_up_run(config, cells.devices_of(config))
