"""BART (Lewis et al. 2020, arXiv 1910.13461): encoder and decoder with norms behind each branch."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.architectures.encoder_decoder import EncoderDecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, map_linear, map_norm, take_row
from maxlm.models.families.gpt2 import (
    multi_head_config,
    plain_mlp_config,
    read_activation,
    to_hf_activation,
)
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

SHORT = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))


def _side(theirs: str, layer: str, trunk: str, block: str) -> NameTable:
    """Returns the entries that encoder and decoder share.

    Args:
        trunk, block: prefixes of our parameters before the layers and within them.
    """
    at = f"{theirs}.layers.{{{layer}}}"
    found: dict[str, Any] = {
        f"{theirs}.embed_positions.weight": copy(f"{trunk}positions.table"),
        **map_norm(f"{theirs}.layernorm_embedding", f"{trunk}embedding_norm"),
        **map_norm(f"{at}.self_attn_layer_norm", f"{block}attention_norm"),
        **map_linear(f"{at}.fc1", f"{block}mlp.up"),
        **map_linear(f"{at}.fc2", f"{block}mlp.down"),
        **map_norm(f"{at}.final_layer_norm", f"{block}mlp_norm"),
    }
    for name, own in SHORT:
        found |= map_linear(f"{at}.self_attn.{name}", f"{block}attention.{own}")
    return found


# Published without a head, so without the logits' offsets.
BARE = "BartModel"
D = "model.decoder.layers.{layer}"
TABLE: NameTable = {
    "model.shared.weight": copy(
        "embedding.table",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
    **_side("model.encoder", "encoder_layer", "encoder.", "encoder.layers."),
    **_side("model.decoder", "layer", "", ""),
    **{
        name: rule
        for theirs, own in SHORT
        for name, rule in map_linear(f"{D}.encoder_attn.{theirs}", f"cross.{own}").items()
    },
    **map_norm(f"{D}.encoder_attn_layer_norm", "cross_norm"),
    "final_logits_bias": take_row("head_bias"),
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("d_model"), reader.size("decoder_attention_heads")
    reader.require("is_encoder_decoder", True)
    start = reader.size("decoder_start_token_id", 2, least=0, nullable=True)
    d_ff, bare = reader.size("decoder_ffn_dim"), BARE in (reader.get("architectures", None) or ())
    for key, own in (("encoder_attention_heads", heads), ("encoder_ffn_dim", d_ff)):
        reader.size(key)  # transformers has a default of its own, not the decoder's.
        reader.require(key, own)
    # Of early files, which had other placements besides.
    for other in ("normalize_before", "add_final_layer_norm", "add_bias_logits"):
        reader.require(other, False)
    reader.require("normalize_embedding", True)
    reader.require("static_position_embeddings", False)
    reader.require("extra_pos_embeddings", 2)
    encoder_layers = reader.size("encoder_layers", also="num_hidden_layers")
    return {
        "architecture": "encoder_decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("decoder_layers"),
        "encoder_layers": encoder_layers,
        "d_model": width,
        "start_id": reader.size("bos_token_id", 0, least=0) if start is None else start,
        "max_seq_len": reader.size("max_position_embeddings"),
        "attention": multi_head_config(width, heads),
        "mlp": plain_mlp_config(d_ff, read_activation(reader, "activation_function", "gelu")),
        "norm": {"kind": "layernorm", "eps": 1e-5, "bias": True},
        "placement": "post",
        "final_norm": False,
        "positions": {"kind": "learned", "offset": 2},
        "embedding_norm": True,
        "embedding_scale": width**0.5 if reader.flag("scale_embedding", False) else 1.0,
        "tie_embeddings": reader.require("tie_word_embeddings", True),
        "head_bias": "final_logits_bias" in reader.tensors if reader.tensors else not bare,
    }


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    if config.norm.eps != 1e-5:
        raise MaxlmError(f"norm.eps={config.norm.eps}", fix="BART's published code has 1e-5 alone")
    heads = config.attention.num_heads
    return {
        **({} if config.head_bias else {"architectures": [BARE]}),
        "vocab_size": config.vocab_size,
        "decoder_layers": config.num_layers,
        "encoder_layers": config.encoder_layers,
        "d_model": config.d_model,
        "max_position_embeddings": config.max_seq_len,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": config.mlp.d_ff,
        "decoder_ffn_dim": config.mlp.d_ff,
        "activation_function": to_hf_activation(config.mlp.activation),
        "scale_embedding": config.embedding_scale != 1,
        "init_std": config.init_std,
        "decoder_start_token_id": config.start_id,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


BART = ModelFamily(
    "bart",
    "bart",
    "BartForConditionalGeneration",
    _read,
    _write,
    lambda config: TABLE,
    prefix="model.",
    other_architectures=[BARE],
    inert=["force_bos_token_to_be_generated"],
    shape="encoder_decoder",
)
