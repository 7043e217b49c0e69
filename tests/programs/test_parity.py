"""Every layout trains as one device does, from the same checkpoint: the loss and every parameter
after each step. What it then writes, one device reads."""

import jax
import numpy as np
import pytest

from maxlm.programs.setup import set_up
from maxlm.train.checkpoint import Checkpointer, group_sizes
from tests.programs import cells

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """What one device makes of a model and its batches: (setup, results, first checkpoint)."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def find(model: str, packed: bool):
        if (model, packed) not in made:
            config = cells.config_of(model, cells.ALONE)
            setup = set_up(config, cells.devices_of(config))
            state = cells.start_from(folder / model, setup)
            made[model, packed] = setup, cells.train(setup, state, packed), folder / model
        return made[model, packed]

    return find


@pytest.mark.parametrize("model", cells.MODELS)
@pytest.mark.parametrize("name", cells.CELLS)
def test_a_layout_equals_one_device(name, model, one_device, tmp_path):
    alone, want, checkpoint = one_device(model, packed=True)
    config = cells.config_of(model, cells.CELLS[name])
    setup = set_up(config, cells.devices_of(config))
    got = cells.train(setup, cells.start_from(checkpoint, setup), packed=True)
    for step, ((metrics, state), (one_metrics, one)) in enumerate(zip(got, want, strict=True)):
        assert metrics == pytest.approx(one_metrics, rel=TOLERANCE), step
        ours, theirs = cells.canonical(setup, state.params), cells.canonical(alone, one.params)
        assert ours.keys() == theirs.keys()
        for path, value in ours.items():
            # An update is of the learning rate's size, also where its gradient is only rounding
            # (a key's bias, to which softmax is blind).
            size = max(np.abs(theirs[path]).max(), cells.RATE)
            error = np.abs(value - theirs[path]).max() / size
            assert error <= TOLERANCE, f"step {step}: {path} differs by {error:.1e}"

    with Checkpointer(tmp_path / "saved", grouped=group_sizes(setup.specs)) as keeper:
        keeper.save(cells.STEPS, state, {}, force=True)
    with Checkpointer(tmp_path / "saved", read_only=True) as keeper:
        restored = keeper.restore(cells.STEPS, alone.abstract_state)
    for path, value in cells.canonical(alone, restored.params).items():
        np.testing.assert_array_equal(value, ours[path], err_msg=path)
    for mine, read in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(mine).reshape(read.shape), read)
