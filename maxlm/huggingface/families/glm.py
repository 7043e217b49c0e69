"""GLM-4 9B (Team GLM 2024, arXiv 2406.12793) and GLM-4-0414: biases on queries, keys
and values, half of a head's dimensions turned, neighbour with neighbour, gate and up in
one matrix; GLM-4-0414 adds a norm behind each branch."""

from maxlm.huggingface.families import fields, llama, phi
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, copy
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"


def _table(config: TransformerConfig) -> NameTable:
    return {
        **llama.OUTER,
        **llama.NORMS,
        f"{L}.post_self_attn_layernorm.weight": copy("attention_post_norm.scale"),
        f"{L}.post_mlp_layernorm.weight": copy("mlp_post_norm.scale"),
        **llama.map_paired_attention(config),
        **phi.FUSED_MLP,
    }


_FIELDS = {
    **llama.COMMON,
    **llama.SWIGLU,
    **llama.map_kv_heads(2),
    "head_dim": fields.map_size("attention.head_dim", 128, nullable=True),
    "rms_norm_eps": fields.map_number("norm.eps", 1.5625e-07),
    "attention_bias": fields.map_flag("attention.bias", True),
    # The library's padding lies outside small vocabularies.
    "pad_token_id": fields.ConfigField(
        lambda reader, key: reader.ignore(key), write=lambda config: None
    ),
}
GLM = ModelFamily(
    "glm",
    "GlmForCausalLM",
    _FIELDS,
    _table,
    {"attention.out_bias": False},
    rope_kwargs={"partial": 0.5},
)
GLM4 = ModelFamily(
    "glm4",
    "Glm4ForCausalLM",
    _FIELDS,
    _table,
    {"attention.out_bias": False, "placement": "sandwich"},
    rope_kwargs={"partial": 0.5},
)
