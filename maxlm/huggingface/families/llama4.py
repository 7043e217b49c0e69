"""Llama 4's text models (Meta 2025, its published code and weights): three layers of
four see chunks alone, the fourth has no positions and a temperature; one expert a token,
whose input the router weighs, beside a shared one; dense layers between them in the
larger model. Images are not read: of the published models it is the language model."""

from collections.abc import Sequence
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    NameTable,
    copy,
    join_experts,
    linear,
    map_linears,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

F = "model.layers.{layer}.feed_forward"
CHUNKED, GLOBAL = "chunked_attention", "full_attention"


def _table(config: TransformerConfig) -> NameTable:
    return {
        **llama.OUTER,
        **llama.NORMS,
        **llama.map_paired_attention(config),
        **map_linears(F, "mlp", **llama.SWIGLU_NAMES),
        f"{F}.router.weight": linear("moe.router"),
        f"{F}.experts.gate_up_proj": join_experts(
            "moe.gate", "moe.up", inputs_first=True
        ),
        f"{F}.experts.down_proj": copy("moe.down"),
        **map_linears(f"{F}.shared_expert", "moe.shared", **llama.SWIGLU_NAMES),
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    has_positions = _read_layers_with_positions(reader, num_layers)
    sparse = _read_sparse_layers(reader, num_layers)
    d_ff = reader.size("intermediate_size_mlp")
    if not all(sparse):
        settings["mlp"] = {"d_ff": d_ff}

    chunk = reader.size("attention_chunk_size", 8192, nullable=True)
    kinds_of_attention = [
        CHUNKED if turns and chunk is not None else GLOBAL for turns in has_positions
    ]
    if reader.has("layer_types"):
        reader.read_implemented("layer_types", kinds_of_attention)
    is_tempered = reader.flag("attn_temperature_tuning", True)
    temperature = {
        "scale": reader.number("attn_scale", 0.1),
        "length": reader.size("floor_scale", 8192),
    }
    plain = settings["attention"]
    turned = {**plain, "chunk": chunk}
    if reader.flag("use_qk_norm", True):
        turned |= {
            "qk_norm": True,
            "qk_norm_form": "weightless",
            "qk_norm_after_rope": True,
        }
    still = {**plain, "temperature": temperature if is_tempered else None}
    # Layers with positions are the model's usual ones.
    settings["attention"] = turned
    kinds: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    for turns, is_sparse in zip(has_positions, sparse, strict=True):
        name = "local" if turns else "global"
        kind: dict[str, Any] = {}
        if not turns:
            kind |= {"attention": still, "positions": {"kind": "none"}}
        if not is_sparse:
            name += "_dense"
        if not all(sparse):
            kind["ffn"] = "moe" if is_sparse else "mlp"
        names.append(name)
        kinds[name] = kind
    if not any(sparse):
        # Its settings of experts say nothing then; the published code has them all the
        # same, in no layer.
        del settings["moe"]
    if any(kinds.values()):
        settings["kinds"] = kinds
        settings["pattern"] = names[: _find_period(names)]


def _find_period(names: Sequence[str]) -> int:
    """Returns the number of names after which a list repeats."""
    return next(n for n in range(1, len(names) + 1) if names[n:] == names[:-n])


def _read_layers_with_positions(reader: ConfigReader, num_layers: int) -> list[bool]:
    interval = reader.size("no_rope_layer_interval", 4)
    # In spite of its name 1 marks a layer with positions.
    default = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    flags = reader.flags("no_rope_layers") or default
    if len(flags) < num_layers:
        message = f"no_rope_layers does not name {num_layers} layers"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    return flags[:num_layers]


def _read_sparse_layers(reader: ConfigReader, num_layers: int) -> list[bool]:
    step = reader.size("interleave_moe_layer_step", 1)
    numbers = reader.values.get("moe_layers")
    reader.ignore("moe_layers")
    usual = list(range(step - 1, num_layers, step))
    if numbers is None:
        numbers = usual
    layers = range(num_layers)
    if not isinstance(numbers, list) or any(n not in layers for n in numbers):
        reader.read_implemented("moe_layers", usual)
    return [layer in numbers for layer in layers]


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_layer_kinds(config)
    turned = [config.get_positions(kind).kind == "rope" for kind in kinds]
    sparse = [kind.ffn != "mlp" and config.moe is not None for kind in kinds]
    attention = [config.get_attention(kind) for kind in kinds]
    local = next(
        (one for one, turns in zip(attention, turned, strict=True) if turns), None
    )
    still = next(
        (one for one, turns in zip(attention, turned, strict=True) if not turns), None
    )
    chunk = local.chunk if local is not None else None
    values: dict[str, Any] = {
        "no_rope_layers": [int(turns) for turns in turned],
        "moe_layers": [number for number, is_sparse in enumerate(sparse) if is_sparse],
        "attention_chunk_size": chunk,
        "layer_types": [CHUNKED if turns and chunk else GLOBAL for turns in turned],
        "use_qk_norm": local is not None and local.qk_norm,
    }
    values["intermediate_size_mlp"] = config.moe.d_ff if config.moe else 1
    if config.mlp is not None:
        values["intermediate_size_mlp"] = config.mlp.d_ff
    temperature = None if still is None else still.temperature
    values["attn_temperature_tuning"] = temperature is not None
    if temperature is not None:
        values["attn_scale"] = temperature.scale
        values["floor_scale"] = temperature.length
    return values


LLAMA4 = ModelFamily(
    "llama4",
    "Llama4ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        "head_dim": fields.map_size("attention.head_dim", 128, nullable=True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.map_flag("attention.bias", False),
        "num_local_experts": fields.map_size("moe.num_experts"),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token", 1),
        "intermediate_size": fields.map_size("moe.d_ff"),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "router_aux_loss_coef": fields.map_balance_loss(0.001),
        "router_jitter_noise": fields.require_value(0.0),
    },
    _table,
    {
        "moe.score": "sigmoid",
        "moe.renormalise": False,
        "moe.weigh_inputs": True,
        "moe.shared_experts": 1,
    },
    hf_model_type="llama4_text",
    rope_kwargs={"theta": 500_000.0},
    read_extra=_read,
    write_extra=_write,
    ignored_keys=["for_llm_compressor"],  # which the published code does not read
)
