"""Small odd-sized models with random parameters, and batches for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.models.architectures.decoder import Decoder, DecoderConfig
from maxlm.models.params import Params, bind, param_specs
from maxlm.sharding import ShardingConfig, resolve_placement

GPT2 = DecoderConfig.model_validate(
    {
        "vocab_size": 37,
        "num_layers": 3,
        "d_model": 14,
        "max_seq_len": 13,
        "attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 5, "bias": True},
        "mlp": {"d_ff": 22, "activation": "gelu_tanh", "gated": False, "bias": True},
        "norm": {"kind": "layernorm", "bias": True},
        "positions": {"kind": "learned"},
        "tie_embeddings": True,
    }
)
LLAMA_GQA = DecoderConfig.model_validate(
    {
        "vocab_size": 41,
        "num_layers": 3,
        "d_model": 14,
        "max_seq_len": 13,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
        "mlp": {"d_ff": 18},
        "positions": {"theta": 100.0},
    }
)
LLAMA_MQA = DecoderConfig.model_validate(
    {
        "vocab_size": 23,
        "num_layers": 1,
        "d_model": 10,
        "max_seq_len": 13,
        "attention": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 4, "window": 4},
        "mlp": {"d_ff": 7, "activation": "relu"},
        "tie_embeddings": True,
    }
)
NO_POSITIONS = DecoderConfig.model_validate(
    {
        "vocab_size": 23,
        "num_layers": 2,
        "d_model": 6,
        "max_seq_len": 13,
        "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 3},
        "mlp": {"d_ff": 5, "activation": "gelu", "bias": True},
        "norm": {"kind": "layernorm", "eps": 1e-3},
        "positions": {"kind": "none"},
        "remat": "none",
    }
)
# Five layers of two kinds by turns: one is left over.
PATTERN = DecoderConfig.model_validate(
    {
        "vocab_size": 29,
        "num_layers": 5,
        "d_model": 10,
        "max_seq_len": 13,
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 6,
            "qk_norm": True,
            "scale": 0.3,
            "soft_cap": 1.5,
        },
        "mlp": {"d_ff": 9, "activation": "gelu_tanh"},
        "pattern": [{"window": 3}, {"positions": {"theta": 900.0, "rotary_dim": 4}}],
        "norm": {"zero_centred": True, "eps": 1e-6},
        "placement": "sandwich",
        "positions": {"theta": 50.0},
        "embedding_scale": 3.2,
        "tie_embeddings": True,
        "logit_cap": 4.0,
    }
)
POST = DecoderConfig.model_validate(
    {
        "vocab_size": 23,
        "num_layers": 2,
        "d_model": 9,
        "max_seq_len": 13,
        "attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 5, "qk_norm": True},
        "mlp": {"d_ff": 11, "activation": "gelu", "gated": False},
        "norm": {"kind": "layernorm", "bias": True, "eps": 1e-12},
        "placement": "post",
        "final_norm": False,
        "positions": {"kind": "learned", "offset": 2},
        "embedding_norm": True,
        "head_bias": True,
        "logit_scale": 0.6,
    }
)
PARALLEL = DecoderConfig.model_validate(
    {
        "vocab_size": 23,
        "num_layers": 2,
        "d_model": 7,
        "max_seq_len": 13,
        "attention": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "clip": 0.9},
        "mlp": {"d_ff": 6, "activation": "relu"},
        "norm": {"kind": "layernorm", "zero_centred": True},
        "placement": "parallel",
        "positions": {"kind": "alibi"},
        "embedding_norm": True,
        "head_bias": True,
        "logit_cap": 3.0,
    }
)
PARALLEL_SHARED = DecoderConfig.model_validate(
    {
        "vocab_size": 23,
        "num_layers": 2,
        "d_model": 7,
        "max_seq_len": 13,
        "attention": {
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "bias": True,
            "out_bias": False,
        },
        "mlp": {"d_ff": 6, "activation": "silu", "bias": True},
        "norm": {"kind": "layernorm", "bias": True},
        "placement": "parallel_shared",
        "positions": {"theta": 20.0, "rotary_dim": 6},
        "tie_embeddings": True,
        "head_bias": True,
        "logit_scale": 1.7,
        "logit_cap": 5.0,
    }
)
WAVES = DecoderConfig.model_validate(
    {
        "vocab_size": 19,
        "num_layers": 1,
        "d_model": 7,
        "max_seq_len": 13,
        "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 3},
        "mlp": {"d_ff": 5},
        "positions": {"kind": "sinusoidal"},
        "embedding_scale": 2.6,
    }
)
RELATIVE = DecoderConfig.model_validate(
    {
        "vocab_size": 19,
        "num_layers": 2,
        "d_model": 6,
        "max_seq_len": 13,
        "attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 4, "scale": 1.0},
        "mlp": {"d_ff": 5, "activation": "relu", "gated": False},
        "positions": {"kind": "relative", "buckets": 6, "max_distance": 9},
        "tie_embeddings": True,
        "logit_scale": 0.4,
    }
)
CONFIGS = {
    "gpt2": GPT2,
    "llama_gqa": LLAMA_GQA,
    "llama_mqa": LLAMA_MQA,
    "no_positions": NO_POSITIONS,
    "pattern": PATTERN,
    "post": POST,
    "parallel": PARALLEL,
    "parallel_shared": PARALLEL_SHARED,
    "waves": WAVES,
    "relative": RELATIVE,
}

# For jax.jit: XLA compiles a model four times as fast when it does not optimise; nothing else
# changes.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False

# Three rows of 11 tokens: one document; two and padding; two. Positions restart with each.
SEGMENTS = np.array([[1] * 11, [1] * 4 + [2] * 5 + [0] * 2, [1] * 8 + [2] * 3], np.int32)
POSITIONS = np.array(
    [[*range(11)], [*range(4), *range(5), 0, 0], [*range(8), *range(3)]],
    np.int32,
)


def decoder(config: DecoderConfig, mesh: Mesh, dtype: Any = jnp.float32) -> Decoder:
    """The model in the default compute layout of ``mesh``."""
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    return Decoder(config, rules=rules, dtype=dtype)


def storage(config: DecoderConfig, mesh: Mesh) -> Params:
    """Every parameter's sharding in the default storage layout of ``mesh``."""
    sizes = dict(mesh.shape)
    rules = ShardingConfig().storage.for_mesh(sizes)
    return jax.tree.map(
        lambda s: NamedSharding(mesh, resolve_placement("", s.shape, s.axes, rules, sizes).spec),
        param_specs(decoder(config, mesh)),
    )


def random_params(config: DecoderConfig, mesh: Mesh, seed: int = 0) -> Params:
    """Float64 NumPy values far from the initial ones: every scale and bias matters."""
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return centre + 0.4 * rng.standard_normal(spec.shape).astype(np.float32).astype(np.float64)

    return jax.tree_util.tree_map_with_path(draw, param_specs(decoder(config, mesh)))


def on_devices(values: Params, shardings: Params) -> Params:
    return jax.tree.map(
        lambda x, s: jax.device_put(np.asarray(x, np.float32), s), values, shardings
    )


def rows(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """[B, S] arrays in the compute layout of ``mesh``."""
    spec = ShardingConfig().compute.for_mesh(dict(mesh.shape)).spec("batch", "seq")
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]


def tokens_and_targets(vocab_size: int, shape: tuple[int, int], seed: int = 1):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocab_size, (2, *shape), dtype=np.int32)
    return tokens, targets, rng.random(shape).astype(np.float32)


def loss(model: Decoder, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    """Weighted cross-entropy summed over the batch; also hidden states and logits."""
    bound = bind(model, params)
    hidden, _ = bound(batch["tokens"], batch["positions"], batch["segments"])
    logits = bound.logits(hidden)
    labels = jax.nn.one_hot(batch["targets"], logits.shape[-1], dtype=jnp.float32)
    nll = -jnp.sum(jax.nn.log_softmax(logits) * labels, axis=-1)
    return jnp.sum(nll * batch["weights"]), (hidden, logits)
