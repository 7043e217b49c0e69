"""nanochat (Karpathy 2025, its published code and weights): norms without weights, also
of the embeddings; squared ReLU without a gate; RoPE that turns backwards, before norms
of queries and keys; logits cut off softly."""

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import linear, map_linears, swap_halves

L = "model.layers.{layer}"
A = f"{L}.self_attn"
TABLE = {
    **llama.OUTER,
    **llama.ATTENTION,
    # To turn the first half of a head by −θ against the second is to turn the second by
    # θ against the first.
    f"{A}.q_proj.weight": swap_halves(linear("attention.query.kernel")),
    f"{A}.q_proj.bias": swap_halves(linear("attention.query.bias")),
    f"{A}.k_proj.weight": swap_halves(linear("attention.key.kernel")),
    f"{A}.k_proj.bias": swap_halves(linear("attention.key.bias")),
    **map_linears(f"{L}.mlp", "mlp", fc1="up", fc2="down"),
}
NANOCHAT = ModelFamily(
    "nanochat",
    "NanoChatForCausalLM",
    {
        **fields.SIZES,
        **llama.map_kv_heads(None),
        "head_dim": fields.map_size("attention.head_dim", None),
        "intermediate_size": fields.map_size("mlp.d_ff", 8192),
        "hidden_act": fields.map_activation("mlp.activation", "relu2"),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "final_logit_softcapping": fields.map_number("logit_cap", 15.0, nullable=True),
        "attention_bias": fields.map_flag("attention.bias", False),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
    },
    TABLE,
    {
        "norm.weightless": True,
        "embedding_norm": True,
        "mlp.gated": False,
        "attention.qk_norm": True,
        "attention.qk_norm_form": "weightless",
        "attention.qk_norm_after_rope": True,
    },
    rope_kwargs={},
    ignored_keys=["qkv_bias"],
)
