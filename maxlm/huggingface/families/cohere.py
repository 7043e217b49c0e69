"""Cohere's Command R and Aya 23 (Aryabumi et al. 2024, arXiv 2405.15032): attention and
FFN side by side with one norm, a LayerNorm without offsets, neighbouring dimensions
turned, scaled logits."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, copy
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"


def _table(config: TransformerConfig) -> NameTable:
    return {
        **llama.OUTER,
        f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
        **llama.map_paired_attention(config),
        **llama.MLP,
    }


_FIELDS = {
    **fields.SIZES,
    **llama.map_kv_heads(None),
    **llama.SWIGLU,
    "layer_norm_eps": fields.map_number("norm.eps", 1e-5),
    "logit_scale": fields.map_number("logit_scale", 0.0625),
    "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
    "attention_bias": fields.map_flag("attention.bias", False),
    # A scale for each dimension of each head, not of one head.
    "use_qk_norm": fields.require_value(False),
    "model_max_length": fields.ConfigField(lambda reader, key: reader.ignore(key)),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    reader.read_implemented("head_dim", None, settings["attention"]["head_dim"])


COHERE = ModelFamily(
    "cohere",
    "CohereForCausalLM",
    _FIELDS,
    _table,
    {"norm.kind": "layernorm", "placement": "parallel_shared"},
    rope_kwargs={"theta": 500_000.0},
    read_extra=_read,
)
