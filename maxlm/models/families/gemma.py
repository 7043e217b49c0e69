"""Gemma 1 (Gemma Team 2024, arXiv 2403.08295), 2 (arXiv 2408.00118) and 3 (2025, arXiv 2503.19786):
norms that multiply by 1 + scale, gated GELU, embeddings times the root of the width."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama
from maxlm.models.families.family import Family
from maxlm.models.families.forms import same
from maxlm.models.families.gpt2 import activation, published_activation
from maxlm.models.families.layers import GLOBAL, LOCAL, read_pattern, write_pattern
from maxlm.models.families.names import Table
from maxlm.models.families.reader import Reader
from maxlm.models.families.rope import read_scaling, write_scaling
from maxlm.models.layers.positions import PositionsConfig

SANDWICH: Table = {
    "model.layers.{layer}.input_layernorm.weight": same("attention_norm.scale"),
    "model.layers.{layer}.post_attention_layernorm.weight": same("attention_post_norm.scale"),
    "model.layers.{layer}.pre_feedforward_layernorm.weight": same("mlp_norm.scale"),
    "model.layers.{layer}.post_feedforward_layernorm.weight": same("mlp_post_norm.scale"),
}
INERT = ("cache_implementation",)
PERIOD = ("sliding_window_pattern", "_sliding_window_pattern")


def _table(config: DecoderConfig) -> Table:
    norms = SANDWICH if config.placement == "sandwich" else llama.NORMS
    return {**llama.OUTER, **llama.EMBEDDING, **norms, **llama.ATTENTION, **llama.MLP}


def _read(reader: Reader) -> dict[str, Any]:
    settings = llama.read_common(reader)
    settings["attention"] |= {"bias": reader.get("attention_bias", False)}
    reader.only("use_bidirectional_attention", None, False)
    settings["norm"] |= {"zero_centred": True}
    settings["tie_embeddings"] = reader.only("tie_word_embeddings", True)
    settings["embedding_scale"] = settings["d_model"] ** 0.5
    # Gemma 1 was published with "gelu" and meant its approximation; hidden_activation came later.
    named = reader.either("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    inner = {"gelu": "gelu_tanh"} if reader.values.get("model_type") == "gemma" else {}
    act = inner.get(named) or activation(Reader({"a": named}, reader.where), "a", "gelu")
    settings["mlp"] = {"d_ff": reader.get("intermediate_size"), "activation": act, "gated": True}
    return settings


def _write(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    name = "gelu_pytorch_tanh"
    if config.mlp.activation != "gelu_tanh":
        name = published_activation(config.mlp.activation)
    return {
        **llama.write_common(config),
        "attention_bias": config.attention.bias,
        "intermediate_size": config.mlp.d_ff,
        "hidden_activation": name,
        "hidden_act": name,
    }


def _read_local(reader: Reader) -> dict[str, Any]:
    """What Gemma 2 and 3 add, but for the pattern."""
    settings = _read(reader)
    divisor = reader.number("query_pre_attn_scalar")
    settings["attention"] |= {
        "scale": divisor**-0.5,
        "soft_cap": reader.get("attn_logit_softcapping", None),
    }
    return settings | {
        "placement": "sandwich",
        "logit_cap": reader.get("final_logit_softcapping", None),
    }


def _read_gemma2(reader: Reader) -> dict[str, Any]:
    settings = _read_local(reader)
    kinds = [GLOBAL if layer % 2 else LOCAL for layer in range(settings["num_layers"])]
    window = reader.get("sliding_window")
    reader.only("sliding_window_size", window)  # once more
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
        "sliding_window": window,
    }


def _read_gemma3(reader: Reader) -> dict[str, Any]:
    """Local layers have a theta of their own, and no scaling."""
    near = reader.number("rope_local_base_freq", 10_000.0)
    both = reader.inside("rope_parameters")
    local = both.inside(LOCAL)
    reader.values["rope_parameters"] = both.get(GLOBAL, None)
    reader.values.setdefault("rope_theta", 1_000_000.0)
    settings = _read_local(reader)
    settings["attention"] |= {"qk_norm": True}
    period = 6
    if any(reader.get(key, None) is not None for key in PERIOD):
        period = reader.size(*PERIOD)
    layers = range(1, settings["num_layers"] + 1)
    kinds = [LOCAL if layer % period else GLOBAL for layer in layers]
    theta = local.number("rope_theta", near)
    positions = {"kind": "rope", "theta": theta, "scaling": read_scaling(local, None)}
    both.finish()
    nearby = {"window": reader.get("sliding_window"), "positions": positions}
    return settings | read_pattern(reader, kinds, {LOCAL: nearby, GLOBAL: {}})


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    def parameters(positions: PositionsConfig) -> dict[str, Any]:
        scaling = write_scaling(positions) or {"rope_type": "default"}
        return {"rope_theta": positions.theta, **scaling}

    found = _write_local(config)
    near = [kind.positions for kind in config.kinds if kind.window is not None]
    if not near or near[0] is None:
        raise MaxlmError("no layer with a window and positions of its own", fix="add a pattern")
    found.pop("rope_theta"), found.pop("rope_scaling", None)
    return found | {
        "rope_parameters": {LOCAL: parameters(near[0]), GLOBAL: parameters(config.positions)}
    }


GEMMA = Family("gemma", "gemma", "GemmaForCausalLM", _read, _write, _table)
GEMMA2 = Family(
    "gemma2", "gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_local, _table, inert=INERT
)
GEMMA3 = Family(
    "gemma3", "gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, _table, inert=INERT
)
