"""What models say of a rollout is the same in every layout; tests/train/test_parity.py
has steps on rollouts."""

from typing import Any

import jax
import numpy as np
import pytest

from maxlm.models.params import bind
from maxlm.optim.step import bind_frozen
from maxlm.rl.tasks.grpo import GrpoTask
from maxlm.run.global_batch import (
    batch_sharding,
    get_local_row_indices,
    make_global_batch,
)
from maxlm.run.setup import set_up_run
from maxlm.sharding import bind_mesh
from maxlm.tasks.task import TaskModels
from tests.models.building import QUICK
from tests.models.test_routes import draw_model_routes
from tests.train import cells

pytestmark = pytest.mark.more

LAYOUTS = {
    "ppo": ["fsdp × cp ring × tp+sp", "cp ring in order × pp 1f1b"],
    "moe": ["fsdp × cp ring × tp+sp", "ep × pp 1f1b × tp+sp"],
}
ADDED = {"ppo": {"old_log_probs", "values"}, "moe": {"old_log_probs"}}
REPLAYING = GrpoTask.model_validate(
    {"rewards": [{"kind": "exact_match"}], "epochs": 2, "replay_routes": True}
    | {"sequences_per_row": cells.SEQ, "num_samples": 2}
)


def prepare_rollout(
    model_name: str, cell: cells.Cell, checkpoint: Any
) -> dict[str, np.ndarray]:
    """Arrays [rows, S] that a layout's policy adds to a rollout, in the order of
    tokens; one with experts is given some for its tokens."""
    config = cells.config_of(model_name, cell)
    if model_name == "moe":
        config = config.model_copy(update={"task": REPLAYING})
    setup = set_up_run(config, cells.devices_of(config))
    state = cells.start_from(checkpoint, setup)
    lead = (cells.MICRO, cells.ROWS)
    rules = setup.placed.compute
    specs = setup.config.batch_arrays
    rows = get_local_row_indices(batch_sharding(rules, setup.mesh, ()), lead)
    drawn = cells.batches(setup.config.model.vocab_size)[0]
    if "routes" in specs:
        num_rows = cells.ROWS * cells.MICRO
        routes = draw_model_routes(config.model, (num_rows, cells.SEQ))
        drawn = drawn | {"routes": routes}
    local_batch = {name: drawn[name][rows] for name in specs}
    batch = make_global_batch(
        local_batch, specs, rows, rules, setup.mesh, lead, setup.token_order
    )

    def prepare(params, frozen, batch):
        models = TaskModels(
            bind(setup.model, params),
            bind_frozen(setup.frozen_modules, frozen, params),
        )
        task: Any = setup.config.task
        return task.prepare_rollouts(models, batch, jax.random.key(0))

    run = bind_mesh(setup.mesh, jax.jit(prepare, compiler_options=QUICK))
    added = run(state.params, state.frozen, batch)
    arrays = {}
    for name, array in added.items():
        value = np.asarray(array).reshape(-1, cells.SEQ)
        if setup.token_order is not None:
            value = value[:, np.argsort(setup.token_order)]
        arrays[name] = np.where(drawn["segment_ids"] > 0, value, 0.0)
    return arrays


@pytest.mark.parametrize("model_name", LAYOUTS)
def test_a_rollout_is_prepared_alike(tmp_path, model_name):
    checkpoint = tmp_path / "checkpoint"
    want = prepare_rollout(model_name, cells.ALONE, checkpoint)
    assert want.keys() == ADDED[model_name]
    for name in LAYOUTS[model_name]:
        ours = prepare_rollout(model_name, cells.CELLS[name], checkpoint)
        for array_name, array in want.items():
            np.testing.assert_allclose(
                ours[array_name], array, rtol=1e-5, atol=1e-5, err_msg=name
            )
