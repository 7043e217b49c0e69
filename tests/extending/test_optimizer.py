"""An optimizer as an external package writes it: the sign of a momentum (Signum,
Bernstein et al. 2018, arXiv 1802.04434), with a setting of its own."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import Field

from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.models.params import Params, flatten_names
from maxlm.optim.config import OPTIMIZERS, OptimizerConfig
from maxlm.optim.kinds import RegisteredOptimizer
from maxlm.run.config import RunConfig
from maxlm.train.program import train_model
from tests.train import tiny

pytestmark = pytest.mark.heavy


class SignumConfig(OptimizerConfig):
    kind: Literal["test_signum"] = "test_signum"  # pyright: ignore
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the momentum."""


class SignumState(NamedTuple):
    signum_momentum: Params


def make_signum(config: SignumConfig, specs: Params) -> optax.GradientTransformation:
    """``m = decay · m + (1 - decay) · g``; the direction is the sign of m."""
    del specs

    def init(params: Params) -> SignumState:
        return SignumState(jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: Params, state: SignumState, params: Params | None = None
    ) -> tuple[Params, SignumState]:
        del params
        momentum = jax.tree.map(
            lambda m, g: config.decay * m + (1 - config.decay) * g,
            state.signum_momentum,
            gradients,
        )
        return jax.tree.map(jnp.sign, momentum), SignumState(momentum)

    return optax.GradientTransformation(init, update)  # pyright: ignore


OPTIMIZERS.register("test_signum", RegisteredOptimizer(make_signum, SignumConfig))


def test_its_direction_is_the_published_one():
    random = np.random.default_rng(0)
    steps = random.normal(size=(4, 5, 3))
    direction = make_signum(SignumConfig(decay=0.7), {})
    state = direction.init({"w": jnp.zeros((5, 3))})
    momentum = np.zeros((5, 3))
    for gradient in steps:
        update, state = direction.update({"w": jnp.asarray(gradient)}, state)
        momentum = 0.7 * momentum + 0.3 * gradient
        np.testing.assert_array_equal(update["w"], np.sign(momentum))


@pytest.mark.more
@pytest.mark.usefixtures("compiled_once")
def test_it_trains(tmp_path):
    """The second of two steps, in float64 from what the first one left."""
    settings = tiny.settings(tmp_path, tiny.write_text(tmp_path / "text"))
    settings["data"]["heldout_fraction"] = 0
    optimizer = {"kind": "test_signum", "decay": 0.5, "weight_decay": 0.25}
    settings |= {"optimizer": optimizer, "checkpoint": {"every_steps": 2}}

    def train(steps: int):
        top = {"name": f"steps{steps}", "train": {"steps": steps}}
        config = RunConfig.model_validate(settings | top)
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config))
        assert load_config(RunConfig, path).value == config
        return train_model(config, say=lambda _: None).state

    first = flatten_names(train(1).params)
    state = train(2)
    momentum = flatten_names(
        optax.tree_utils.tree_get(state.opt_state, "signum_momentum")
    )
    second = flatten_names(state.params)
    assert momentum.keys() == second.keys()
    learning_rate = 1e-2
    for name, array in second.items():
        before = np.asarray(first[name], np.float64)
        direction = np.sign(np.asarray(momentum[name], np.float64))
        # Norms' scales are not decayed.
        decay = 0.0 if "norm" in name else 0.25
        expected = before - learning_rate * (direction + decay * before)
        np.testing.assert_allclose(array, expected, rtol=0, atol=3e-7, err_msg=name)
        assert direction.any(), name
