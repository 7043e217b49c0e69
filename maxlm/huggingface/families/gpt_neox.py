"""GPT-NeoX-20B (Black et al. 2022, arXiv 2204.06745) and Pythia (Biderman et al. 2023,
arXiv 2304.01373): attention and FFN side by side with a norm each, biases everywhere, a
quarter of a head's dimensions turned."""

from typing import Any

from maxlm.huggingface.families import fields, gpt2, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    QKV_BIASES,
    QKV_KERNELS,
    copy,
    interleave_by_kv_head,
    linear,
    map_linear,
    map_linears,
    map_norm,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "gpt_neox.layers.{layer}"
TABLE = {
    "gpt_neox.embed_in.weight": copy("embedding.table", "embed_out.weight"),
    **map_norm(f"{L}.input_layernorm", "attention_norm"),
    f"{L}.attention.query_key_value.weight": interleave_by_kv_head(*QKV_KERNELS),
    f"{L}.attention.query_key_value.bias": interleave_by_kv_head(*QKV_BIASES),
    **map_linear(f"{L}.attention.dense", "attention.out"),
    **map_norm(f"{L}.post_attention_layernorm", "mlp_norm"),
    **map_linears(f"{L}.mlp", "mlp", dense_h_to_4h="up", dense_4h_to_h="down"),
    **map_norm("gpt_neox.final_layer_norm", "final_norm"),
    "embed_out.weight": linear("head.kernel"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    is_parallel = reader.flag("use_parallel_residual", True)
    settings["placement"] = "parallel" if is_parallel else "pre"
    for key in ("rope_theta", "partial_rotary_factor"):
        reader.read_implemented(key, None)  # the published code has other names
    settings["positions"] = rope.read_position_settings(
        reader,
        settings["attention"]["head_dim"],
        theta=reader.number("rotary_emb_base", 10_000.0),
        partial=reader.number("rotary_pct", 0.25, most=1),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    values = rope.write_position_settings(config.positions, config.attention.head_dim)
    return {
        "use_parallel_residual": config.placement == "parallel",
        "rotary_emb_base": values.pop("rope_theta"),
        "rotary_pct": values.pop("partial_rotary_factor", 1.0),
        **values,
    }


GPT_NEOX = ModelFamily(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    {
        **fields.SIZES,
        "intermediate_size": fields.map_size("mlp.d_ff"),
        "hidden_act": fields.map_activation("mlp.activation", "gelu"),
        "layer_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.map_flag("attention.bias", True),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
    },
    TABLE,
    gpt2.BIASED,
    read_extra=_read,
    write_extra=_write,
    ignored_tensors=(
        "*.attention.bias",
        "*.attention.masked_bias",
        "*.attention.rotary_emb.inv_freq",
    ),
)
