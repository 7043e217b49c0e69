"""StableLM 3B and 2 1.6B (Bellagente et al. 2024, arXiv 2402.17834): LayerNorm, a gated
FFN without biases, a quarter of a head's dimensions turned. StableLM 2 12B's norms of
queries and keys, one for each head, are refused."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, linear, map_norm
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
TABLE = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    **map_norm(f"{L}.input_layernorm", "attention_norm"),
    **llama.ATTENTION,
    **map_norm(f"{L}.post_attention_layernorm", "mlp_norm"),
    **llama.MLP,
    **map_norm("model.norm", "final_norm"),
    "lm_head.weight": linear("head.kernel"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    if reader.flag("use_parallel_residual", False):
        settings["placement"] = "parallel_shared"


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {"use_parallel_residual": config.placement == "parallel_shared"}


STABLELM = ModelFamily(
    "stablelm",
    "StableLmForCausalLM",
    {
        **fields.SIZES,
        **llama.map_kv_heads(32),
        **llama.SWIGLU,
        "layer_norm_eps": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "use_qkv_bias": fields.map_flag("attention.bias", False),
        "qk_layernorm": fields.require_value(False),
    },
    TABLE,
    {"norm.kind": "layernorm", "norm.bias": True, "attention.out_bias": False},
    rope_kwargs={"partial": 0.25},
    read_extra=_read,
    write_extra=_write,
)
