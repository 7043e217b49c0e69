"""OPT (Zhang et al. 2022, arXiv 2205.01068): learnt positions behind two rows that are
not used, LayerNorm, biases, ReLU. OPT 350M, whose norms come last and whose embeddings
are narrower than its layers, is refused."""

from typing import Any

from maxlm.huggingface.families import fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.llama import PROJECTIONS
from maxlm.huggingface.families.names import (
    copy,
    linear,
    map_linear,
    map_linears,
    map_norm,
)
from maxlm.huggingface.families.reader import ConfigReader

D = "model.decoder"
L = f"{D}.layers.{{layer}}"
TABLE = {
    f"{D}.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    f"{D}.embed_positions.weight": copy("positions.table"),
    **map_norm(f"{L}.self_attn_layer_norm", "attention_norm"),
    **map_linears(f"{L}.self_attn", "attention", **PROJECTIONS, out_proj="out"),
    **map_norm(f"{L}.final_layer_norm", "mlp_norm"),
    **map_linear(f"{L}.fc1", "mlp.up"),
    **map_linear(f"{L}.fc2", "mlp.down"),
    **map_norm(f"{D}.final_layer_norm", "final_norm"),
    "lm_head.weight": linear("head.kernel"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    reader.read_implemented("word_embed_proj_dim", None, settings["d_model"])
    settings["mlp"]["bias"] = settings["attention"]["bias"]


OPT = ModelFamily(
    "opt",
    "OPTForCausalLM",
    {
        **fields.SIZES,
        "ffn_dim": fields.map_size("mlp.d_ff"),
        "activation_function": fields.map_activation("mlp.activation", "relu"),
        "enable_bias": fields.map_flag("attention.bias", True),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        "do_layer_norm_before": fields.require_value(True),
        "_remove_final_layer_norm": fields.require_value(False),
        "layer_norm_elementwise_affine": fields.require_value(True),
    },
    TABLE,
    {
        "norm.kind": "layernorm",
        "norm.bias": True,
        "norm.eps": 1e-5,
        "mlp.gated": False,
        "positions.kind": "learned",
        "positions.offset": 2,
    },
    read_extra=_read,
    # The library's padding lies outside small vocabularies.
    write_extra=lambda config: {"pad_token_id": None},
    prefix="model.",
    init_std_key="init_std",
)
