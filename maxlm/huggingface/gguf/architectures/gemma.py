"""Gemma 1, 2 and 3. llama.cpp's norms multiply by what is stored: 1 + the scale of
Hugging Face's files."""

from typing import Any

import numpy as np

from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.gguf.architectures.architecture import (
    FFN,
    RMS_NORM,
    Architecture,
)
from maxlm.huggingface.gguf.architectures.llama import (
    ATTENTION,
    MLP,
    SIZES,
    WEIGHT,
    B,
    L,
)
from maxlm.huggingface.gguf.metadata import (
    ConfigValues,
    GgufMetadata,
    MetadataKey,
    Number,
)
from maxlm.huggingface.gguf.names import NameRule, map_parts

_TANH = "gelu_pytorch_tanh"
_PATTERN = "attention.sliding_window_pattern"
_WINDOW = "attention.sliding_window"
_LOCAL_THETA = "rope.freq_base_swa"
_FIXED = {"hidden_activation": _TANH, "hidden_act": _TANH, "attention_bias": False}
_CAPS = (
    MetadataKey(
        "attn_logit_softcapping", "attn_logit_softcapping", "number", is_required=False
    ),
    MetadataKey(
        "final_logit_softcapping",
        "final_logit_softcapping",
        "number",
        is_required=False,
    ),
)
_OUTER = (
    NameRule("token_embd.weight", "model.embed_tokens.weight"),
    *map_parts("output_norm", "model.norm", added=1.0),
)


def _map_norm(name: str, theirs: str) -> tuple[NameRule, ...]:
    return map_parts(f"{B}.{name}", f"{L}.{theirs}", WEIGHT, added=1.0)


_SANDWICH = (
    *_map_norm("attn_norm", "input_layernorm"),
    *_map_norm("post_attention_norm", "post_attention_layernorm"),
    *_map_norm("ffn_norm", "pre_feedforward_layernorm"),
    *_map_norm("post_ffw_norm", "post_feedforward_layernorm"),
)
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose scores are divided by another root: llama.cpp knows
them by that."""


def _find_divisor(values: ConfigValues, architecture: str) -> int:
    """Returns what llama.cpp divides scores by the root of."""
    if values["num_hidden_layers"] == _LARGEST[architecture]:
        return values["hidden_size"] // values["num_attention_heads"]
    heads = values["num_attention_heads"]
    return values.get("head_dim") or values["hidden_size"] // heads


def _read_layer_kinds(
    metadata: GgufMetadata, values: dict[str, Any], default_period: int
) -> None:
    """Reads which layers have a window: all but the last of each period."""
    num_layers = values["num_hidden_layers"]
    stored = metadata.get(_PATTERN)
    if isinstance(stored, np.ndarray) and len(stored) >= num_layers:
        has_window = [bool(flag) for flag in stored[:num_layers]]
    else:
        period = stored if type(stored) is int and stored > 0 else default_period
        has_window = [(layer + 1) % period != 0 for layer in range(num_layers)]
    values["layer_types"] = [LOCAL if local else GLOBAL for local in has_window]


def _check_layer_kinds(
    values: ConfigValues, architecture: Architecture, period: int
) -> bool:
    """Checks that the last layer of each period alone has no window; returns whether
    there is any. Raises MaxlmError."""
    kinds = values["layer_types"]
    expected = [
        LOCAL if (layer + 1) % period else GLOBAL for layer in range(len(kinds))
    ]
    window = values.get("sliding_window")
    if window is None or LOCAL not in kinds:
        return False
    if kinds != expected:
        raise architecture.refuse("layer_types", kinds)
    return True


def _read_gemma2(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["query_pre_attn_scalar"] = _find_divisor(values, "gemma2")
    values["sliding_window"] = metadata.read_size(_WINDOW, 4096)
    # llama.cpp's where a file does not say.
    values.setdefault("attn_logit_softcapping", 50.0)
    values.setdefault("final_logit_softcapping", 30.0)
    _read_layer_kinds(metadata, values, 2)


def _write_gemma2(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    _check_divisor(values, GEMMA2)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if values.get(key) is None:
            raise GEMMA2.refuse(key, None)
    if _check_layer_kinds(values, GEMMA2, 2):
        metadata[_WINDOW] = values["sliding_window"]
    else:
        metadata[_WINDOW] = values["max_position_embeddings"]
    return []


def _check_divisor(values: ConfigValues, architecture: Architecture) -> None:
    divisor = values["query_pre_attn_scalar"]
    if divisor != _find_divisor(values, architecture.name):
        raise architecture.refuse("query_pre_attn_scalar", divisor)


def _read_gemma3(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["query_pre_attn_scalar"] = _find_divisor(values, "gemma3")
    window = metadata.read_size(_WINDOW, 0)
    local_theta = metadata.read_number(_LOCAL_THETA, 10_000.0)
    theta = values.pop("rope_theta")
    scaling = values.pop("rope_scaling", None) or {"rope_type": "default"}
    by_kind: dict[str, Any] = {GLOBAL: {"rope_theta": theta, **scaling}}
    if window:
        values["sliding_window"] = window
        _read_layer_kinds(metadata, values, 6)
        by_kind[LOCAL] = {"rope_theta": local_theta, "rope_type": "default"}
    else:
        values["sliding_window"] = None
        values["layer_types"] = [GLOBAL] * values["num_hidden_layers"]
    values["rope_parameters"] = by_kind


def _write_gemma3(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    _check_divisor(values, GEMMA3)
    if not _check_layer_kinds(values, GEMMA3, 6):
        return []
    metadata[_WINDOW] = values["sliding_window"]
    local = values["rope_parameters"][LOCAL]
    if local.get("rope_type", "default") != "default":
        raise GEMMA3.refuse("rope_parameters.sliding_attention.rope_type", "…")
    metadata[_LOCAL_THETA] = float(local["rope_theta"])
    return []


def _get_global_rope(values: ConfigValues) -> dict[str, Any]:
    """The rotary positions of layers without a window, which the keys are of."""
    rope = dict(values["rope_parameters"][GLOBAL])
    theta = rope.pop("rope_theta")
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    return {**values, "rope_theta": theta, "rope_scaling": scaling}


GEMMA = Architecture(
    "gemma",
    "GemmaForCausalLM",
    "gemma",
    (*SIZES, FFN, RMS_NORM),
    (
        *_OUTER,
        *_map_norm("attn_norm", "input_layernorm"),
        *_map_norm("ffn_norm", "post_attention_layernorm"),
        *ATTENTION,
        *MLP,
    ),
    _FIXED,
    tie_key=None,
)
GEMMA2 = Architecture(
    "gemma2",
    "Gemma2ForCausalLM",
    "gemma2",
    (*SIZES, FFN, RMS_NORM, *_CAPS),
    (*_OUTER, *_SANDWICH, *ATTENTION, *MLP),
    _FIXED,
    tie_key=None,
    read_extra=_read_gemma2,
    write_extra=_write_gemma2,
)
GEMMA3 = Architecture(
    "gemma3",
    "Gemma3ForCausalLM",
    "gemma3_text",
    (*SIZES, FFN, RMS_NORM, _CAPS[1]),
    (
        *_OUTER,
        *_SANDWICH,
        *ATTENTION,
        *_map_norm("attn_q_norm", "self_attn.q_norm"),
        *_map_norm("attn_k_norm", "self_attn.k_norm"),
        *MLP,
    ),
    _FIXED,
    tie_key=None,
    get_rope=_get_global_rope,
    read_extra=_read_gemma3,
    write_extra=_write_gemma3,
)
