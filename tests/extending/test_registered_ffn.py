"""A feed-forward as an external package writes it, named in a config by its kind."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.config import Config, MaxlmError
from maxlm.config.keys import COMMAND_LINE
from maxlm.config.layers import SettingsTree
from maxlm.config.load import validate_config
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.aux import Aux
from maxlm.models.blocks import FEED_FORWARDS, RegisteredFeedForward
from maxlm.models.build_context import BuildContext
from maxlm.models.layers.linear import Linear
from maxlm.models.params import bind, flatten_names, init_params, param_specs
from maxlm.sharding import AxisRules
from tests.models.building import LLAMA_GQA

pytestmark = pytest.mark.heavy


class SquaredReluConfig(Config):
    kind: Literal["squared_relu"] = "squared_relu"
    width: int


class SquaredRelu(nnx.Module):
    """``down(relu(up(x))²)`` (So et al. 2021, arXiv 2109.08668)."""

    name = "squared"

    def __init__(self, config: SquaredReluConfig, context: BuildContext):
        residual = {"embed": context.d_model}
        hidden = {"mlp": config.width}
        self.up = Linear(residual, hidden, context, bias=False)
        self.down = Linear(hidden, residual, context, bias=False)

    def feed(self, x, segment_ids):
        return self.down(
            jnp.square(jax.nn.relu(self.up(x))), seq_axis="residual"
        ), Aux()


FEED_FORWARDS.register(
    "squared_relu", RegisteredFeedForward(SquaredReluConfig, SquaredRelu)
)
SETTINGS = LLAMA_GQA.model_dump() | {
    "mlp": None,
    "ffn": {"kind": "squared_relu", "width": 10},
}


def test_a_model_has_it_in_place_of_an_mlp(one_device_mesh):
    config = DecoderConfig.model_validate(SETTINGS)
    assert DecoderConfig.model_validate(config.model_dump()) == config
    with jax.set_mesh(one_device_mesh):
        model = config.build(rules=AxisRules(), dtype=jnp.float32)
        params = init_params(param_specs(model), jax.random.key(0))
        names = [
            name for name in flatten_names(params) if name.startswith("layers.squared.")
        ]
        assert names == ["layers.squared.down.kernel", "layers.squared.up.kernel"]
        x = np.random.default_rng(0).normal(size=(2, 5, 14)).astype(np.float32)
        layer = jax.tree.map(lambda p: p[0], params["layers"])
        output, _ = bind(model.stacks["layers"], layer).ffn.feed(x, None)
    up = np.asarray(layer["squared"]["up"]["kernel"])
    down = np.asarray(layer["squared"]["down"]["kernel"])
    expected = np.maximum(x @ up, 0) ** 2 @ down
    np.testing.assert_allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ffn": {"kind": "cubed"}},
            "ffn.kind must be 'squared_relu', not 'cubed'",
        ),
        ({"mlp": {"d_ff": 8}}, "ffn beside"),
    ],
)
def test_an_unknown_kind_and_two_feed_forwards_are_refused(changes, message):
    settings = SettingsTree(SETTINGS | changes, {(): COMMAND_LINE})
    with pytest.raises(MaxlmError, match=message):
        validate_config(DecoderConfig, settings)
