"""Llama and its relatives: Mistral, Mixtral, Granite, OLMo 2, Qwen 2 and 3, Phi-3."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from maxlm.huggingface.gguf.architectures.architecture import (
    EXPERTS_USED,
    FFN,
    HEAD_DIM,
    KV_HEADS,
    RMS_NORM,
    Architecture,
    map_sizes,
)
from maxlm.huggingface.gguf.metadata import (
    ConfigValues,
    GgufMetadata,
    MetadataKey,
    Number,
)
from maxlm.huggingface.gguf.names import NameRule, NameRules, map_parts
from maxlm.huggingface.gguf.rows import PairedRotary

L = "model.layers.{layer}"
B = "blk.{layer}"
WEIGHT = ("weight",)
SIZES = (*map_sizes(), KV_HEADS, HEAD_DIM)
OUTER: NameRules = (
    NameRule("token_embd.weight", "model.embed_tokens.weight"),
    *map_parts("output_norm", "model.norm"),
    NameRule("output.weight", "lm_head.weight"),
)
NORMS: NameRules = (
    *map_parts(f"{B}.attn_norm", f"{L}.input_layernorm"),
    *map_parts(f"{B}.ffn_norm", f"{L}.post_attention_layernorm"),
)
QK_NORMS: NameRules = (
    NameRule(f"{B}.attn_q_norm.weight", f"{L}.self_attn.q_norm.weight"),
    NameRule(f"{B}.attn_k_norm.weight", f"{L}.self_attn.k_norm.weight"),
)
ATTENTION: NameRules = (
    *map_parts(f"{B}.attn_q", f"{L}.self_attn.q_proj"),
    *map_parts(f"{B}.attn_k", f"{L}.self_attn.k_proj"),
    *map_parts(f"{B}.attn_v", f"{L}.self_attn.v_proj"),
    *map_parts(f"{B}.attn_output", f"{L}.self_attn.o_proj"),
)


def order_queries(values: ConfigValues) -> PairedRotary:
    """Returns the order of queries' rows where llama.cpp turns neighbours."""
    return PairedRotary(values["num_attention_heads"])


def order_keys(values: ConfigValues) -> PairedRotary:
    """Returns the order of keys' rows where llama.cpp turns neighbours."""
    heads = values["num_attention_heads"]
    return PairedRotary(values.get("num_key_value_heads") or heads)


PAIRED_ATTENTION: NameRules = (
    *map_parts(f"{B}.attn_q", f"{L}.self_attn.q_proj", make_row_order=order_queries),
    *map_parts(f"{B}.attn_k", f"{L}.self_attn.k_proj", make_row_order=order_keys),
    *ATTENTION[4:],
)
FFN_NAMES = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
MLP: NameRules = tuple(
    rule
    for ours, theirs in FFN_NAMES.items()
    for rule in map_parts(f"{B}.{ours}", f"{L}.mlp.{theirs}")
)


def map_experts(
    router: str, experts: str, gate: str, up: str, down: str
) -> tuple[NameRule, ...]:
    """Returns the rules of stacked experts; before 2024-04 each expert's matrices were
    tensors of their own."""
    rules = [NameRule(f"{B}.ffn_gate_inp.weight", f"{L}.{router}.weight")]
    for name, theirs in (("gate", gate), ("up", up), ("down", down)):
        expert = f"{L}.{experts}.{{expert}}.{theirs}.weight"
        rules.append(NameRule(f"{B}.ffn_{name}_exps.weight", expert))
        rules.append(NameRule(f"{B}.ffn_{name}.{{expert}}.weight", expert))
    return tuple(rules)


MIXTRAL_EXPERTS = map_experts(
    "block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"
)


def has_tensor(metadata: GgufMetadata, *names: str) -> bool:
    """Whether a file has any of these tensors in its first layer."""
    return any(f"blk.0.{name}" in metadata.tensors for name in names)


def _read_biases(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["attention_bias"] = has_tensor(metadata, "attn_q.bias")
    values["mlp_bias"] = has_tensor(metadata, "ffn_up.bias")


def _read_llama(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    num_experts = metadata.read_size("expert_count", 0)
    if not num_experts:
        metadata.ignore("expert_used_count")
        _read_biases(metadata, values)
        return
    values |= {
        "architectures": [MIXTRAL.hf_architecture],
        "model_type": MIXTRAL.model_type,
        "num_local_experts": num_experts,
        "num_experts_per_tok": metadata.require_size("expert_used_count"),
        "sliding_window": None,
    }


def describe_window(values: ConfigValues) -> list[str]:
    """Returns a note where layers have a window that hides a position: llama.cpp has
    none here, as its own conversion passes over it too."""
    window = values.get("sliding_window")
    is_used = values.get("use_sliding_window", True)
    longest = values["max_position_embeddings"]
    if not is_used or window is None or window >= longest:
        return []
    line = f"left out: sliding_window={window}"
    return [f"{line}, which llama.cpp does not have: it sees all {longest:,} positions"]


def _write_llama(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    num_experts = values.get("num_local_experts")
    if num_experts:
        metadata["expert_count"] = num_experts
        metadata["expert_used_count"] = values["num_experts_per_tok"]
    return describe_window(values)


LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    "llama",
    (*SIZES, FFN, RMS_NORM),
    (*OUTER, *NORMS, *PAIRED_ATTENTION, *MLP, *MIXTRAL_EXPERTS),
    {"hidden_act": "silu"},
    read_extra=_read_llama,
    write_extra=_write_llama,
    other_hf_architectures=("MistralForCausalLM", "MixtralForCausalLM"),
)
MIXTRAL = replace(LLAMA, hf_architecture="MixtralForCausalLM", model_type="mixtral")
GRANITE = Architecture(
    "granite",
    "GraniteForCausalLM",
    "granite",
    (
        *SIZES,
        FFN,
        RMS_NORM,
        MetadataKey("attention.scale", "attention_multiplier", "number"),
        MetadataKey("embedding_scale", "embedding_multiplier", "number"),
        MetadataKey("residual_scale", "residual_multiplier", "number"),
        MetadataKey("logit_scale", "logits_scaling", "number"),
    ),
    (*OUTER, *NORMS, *PAIRED_ATTENTION, *MLP),
    {"hidden_act": "silu"},
    read_extra=_read_biases,
)
OLMO2 = Architecture(
    "olmo2",
    "Olmo2ForCausalLM",
    "olmo2",
    (*SIZES, FFN, RMS_NORM),
    (
        *OUTER,
        *ATTENTION,
        *QK_NORMS,
        *map_parts(f"{B}.post_attention_norm", f"{L}.post_attention_layernorm"),
        *map_parts(f"{B}.post_ffw_norm", f"{L}.post_feedforward_layernorm"),
        *MLP,
    ),
    {"hidden_act": "silu", "attention_bias": False},
)


def _write_phi3(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    # 0 says that it is not Phi-3 but Phi-4.
    metadata["attention.sliding_window"] = values.get("sliding_window") or 0
    metadata.setdefault(
        "rope.scaling.original_context_length", values["max_position_embeddings"]
    )
    return describe_window(values)


def _read_phi3(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    window = metadata.read_size("attention.sliding_window", 0)
    values["sliding_window"] = window or None
    original = metadata.read_size("rope.scaling.original_context_length")
    if original is not None:
        values["original_max_position_embeddings"] = original


def map_layers(pairs: Iterable[tuple[str, str]], theirs: str) -> NameRules:
    """Returns the rules of modules of a layer, whose names there begin with
    ``theirs``."""
    return tuple(
        rule
        for name, their_name in pairs
        for rule in map_parts(f"{B}.{name}", f"{theirs}.{their_name}")
    )


PHI3 = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    "phi3",
    (*SIZES, FFN, RMS_NORM),
    (
        *OUTER,
        *NORMS,
        *map_layers(
            (
                ("attn_qkv", "self_attn.qkv_proj"),
                ("attn_output", "self_attn.o_proj"),
                ("ffn_up", "mlp.gate_up_proj"),
                ("ffn_down", "mlp.down_proj"),
            ),
            L,
        ),
    ),
    {"hidden_act": "silu", "attention_bias": False},
    partial_key="partial_rotary_factor",
    read_extra=_read_phi3,
    write_extra=_write_phi3,
)
EXPERT_KEYS = (MetadataKey("expert_count", "num_experts"), EXPERTS_USED)


def _read_smollm3(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    _read_biases(metadata, values)
    values["no_rope_layers"] = _list_turned_layers(values)


def _list_turned_layers(values: ConfigValues) -> list[int]:
    """Whether each layer has positions in llama.cpp: all but every fourth."""
    numbers = range(1, values["num_hidden_layers"] + 1)
    return [int(number % 4 != 0) for number in numbers]


def _write_smollm3(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    turned = values["no_rope_layers"]
    if turned != _list_turned_layers(values):
        raise SMOLLM3.refuse("no_rope_layers", turned)
    return describe_window(values)


SMOLLM3 = Architecture(
    "smollm3",
    "SmolLM3ForCausalLM",
    "smollm3",
    (*SIZES, FFN, RMS_NORM),
    (*OUTER, *NORMS, *PAIRED_ATTENTION, *MLP),
    {"hidden_act": "silu"},
    read_extra=_read_smollm3,
    write_extra=_write_smollm3,
)
OLMOE = Architecture(
    "olmoe",
    "OlmoeForCausalLM",
    "olmoe",
    (*SIZES, FFN, RMS_NORM, *EXPERT_KEYS),
    (
        *OUTER,
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        *map_experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
    {"hidden_act": "silu", "norm_topk_prob": False, "attention_bias": False},
)
