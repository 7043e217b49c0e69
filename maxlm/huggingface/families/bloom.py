"""BLOOM (BigScience 2022, arXiv 2211.05100): ALiBi, a norm on embeddings, biases
everywhere; and Falcon 7B and 40B (Almazrouei et al. 2023, arXiv 2311.16867), which name
their maps alike: attention and FFN side by side, few kv heads. Falcon 1B with ALiBi
scales and rounds its slopes in a way of its own: refused."""

from typing import Any

from maxlm.huggingface.families import fields, gpt2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    QKV_BIASES,
    QKV_KERNELS,
    NameTable,
    copy,
    interleave_by_kv_head,
    linear,
    map_linear,
    map_linears,
    map_norm,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

H = "transformer.h.{layer}"
COMMON = {
    "transformer.word_embeddings.weight": copy("embedding.table", "lm_head.weight"),
    f"{H}.self_attention.query_key_value.weight": interleave_by_kv_head(*QKV_KERNELS),
    f"{H}.self_attention.query_key_value.bias": interleave_by_kv_head(*QKV_BIASES),
    **map_linear(f"{H}.self_attention.dense", "attention.out"),
    **map_linears(f"{H}.mlp", "mlp", dense_h_to_4h="up", dense_4h_to_h="down"),
    **map_norm("transformer.ln_f", "final_norm"),
}
TABLE = {
    **COMMON,
    **map_norm("transformer.word_embeddings_layernorm", "embedding_norm"),
    **map_norm(f"{H}.input_layernorm", "attention_norm"),
    **map_norm(f"{H}.post_attention_layernorm", "mlp_norm"),
}


def _read_bloom(reader: ConfigReader, settings: dict[str, Any]) -> None:
    reader.read_implemented("n_inner", None, settings["mlp"]["d_ff"])


def _falcon_table(config: TransformerConfig) -> NameTable:
    attention, mlp = "input_layernorm", "post_attention_layernorm"
    if config.placement == "parallel":
        attention, mlp = "ln_attn", "ln_mlp"
    return {
        **COMMON,
        **map_norm(f"{H}.{attention}", "attention_norm"),
        **map_norm(f"{H}.{mlp}", "mlp_norm"),
        "lm_head.weight": linear("head.kernel"),
    }


def _read_falcon(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings["attention"]
    mlp = settings["mlp"]
    new = reader.flag("new_decoder_architecture", False)
    parallel = reader.flag("parallel_attn", True)
    num_kv_heads = reader.size("num_kv_heads", None) or attention["num_heads"]
    single = reader.flag("multi_query", True)
    if new:
        attention["num_kv_heads"] = num_kv_heads
    else:
        # The older architecture has one kv head or all, whatever num_kv_heads says.
        attention["num_kv_heads"] = 1 if single else attention["num_heads"]
    default_norms = 2 if new else 1
    norms = reader.size("num_ln_in_parallel_attn", None) or default_norms
    if new or parallel:
        two_norms = new and norms == 2
        settings["placement"] = "parallel" if two_norms else "parallel_shared"
    reader.read_implemented("ff_factor", mlp["d_ff"] / settings["d_model"])
    mlp["bias"] = attention["bias"]


def _write_falcon(config: TransformerConfig) -> dict[str, Any]:
    attention = config.attention
    two_norms = config.placement == "parallel"
    return {
        "num_kv_heads": attention.num_kv_heads,
        "new_decoder_architecture": two_norms
        or 1 < attention.num_kv_heads < attention.num_heads,
        "multi_query": attention.num_kv_heads == 1,
        "parallel_attn": config.placement != "pre",
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
    }


BLOOM = ModelFamily(
    "bloom",
    "BloomForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size"),
        "n_layer": fields.map_layer_count("num_layers", alias="num_hidden_layers"),
        "hidden_size": fields.map_size("d_model", alias="n_embed"),
        "seq_length": fields.map_size(
            "max_seq_len", 2048
        ),  # of training; ALiBi has no limit
        "n_head": fields.map_size("attention.num_heads", alias="num_attention_heads"),
        "layer_norm_epsilon": fields.map_number("norm.eps"),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
        "apply_residual_connection_post_layernorm": fields.require_value(False),
    },
    TABLE,
    {
        **gpt2.BIASED,
        "mlp.activation": "gelu_tanh",
        "positions.kind": "alibi",
        "embedding_norm": True,
    },
    read_extra=_read_bloom,
    prefix="transformer.",
    ignored_keys=[
        "attention_softmax_in_fp32",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
    ],
)
FALCON = ModelFamily(
    "falcon",
    "FalconForCausalLM",
    {
        **fields.SIZES,
        "max_position_embeddings": fields.map_size("max_seq_len", 2048),
        "bias": fields.map_flag("attention.bias", False),
        "ffn_hidden_size": fields.map_size("mlp.d_ff", None),
        "activation": fields.map_activation("mlp.activation", "gelu"),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        "alibi": fields.require_value(False, always_write=True),
        "apply_residual_connection_post_layernorm": fields.require_value(False),
    },
    _falcon_table,
    {"mlp.gated": False, "norm.kind": "layernorm", "norm.bias": True},
    rope_kwargs={},
    read_extra=_read_falcon,
    write_extra=_write_falcon,
)
