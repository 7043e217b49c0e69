"""BLOOM (BigScience 2022, arXiv 2211.05100): ALiBi, a norm on embeddings, biases everywhere."""

from typing import Any

from maxlm.models.families import fields, gpt2
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.names import (
    QKV_BIASES,
    QKV_KERNELS,
    copy,
    interleave_by_kv_head,
    map_linear,
    map_linears,
    map_norm,
)
from maxlm.models.families.reader import ConfigReader

H = "transformer.h.{layer}"
# Of Falcon too.
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


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    reader.read_implemented("n_inner", None, settings["mlp"]["d_ff"])


BLOOM = ModelFamily(
    "bloom",
    "BloomForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size"),
        "n_layer": fields.map_size("num_layers", alias="num_hidden_layers"),
        "hidden_size": fields.map_size("d_model", alias="n_embed"),
        "seq_length": fields.map_size("max_seq_len", 2048),  # of training; ALiBi has no limit
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
    read_extra=_read,
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
