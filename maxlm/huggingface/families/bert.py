"""BERT (Devlin et al. 2019, arXiv 1810.04805) with its head for masked tokens."""

from maxlm.huggingface.families import fields, gpt2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, map_linear, map_linears, map_norm

L = "bert.encoder.layer.{layer}"
E, HEAD = "bert.embeddings", "cls.predictions"
TABLE = {
    f"{E}.word_embeddings.weight": copy("embedding.table", f"{HEAD}.decoder.weight"),
    f"{E}.position_embeddings.weight": copy("positions.table"),
    f"{E}.token_type_embeddings.weight": copy("types.table"),
    **map_norm(f"{E}.LayerNorm", "embedding_norm"),
    **map_linears(
        f"{L}.attention.self", "attention", query="query", key="key", value="value"
    ),
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


BERT = ModelFamily(
    "bert",
    "BertForMaskedLM",
    {
        **fields.SIZES,
        "intermediate_size": fields.map_size("mlp.d_ff"),
        "hidden_act": fields.map_activation("mlp.activation", "gelu"),
        "layer_norm_eps": fields.map_number("norm.eps", 1e-12),
        "type_vocab_size": fields.map_size("token_types", 2),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
        "position_embedding_type": fields.require_value("absolute"),
        "add_cross_attention": fields.require_value(False),
        "is_decoder": fields.require_value(False),  # true: nothing sees what follows
    },
    TABLE,
    {
        **gpt2.BIASED,
        "placement": "post",
        "final_norm": False,
        "positions.kind": "learned",
        "embedding_norm": True,
        "head_bias": True,
    },
    read_extra=lambda _, settings: settings.update(
        head_activation=settings["mlp"]["activation"]
    ),
    # Position numbers, and the head of the task that was trained beside.
    ignored_tensors=(
        "bert.embeddings.position_ids",
        "bert.pooler.*",
        "cls.seq_relationship.*",
    ),
    suffix_aliases={
        "LayerNorm.weight": "LayerNorm.gamma",
        "LayerNorm.bias": "LayerNorm.beta",
    },
    ignored_keys=["directionality", *(f"pooler_{name}" for name in POOLER)],
    other_hf_architectures=["BertForPreTraining"],
    architecture="encoder",
)
