"""StarCoder2 (Lozhkov et al. 2024, arXiv 2402.19173): LayerNorm and biases, an FFN
without a gate, few kv heads, a sliding window."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, linear, map_linears, map_norm
from maxlm.huggingface.families.reader import ConfigReader

L = "model.layers.{layer}"
TABLE = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    **map_norm(f"{L}.input_layernorm", "attention_norm"),
    **llama.ATTENTION,
    **map_norm(f"{L}.post_attention_layernorm", "mlp_norm"),
    **map_linears(f"{L}.mlp", "mlp", c_fc="up", c_proj="down"),
    **map_norm("model.norm", "final_norm"),
    "lm_head.weight": linear("head.kernel"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    settings["mlp"]["bias"] = settings["attention"]["bias"]


STARCODER2 = ModelFamily(
    "starcoder2",
    "Starcoder2ForCausalLM",
    {
        **fields.SIZES,
        **llama.map_kv_heads(2),
        "head_dim": fields.map_size("attention.head_dim", None, nullable=True),
        "intermediate_size": fields.map_size("mlp.d_ff"),
        "hidden_act": fields.map_activation("mlp.activation", "gelu_pytorch_tanh"),
        "norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "norm_type": fields.require_value("layer_norm"),
        "mlp_type": fields.require_value("default"),
        "sliding_window": fields.map_size("attention.window", None),
        "use_bias": fields.map_flag("attention.bias", True),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
    },
    TABLE,
    {"norm.kind": "layernorm", "norm.bias": True, "mlp.gated": False},
    rope_kwargs={},
    read_extra=_read,
    # Which the published code does not read.
    ignored_keys=[
        "attention_softmax_in_fp32",
        "layer_norm_epsilon",
        "scale_attention_softmax_in_fp32",
        "scale_attn_weights",
    ],
)
