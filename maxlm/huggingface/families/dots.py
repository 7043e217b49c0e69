"""dots.llm1 (rednote-hilab 2025, arXiv 2506.05767): DeepSeek-V3's experts behind
attention with norms of queries and keys."""

from typing import Any

from maxlm.huggingface.families import deepseek, fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    deepseek.read_dense_layers(reader, settings, 0)
    num_layers = settings["num_layers"]
    window = reader.size("sliding_window", 4096, nullable=True)
    # Layers from this one on have the window, if there is one.
    first = reader.size("max_window_layers", 62, least=0)
    num_global = num_layers if window is None else first
    kinds = [LOCAL if layer >= num_global else GLOBAL for layer in range(num_layers)]
    local = {"window": window}
    settings |= fields.read_layer_pattern(reader, kinds, {LOCAL: local, GLOBAL: {}})


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    return {
        **deepseek.write_dense_layers(config),
        "layer_types": kinds,
        "sliding_window": window,
    }


DOTS1 = ModelFamily(
    "dots1",
    "Dots1ForCausalLM",
    {
        **llama.COMMON,
        **deepseek.map_sigmoid_routing(groups=1, groups_per_token=1),
        **llama.map_kv_heads(32),
        "attention_bias": fields.map_flag("attention.bias", False),
        "n_routed_experts": fields.map_size("moe.num_experts"),
        "n_shared_experts": fields.map_size("moe.shared_experts"),
        "norm_topk_prob": fields.map_flag("moe.renormalise", False),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
    },
    {
        **llama.TABLE,
        **qwen.EXPERTS,
        **deepseek.SHARED_EXPERTS,
        **deepseek.SELECTION_BIAS,
    },
    {**deepseek.SIGMOID_ROUTING, "attention.qk_norm": True},
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
    # The published code scores by sigmoids and chooses by the bias, whatever they say.
    ignored_keys=["scoring_func", "topk_method", "moe_layer_freq"],
)
