"""GPT-2 (Radford et al. 2019): learnt positions, LayerNorm, biases everywhere."""

from maxlm.huggingface.families import fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    QKV_BIASES,
    QKV_KERNELS,
    copy,
    linear,
    map_norm,
    transpose,
)

H = "transformer.h.{layer}"
TABLE = {
    "transformer.wte.weight": copy("embedding.table", "lm_head.weight"),
    "transformer.wpe.weight": copy("positions.table"),
    **map_norm(f"{H}.ln_1", "attention_norm"),
    f"{H}.attn.c_attn.weight": transpose(*QKV_KERNELS),
    f"{H}.attn.c_attn.bias": linear(*QKV_BIASES),
    f"{H}.attn.c_proj.weight": transpose("attention.out.kernel"),
    f"{H}.attn.c_proj.bias": linear("attention.out.bias"),
    **map_norm(f"{H}.ln_2", "mlp_norm"),
    f"{H}.mlp.c_fc.weight": transpose("mlp.up.kernel"),
    f"{H}.mlp.c_fc.bias": linear("mlp.up.bias"),
    f"{H}.mlp.c_proj.weight": transpose("mlp.down.kernel"),
    f"{H}.mlp.c_proj.bias": linear("mlp.down.bias"),
    **map_norm("transformer.ln_f", "final_norm"),
}
# Of older decoders and encoders: LayerNorm with offsets, an FFN without a gate, biases
# everywhere.
BIASED = {
    "attention.bias": True,
    "mlp.gated": False,
    "mlp.bias": True,
    "norm.kind": "layernorm",
    "norm.bias": True,
}

GPT2 = ModelFamily(
    "gpt2",
    "GPT2LMHeadModel",
    {
        **fields.map_sizes("n_layer", "n_embd", "n_positions", "n_head"),
        "n_inner": fields.map_size("mlp.d_ff", None),
        "activation_function": fields.map_activation("mlp.activation", "gelu_new"),
        "layer_norm_epsilon": fields.map_number("norm.eps"),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
        "scale_attn_weights": fields.require_value(True),
        "scale_attn_by_inverse_layer_idx": fields.require_value(False),
        "add_cross_attention": fields.require_value(False),
    },
    TABLE,
    {**BIASED, "positions.kind": "learned"},
    ignored_tensors=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
    prefix="transformer.",
    ignored_keys=[
        f"summary_{x}" for x in ("activation", "proj_to_labels", "type", "use_proj")
    ],
)
