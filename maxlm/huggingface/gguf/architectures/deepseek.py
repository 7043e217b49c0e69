"""DeepSeek-V2 and V3: latent attention, experts beside shared ones, dense layers first.

Files since April 2025 hold the map from latent vectors to keys and values as two, turned
for llama.cpp's own order of products; older ones as Hugging Face does, and llama.cpp
reads both. The older kind is written.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.architectures.architecture import (
    EXPERT_FFN,
    EXPERTS_USED,
    FFN,
    RMS_NORM,
    Architecture,
    map_sizes,
)
from maxlm.huggingface.gguf.architectures.llama import (
    MLP,
    NORMS,
    OUTER,
    WEIGHT,
    B,
    L,
    map_experts,
)
from maxlm.huggingface.gguf.metadata import (
    ConfigValues,
    GgufMetadata,
    MetadataKey,
    Number,
)
from maxlm.huggingface.gguf.names import NameRule, map_parts
from maxlm.huggingface.gguf.tensors import GgufTensor, place_tensor
from maxlm.huggingface.quantized import QuantizedTensor

_A = f"{L}.self_attn"
_V3 = "DeepseekV3ForCausalLM"
_SOFTMAX = 1
_SIGMOID = 2
"""Values of ``expert_gating_func``."""
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
_MSCALES = ("mscale", "mscale_all_dim")


@dataclass(frozen=True)
class LatentMapTensor(QuantizedTensor):
    """The map from latent vectors to keys and values [H · (keys + values), latent], of
    which a file has two parts: ``blk.*.attn_k_b`` [H, latent, keys] and
    ``blk.*.attn_v_b`` [H, values, latent]."""

    keys: GgufTensor
    values: GgufTensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def dequantize(self) -> np.ndarray:
        keys = self.keys.dequantize().transpose(0, 2, 1)
        values = self.values.dequantize()
        return np.concatenate([keys, values], axis=1).reshape(self.shape)


def _join_latent_maps(metadata: GgufMetadata) -> list[QuantizedTensor]:
    joined: list[QuantizedTensor] = []
    for layer in range(metadata.require_size("block_count")):
        keys = metadata.tensors.get(f"blk.{layer}.attn_k_b.weight")
        values = metadata.tensors.get(f"blk.{layer}.attn_v_b.weight")
        if keys is None or values is None:
            continue
        are_stacks = len(keys.shape) == len(values.shape) == 3
        if not are_stacks or keys.shape[:2] != (values.shape[0], values.shape[2]):
            message = f"{keys.name} and {values.name} do not fit"
            fix = "download it again"
            raise MaxlmError(message, where=metadata.where, fix=fix)
        num_heads, latent_size, key_size = keys.shape
        shape = (num_heads * (key_size + values.shape[1]), latent_size)
        name = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        key_tensor = place_tensor(keys, name)
        value_tensor = place_tensor(values, name)
        joined.append(
            LatentMapTensor(
                name,
                keys.path,
                "F32",
                shape,
                keys.offset,
                key_tensor.codes,
                key_tensor.codes,
                keys=key_tensor,
                values=value_tensor,
            )
        )
    return joined


def _read_deepseek(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    key_size = metadata.require_size("attention.key_length")
    value_size = metadata.require_size("attention.value_length")
    key_size = metadata.read_size("attention.key_length_mla", key_size)
    value_size = metadata.read_size("attention.value_length_mla", value_size)
    assert key_size is not None
    rotary_size = metadata.require_size("rope.dimension_count")
    values |= {
        "num_key_value_heads": values["num_attention_heads"],
        "qk_rope_head_dim": rotary_size,
        "qk_nope_head_dim": key_size - rotary_size,
        "v_head_dim": value_size,
        "norm_topk_prob": metadata.read_flag("expert_weights_norm", default=False),
    }
    values.setdefault("q_lora_rank", None)
    metadata.ignore("attention.head_count_kv")
    multiplier = metadata.read_number(_LOG_MULTIPLIER, 0.0)
    scaling = values.get("rope_scaling")
    if scaling is not None and multiplier:
        # Equal, so that cosines and sines are not scaled.
        mscale = round(10 * multiplier, 6)
        values["rope_scaling"] = {**scaling, **dict.fromkeys(_MSCALES, mscale)}
    groups = metadata.read_size("expert_group_count", 1)
    groups_used = metadata.read_size("expert_group_used_count", 1)
    if metadata.read_size("expert_gating_func", _SOFTMAX) == _SIGMOID:
        values |= {
            "architectures": [_V3],
            "model_type": "deepseek_v3",
            "n_group": groups,
            "topk_group": groups_used,
        }
        return
    values["topk_method"] = "greedy"


def _write_deepseek(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    is_v3 = values["architectures"] == [_V3]
    rotary_size = values["qk_rope_head_dim"]
    metadata["attention.head_count_kv"] = values["num_attention_heads"]
    metadata["attention.key_length"] = values["qk_nope_head_dim"] + rotary_size
    metadata["attention.value_length"] = values["v_head_dim"]
    metadata["expert_gating_func"] = _SIGMOID if is_v3 else _SOFTMAX
    metadata["expert_weights_norm"] = values["norm_topk_prob"]
    # llama.cpp asks for it, though there may be no dense layers.
    size = values.get("intermediate_size") or values["moe_intermediate_size"]
    metadata["feed_forward_length"] = size
    groups = values.get("n_group") or 1
    if is_v3:
        metadata["expert_group_count"] = groups
        metadata["expert_group_used_count"] = values["topk_group"]
    elif values["topk_method"] != "greedy":
        raise DEEPSEEK2.refuse("topk_method", values["topk_method"])
    scaling = values.get("rope_scaling") or {}
    mscales = {scaling.get(name, 0.0) for name in _MSCALES}
    if len(mscales) > 1:
        raise DEEPSEEK2.refuse("rope_scaling.mscale", scaling.get("mscale"))
    (mscale,) = mscales
    if scaling and not mscale:
        raise DEEPSEEK2.refuse("rope_scaling.mscale", None)
    if mscale:
        metadata[_LOG_MULTIPLIER] = 0.1 * mscale
    return []


def _drop_mscales(values: ConfigValues) -> dict[str, Any]:
    """Values without what ``_write_deepseek`` writes."""
    scaling = values.get("rope_scaling")
    if scaling:
        scaling = {name: x for name, x in scaling.items() if name not in _MSCALES}
    return {**values, "rope_scaling": scaling}


DEEPSEEK2 = Architecture(
    "deepseek2",
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    (
        *map_sizes(),
        FFN,
        RMS_NORM,
        MetadataKey("attention.q_lora_rank", "q_lora_rank", is_required=False),
        MetadataKey("attention.kv_lora_rank", "kv_lora_rank"),
        MetadataKey("leading_dense_block_count", "first_k_dense_replace"),
        MetadataKey("expert_count", "n_routed_experts"),
        MetadataKey("expert_shared_count", "n_shared_experts"),
        MetadataKey(
            "expert_weights_scale",
            "routed_scaling_factor",
            "number",
            is_required=False,
        ),
        EXPERTS_USED,
        EXPERT_FFN,
    ),
    (
        *OUTER,
        *NORMS,
        *map_parts(f"{B}.attn_q", f"{_A}.q_proj", WEIGHT),
        *map_parts(f"{B}.attn_q_a", f"{_A}.q_a_proj", WEIGHT),
        *map_parts(f"{B}.attn_q_a_norm", f"{_A}.q_a_layernorm", WEIGHT),
        *map_parts(f"{B}.attn_q_b", f"{_A}.q_b_proj", WEIGHT),
        *map_parts(f"{B}.attn_kv_a_mqa", f"{_A}.kv_a_proj_with_mqa", WEIGHT),
        *map_parts(f"{B}.attn_kv_a_norm", f"{_A}.kv_a_layernorm", WEIGHT),
        *map_parts(f"{B}.attn_kv_b", f"{_A}.kv_b_proj", WEIGHT),
        *map_parts(f"{B}.attn_output", f"{_A}.o_proj", WEIGHT),
        *MLP,
        *map_experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *(
            NameRule(
                f"{B}.ffn_{name}_shexp.weight",
                f"{L}.mlp.shared_experts.{name}_proj.weight",
            )
            for name in ("gate", "up", "down")
        ),
        NameRule(f"{B}.exp_probs_b.bias", f"{L}.mlp.gate.e_score_correction_bias"),
    ),
    {"hidden_act": "silu", "attention_bias": False},
    rotary_key="qk_rope_head_dim",
    get_rope=_drop_mscales,
    read_extra=_read_deepseek,
    write_extra=_write_deepseek,
    join_tensors=_join_latent_maps,
    joined_names=("attn_k_b.weight", "attn_v_b.weight"),
    other_hf_architectures=(_V3,),
)
