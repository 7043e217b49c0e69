"""Granite 3's mixtures of experts (IBM Granite Team 2024, "Granite 3.0 Language
Models"): Llama's shape with factors on embeddings, scores, branches and logits; all
experts of a layer in one tensor."""

from maxlm.huggingface.families import fields, granite, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import join_experts, linear

M = "model.layers.{layer}.block_sparse_moe"
TABLE = {
    **llama.OUTER,
    **llama.NORMS,
    **llama.ATTENTION,
    f"{M}.router.layer.weight": linear("moe.router"),
    f"{M}.input_linear.weight": join_experts("moe.gate", "moe.up", inputs_first=False),
    f"{M}.output_linear.weight": join_experts("moe.down", inputs_first=False),
}
GRANITE_MOE = ModelFamily(
    "granitemoe",
    "GraniteMoeForCausalLM",
    {
        **llama.COMMON,
        **llama.EXPERTS,
        **granite.MULTIPLIERS,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "attention_bias": fields.map_flag("attention.bias", False),
        "num_local_experts": fields.map_size("moe.num_experts"),
        "intermediate_size": fields.map_size("moe.d_ff"),
    },
    TABLE,
    rope_kwargs={},
)
