"""Seed-OSS (ByteDance Seed Team 2025): Llama's shape with a width of heads other than
the model's, and biases on queries, keys and values."""

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily

SEED_OSS = ModelFamily(
    "seed_oss",
    "SeedOssForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        **llama.SWIGLU,
        "head_dim": fields.map_size("attention.head_dim", 128, nullable=True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "attention_bias": fields.map_flag("attention.bias", True),
        "attention_out_bias": fields.ConfigField(
            lambda reader, key: reader.flag(key, False),
            "attention.out_bias",
            lambda config: config.attention.has_out_bias,
        ),
        "mlp_bias": fields.map_flag("mlp.bias", False),
    },
    llama.TABLE,
    rope_kwargs={},
)
