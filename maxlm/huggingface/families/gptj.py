"""GPT-J 6B (Wang and Komatsuzaki 2021): attention and FFN side by side with one norm,
part of a head's dimensions turned, neighbour with neighbour, a bias on the logits."""

from typing import Any

from maxlm.huggingface.families import fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    NameTable,
    TensorRule,
    copy,
    linear,
    map_linears,
    map_norm,
    permute_rotary,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

H = "transformer.h.{layer}"


def _table(config: TransformerConfig) -> NameTable:
    rotary_dim = config.positions.rotary_dim or config.attention.head_dim

    def map_turned(ours: str) -> TensorRule:
        return permute_rotary(linear(ours), rotary_dim, each_head=True, first=True)

    return {
        "transformer.wte.weight": copy("embedding.table"),
        **map_norm(f"{H}.ln_1", "attention_norm"),
        f"{H}.attn.q_proj.weight": map_turned("attention.query.kernel"),
        f"{H}.attn.k_proj.weight": map_turned("attention.key.kernel"),
        f"{H}.attn.v_proj.weight": linear("attention.value.kernel"),
        f"{H}.attn.out_proj.weight": linear("attention.out.kernel"),
        **map_linears(f"{H}.mlp", "mlp", fc_in="up", fc_out="down"),
        **map_norm("transformer.ln_f", "final_norm"),
        "lm_head.weight": linear("head.kernel"),
        "lm_head.bias": copy("head_bias"),
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    rotary_dim = reader.size("rotary_dim", 64)
    positions: dict[str, Any] = {"kind": "rope", "theta": 10_000.0}
    if rotary_dim != settings["attention"]["head_dim"]:
        positions["rotary_dim"] = rotary_dim
    settings["positions"] = positions
    # The published code reads neither.
    reader.read_implemented("rotary", True)
    reader.read_implemented("scale_attn_weights", True)


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {"rotary_dim": config.positions.rotary_dim or config.attention.head_dim}


GPTJ = ModelFamily(
    "gptj",
    "GPTJForCausalLM",
    {
        **fields.map_sizes("n_layer", "n_embd", "n_positions", "n_head"),
        "n_inner": fields.map_size("mlp.d_ff", None),
        "activation_function": fields.map_activation("mlp.activation", "gelu_new"),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.require_value(False, ours="tie_embeddings"),
    },
    _table,
    {
        "norm.kind": "layernorm",
        "norm.bias": True,
        "mlp.gated": False,
        "mlp.bias": True,
        "placement": "parallel_shared",
        "head_bias": True,
    },
    read_extra=_read,
    write_extra=_write,
    ignored_tensors=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
    prefix="transformer.",
    ignored_keys=[
        f"summary_{x}" for x in ("activation", "proj_to_labels", "type", "use_proj")
    ],
)
