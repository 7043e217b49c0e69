"""An architecture as an external package writes it: a decoder whose last hidden states
have a learned gain."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.sampling import SamplingConfig
from maxlm.config.show import to_yaml
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.architectures import ARCHITECTURES
from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.params import bind, declare, init_params, materialize, param_specs
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.cross_entropy import LogitsInputs
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from maxlm.run.config import RunConfig
from maxlm.run.load import load_run
from maxlm.sharding import AxisRules
from maxlm.train.program import train_model
from tests.models.building import LLAMA_GQA, draw_params
from tests.train import tiny

pytestmark = pytest.mark.heavy


@ARCHITECTURES.register("gained_decoder")
class GainedDecoderConfig(DecoderConfig):
    """A decoder whose last hidden states are multiplied with a learned vector."""

    architecture: Literal["gained_decoder"] = "gained_decoder"  # pyright: ignore
    initial_gain: float = 0.5

    def build(
        self,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ) -> "GainedDecoder":
        return GainedDecoder(self, rules=rules, dtype=dtype, parallel=parallel)


class GainedDecoder(Decoder):
    config: GainedDecoderConfig

    def __init__(
        self,
        config: GainedDecoderConfig,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ):
        super().__init__(config, rules=rules, dtype=dtype, parallel=parallel)
        initial = jax.nn.initializers.constant(config.initial_gain)
        self.gain = declare((config.d_model,), ("embed",), initial, "vector")

    def prepare_logits(self, hidden: jax.Array) -> LogitsInputs:
        gain = materialize(self.gain, self.rules, hidden.dtype)
        return super().prepare_logits(hidden * gain)


SETTINGS = LLAMA_GQA.model_dump() | {"architecture": "gained_decoder"}
CONFIG = GainedDecoderConfig.model_validate(SETTINGS)


def make_run(folder: Path, **top: Any) -> RunConfig:
    settings = tiny.settings(folder, str(folder / "text"))
    settings["model"] |= {"architecture": "gained_decoder", "initial_gain": 2.0}
    return RunConfig.model_validate(settings | top)


def test_its_logits_are_a_decoders_of_gained_states(one_device_mesh):
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, 31, (2, 7)))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    with jax.set_mesh(one_device_mesh):
        model = CONFIG.build(rules=AxisRules(), dtype=jnp.float32)
        plain = LLAMA_GQA.build(rules=AxisRules(), dtype=jnp.float32)
        specs = param_specs(model)
        initial = init_params({"gain": specs["gain"]}, jax.random.key(0))
        np.testing.assert_array_equal(initial["gain"], np.full(14, 0.5, np.float32))
        params = jax.tree.map(jnp.float32, draw_params(specs))

        @jax.jit
        def compute_logits(params):
            bound = bind(model, params)
            hidden, _ = bound(tokens, positions)
            return bound.logits(hidden)

        @jax.jit
        def define_logits(params, gain):
            bound = bind(plain, params)
            hidden, _ = bound(tokens, positions)
            return bound.logits(hidden * gain)

        logits = compute_logits(params)
        gain = params.pop("gain")
        expected = define_logits(params, gain)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_the_engine_generates_with_it(one_device_mesh):
    prompt = (3, 1, 4, 1, 5)
    with jax.set_mesh(one_device_mesh):
        model = CONFIG.build(rules=AxisRules(), dtype=jnp.float32)
        params = jax.tree.map(jnp.float32, draw_params(param_specs(model), seed=1))
        engine = Engine(model, params, EngineConfig(max_sequences=1, max_length=16))
        sampling = SamplingConfig(temperature=0, max_new_tokens=6)
        outputs = engine.run([GenerationRequest("a", prompt, sampling)])
        generated = [token for output in outputs for token in output.token_ids]
        text = jnp.asarray([[*prompt, *generated]])

        @jax.jit
        def predict(params):
            bound = bind(model, params)
            hidden, _ = bound(text, jnp.arange(text.shape[1])[None])
            return bound.logits(hidden).argmax(-1)

        likeliest = predict(params)
    assert generated == likeliest[0, len(prompt) - 1 : -1].tolist()


@pytest.mark.usefixtures("compiled_once")
def test_it_trains_is_planned_and_loads_as_any_model_does(tmp_path):
    tiny.write_text(tmp_path / "text")
    config = make_run(tmp_path, train={"steps": 2})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(RunConfig, tmp_path / "config.yaml").value == config
    plain_settings = config.model.model_dump(exclude={"initial_gain"})
    plain_settings["architecture"] = "decoder"
    plain_model = DecoderConfig.model_validate(plain_settings)
    plain = config.model_copy(update={"model": plain_model})
    machine = Machine.from_name("h100x1")
    gained_size = plan_run(config, machine).layout.parameters
    plain_size = plan_run(plain, machine).layout.parameters
    assert gained_size - plain_size == config.model.d_model
    trained = train_model(config, say=lambda _: None)
    loaded = load_run(trained.folder)
    assert isinstance(loaded.model, GainedDecoder)
    gain = np.asarray(loaded.params["gain"])
    np.testing.assert_array_equal(gain, np.asarray(trained.state.params["gain"]))
    assert (gain != 2.0).all()


def test_a_mistyped_architecture_is_told_near_names(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(make_run(tmp_path)))
    message = r"model\.architecture must be .*did you mean gained_decoder\?"
    settings = ["model.architecture=gained_decodr"]
    with pytest.raises(MaxlmError, match=message):
        load_config(RunConfig, tmp_path / "config.yaml", settings)
