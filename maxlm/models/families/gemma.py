"""Gemma 1 (Gemma Team 2024, arXiv 2403.08295), 2 (arXiv 2408.00118) and 3 (2025, arXiv 2503.19786):
norms that multiply by 1 + scale, gated GELU, embeddings times the root of the width."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama, rope
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy
from maxlm.models.families.gpt2 import read_activation, to_hf_activation
from maxlm.models.families.layers import GLOBAL, LOCAL, read_pattern, write_pattern
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader
from maxlm.models.layers.positions import PositionsConfig

SANDWICH: NameTable = {
    "model.layers.{layer}.input_layernorm.weight": copy("attention_norm.scale"),
    "model.layers.{layer}.post_attention_layernorm.weight": copy("attention_post_norm.scale"),
    "model.layers.{layer}.pre_feedforward_layernorm.weight": copy("mlp_norm.scale"),
    "model.layers.{layer}.post_feedforward_layernorm.weight": copy("mlp_post_norm.scale"),
}
TANH = "gelu_pytorch_tanh"
INERT = ("cache_implementation", "_sliding_window_pattern")


def _table(config: DecoderConfig) -> NameTable:
    norms = SANDWICH if config.placement == "sandwich" else llama.NORMS
    return {**llama.OUTER, **llama.EMBEDDING, **norms, **llama.ATTENTION, **llama.MLP}


def _read(reader: ConfigReader, *, local: bool = False, theta: float = 10_000.0) -> dict[str, Any]:
    kv_heads = 4 if local else 16
    settings = llama.read_common(reader, kv_heads=kv_heads, head_dim=256, theta=theta)
    settings["attention"] |= {"bias": reader.flag("attention_bias", False)}
    reader.require("use_bidirectional_attention", None, False)
    settings["norm"] |= {"zero_centred": True}
    settings["tie_embeddings"] = reader.require("tie_word_embeddings", True)
    settings["embedding_scale"] = settings["d_model"] ** 0.5
    # Gemma 1 was published with "gelu" and meant its approximation; hidden_activation came later,
    # and stands beside hidden_act in many files of Gemma 2 and 3.
    key, other = "hidden_act", "hidden_activation"
    if local:
        key, other = other, key
    elif reader.values.get(key) == "gelu":
        reader.values[key] = TANH
    act = read_activation(reader, key, TANH)
    reader.require(other, None, reader.get(key, TANH))
    settings["mlp"] = {"d_ff": reader.size("intermediate_size"), "activation": act, "gated": True}
    return settings


def _write(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    name = TANH
    if config.mlp.activation != "gelu_tanh":
        name = to_hf_activation(config.mlp.activation)
    return {
        **llama.write_common(config),
        "attention_bias": config.attention.bias,
        "intermediate_size": config.mlp.d_ff,
        "hidden_activation": name,
        "hidden_act": name,
    }


def _read_local(
    reader: ConfigReader, *, caps: tuple[float, float] | tuple[None, None], theta: float = 10_000.0
) -> dict[str, Any]:
    """Reads the settings that Gemma 2 and 3 add, except for the pattern.

    Args:
        caps: of scores and logits, where the file does not name them; a null there is none.
    """
    settings = _read(reader, local=True, theta=theta)
    divisor = reader.number("query_pre_attn_scalar")
    settings["attention"] |= {
        "scale": divisor**-0.5,
        "soft_cap": reader.number("attn_logit_softcapping", caps[0], nullable=True),
    }
    return settings | {
        "placement": "sandwich",
        "logit_cap": reader.number("final_logit_softcapping", caps[1], nullable=True),
    }


def _read_gemma2(reader: ConfigReader) -> dict[str, Any]:
    settings = _read_local(reader, caps=(50.0, 30.0))
    kinds = [GLOBAL if layer % 2 else LOCAL for layer in range(settings["num_layers"])]
    window = reader.size("sliding_window", 4096, nullable=True)
    reader.require("sliding_window_size", window)  # once more
    return settings | read_pattern(reader, kinds, {LOCAL: {"window": window}, GLOBAL: {}})


def _write_local(config: DecoderConfig) -> dict[str, Any]:
    kinds, window = write_pattern(config)
    scale = config.attention.scale or config.attention.head_dim**-0.5
    divisor = round(scale**-2, 6)
    return {
        **_write(config),
        "query_pre_attn_scalar": int(divisor) if divisor.is_integer() else divisor,
        "attn_logit_softcapping": config.attention.soft_cap,
        "final_logit_softcapping": config.logit_cap,
        "layer_types": kinds,
        **({} if window is None else {"sliding_window": window}),
    }


def _read_gemma3(reader: ConfigReader) -> dict[str, Any]:
    """Local layers have a theta of their own, and no scaling."""
    reader.require("attn_logit_softcapping", None)  # the published code does not apply it
    near = reader.number("rope_local_base_freq", 10_000.0)
    both = reader.read_nested("rope_parameters")
    local = both.read_nested(LOCAL)
    reader.values["rope_parameters"] = both.get(GLOBAL, None)
    settings = _read_local(reader, caps=(None, None), theta=1_000_000.0)
    settings["attention"] |= {"qk_norm": True}
    period = reader.size("sliding_window_pattern", 6)
    if not reader.has("layer_types"):
        reader.require(
            "_sliding_window_pattern", None, period
        )  # the published code does not read it
    layers = range(1, settings["num_layers"] + 1)
    kinds = [LOCAL if layer % period else GLOBAL for layer in layers]
    theta = local.number("rope_theta", near)
    local.require("partial_rotary_factor", 1.0, None)
    positions = {"kind": "rope", "theta": theta, "scaling": rope.read_scaling(local, None)}
    both.finish()
    nearby = {"window": reader.size("sliding_window", 4096, nullable=True), "positions": positions}
    return settings | read_pattern(reader, kinds, {LOCAL: nearby, GLOBAL: {}})


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    def parameters(positions: PositionsConfig) -> dict[str, Any]:
        scaling = rope.write_scaling(positions) or {"rope_type": "default"}
        return {"rope_theta": positions.theta, **scaling}

    found = _write_local(config)
    near = [kind.positions for kind in config.kinds if kind.window is not None]
    for flat in ("rope_theta", "rope_scaling"):
        found.pop(flat, None)
    both = {GLOBAL: parameters(config.positions)}
    if near:  # else all layers are global
        if near[0] is None:
            raise MaxlmError("no positions of its own for a layer with a window", fix="add them")
        both[LOCAL] = parameters(near[0])
    return found | {"rope_parameters": both}


GEMMA = ModelFamily("gemma", "gemma", "GemmaForCausalLM", _read, _write, _table)
GEMMA2 = ModelFamily(
    "gemma2", "gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_local, _table, inert=INERT
)
GEMMA3 = ModelFamily(
    "gemma3", "gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, _table, inert=INERT
)
