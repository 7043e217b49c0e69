"""Tiny random models, and what their continuations are without a cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.params import Params, bind, param_specs
from tests.models import building

VOCAB = 66
# A large init_std: logits of a random model must differ enough for a wrong cache to
# show.
CONFIGS = {
    "llama": {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 20,
        "max_seq_len": 48,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
        "mlp": {"d_ff": 28},
        "init_std": 0.5,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 24,
        "max_seq_len": 40,
        "attention": {
            "num_heads": 3,
            "num_kv_heads": 3,
            "head_dim": 8,
            "bias": True,
            "window": 6,
        },
        "mlp": {"d_ff": 36, "activation": "gelu_tanh", "gated": False, "bias": True},
        "norm": {"kind": "layernorm", "bias": True},
        "positions": {"kind": "learned"},
        "tie_embeddings": True,
        "init_std": 0.5,
    },
}


@dataclass(frozen=True)
class Tiny:
    model: Decoder
    params: Params

    def logits(self, tokens) -> np.ndarray:
        """Of every position of one row, by a plain forward pass: [S, V]."""
        # One width, one compilation: what follows a token does not change its logits.
        learned = self.model.config.positions.kind == "learned"
        ids = np.zeros((1, self.model.config.max_seq_len if learned else 64), np.int32)
        ids[0, : len(tokens)] = tokens
        return np.asarray(_forward(self.model, self.params, ids))[0, : len(tokens)]

    def greedy(self, prompt, steps) -> list[int]:
        """Continue one prompt by full forward passes of the growing text."""
        text = list(prompt)
        for _ in range(steps):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(prompt) :]


@partial(jax.jit, static_argnums=0)
def _forward(model, params, ids):
    bound = bind(model, params)
    hidden, _ = bound(ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None])
    return bound.logits(hidden)


def build(config: dict, mesh, dtype=jnp.float32) -> Tiny:
    """The same values on any mesh, none of them special: biases and scales matter
    too."""
    with jax.set_mesh(mesh):
        model = building.decoder(DecoderConfig(**config), mesh, dtype)
        specs = param_specs(model)

        def value(spec):
            drawn = np.random.default_rng(spec.shape).normal(0, 1, spec.shape)
            if spec.role == "vector":
                return 0.3 * drawn + spec.init(
                    jax.random.key(0), spec.shape, jnp.float32
                )
            return drawn * config["init_std"]

        values = jax.tree.map(value, specs)
        return Tiny(model, building.on_devices(values, building.shardings(specs, mesh)))


@pytest.fixture(scope="session")
def tinies(one_device_mesh) -> dict[str, Tiny]:
    """Built once, so that tests share what they compile."""
    configs = {**CONFIGS, "shallow": CONFIGS["llama"] | {"num_layers": 1}}
    return {name: build(config, one_device_mesh) for name, config in configs.items()}


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.more)])
def tiny(request, tinies, one_device_mesh) -> Iterator[Tiny]:
    """Each of the two, for what depends on the architecture."""
    with jax.set_mesh(one_device_mesh):
        yield tinies[request.param]


@pytest.fixture
def llama(tinies, one_device_mesh) -> Iterator[Tiny]:
    with jax.set_mesh(one_device_mesh):
        yield tinies["llama"]


@pytest.fixture
def shallow(tinies, one_device_mesh) -> Iterator[Tiny]:
    """Another model of llama's vocabulary, of one layer: programs that compile in less
    time."""
    with jax.set_mesh(one_device_mesh):
        yield tinies["shallow"]


@pytest.fixture
def gpt2(tinies, one_device_mesh) -> Iterator[Tiny]:
    with jax.set_mesh(one_device_mesh):
        yield tinies["gpt2"]


@pytest.fixture(scope="session")
def build_tiny():
    """``build_tiny("llama", mesh)``: the values of ``tiny`` on another mesh, or other
    settings."""
    return lambda name, mesh, **settings: build(CONFIGS[name] | settings, mesh)
