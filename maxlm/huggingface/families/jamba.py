"""Jamba (Lieber et al. 2024, arXiv 2403.19887; 1.5: arXiv 2408.12570): Mamba's
selective scan with attention without positions in one layer of eight, experts in every
other layer."""

from typing import Any

from maxlm.huggingface.families import bamba, fields, llama, mamba
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba import MambaConfig

L = "model.layers.{layer}"
_EXPERT = f"{L}.feed_forward.experts.{{expert}}"
TABLE = {
    **bamba.OUTER,
    **bamba.NORMS,
    **llama.ATTENTION,
    **mamba.map_mamba(f"{L}.mamba"),
    **bamba.MLP,
    f"{L}.feed_forward.router.weight": linear("moe.router"),
    f"{_EXPERT}.gate_proj.weight": linear("moe.gate"),
    f"{_EXPERT}.up_proj.weight": linear("moe.up"),
    f"{_EXPERT}.down_proj.weight": linear("moe.down"),
}


def _read_mixer(reader: ConfigReader, d_model: int) -> dict[str, Any]:
    return {
        "kind": "mamba",
        "d_inner": reader.size("mamba_expand", 2) * d_model,
        "d_state": reader.size("mamba_d_state", 16),
        "d_conv": reader.size("mamba_d_conv", 4, least=2),
        "dt_rank": mamba.read_rank(reader, "mamba_dt_rank", d_model),
        "bias": reader.flag("mamba_proj_bias", False),
        "conv_bias": reader.flag("mamba_conv_bias", True),
        "inner_norms": "learned",
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    attention_period = reader.size("attn_layer_period", 8)
    attention_offset = reader.size("attn_layer_offset", 4, least=0)
    expert_period = reader.size("expert_layer_period", 2)
    expert_offset = reader.size("expert_layer_offset", 1, least=0)
    num_experts = reader.size("num_experts", 16, alias="num_local_experts")
    mixer = _read_mixer(reader, settings["d_model"])
    settings["kinds"] = {
        "mamba": {"mixer": mixer, "ffn": "mlp"},
        "mamba_moe": {"mixer": mixer, "ffn": "moe"},
        "attention": {"ffn": "mlp"},
        "attention_moe": {"ffn": "moe"},
    }
    kinds: list[str] = []
    for layer in range(num_layers):
        has_attention = layer % attention_period == attention_offset
        has_experts = num_experts > 1 and layer % expert_period == expert_offset
        kind = "attention" if has_attention else "mamba"
        kinds.append(f"{kind}_moe" if has_experts else kind)
    fields.name_layers(settings, kinds)

    activation = fields.read_activation(reader, "hidden_act", "silu")
    width = reader.size("intermediate_size", 14_336)
    per_token = reader.size("num_experts_per_tok", 2)
    loss = reader.number("router_aux_loss_coef", 1e-3, least=0)
    if {"mamba", "attention"} & set(kinds):
        settings["mlp"] = {"d_ff": width, "activation": activation}
    if {"mamba_moe", "attention_moe"} & set(kinds):
        settings["moe"] = {
            "num_experts": num_experts,
            "experts_per_token": per_token,
            "d_ff": width,
            "activation": activation,
            "renormalise": False,
            "balance_loss": per_token * loss,
        }


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_kind_names(config)
    mixer = fields.find_mixer(config, MambaConfig)
    ffn = config.moe or config.mlp
    assert ffn is not None
    values: dict[str, Any] = {
        "intermediate_size": ffn.d_ff,
        "mamba_expand": bamba.divide_by_width(config, mixer.d_inner),
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_dt_rank": mixer.dt_rank,
        "mamba_proj_bias": mixer.bias,
        "mamba_conv_bias": mixer.conv_bias,
        **_write_period("attn_layer", [kind.startswith("attention") for kind in kinds]),
        **_write_period("expert_layer", [kind.endswith("moe") for kind in kinds]),
        "num_experts": 1,
    }
    if config.moe is not None:
        values |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.experts_per_token,
            "router_aux_loss_coef": (
                config.moe.balance_loss / config.moe.experts_per_token
            ),
        }
    return values


def _write_period(name: str, are_special: list[bool]) -> dict[str, int]:
    """Writes which layers of a list are special, as a period and the first of them.
    Raises MaxlmError: they do not come at equal distances."""
    num_layers = len(are_special)
    if not any(are_special):
        return {f"{name}_period": num_layers + 1, f"{name}_offset": num_layers}
    first = are_special.index(True)
    periods = range(first + 1, num_layers + 1)
    for period in periods:
        layers = range(num_layers)
        if [layer % period == first for layer in layers] == are_special:
            return {f"{name}_period": period, f"{name}_offset": first}
    raise fields.refuse_pattern("layers that do not come at equal distances")


JAMBA = ModelFamily(
    "jamba",
    "JambaForCausalLM",
    {
        **fields.SIZES,
        "vocab_size": fields.map_size("vocab_size", 65_536),
        "max_position_embeddings": fields.map_size("max_seq_len", 262_144),
        **llama.map_kv_heads(8),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
    },
    TABLE,
    {"positions.kind": "none"},
    read_extra=_read,
    write_extra=_write,
    # Choices of programs, and what the published code does not read.
    ignored_keys=[
        *("use_associative_scan", "use_mamba_kernels", "use_mambapy"),
        *("mamba_inner_layernorms", "n_ctx", "num_logits_to_keep", "sliding_window"),
        "calc_logits_for_entire_prompt",
    ],
)
