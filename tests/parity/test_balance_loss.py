"""Coefficients of published balance losses mean here what they mean in transformers."""

from importlib import import_module

import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.layers.moe import MoeConfig, route, router_loss
from tests.parity.compare import read
from tests.parity.tiny import CASES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COEFFICIENT = 0.03
GIVEN = {
    "mixtral": {"router_aux_loss_coef": COEFFICIENT},
    "qwen3_moe": {"router_aux_loss_coef": COEFFICIENT},
    "dbrx": {
        "ffn_config": {**CASES["dbrx"][1]["ffn_config"], "moe_loss_weight": COEFFICIENT}
    },
}


@pytest.mark.parametrize("name", GIVEN)
def test_one_layers_loss(name):
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    architecture, settings = CASES[name]
    config = getattr(transformers, architecture).config_class(**settings | GIVEN[name])
    values = config.to_dict() | {"architectures": [architecture]}
    moe: MoeConfig = read(values)[1].moe
    experts, k = moe.num_experts, moe.experts_per_token
    logits = np.random.default_rng(0).normal(size=(2, 11, experts)).astype(np.float32)
    gates = (torch.from_numpy(logits.reshape(-1, experts)),)
    theirs = COEFFICIENT * module.load_balancing_loss_func(gates, experts, k)

    ours = jnp.asarray(logits)
    routing = route(ours, None, moe)
    load = (np.asarray(routing.expert_ids)[..., None] == np.arange(experts)).sum(
        (0, 1, 2)
    )
    counted = jnp.ones((2, 11), bool)
    loss = router_loss(
        ours, routing.scores, jnp.asarray(load, jnp.float32), counted, moe
    )
    np.testing.assert_allclose(loss / 22, theirs.item(), rtol=1e-6)
