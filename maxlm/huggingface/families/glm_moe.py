"""GLM-4.5 and 4.6 (GLM-4.5 Team 2025, arXiv 2508.06471): DeepSeek-V3's experts behind
attention with grouped kv heads, of whose dimensions half are turned."""

from maxlm.huggingface.families import deepseek, fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.modules import DEEPSEEK_MODULES

L = "model.layers.{layer}"
GLM4_MOE = ModelFamily(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    {
        **llama.COMMON,
        **deepseek.map_sigmoid_routing(groups=1, groups_per_token=1),
        **llama.map_kv_heads(8),
        "attention_bias": fields.map_flag("attention.bias", False),
        "use_qk_norm": fields.map_flag("attention.qk_norm", False),
        "n_routed_experts": fields.map_size("moe.num_experts"),
        "n_shared_experts": fields.map_size("moe.shared_experts", 1),
        "norm_topk_prob": fields.map_flag("moe.renormalise", True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
    },
    {
        **llama.TABLE,
        **qwen.EXPERTS,
        **deepseek.SHARED_EXPERTS,
        **deepseek.SELECTION_BIAS,
    },
    {**deepseek.SIGMOID_ROUTING, "attention.out_bias": False},
    rope_kwargs={"partial": 0.5},
    read_extra=lambda reader, settings: deepseek.read_dense_layers(reader, settings, 1),
    write_extra=deepseek.write_dense_layers,
    layers_for_more_tokens=L,
    modules=DEEPSEEK_MODULES,
)
