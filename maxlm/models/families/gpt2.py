"""GPT-2 (Radford et al. 2019): learnt positions, LayerNorm, biases everywhere."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import Family
from maxlm.models.families.forms import linear, same, transposed
from maxlm.models.families.names import Table
from maxlm.models.families.reader import Reader

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
QKV = ("attention.query", "attention.key", "attention.value")
TABLE: Table = {
    "transformer.wte.weight": same("embedding.table", "lm_head.weight"),
    "transformer.wpe.weight": same("positions.table"),
    "transformer.h.{layer}.ln_1.weight": same("attention_norm.scale"),
    "transformer.h.{layer}.ln_1.bias": same("attention_norm.bias"),
    "transformer.h.{layer}.attn.c_attn.weight": transposed(*(f"{x}.kernel" for x in QKV)),
    "transformer.h.{layer}.attn.c_attn.bias": linear(*(f"{x}.bias" for x in QKV)),
    "transformer.h.{layer}.attn.c_proj.weight": transposed("attention.out.kernel"),
    "transformer.h.{layer}.attn.c_proj.bias": linear("attention.out.bias"),
    "transformer.h.{layer}.ln_2.weight": same("mlp_norm.scale"),
    "transformer.h.{layer}.ln_2.bias": same("mlp_norm.bias"),
    "transformer.h.{layer}.mlp.c_fc.weight": transposed("mlp.up.kernel"),
    "transformer.h.{layer}.mlp.c_fc.bias": linear("mlp.up.bias"),
    "transformer.h.{layer}.mlp.c_proj.weight": transposed("mlp.down.kernel"),
    "transformer.h.{layer}.mlp.c_proj.bias": linear("mlp.down.bias"),
    "transformer.ln_f.weight": same("final_norm.scale"),
    "transformer.ln_f.bias": same("final_norm.bias"),
}


def activation(reader: Reader, key: str, default: str) -> str:
    """Our name of an activation."""
    name = reader.get(key, default)
    return ACTIVATIONS[name if name in [*ACTIVATIONS] else reader.only(key, *ACTIVATIONS)]


def published_activation(name: str) -> str:
    """The inverse of :func:`activation`."""
    assert name in ACTIVATIONS.values(), name
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def _read(reader: Reader) -> dict[str, Any]:
    width, heads = reader.size("n_embd"), reader.size("n_head")
    reader.only("scale_attn_weights", True)
    reader.only("scale_attn_by_inverse_layer_idx", False)
    reader.only("add_cross_attention", False)
    reader.only("tie_word_embeddings", True)
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("n_layer"),
        "d_model": width,
        "max_seq_len": reader.size("n_positions"),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": width // heads,
            "bias": True,
        },
        "mlp": {
            "d_ff": reader.size("n_inner", None) or 4 * width,
            "activation": activation(reader, "activation_function", "gelu_new"),
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_epsilon"), "bias": True},
        "positions": {"kind": "learned"},
        "tie_embeddings": True,
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_positions": config.max_seq_len,
        "n_head": config.attention.num_heads,
        "n_inner": config.mlp.d_ff,
        "activation_function": published_activation(config.mlp.activation),
        "layer_norm_epsilon": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


GPT2 = Family(
    "gpt2",
    "gpt2",
    "GPT2LMHeadModel",
    _read,
    _write,
    lambda config: TABLE,
    ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
    prefix="transformer.",
    inert=[f"summary_{x}" for x in ("activation", "proj_to_labels", "type", "use_proj")],
)
