"""Every layout trains as one device does: the loss and every parameter after each step."""

import numpy as np
import pytest

from maxlm.programs.setup import set_up
from tests.programs import cells

TOLERANCE = 1e-5


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("model", cells.MODELS)
@pytest.mark.parametrize("name", cells.CELLS)
def test_a_layout_equals_one_device(name, model, packed):
    config = cells.config_of(model, cells.CELLS[name])
    got = cells.train(set_up(config, cells.devices_of(config)), packed)
    want = cells.one_device(model, packed)
    for step, ((metrics, params), (one_metrics, one_params)) in enumerate(
        zip(got, want, strict=True)
    ):
        assert metrics == pytest.approx(one_metrics, rel=TOLERANCE), step
        assert params.keys() == one_params.keys()
        for path, value in params.items():
            # An update is of the learning rate's size, also where its gradient is only rounding
            # (a key's bias, to which softmax is blind).
            size = max(np.abs(one_params[path]).max(), cells.RATE)
            error = np.abs(value - one_params[path]).max() / size
            assert error <= TOLERANCE, f"step {step}: {path} differs by {error:.1e}"
