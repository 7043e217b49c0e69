"""Helium 1 (Kyutai 2025, its published code and weights): Llama's shape, with
neighbouring dimensions of a head turned."""

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable
from maxlm.models.architectures.config import TransformerConfig


def _make_table(config: TransformerConfig) -> NameTable:
    return {**llama.TABLE, **llama.map_paired_attention(config)}


HELIUM = ModelFamily(
    "helium",
    "HeliumForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(20),
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-8),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.map_flag("mlp.bias", False),
    },
    _make_table,
    {"attention.out_bias": False},
    rope_kwargs={"theta": 100_000.0},
)
