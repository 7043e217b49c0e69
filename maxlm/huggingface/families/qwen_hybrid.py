"""Qwen3-Next (Qwen Team 2025) and the text models of Qwen3.5 (Qwen Team 2026): three
layers with a gated delta rule and one with gated attention, by turns; dense, or experts
with a gate on the shared one."""

from typing import Any

from maxlm.huggingface.families import fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.modules import APART, map_modules_apart
from maxlm.huggingface.families.names import (
    NameTable,
    copy,
    depthwise,
    interleave_by_kv_head,
    interleave_rows,
    linear,
    map_linears,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.gated_delta_net import GatedDeltaNetConfig

LINEAR, FULL = "linear_attention", "full_attention"
"""Kinds of layers, there as here."""
L = "model.layers.{layer}"
M = f"{L}.linear_attn"
DELTA = "gated_delta_net"
CONVS = tuple(f"{DELTA}.{name}_conv" for name in ("query", "key", "value"))
_QKV = tuple(f"{DELTA}.{name}.kernel" for name in ("query", "key", "value"))
_GATE = f"{DELTA}.gate.kernel"
_BETA = f"{DELTA}.beta.kernel"
_DECAY = f"{DELTA}.decay.kernel"

_OUTER = {
    **llama.OUTER,
    **llama.NORMS,
    **llama.ATTENTION,
    # Each head's queries, and below them its gates.
    f"{L}.self_attn.q_proj.weight": interleave_by_kv_head(
        "attention.query.kernel", "attention.gate.kernel"
    ),
    f"{M}.conv1d.weight": depthwise(*CONVS),
    f"{M}.A_log": copy(f"{DELTA}.A_log"),
    f"{M}.dt_bias": copy(f"{DELTA}.dt_bias"),
    f"{M}.norm.weight": copy(f"{DELTA}.norm.scale"),
    f"{M}.out_proj.weight": linear(f"{DELTA}.out.kernel"),
}
_EXPERTS = {
    **qwen.EXPERTS,
    **map_linears(f"{L}.mlp.shared_expert", "moe.shared", **llama.SWIGLU_NAMES),
    f"{L}.mlp.shared_expert_gate.weight": linear("moe.shared_gate"),
}
_APART = {
    f"{M}.in_proj_qkv.weight": linear(*_QKV),
    f"{M}.in_proj_z.weight": linear(_GATE),
    f"{M}.in_proj_b.weight": linear(_BETA),
    f"{M}.in_proj_a.weight": linear(_DECAY),
}


def _make_qwen3_next_table(config: TransformerConfig) -> NameTable:
    key_heads = 1
    for mixer in config.list_mixers():
        if isinstance(mixer, GatedDeltaNetConfig):
            key_heads = mixer.num_key_heads
    return {
        **_OUTER,
        **_EXPERTS,
        # For each key head its rows of all maps.
        f"{M}.in_proj_qkvz.weight": interleave_rows(key_heads, *_QKV, _GATE),
        f"{M}.in_proj_ba.weight": interleave_rows(key_heads, _BETA, _DECAY),
    }


def map_delta_net(
    key_heads: int | None,
    value_heads: int | None,
    key_dim: int | None,
    value_dim: int | None,
) -> fields.ConfigFields:
    """Declares the sizes of layers with a gated delta rule; their defaults, or None:
    others say."""
    keys = {
        "linear_num_key_heads": fields.map_size("num_key_heads", key_heads),
        "linear_num_value_heads": fields.map_size("num_heads", value_heads),
        "linear_key_head_dim": fields.map_size("key_dim", key_dim),
        "linear_value_head_dim": fields.map_size("value_dim", value_dim),
        "linear_conv_kernel_dim": fields.map_size("conv_width", 4, least=2),
    }
    return fields.map_in_mixer(f"kinds.{LINEAR}.mixer", GatedDeltaNetConfig, keys)


def read_kinds(
    reader: ConfigReader, settings: dict[str, Any], default_kinds: list[str]
) -> None:
    """Reads each layer's kind from ``layer_types``, or takes ``default_kinds``."""
    settings["kinds"].setdefault(FULL, {})
    kinds = fields.read_layer_types(reader, default_kinds, (LINEAR, FULL))
    fields.name_layers(settings, list(kinds))


def write_kinds(config: TransformerConfig) -> dict[str, Any]:
    """Writes what :func:`read_kinds` reads."""
    kinds = fields.list_layer_kinds(config)
    has_attention = [config.get_attention(kind) is not None for kind in kinds]
    return {"layer_types": [FULL if full else LINEAR for full in has_attention]}


def choose_module_layer(settings: dict[str, Any], kind: str) -> str | None:
    """Chooses the kind of a module's layer; None: the model's last layer is of that
    kind."""
    pattern = settings["pattern"]
    if pattern[(settings["num_layers"] - 1) % len(pattern)] == kind:
        return None
    if kind == FULL:
        # A model of few layers may have no other of this kind.
        settings["kinds"].setdefault(FULL, {})
    return kind


def _read_module_layer(reader: ConfigReader, settings: dict[str, Any]) -> str | None:
    reader.read_implemented("mtp_use_dedicated_embeddings", False)
    return choose_module_layer(settings, FULL)


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    interval = reader.size("full_attention_interval", 4)
    numbers = range(1, settings["num_layers"] + 1)
    kinds = [LINEAR if number % interval else FULL for number in numbers]
    read_kinds(reader, settings, kinds)
    # How positions of images are counted; those of text are the same in all sections.
    rope = reader.read_nested("rope_parameters")
    for key in ("mrope_section", "mrope_interleaved"):
        rope.ignore(key)


def _map_common(num_kv_heads: int) -> fields.ConfigFields:
    return {
        **llama.COMMON,
        **llama.map_kv_heads(num_kv_heads),
        **map_delta_net(16, 32, 128, 128),
        "head_dim": fields.map_size("attention.head_dim", 256, nullable=True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "attention_bias": fields.require_value(False),
    }


_MOE: fields.ConfigFields = {
    **llama.EXPERTS,
    "num_experts": fields.map_size("moe.num_experts", alias="num_local_experts"),
    "moe_intermediate_size": fields.map_size("moe.d_ff", 512),
    "shared_expert_intermediate_size": fields.map_size("moe.shared_d_ff", 512),
}
_FIXED = {
    "norm.zero_centred": True,
    "attention.qk_norm": True,
    "attention.output_gate": "element",
    f"kinds.{LINEAR}.mixer.kind": DELTA,
}
_FIXED_MOE = {**_FIXED, "moe.shared_experts": 1, "moe.shared_gate": True}
# What is there for the published code's kernels, and of modules where there are some.
_INERT = ("mamba_ssm_dtype", "mtp_use_dedicated_embeddings")
_MODULES = map_modules_apart(_read_module_layer, "mtp_num_hidden_layers")
# Some files have all experts of a module in one tensor, which is left out.
_MOE_MODULES = map_modules_apart(
    _read_module_layer,
    "mtp_num_hidden_layers",
    f"{APART}.mlp.experts.0.gate_proj.weight",
)

QWEN3_NEXT = ModelFamily(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    {
        **_map_common(2),
        **_MOE,
        "norm_topk_prob": fields.map_flag("moe.renormalise", True),
        "decoder_sparse_step": fields.require_value(1, always_write=True),
        "mlp_only_layers": fields.require_value([], None, always_write=True),
        # Of dense layers, which there are none of.
        "intermediate_size": fields.ignore_key(),
        "use_sliding_window": fields.require_value(False),
    },
    _make_qwen3_next_table,
    _FIXED_MOE,
    rope_kwargs={"partial": 0.25},
    read_extra=_read,
    write_extra=write_kinds,
    layers_for_more_tokens="mtp",
    modules=_MOE_MODULES,
    ignored_keys=_INERT,
)
QWEN3_5 = ModelFamily(
    "qwen3_5",
    "Qwen3_5ForCausalLM",
    {**_map_common(4), **llama.SWIGLU},
    {**_OUTER, **_APART, **llama.MLP},
    _FIXED,
    rope_kwargs={"partial": 0.25},
    read_extra=_read,
    write_extra=write_kinds,
    hf_model_type="qwen3_5_text",
    layers_for_more_tokens="mtp",
    modules=_MODULES,
    ignored_keys=_INERT,
)
QWEN3_5_MOE = ModelFamily(
    "qwen3_5_moe",
    "Qwen3_5MoeForCausalLM",
    {
        **_map_common(2),
        **_MOE,
        "norm_topk_prob": fields.require_value(True),
        # Of dense layers, which there are none of.
        "intermediate_size": fields.ignore_key(),
    },
    {**_OUTER, **_APART, **_EXPERTS},
    {**_FIXED_MOE, "moe.renormalise": True},
    rope_kwargs={"partial": 0.25},
    read_extra=_read,
    write_extra=write_kinds,
    hf_model_type="qwen3_5_moe_text",
    layers_for_more_tokens="mtp",
    modules=_MOE_MODULES,
    ignored_keys=_INERT,
)
