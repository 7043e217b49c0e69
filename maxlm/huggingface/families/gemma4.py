"""Gemma 4 (Gemma Team 2026), the part for text: larger heads in global layers, whose
values may be their keys; last layers that read keys of earlier ones; an embedding in
each layer; experts beside a dense MLP; each by size."""

from collections.abc import Sequence
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, gemma3n, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.gemma import SANDWICH, TANH
from maxlm.huggingface.families.names import copy, either, join_experts, linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.layers.rope import ProportionalScaling

L = "model.layers.{layer}"
_FIX = "take it from the published model"
TABLE = {
    **SANDWICH,
    **gemma3n.LAYER_INPUTS,
    f"{L}.layer_scalar": copy("output_scale"),
    # With experts beside it, the MLP is their shared one.
    **{
        f"{L}.mlp.{theirs}.weight": either(
            linear(f"mlp.{ours}.kernel"), linear(f"moe.shared.{ours}.kernel")
        )
        for theirs, ours in llama.SWIGLU_NAMES.items()
    },
    f"{L}.pre_feedforward_layernorm.weight": either(
        copy("mlp_norm.scale"), copy("moe.shared_norm.scale")
    ),
    f"{L}.post_feedforward_layernorm_1.weight": copy("moe.shared_output_norm.scale"),
    f"{L}.pre_feedforward_layernorm_2.weight": copy("moe.input_norm.scale"),
    f"{L}.post_feedforward_layernorm_2.weight": copy("moe.output_norm.scale"),
    f"{L}.router.proj.weight": linear("moe.router"),
    f"{L}.router.scale": copy("moe.router_scale"),
    f"{L}.router.per_expert_scale": copy("moe.expert_scales"),
    f"{L}.experts.gate_up_proj": join_experts("moe.gate", "moe.up", inputs_first=False),
    f"{L}.experts.down_proj": join_experts("moe.down", inputs_first=False),
}


def _read_global_heads(
    reader: ConfigReader,
    layer_types: Sequence[str],
    local_heads: dict[str, Any],
    same_values: bool,
) -> dict[str, Any]:
    """Reads heads of global layers: ``per_layer_config``, as transformers writes it, or
    ``global_head_dim`` and ``num_global_key_value_heads``, as published files have
    it. The former leaves out what is as in local layers, ``local_heads``."""
    kv_heads = local_heads["num_kv_heads"]
    head_dim = reader.size("global_head_dim", 512)
    num_kv_heads = reader.size("num_global_key_value_heads", kv_heads)
    if not same_values:  # the published code reads it with keys as values alone
        num_kv_heads = kv_heads
    key = "per_layer_config"
    layers = reader.mapping(key)
    if key not in reader.values:
        return {"head_dim": head_dim, "num_kv_heads": num_kv_heads}
    if not layers:
        return local_heads
    global_layers = {
        str(layer) for layer, kind in enumerate(layer_types) if kind == GLOBAL
    }
    values = [layers[layer] for layer in sorted(layers)]
    first = values[0]
    are_same = {*layers} == global_layers and all(value == first for value in values)
    if not are_same or not isinstance(first, dict):
        message = f"{key} does not give the heads of all global layers alike"
        raise MaxlmError(message, where=reader.where, fix=_FIX)
    nested = ConfigReader(first, f"{reader.where}: {key}")
    heads = {
        "head_dim": nested.size("head_dim", local_heads["head_dim"]),
        "num_kv_heads": nested.size("num_key_value_heads", kv_heads),
    }
    nested.check_all_read()
    return heads


def _read_positions(
    rope_reader: ConfigReader, default_type: str, theta: float
) -> dict[str, Any]:
    """Reads positions of a kind of layers."""
    rope_type = rope_reader.choice(
        "rope_type", ("default", "proportional"), default_type
    )
    positions: dict[str, Any] = {
        "kind": "rope",
        "theta": rope_reader.number("rope_theta", theta),
    }
    if rope_type == "default":
        rope_reader.read_implemented("partial_rotary_factor", 1.0, None)
        return positions
    positions["scaling"] = {
        "kind": "proportional",
        "share": rope_reader.number("partial_rotary_factor", 0.25, most=1),
        "factor": rope_reader.number("factor", 1.0),
    }
    return positions


def _write_positions(positions: PositionsConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": positions.theta}
    scaling = positions.scaling
    if scaling is None:
        return values
    if not isinstance(scaling, ProportionalScaling):
        raise MaxlmError(
            f"positions.scaling.kind={scaling.kind} is not Gemma 4's",
            where="model.positions",
            fix="convert to another family, or use proportional",
        )
    values |= {"rope_type": "proportional", "partial_rotary_factor": scaling.share}
    if scaling.factor != 1:
        values["factor"] = scaling.factor
    return values


def _read_experts(
    reader: ConfigReader, settings: dict[str, Any], mlp: dict[str, Any]
) -> dict[str, Any]:
    """Reads experts, beside which the MLP is a shared one."""
    eps = settings["norm"]["eps"]
    return {
        "num_experts": reader.size("num_experts"),
        "experts_per_token": reader.size("top_k_experts"),
        "d_ff": reader.size("moe_intermediate_size"),
        "activation": mlp["activation"],
        "shared_experts": 1,
        "shared_d_ff": mlp["d_ff"],
        "expert_scales": True,
        "router_norm_eps": eps,
        "branch_norms": {"eps": eps},
    }


def _read_layer_inputs(
    reader: ConfigReader, settings: dict[str, Any], activation: str
) -> None:
    width = reader.size("hidden_size_per_layer_input", 256, least=0)
    num_rows = reader.size("vocab_size_per_layer_input", 262_144)
    if width:
        settings["layer_inputs"] = {
            "width": width,
            "vocab_size": num_rows,
            "activation": activation,
        }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    settings["embedding_scale"] = settings["d_model"] ** 0.5
    activation = fields.read_activation(reader, "hidden_activation", TANH)
    _read_layer_inputs(reader, settings, activation)
    default_types = [
        LOCAL if number % 6 else GLOBAL for number in range(1, num_layers + 1)
    ]
    layer_types = list(fields.read_layer_types(reader, default_types, (LOCAL, GLOBAL)))
    layer_types[-1] = GLOBAL  # whatever the file says, as in the published code
    sources = gemma3n.read_sharing(reader, layer_types, 0)

    local_attention = settings["attention"]
    local_heads = {key: local_attention[key] for key in ("head_dim", "num_kv_heads")}
    same_values = reader.flag("attention_k_eq_v", False)
    global_heads = _read_global_heads(reader, layer_types, local_heads, same_values)
    global_attention = local_attention | global_heads
    if same_values:
        global_attention["keys_as_values"] = True
    settings["attention"] = global_attention
    rope_reader = reader.read_nested("rope_parameters")
    settings["positions"] = _read_positions(
        rope_reader.read_nested(GLOBAL), "proportional", 1_000_000.0
    )
    local: dict[str, Any] = {
        "window": reader.size("sliding_window", 512),
        "positions": _read_positions(
            rope_reader.read_nested(LOCAL), "default", 10_000.0
        ),
    }
    if local_attention != global_attention:
        local["attention"] = local_attention

    mlp = {"d_ff": reader.size("intermediate_size", 9216), "activation": activation}
    has_experts = reader.flag("enable_moe_block", False)
    is_wide = reader.flag("use_double_wide_mlp", False) and any(
        source is not None for source in sources
    )
    if has_experts and is_wide:
        raise MaxlmError(
            "use_double_wide_mlp with enable_moe_block is not implemented",
            where=reader.where,
            fix="no published model has both",
        )
    if has_experts:
        settings["moe"] = _read_experts(reader, settings, mlp)
    else:
        settings["mlp"] = mlp
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            reader.ignore(key)
    layers: list[dict[str, Any]] = []
    for layer_type, source in zip(layer_types, sources, strict=True):
        layer = dict(local) if layer_type == LOCAL else {}
        if is_wide and source is not None:
            layer["mlp"] = mlp | {"d_ff": 2 * mlp["d_ff"]}
        layers.append(layer)
    gemma3n.name_kinds(settings, layers, layer_types, sources)


def _write_feed_forward(
    config: TransformerConfig, kinds: Sequence[LayerKind]
) -> dict[str, Any]:
    moe = config.moe
    if moe is not None:
        return {
            "enable_moe_block": True,
            "intermediate_size": moe.shared_d_ff or moe.shared_experts * moe.d_ff,
            "num_experts": moe.num_experts,
            "top_k_experts": moe.experts_per_token,
            "moe_intermediate_size": moe.d_ff,
        }
    assert config.mlp is not None
    width = config.mlp.d_ff
    wide = [kind.mlp is not None for kind in kinds]
    if any(wide):
        doubled = [
            kind.mlp is not None and kind.mlp.d_ff == 2 * width for kind in kinds
        ]
        if doubled != [kind.keys_of is not None for kind in kinds]:
            raise fields.refuse_pattern("other layers have wide MLPs than Gemma 4's")
    return {"intermediate_size": width, "use_double_wide_mlp": any(wide)}


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_layer_kinds(config)
    layer_types, window = fields.write_layer_types(config)
    ffn = config.moe or config.mlp
    assert ffn is not None
    activation = fields.to_hf_activation(ffn.activation)
    local_kind = next((kind for kind in kinds if kind.window is not None), None)
    global_attention = config.attention
    local_attention = global_attention
    rope_parameters = {GLOBAL: _write_positions(config.positions)}
    if local_kind is not None:
        local_attention = config.get_attention(local_kind) or global_attention
        rope_parameters[LOCAL] = _write_positions(config.get_positions(local_kind))
    same_values = global_attention.keys_as_values
    num_kv_heads = local_attention.num_kv_heads
    if not same_values and num_kv_heads != global_attention.num_kv_heads:
        raise fields.refuse_pattern(
            "other kv heads in global layers, whose values are not their keys"
        )
    inputs = config.layer_inputs
    values = {
        "hidden_activation": TANH if activation == "gelu_new" else activation,
        "num_key_value_heads": num_kv_heads,
        "head_dim": local_attention.head_dim,
        "global_head_dim": global_attention.head_dim,
        "num_global_key_value_heads": global_attention.num_kv_heads,
        "attention_k_eq_v": same_values,
        "layer_types": layer_types,
        "num_kv_shared_layers": gemma3n.write_sharing(config),
        "rope_parameters": rope_parameters,
        "hidden_size_per_layer_input": 0 if inputs is None else inputs.width,
        **_write_feed_forward(config, kinds),
    }
    if inputs is not None:
        num_rows = inputs.vocab_size or config.vocab_size
        values["vocab_size_per_layer_input"] = num_rows
    if window is not None:
        values["sliding_window"] = window
    return values


GEMMA4 = ModelFamily(
    "gemma4",
    "Gemma4ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(4),
        **gemma3n.GEMMA_TEXT,
        "final_logit_softcapping": fields.map_number("logit_cap", None, nullable=True),
        "use_bidirectional_attention": fields.require_value(None, False, "vision"),
    },
    TABLE,
    {
        "placement": "sandwich",
        "layer_scale": True,
        "attention.qk_norm": True,
        "attention.value_norm": True,
        "attention.scale": 1.0,
    },
    read_extra=_read,
    write_extra=_write,
    hf_model_type="gemma4_text",
)
