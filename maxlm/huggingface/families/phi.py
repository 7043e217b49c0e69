"""Phi-2 (Javaheripi et al. 2023; block of Gunasekar et al. 2023, arXiv 2306.11644),
Phi-3 and 3.5 (Abdin et al. 2024, arXiv 2404.14219) and Phi-4 (Abdin et al. 2024, arXiv
2412.08905; mini: Microsoft 2025, arXiv 2503.01743)."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, gpt2, llama, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    QKV_KERNELS,
    copy,
    linear,
    map_linear,
    map_linears,
    map_norm,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.rope import LongRopeScaling

L = "model.layers.{layer}"
PHI_TABLE = {
    **map_linears(f"{L}.self_attn", "attention", **llama.PROJECTIONS),
    "model.embed_tokens.weight": copy("embedding.table"),
    **map_norm(f"{L}.input_layernorm", "attention_norm"),
    **map_linear(f"{L}.self_attn.dense", "attention.out"),
    **map_norm(f"{L}.self_attn.q_layernorm", "attention.query_norm"),
    **map_norm(f"{L}.self_attn.k_layernorm", "attention.key_norm"),
    **map_linears(f"{L}.mlp", "mlp", fc1="up", fc2="down"),
    **map_norm("model.final_layernorm", "final_norm"),
    "lm_head.weight": linear("head.kernel"),
    "lm_head.bias": copy("head_bias"),
}
FUSED_MLP = {
    f"{L}.mlp.gate_up_proj.weight": linear("mlp.gate.kernel", "mlp.up.kernel"),
    f"{L}.mlp.down_proj.weight": linear("mlp.down.kernel"),
}
PHI3_TABLE = {
    **llama.OUTER,
    **llama.NORMS,
    f"{L}.self_attn.qkv_proj.weight": linear(*QKV_KERNELS),
    f"{L}.self_attn.o_proj.weight": linear("attention.out.kernel"),
    **FUSED_MLP,
}

PHI = ModelFamily(
    "phi",
    "PhiForCausalLM",
    {
        **fields.SIZES,
        "num_key_value_heads": fields.map_size("attention.num_kv_heads", None),
        "qk_layernorm": fields.map_flag("attention.qk_norm", False),
        "intermediate_size": fields.map_size("mlp.d_ff"),
        "hidden_act": fields.map_activation("mlp.activation", "gelu_new"),
        "layer_norm_eps": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.require_value(False, ours="tie_embeddings"),
        # Overwritten where fewer dimensions turn.
        "partial_rotary_factor": fields.ConfigField(
            lambda reader, key: None, write=lambda config: 1.0
        ),
    },
    PHI_TABLE,
    {**gpt2.BIASED, "placement": "parallel_shared", "head_bias": True},
    rope_kwargs={"partial": 0.5},
)


def _read_phi3(reader: ConfigReader, settings: dict[str, Any]) -> None:
    positions = rope.read_position_settings(
        reader,
        settings["attention"]["head_dim"],
        partial=1.0,
        original_positions=reader.size("original_max_position_embeddings", 4096),
    )
    scaling = positions["scaling"]
    if scaling is not None and scaling["kind"] != "longrope":
        message = f"rope_type of {scaling['kind']} is not implemented"
        fix = "only longrope and default can be converted"
        raise MaxlmError(message, where=reader.where, fix=fix)
    settings["positions"] = positions


def _write_phi3(config: TransformerConfig) -> dict[str, Any]:
    positions = config.positions
    values = rope.write_position_settings(positions, config.attention.head_dim)
    if isinstance(positions.scaling, LongRopeScaling):
        length = positions.scaling.original_length
        values["original_max_position_embeddings"] = length
    # The library's padding lies outside small vocabularies.
    return {**values, "pad_token_id": None}


PHI3 = ModelFamily(
    "phi3",
    "Phi3ForCausalLM",
    {
        **llama.COMMON,
        **llama.SWIGLU,
        "attention_bias": fields.require_value(False),
        "mlp_bias": fields.require_value(False),
        "lm_head_bias": fields.require_value(False),
        "sliding_window": fields.map_size("attention.window", None),
    },
    PHI3_TABLE,
    read_extra=_read_phi3,
    write_extra=_write_phi3,
    # Of Phi-4-mini, which the published code does not read.
    ignored_keys=["full_attn_mod", "interpolate_factor"],
)
