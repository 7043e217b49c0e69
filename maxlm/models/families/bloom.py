"""BLOOM (BigScience 2022, arXiv 2211.05100): ALiBi, a norm on embeddings, biases everywhere."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import Family
from maxlm.models.families.forms import grouped, linear, same
from maxlm.models.families.gpt2 import QKV
from maxlm.models.families.names import Table
from maxlm.models.families.reader import Reader

H = "transformer.h.{layer}"
TABLE: Table = {
    "transformer.word_embeddings.weight": same("embedding.table", "lm_head.weight"),
    "transformer.word_embeddings_layernorm.weight": same("embedding_norm.scale"),
    "transformer.word_embeddings_layernorm.bias": same("embedding_norm.bias"),
    f"{H}.input_layernorm.weight": same("attention_norm.scale"),
    f"{H}.input_layernorm.bias": same("attention_norm.bias"),
    f"{H}.self_attention.query_key_value.weight": grouped(*(f"{x}.kernel" for x in QKV)),
    f"{H}.self_attention.query_key_value.bias": grouped(*(f"{x}.bias" for x in QKV)),
    f"{H}.self_attention.dense.weight": linear("attention.out.kernel"),
    f"{H}.self_attention.dense.bias": linear("attention.out.bias"),
    f"{H}.post_attention_layernorm.weight": same("mlp_norm.scale"),
    f"{H}.post_attention_layernorm.bias": same("mlp_norm.bias"),
    f"{H}.mlp.dense_h_to_4h.weight": linear("mlp.up.kernel"),
    f"{H}.mlp.dense_h_to_4h.bias": linear("mlp.up.bias"),
    f"{H}.mlp.dense_4h_to_h.weight": linear("mlp.down.kernel"),
    f"{H}.mlp.dense_4h_to_h.bias": linear("mlp.down.bias"),
    "transformer.ln_f.weight": same("final_norm.scale"),
    "transformer.ln_f.bias": same("final_norm.bias"),
}


def _read(reader: Reader) -> dict[str, Any]:
    width, heads = (
        reader.size("hidden_size", also="n_embed"),
        reader.size("n_head", also="num_attention_heads"),
    )
    reader.only("n_inner", None, 4 * width)
    reader.only("apply_residual_connection_post_layernorm", False)
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("n_layer", also="num_hidden_layers"),
        "d_model": width,
        "max_seq_len": reader.size("seq_length", 2048),  # of training; ALiBi has no limit
        "attention": {
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": width // heads,
            "bias": True,
        },
        "mlp": {"d_ff": 4 * width, "activation": "gelu_tanh", "gated": False, "bias": True},
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_epsilon"), "bias": True},
        "positions": {"kind": "alibi"},
        "embedding_norm": True,
        "tie_embeddings": reader.only("tie_word_embeddings", True),
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


BLOOM = Family(
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
