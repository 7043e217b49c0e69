"""Granite 3's dense models (Granite Team 2024): Llama's shape with factors on
embeddings, scores, what branches add, and logits."""

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily

MULTIPLIERS = {
    "embedding_multiplier": fields.map_number("embedding_scale", 1.0),
    "attention_multiplier": fields.ConfigField(
        lambda reader, key: reader.number(key, 1.0),
        "attention.scale",
        lambda config: config.attention.scale or config.attention.head_dim**-0.5,
    ),
    "residual_multiplier": fields.map_number("residual_scale", 1.0),
    "logits_scaling": fields.map_inverse("logit_scale", 1.0),
}
GRANITE = ModelFamily(
    "granite",
    "GraniteForCausalLM",
    {
        **llama.COMMON,
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.map_flag("mlp.bias", False),
        **MULTIPLIERS,
    },
    llama.TABLE,
    rope_kwargs={},
)
