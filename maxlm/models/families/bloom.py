"""BLOOM (BigScience 2022, arXiv 2211.05100): ALiBi, a norm on embeddings, biases everywhere."""

from typing import Any

from maxlm.models.families.family import ModelFamily
from maxlm.models.families.fields import map_number, map_size, require_value
from maxlm.models.families.forms import (
    QKV_BIASES,
    QKV_KERNELS,
    copy,
    map_linear,
    map_norm,
    split_grouped_qkv,
)
from maxlm.models.families.gpt2 import BIASED
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

H = "transformer.h.{layer}"
TABLE: NameTable = {
    "transformer.word_embeddings.weight": copy("embedding.table", "lm_head.weight"),
    **map_norm("transformer.word_embeddings_layernorm", "embedding_norm"),
    **map_norm(f"{H}.input_layernorm", "attention_norm"),
    f"{H}.self_attention.query_key_value.weight": split_grouped_qkv(*QKV_KERNELS),
    f"{H}.self_attention.query_key_value.bias": split_grouped_qkv(*QKV_BIASES),
    **map_linear(f"{H}.self_attention.dense", "attention.out"),
    **map_norm(f"{H}.post_attention_layernorm", "mlp_norm"),
    **map_linear(f"{H}.mlp.dense_h_to_4h", "mlp.up"),
    **map_linear(f"{H}.mlp.dense_4h_to_h", "mlp.down"),
    **map_norm("transformer.ln_f", "final_norm"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    reader.require("n_inner", None, settings["mlp"]["d_ff"])


BLOOM = ModelFamily(
    "bloom",
    "BloomForCausalLM",
    {
        "vocab_size": map_size("vocab_size"),
        "n_layer": map_size("num_layers", also="num_hidden_layers"),
        "hidden_size": map_size("d_model", also="n_embed"),
        "seq_length": map_size("max_seq_len", 2048),  # of training; ALiBi has no limit
        "n_head": map_size("attention.num_heads", also="num_attention_heads"),
        "layer_norm_epsilon": map_number("norm.eps"),
        "tie_word_embeddings": require_value(True, ours="tie_embeddings"),
        "apply_residual_connection_post_layernorm": require_value(False),
    },
    TABLE,
    {
        **BIASED,
        "mlp.activation": "gelu_tanh",
        "positions.kind": "alibi",
        "embedding_norm": True,
    },
    read=_read,
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
