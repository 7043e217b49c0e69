"""Every layout trains as one device does, from the same checkpoint: the loss and every
parameter after each step. What it then writes, one device reads."""

from typing import Any

import jax
import numpy as np
import pytest

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import layer_group_shapes
from maxlm.run.setup import set_up_run
from tests.train import cells

pytestmark = pytest.mark.heavy

TOLERANCE = 1e-5


def _stored_over(name: str) -> tuple[frozenset[str], str]:
    """What a checkpoint's arrays depend on: axes that parameters lie over, and rules of
    storage."""
    cell = cells.CELLS[name]
    axes = {axis for axis, size in cell.mesh.items() if size > 1} - {"data", "context"}
    return frozenset(axes), str(cell.settings.get("sharding", {}).get("storage"))


# Writing depends neither on the model nor on how a step is computed: one of each.
WRITTEN = {
    _stored_over(name): (name, model) for name, model in [*cells.TRAINED, *cells.COVER]
}


def _mark(cell: tuple[str, str]) -> list[pytest.MarkDecorator]:
    """`make test` takes each part of the matrix, `make test-more` each two that meet,
    `make test-layouts` all of it."""
    if cell in cells.SMALL_COVER:
        return []
    return [pytest.mark.more if cell in cells.COVER else pytest.mark.slow]


TRAINED = [pytest.param(*cell, marks=_mark(cell)) for cell in cells.TRAINED]


def with_metrics(
    params: dict[str, np.ndarray], metrics: dict[str, float]
) -> dict[str, Any]:
    """One flat record of a step."""
    return params | {
        f"metric:{name}": np.float64(value) for name, value in metrics.items()
    }


def differences(
    metrics: dict[str, float], params: dict[str, np.ndarray], want: dict[str, Any]
) -> dict[str, float]:
    """What differs from a record by more than the tolerance, and how much."""
    ours = with_metrics(params, metrics)
    assert ours.keys() == want.keys()
    wrong = {}
    for name, value in ours.items():
        if name == "metric:accuracy":
            continue  # the sign of margins, which at first are rounding
        size = np.abs(want[name]).max()
        if not name.startswith("metric:"):
            # An update is of the learning rate's size, also where its gradient is only
            # rounding (a key's bias, to which softmax is blind).
            size = max(size, cells.RATE)
        elif name.endswith(("_reward", "margin", "kl", "value_mean")):
            # Differences of log-probabilities, which are larger, and values of either
            # sign.
            size = max(size, 1.0)
        error = np.abs(value - want[name]).max() / size if size else np.abs(value).max()
        if not error <= TOLERANCE:
            wrong[name] = float(error)
    return wrong


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """What one device makes of a model and its batches: (setup, records, first
    checkpoint)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    references = {}

    def find(model: str):
        if model not in references:
            config = cells.config_of(model, cells.ALONE)
            setup = set_up_run(config, cells.devices_of(config))
            steps = cells.train(setup, cells.start_from(folder / model, setup))
            records = [
                with_metrics(cells.canonical(setup, s.params), m) for m, s in steps
            ]
            references[model] = setup, records, folder / model
        return references[model]

    return find


@pytest.mark.parametrize(("name", "model"), TRAINED)
def test_a_layout_equals_one_device(name, model, one_device, tmp_path):
    alone, want, checkpoint = one_device(model)
    config = cells.config_of(model, cells.CELLS[name])
    setup = set_up_run(config, cells.devices_of(config))
    steps = cells.train(setup, cells.start_from(checkpoint, setup))
    for step, ((metrics, state), record) in enumerate(zip(steps, want, strict=True)):
        wrong = differences(metrics, cells.canonical(setup, state.params), record)
        assert not wrong, f"step {step}"
    if (name, model) in WRITTEN.values():
        written_here_is_read_there(setup, state, alone, tmp_path / "saved")


def written_here_is_read_there(setup, state, alone, folder) -> None:
    with FolderTier(folder, layer_groups=layer_group_shapes(setup.specs)) as keeper:
        keeper.save(cells.STEPS, state, {})
    with FolderTier(folder, read_only=True) as keeper:
        restored = keeper.restore(cells.STEPS, alone.abstract_state)
    ours = cells.canonical(setup, state.params)
    for path, value in cells.canonical(alone, restored.params).items():
        np.testing.assert_array_equal(value, ours[path], err_msg=path)
    for mine, read in zip(
        jax.tree.leaves(state), jax.tree.leaves(restored), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(mine).reshape(read.shape), read)
