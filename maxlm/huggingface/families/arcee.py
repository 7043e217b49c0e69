"""Arcee's AFM (Arcee AI 2025): Llama's shape with an FFN of squared ReLU, without a
gate."""

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily

ARCEE = ModelFamily(
    "arcee",
    "ArceeForCausalLM",
    {
        **llama.COMMON,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "intermediate_size": fields.map_size("mlp.d_ff"),
        "hidden_act": fields.map_activation("mlp.activation", "relu2"),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.map_flag("mlp.bias", False),
    },
    llama.TABLE,
    {"mlp.gated": False},
    rope_kwargs={},
)
