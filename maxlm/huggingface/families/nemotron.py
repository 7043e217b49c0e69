"""Nemotron-4 (NVIDIA 2024, arXiv 2402.16819) and Minitron (Muralidharan et al. 2024,
arXiv 2407.14679): LayerNorm that multiplies by 1 + scale, an FFN of squared ReLU
without a gate, half of a head's dimensions turned."""

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, linear, map_norm

L = "model.layers.{layer}"
TABLE = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    **map_norm(f"{L}.input_layernorm", "attention_norm"),
    **llama.ATTENTION,
    **map_norm(f"{L}.post_attention_layernorm", "mlp_norm"),
    **llama.MLP,
    **map_norm("model.norm", "final_norm"),
    "lm_head.weight": linear("head.kernel"),
}
NEMOTRON = ModelFamily(
    "nemotron",
    "NemotronForCausalLM",
    {
        **fields.SIZES,
        **llama.map_kv_heads(None),
        "head_dim": fields.map_size("attention.head_dim", None, nullable=True),
        "norm_eps": fields.map_number("norm.eps", 1e-5),
        "intermediate_size": fields.map_size("mlp.d_ff"),
        "hidden_act": fields.map_activation("mlp.activation", "relu2"),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.map_flag("mlp.bias", False),
    },
    TABLE,
    {
        "norm.kind": "layernorm",
        "norm.bias": True,
        "norm.zero_centred": True,
        "mlp.gated": False,
    },
    rope_kwargs={"partial": 0.5},
)
