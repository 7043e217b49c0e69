"""BERT (Devlin et al. 2019, arXiv 1810.04805) with its head for masked tokens."""

from typing import Any

from maxlm.models.architectures.encoder import EncoderConfig
from maxlm.models.families.family import Family
from maxlm.models.families.forms import linear, same
from maxlm.models.families.gpt2 import activation, published_activation
from maxlm.models.families.names import Table
from maxlm.models.families.reader import Reader

L = "bert.encoder.layer.{layer}"
E, HEAD = "bert.embeddings", "cls.predictions"
TABLE: Table = {
    f"{E}.word_embeddings.weight": same("embedding.table", f"{HEAD}.decoder.weight"),
    f"{E}.position_embeddings.weight": same("positions.table"),
    f"{E}.token_type_embeddings.weight": same("types.table"),
    f"{E}.LayerNorm.weight": same("embedding_norm.scale"),
    f"{E}.LayerNorm.bias": same("embedding_norm.bias"),
    **{
        f"{L}.attention.self.{name}.{part}": linear(f"attention.{name}.{ours}")
        for name in ("query", "key", "value")
        for part, ours in (("weight", "kernel"), ("bias", "bias"))
    },
    f"{L}.attention.output.dense.weight": linear("attention.out.kernel"),
    f"{L}.attention.output.dense.bias": linear("attention.out.bias"),
    f"{L}.attention.output.LayerNorm.weight": same("attention_norm.scale"),
    f"{L}.attention.output.LayerNorm.bias": same("attention_norm.bias"),
    f"{L}.intermediate.dense.weight": linear("mlp.up.kernel"),
    f"{L}.intermediate.dense.bias": linear("mlp.up.bias"),
    f"{L}.output.dense.weight": linear("mlp.down.kernel"),
    f"{L}.output.dense.bias": linear("mlp.down.bias"),
    f"{L}.output.LayerNorm.weight": same("mlp_norm.scale"),
    f"{L}.output.LayerNorm.bias": same("mlp_norm.bias"),
    f"{HEAD}.transform.dense.weight": linear("head_layer.dense.kernel"),
    f"{HEAD}.transform.dense.bias": linear("head_layer.dense.bias"),
    f"{HEAD}.transform.LayerNorm.weight": same("head_layer.norm.scale"),
    f"{HEAD}.transform.LayerNorm.bias": same("head_layer.norm.bias"),
    f"{HEAD}.bias": same("head_bias", f"{HEAD}.decoder.bias"),
}

POOLER = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")


def _read(reader: Reader) -> dict[str, Any]:
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    reader.only("position_embedding_type", "absolute")
    reader.only("add_cross_attention", False)
    reader.only("is_decoder", False)  # true: nothing sees what follows
    act = activation(reader, "hidden_act", "gelu")
    return {
        "architecture": "encoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("num_hidden_layers"),
        "d_model": width,
        "max_seq_len": reader.size("max_position_embeddings"),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": width // heads,
            "bias": True,
        },
        "mlp": {
            "d_ff": reader.size("intermediate_size"),
            "activation": act,
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_eps", 1e-12), "bias": True},
        "placement": "post",
        "final_norm": False,
        "positions": {"kind": "learned"},
        "embedding_norm": True,
        "token_types": reader.size("type_vocab_size", 2),
        "head_activation": act,
        "head_bias": True,
        "tie_embeddings": reader.only("tie_word_embeddings", True),
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
        "hidden_act": published_activation(config.mlp.activation),
        "layer_norm_eps": config.norm.eps,
        "type_vocab_size": config.token_types,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


BERT = Family(
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
