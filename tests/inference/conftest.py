"""Tiny random models, and what their continuations are without a cache."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.architectures.decoder import Decoder, DecoderConfig
from maxlm.models.params import Params, bind, init_params, param_specs
from maxlm.sharding import AxisRules, MeshConfig, ShardingConfig, make_mesh

VOCAB = 67
# A large init_std: logits of a random model must differ enough that a wrong cache shows.
LLAMA = {
    "vocab_size": VOCAB,
    "num_layers": 3,
    "d_model": 20,
    "max_seq_len": 48,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "mlp": {"d_ff": 28},
    "init_std": 0.5,
}
GPT2 = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "d_model": 24,
    "max_seq_len": 40,
    "attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 8, "bias": True},
    "mlp": {"d_ff": 36, "activation": "gelu_tanh", "gated": False, "bias": True},
    "norm": {"kind": "layernorm", "bias": True},
    "positions": {"kind": "learned"},
    "tie_embeddings": True,
    "init_std": 0.5,
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


def build(config: dict, rules: AxisRules, dtype=jnp.float32) -> Tiny:
    """The same values on any mesh; noise everywhere, so that biases and scales matter too."""
    model = Decoder(DecoderConfig(**config), rules=rules, dtype=dtype)
    specs = param_specs(model)

    def values(key):
        params = init_params(specs, key)
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        noisy = [
            x + 0.3 * jax.random.normal(k, x.shape) if spec.role == "vector" else x
            for x, k, spec in zip(leaves, keys, treedef.flatten_up_to(specs), strict=True)
        ]
        return treedef.unflatten(noisy)

    return Tiny(model, jax.jit(values)(jax.random.key(3)))


@pytest.fixture
def one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(params=["llama", "gpt2"])
def tiny(request, one_device) -> Tiny:
    rules = ShardingConfig().compute.on(dict(one_device.shape))
    return build({"llama": LLAMA, "gpt2": GPT2}[request.param], rules)
