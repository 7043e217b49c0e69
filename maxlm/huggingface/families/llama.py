"""Llama 1 to 3.3 (Touvron et al. 2023, arXiv 2302.13971; Llama Team 2024, arXiv
2407.21783), SmolLM2, Mistral (Jiang et al. 2023, arXiv 2310.06825) and Mixtral (Jiang
et al. 2024, arXiv 2401.04088; eight experts, two a token): pre-norm, RoPE, grouped
queries, SwiGLU."""

from maxlm.huggingface.families import fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    NameTable,
    TensorRule,
    copy,
    linear,
    map_linears,
    permute_rotary,
)
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
OUTER = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    "model.norm.weight": copy("final_norm.scale"),
    "lm_head.weight": linear("head.kernel"),
}
NORMS = {
    f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
    f"{L}.post_attention_layernorm.weight": copy("mlp_norm.scale"),
}
ATTENTION = {
    **map_linears(f"{L}.self_attn", "attention", **PROJECTIONS, o_proj="out"),
    f"{L}.self_attn.q_norm.weight": copy("attention.query_norm.scale"),
    f"{L}.self_attn.k_norm.weight": copy("attention.key_norm.scale"),
}


def map_paired_attention(config: TransformerConfig) -> NameTable:
    """Returns attention's entries where the published code turns neighbouring
    dimensions of a head, the first ones, and ours i with i + R/2: rows of queries and
    keys are reordered, which loses nothing."""
    attention = config.attention
    rotary_dim = config.positions.rotary_dim or attention.head_dim
    reordered: dict[str, TensorRule] = {}
    for their_name in ("q_proj", "k_proj"):
        for part in ("weight", "bias"):
            name = f"{L}.self_attn.{their_name}.{part}"
            reordered[name] = permute_rotary(
                ATTENTION[name], rotary_dim, each_head=True, first=True
            )
    return {**ATTENTION, **reordered}


SWIGLU_NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
MLP = map_linears(f"{L}.mlp", "mlp", **SWIGLU_NAMES)
TABLE = {**OUTER, **NORMS, **ATTENTION, **MLP}
E = f"{L}.block_sparse_moe.experts.{{expert}}"
MIXTRAL_TABLE = {
    **OUTER,
    **NORMS,
    **ATTENTION,
    f"{L}.block_sparse_moe.gate.weight": linear("moe.router"),
    f"{E}.w1.weight": linear("moe.gate"),
    f"{E}.w2.weight": linear("moe.down"),
    f"{E}.w3.weight": linear("moe.up"),
}
# Angles of RoPE, which older files hold.
BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)


def map_kv_heads(default: int | None) -> fields.ConfigFields:
    """Declares the kv heads; where the file does not say, ``default``, or as many as
    heads."""
    return {
        "num_key_value_heads": fields.map_size(
            "attention.num_kv_heads", default, nullable=True
        )
    }


# Of all of Llama's relatives: sizes, heads, RMSNorm, ties; not the FFN.
COMMON = {
    **fields.SIZES,
    # The second name is that of early files.
    "max_position_embeddings": fields.map_size(
        "max_seq_len", alias="max_sequence_length"
    ),
    **map_kv_heads(None),
    "head_dim": fields.map_size("attention.head_dim", None, nullable=True),
    "rms_norm_eps": fields.map_number("norm.eps"),
    "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
}
SWIGLU = {
    "intermediate_size": fields.map_size("mlp.d_ff"),
    "hidden_act": fields.require_value("silu", ours="mlp.activation"),
}
EXPERTS = {
    "num_experts_per_tok": fields.map_size("moe.experts_per_token"),
    "hidden_act": fields.require_value("silu", ours="moe.activation"),
    "router_aux_loss_coef": fields.map_balance_loss(0.001),
}
LLAMA = ModelFamily(
    "llama",
    "LlamaForCausalLM",
    {
        **COMMON,
        **SWIGLU,
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.map_flag("mlp.bias", False),
        "rope_interleaved": fields.require_value(False),
    },
    TABLE,
    rope_kwargs={},
    ignored_tensors=BUFFERS,
)
MISTRAL = ModelFamily(
    "mistral",
    "MistralForCausalLM",
    {
        **COMMON,
        **map_kv_heads(8),
        **SWIGLU,
        "sliding_window": fields.map_size("attention.window", 4096, nullable=True),
    },
    TABLE,
    rope_kwargs={},
    ignored_tensors=BUFFERS,
)
MIXTRAL = ModelFamily(
    "mixtral",
    "MixtralForCausalLM",
    {
        **COMMON,
        **map_kv_heads(8),
        **EXPERTS,
        "num_local_experts": fields.map_size("moe.num_experts", alias="num_experts"),
        "intermediate_size": fields.map_size("moe.d_ff"),
        "sliding_window": fields.map_size("attention.window", None),
        "router_jitter_noise": fields.require_value(0.0),
    },
    MIXTRAL_TABLE,
    rope_kwargs={"theta": 1_000_000.0},
    ignored_tensors=BUFFERS,
)
