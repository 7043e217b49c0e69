"""BLOOM (BigScience 2022, arXiv 2211.05100): ALiBi, a norm on embeddings, biases everywhere."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, map_linear, map_norm, split_grouped_qkv
from maxlm.models.families.gpt2 import QKV, multi_head_config, plain_mlp_config
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

H = "transformer.h.{layer}"
TABLE: NameTable = {
    "transformer.word_embeddings.weight": copy("embedding.table", "lm_head.weight"),
    **map_norm("transformer.word_embeddings_layernorm", "embedding_norm"),
    **map_norm(f"{H}.input_layernorm", "attention_norm"),
    f"{H}.self_attention.query_key_value.weight": split_grouped_qkv(*(f"{x}.kernel" for x in QKV)),
    f"{H}.self_attention.query_key_value.bias": split_grouped_qkv(*(f"{x}.bias" for x in QKV)),
    **map_linear(f"{H}.self_attention.dense", "attention.out"),
    **map_norm(f"{H}.post_attention_layernorm", "mlp_norm"),
    **map_linear(f"{H}.mlp.dense_h_to_4h", "mlp.up"),
    **map_linear(f"{H}.mlp.dense_4h_to_h", "mlp.down"),
    **map_norm("transformer.ln_f", "final_norm"),
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = (
        reader.size("hidden_size", also="n_embed"),
        reader.size("n_head", also="num_attention_heads"),
    )
    reader.require("n_inner", None, 4 * width)
    reader.require("apply_residual_connection_post_layernorm", False)
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("n_layer", also="num_hidden_layers"),
        "d_model": width,
        "max_seq_len": reader.size("seq_length", 2048),  # of training; ALiBi has no limit
        "attention": multi_head_config(width, heads),
        "mlp": plain_mlp_config(4 * width, "gelu_tanh"),
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_epsilon"), "bias": True},
        "positions": {"kind": "alibi"},
        "embedding_norm": True,
        "tie_embeddings": reader.require("tie_word_embeddings", True),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "hidden_size": config.d_model,
        "seq_length": config.max_seq_len,
        "n_head": config.attention.num_heads,
        "layer_norm_epsilon": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


BLOOM = ModelFamily(
    "bloom",
    "bloom",
    "BloomForCausalLM",
    _read,
    _write,
    lambda config: TABLE,
    prefix="transformer.",
    inert=[
        "attention_softmax_in_fp32",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
    ],
)
