"""GPT-2 (Radford et al. 2019): learnt positions, LayerNorm, biases everywhere."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear, map_norm, transpose
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

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
TABLE: NameTable = {
    "transformer.wte.weight": copy("embedding.table", "lm_head.weight"),
    "transformer.wpe.weight": copy("positions.table"),
    **map_norm("transformer.h.{layer}.ln_1", "attention_norm"),
    "transformer.h.{layer}.attn.c_attn.weight": transpose(*(f"{x}.kernel" for x in QKV)),
    "transformer.h.{layer}.attn.c_attn.bias": linear(*(f"{x}.bias" for x in QKV)),
    "transformer.h.{layer}.attn.c_proj.weight": transpose("attention.out.kernel"),
    "transformer.h.{layer}.attn.c_proj.bias": linear("attention.out.bias"),
    **map_norm("transformer.h.{layer}.ln_2", "mlp_norm"),
    "transformer.h.{layer}.mlp.c_fc.weight": transpose("mlp.up.kernel"),
    "transformer.h.{layer}.mlp.c_fc.bias": linear("mlp.up.bias"),
    "transformer.h.{layer}.mlp.c_proj.weight": transpose("mlp.down.kernel"),
    "transformer.h.{layer}.mlp.c_proj.bias": linear("mlp.down.bias"),
    **map_norm("transformer.ln_f", "final_norm"),
}


def read_activation(reader: ConfigReader, key: str, default: str) -> str:
    """Our name of an activation."""
    name = reader.get(key, default)
    return ACTIVATIONS[name if name in [*ACTIVATIONS] else reader.require(key, *ACTIVATIONS)]


def to_hf_activation(name: str) -> str:
    """The inverse of :func:`read_activation`."""
    assert name in ACTIVATIONS.values(), name
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def multi_head_config(width: int, heads: int) -> dict[str, Any]:
    """Returns settings of attention with a kv head for every query head, and biases."""
    return {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads, "bias": True}


def plain_mlp_config(d_ff: int, activation: str) -> dict[str, Any]:
    """Returns settings of an FFN without a gate, with biases."""
    return {"d_ff": d_ff, "activation": activation, "gated": False, "bias": True}


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("n_embd"), reader.size("n_head")
    reader.require("scale_attn_weights", True)
    reader.require("scale_attn_by_inverse_layer_idx", False)
    reader.require("add_cross_attention", False)
    reader.require("tie_word_embeddings", True)
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("n_layer"),
        "d_model": width,
        "max_seq_len": reader.size("n_positions"),
        "attention": multi_head_config(width, heads),
        "mlp": plain_mlp_config(
            reader.size("n_inner", None) or 4 * width,
            read_activation(reader, "activation_function", "gelu_new"),
        ),
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
        "activation_function": to_hf_activation(config.mlp.activation),
        "layer_norm_epsilon": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


GPT2 = ModelFamily(
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
