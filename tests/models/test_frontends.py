"""Frontends in a model's config: where they are refused, the built-in one, adapters
beside their matrices, small models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.adapters import ADAPTERS
from maxlm.config import MaxlmError
from maxlm.models.architectures.encoder import EncoderConfig
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import bind, flatten_names, param_specs
from maxlm.models.transforms import build_transformed_model
from maxlm.sharding import AxisRules
from tests.models.building import LLAMA_GQA

FRONTEND = {"kind": "embeddings", "placeholder_id": 3, "width": 6}
CONFIG = DecoderConfig.model_validate(LLAMA_GQA.model_dump() | {"frontend": FRONTEND})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placeholder_id": LLAMA_GQA.vocab_size}, "is no row of the model's table"),
        ({"placeholder_id": 0}, "greater than 0"),
        ({"width": None}, "width"),
        ({"kind": "embedings"}, "embedings"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    settings = LLAMA_GQA.model_dump() | {"frontend": FRONTEND | changes}
    with pytest.raises((MaxlmError, ValueError), match=message):
        DecoderConfig.model_validate(settings)


def test_other_models_than_decoders_of_the_next_token_are_refused():
    settings = LLAMA_GQA.model_dump(exclude={"architecture"})
    with pytest.raises(MaxlmError, match="a frontend before an architecture=encoder"):
        EncoderConfig.model_validate(settings | {"frontend": FRONTEND})
    with pytest.raises(MaxlmError, match="a frontend beside mtp"):
        DecoderConfig.model_validate(settings | {"frontend": FRONTEND, "mtp": {}})


def test_a_config_keeps_its_kind_and_a_small_model_has_a_placeholder():
    assert DecoderConfig.model_validate(CONFIG.model_dump(mode="json")) == CONFIG
    small = CONFIG.shrunk(vocab_size=4, num_layers=1, head_dim=4, seq_len=8)
    assert small.frontend is not None
    assert small.frontend.placeholder_id == 3
    small = CONFIG.shrunk(vocab_size=3, num_layers=1, head_dim=4, seq_len=8)
    assert small.frontend is not None
    assert small.frontend.placeholder_id == 2


def test_vectors_that_are_not_projected_have_the_models_width(one_device_mesh):
    width = CONFIG.d_model
    settings = FRONTEND | {"project": False, "width": width}
    config: Any = DecoderConfig.model_validate(
        CONFIG.model_dump() | {"frontend": settings}
    )
    model = config.build(rules=AxisRules(), dtype=jnp.float32)
    assert "frontend" not in param_specs(model)
    vectors = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    with jax.set_mesh(one_device_mesh):
        encoded = model.encode_items({"embeddings": jnp.asarray(vectors)})
        np.testing.assert_array_equal(encoded, vectors)
        # Micro-batches of a pipeline, [M, B, I, width], are encoded together.
        stacked = model.encode_items({"embeddings": jnp.asarray(vectors[:, :, None])})
        np.testing.assert_array_equal(stacked, vectors[:, :, None])
    settings = FRONTEND | {"project": False, "width": 6}
    config = DecoderConfig.model_validate(CONFIG.model_dump() | {"frontend": settings})
    with pytest.raises(MaxlmError, match=r"width=6 for model\.d_model=14"):
        config.build(rules=AxisRules(), dtype=jnp.float32)


@pytest.mark.heavy
def test_lora_beside_its_matrix_adds_its_product(one_device_mesh):
    adapter_class = ADAPTERS.get("lora")

    def build(targets: list[str] | None) -> Any:
        adapter = adapter_class.model_validate({"rank": 2, "targets": targets})
        return build_transformed_model(
            CONFIG, [adapter], rules=AxisRules(), dtype=jnp.float32
        )

    by_default = flatten_names(param_specs(build(None)))
    assert not [
        name for name in by_default if name.startswith("frontend.") and "lora" in name
    ]
    model = build(["frontend.projection"])
    specs = param_specs(model)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: jnp.asarray(random.normal(size=spec.shape), jnp.float32), specs
    )
    items = random.normal(size=(1, 4, 6)).astype(np.float32)
    with jax.set_mesh(one_device_mesh):
        encoded = bind(model, params).encode_items({"embeddings": jnp.asarray(items)})
    flat = {name: np.asarray(value) for name, value in flatten_names(params).items()}
    name = "frontend.projection.kernel"
    scale = adapter_class.model_validate({"rank": 2}).scale
    delta = flat[f"{name}.lora_a"] @ flat[f"{name}.lora_b"]
    expected = items @ (flat[f"{name}.base"] + scale * delta)
    np.testing.assert_allclose(encoded, expected, rtol=1e-5, atol=1e-5)
