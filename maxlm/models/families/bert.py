"""BERT (Devlin et al. 2019, arXiv 1810.04805) with its head for masked tokens."""

from typing import Any

from maxlm.models.architectures.encoder import EncoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, map_linear, map_norm
from maxlm.models.families.gpt2 import (
    multi_head_config,
    plain_mlp_config,
    read_activation,
    to_hf_activation,
)
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

L = "bert.encoder.layer.{layer}"
E, HEAD = "bert.embeddings", "cls.predictions"
TABLE: NameTable = {
    f"{E}.word_embeddings.weight": copy("embedding.table", f"{HEAD}.decoder.weight"),
    f"{E}.position_embeddings.weight": copy("positions.table"),
    f"{E}.token_type_embeddings.weight": copy("types.table"),
    **map_norm(f"{E}.LayerNorm", "embedding_norm"),
    **map_linear(f"{L}.attention.self.query", "attention.query"),
    **map_linear(f"{L}.attention.self.key", "attention.key"),
    **map_linear(f"{L}.attention.self.value", "attention.value"),
    **map_linear(f"{L}.attention.output.dense", "attention.out"),
    **map_norm(f"{L}.attention.output.LayerNorm", "attention_norm"),
    **map_linear(f"{L}.intermediate.dense", "mlp.up"),
    **map_linear(f"{L}.output.dense", "mlp.down"),
    **map_norm(f"{L}.output.LayerNorm", "mlp_norm"),
    **map_linear(f"{HEAD}.transform.dense", "head_layer.dense"),
    **map_norm(f"{HEAD}.transform.LayerNorm", "head_layer.norm"),
    f"{HEAD}.bias": copy("head_bias", f"{HEAD}.decoder.bias"),
}

POOLER = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    reader.require("position_embedding_type", "absolute")
    reader.require("add_cross_attention", False)
    reader.require("is_decoder", False)  # true: nothing sees what follows
    act = read_activation(reader, "hidden_act", "gelu")
    return {
        "architecture": "encoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("num_hidden_layers"),
        "d_model": width,
        "max_seq_len": reader.size("max_position_embeddings"),
        "attention": multi_head_config(width, heads),
        "mlp": plain_mlp_config(reader.size("intermediate_size"), act),
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_eps", 1e-12), "bias": True},
        "placement": "post",
        "final_norm": False,
        "positions": {"kind": "learned"},
        "embedding_norm": True,
        "token_types": reader.size("type_vocab_size", 2),
        "head_activation": act,
        "head_bias": True,
        "tie_embeddings": reader.require("tie_word_embeddings", True),
    }


def _write(config: EncoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": config.attention.num_heads,
        "intermediate_size": config.mlp.d_ff,
        "hidden_act": to_hf_activation(config.mlp.activation),
        "layer_norm_eps": config.norm.eps,
        "type_vocab_size": config.token_types,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


BERT = ModelFamily(
    "bert",
    "bert",
    "BertForMaskedLM",
    _read,
    _write,
    lambda config: TABLE,
    # Position numbers, and the head of the task that was trained beside.
    ignored=("bert.embeddings.position_ids", "bert.pooler.*", "cls.seq_relationship.*"),
    spellings={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    inert=["directionality", *(f"pooler_{name}" for name in POOLER)],
    other_architectures=["BertForPreTraining"],
    shape="encoder",
)
