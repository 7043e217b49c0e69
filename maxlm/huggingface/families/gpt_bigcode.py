"""StarCoder (Li et al. 2023, arXiv 2305.06161) and SantaCoder: GPT-2's shape with one
kv head."""

from maxlm.huggingface.families import fields, gpt2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    QKV_BIASES,
    QKV_KERNELS,
    copy,
    linear,
    map_linear,
    map_linears,
    map_norm,
)

H = "transformer.h.{layer}"
TABLE = {
    "transformer.wte.weight": copy("embedding.table", "lm_head.weight"),
    "transformer.wpe.weight": copy("positions.table"),
    **map_norm(f"{H}.ln_1", "attention_norm"),
    f"{H}.attn.c_attn.weight": linear(*QKV_KERNELS),
    f"{H}.attn.c_attn.bias": linear(*QKV_BIASES),
    **map_linear(f"{H}.attn.c_proj", "attention.out"),
    **map_norm(f"{H}.ln_2", "mlp_norm"),
    **map_linears(f"{H}.mlp", "mlp", c_fc="up", c_proj="down"),
    **map_norm("transformer.ln_f", "final_norm"),
    "lm_head.weight": linear("head.kernel"),
}
GPT_BIGCODE = ModelFamily(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    {
        **fields.map_sizes("n_layer", "n_embd", "n_positions", "n_head"),
        "n_inner": fields.map_size("mlp.d_ff", None),
        "activation_function": fields.map_activation(
            "mlp.activation", "gelu_pytorch_tanh"
        ),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        # With a kv head for each query head the maps are fused in another order.
        "multi_query": fields.require_value(True),
        "num_key_value_heads": fields.require_value(None, 1),
        "scale_attn_weights": fields.require_value(True),
        "add_cross_attention": fields.require_value(False),
    },
    TABLE,
    {**gpt2.BIASED, "positions.kind": "learned", "attention.num_kv_heads": 1},
    prefix="transformer.",
    ignored_keys=[
        # How sums are rounded, and how attention was computed.
        "attention_softmax_in_fp32",
        "scale_attention_softmax_in_fp32",
        "inference_runner",
        "max_batch_size",
        "max_sequence_length",
        "pad_key_length",
        "pre_allocate_kv_cache",
        "validate_runner_input",
        *(f"summary_{x}" for x in ("activation", "proj_to_labels", "type", "use_proj")),
    ],
)
