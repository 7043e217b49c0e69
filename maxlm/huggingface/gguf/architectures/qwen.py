"""Qwen 2, 2.5 and 3, and their mixtures of experts."""

from typing import Any

from maxlm.huggingface.gguf.architectures.architecture import (
    EXPERT_FFN,
    FFN,
    RMS_NORM,
    Architecture,
)
from maxlm.huggingface.gguf.architectures.llama import (
    ATTENTION,
    EXPERT_KEYS,
    MLP,
    NORMS,
    OUTER,
    QK_NORMS,
    SIZES,
    B,
    L,
    describe_window,
    has_tensor,
    map_experts,
)
from maxlm.huggingface.gguf.metadata import (
    ConfigValues,
    GgufMetadata,
    MetadataKey,
    Number,
)
from maxlm.huggingface.gguf.names import NameRule

_EXPERTS = map_experts(
    "mlp.gate", "mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"
)
_SHARED_EXPERT = (
    *(
        NameRule(
            f"{B}.ffn_{name}_shexp.weight",
            f"{L}.mlp.shared_expert.{name}_proj.weight",
        )
        for name in ("gate", "up", "down")
    ),
    NameRule(
        f"{B}.ffn_gate_inp_shexp.weight",
        f"{L}.mlp.shared_expert_gate.weight",
        is_row=True,
    ),
)
_DENSE = {"hidden_act": "silu"}
_SPARSE = {**_DENSE, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _read_dense(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["use_sliding_window"] = False


def _read_bias(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    _read_dense(metadata, values)
    values["attention_bias"] = has_tensor(metadata, "attn_q.bias")


def _read_qwen2_moe(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    _read_dense(metadata, values)
    values["qkv_bias"] = has_tensor(metadata, "attn_q.bias")
    # Of dense layers, which there are none of.
    metadata.ignore("feed_forward_length")


def _read_qwen3_moe(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    _read_bias(metadata, values)
    metadata.ignore("feed_forward_length")


def _write_dense_size(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    # llama.cpp asks for it, and has no dense layers here.
    size = values.get("intermediate_size") or values["moe_intermediate_size"]
    metadata["feed_forward_length"] = size
    return describe_window(values)


def _write_dense(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    return describe_window(values)


QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    "qwen2",
    (*SIZES, FFN, RMS_NORM),
    (*OUTER, *NORMS, *ATTENTION, *MLP),
    _DENSE,
    read_extra=_read_dense,
    write_extra=_write_dense,
)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    "qwen3",
    (*SIZES, FFN, RMS_NORM),
    (*OUTER, *NORMS, *ATTENTION, *QK_NORMS, *MLP),
    _DENSE,
    read_extra=_read_bias,
    write_extra=_write_dense,
)
QWEN2_MOE = Architecture(
    "qwen2moe",
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    (
        *SIZES,
        RMS_NORM,
        *EXPERT_KEYS,
        EXPERT_FFN,
        MetadataKey(
            "expert_shared_feed_forward_length", "shared_expert_intermediate_size"
        ),
    ),
    (*OUTER, *NORMS, *ATTENTION, *_EXPERTS, *_SHARED_EXPERT),
    {**_SPARSE, "norm_topk_prob": False},
    read_extra=_read_qwen2_moe,
    write_extra=_write_dense_size,
)
QWEN3_MOE = Architecture(
    "qwen3moe",
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    (*SIZES, RMS_NORM, *EXPERT_KEYS, EXPERT_FFN),
    (*OUTER, *NORMS, *ATTENTION, *QK_NORMS, *_EXPERTS),
    {**_SPARSE, "norm_topk_prob": True},
    read_extra=_read_qwen3_moe,
    write_extra=_write_dense_size,
)
