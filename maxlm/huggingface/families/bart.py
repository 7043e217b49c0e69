"""BART (Lewis et al. 2020, arXiv 1910.13461): encoder and decoder with norms behind
each branch."""

from typing import Any

from maxlm.huggingface.families import fields, gpt2, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, copy, map_linears, map_norm
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.encoder_decoder import EncoderDecoderConfig

ATTENTION = {**llama.PROJECTIONS, "out_proj": "out"}


def _side(theirs: str, layer: str, trunk: str, block: str) -> NameTable:
    """Returns the entries that encoder and decoder share; ``trunk`` and ``block`` are
    prefixes of our parameters before the layers and within them."""
    at = f"{theirs}.layers.{{{layer}}}"
    return {
        f"{theirs}.embed_positions.weight": copy(f"{trunk}positions.table"),
        **map_norm(f"{theirs}.layernorm_embedding", f"{trunk}embedding_norm"),
        **map_linears(f"{at}.self_attn", f"{block}attention", **ATTENTION),
        **map_norm(f"{at}.self_attn_layer_norm", f"{block}attention_norm"),
        **map_linears(at, f"{block}mlp", fc1="up", fc2="down"),
        **map_norm(f"{at}.final_layer_norm", f"{block}mlp_norm"),
    }


# Published without a head, so without the logits' offsets.
BARE = "BartModel"
TABLE = {
    "model.shared.weight": copy(
        "embedding.table",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
    **_side("model.encoder", "encoder_layer", "encoder.", "encoder.layers."),
    **_side("model.decoder", "layer", "", ""),
    **map_linears("model.decoder.layers.{layer}.encoder_attn", "cross", **ATTENTION),
    **map_norm("model.decoder.layers.{layer}.encoder_attn_layer_norm", "cross_norm"),
    "final_logits_bias": copy("head_bias", as_row=True),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    same_in_both = {
        "encoder_attention_heads": settings["attention"]["num_heads"],
        "encoder_ffn_dim": settings["mlp"]["d_ff"],
    }
    for key, decoder_size in same_in_both.items():
        reader.size(key)  # transformers has a default of its own, not the decoder's.
        reader.read_implemented(key, decoder_size)
    start_id = reader.size("decoder_start_token_id", 2, least=0, nullable=True)
    if start_id is None:
        start_id = reader.size("bos_token_id", 0, least=0)
    settings["start_id"] = start_id
    is_scaled = reader.flag("scale_embedding", False)
    settings["embedding_scale"] = settings["d_model"] ** 0.5 if is_scaled else 1.0
    is_bare = BARE in reader.names("architectures")
    if reader.tensors:
        settings["head_bias"] = "final_logits_bias" in reader.tensors
    else:
        settings["head_bias"] = not is_bare


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        **({} if config.head_bias else {"architectures": [BARE]}),
        "encoder_attention_heads": config.attention.num_heads,
        "encoder_ffn_dim": config.mlp.d_ff,
        "scale_embedding": config.embedding_scale != 1,
        "decoder_start_token_id": config.start_id,
    }


BART = ModelFamily(
    "bart",
    "BartForConditionalGeneration",
    {
        "vocab_size": fields.map_size("vocab_size"),
        "decoder_layers": fields.map_layer_count("num_layers"),
        "encoder_layers": fields.map_layer_count(
            "encoder_layers", alias="num_hidden_layers"
        ),
        "d_model": fields.map_size("d_model"),
        "max_position_embeddings": fields.map_size("max_seq_len"),
        "decoder_attention_heads": fields.map_size("attention.num_heads"),
        "decoder_ffn_dim": fields.map_size("mlp.d_ff"),
        "activation_function": fields.map_activation("mlp.activation", "gelu"),
        "is_encoder_decoder": fields.require_value(True, always_write=True),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
        # Of early files, which had other placements besides.
        "normalize_before": fields.require_value(False),
        "add_final_layer_norm": fields.require_value(False),
        "add_bias_logits": fields.require_value(False),
        "normalize_embedding": fields.require_value(True),
        "static_position_embeddings": fields.require_value(False),
        "extra_pos_embeddings": fields.require_value(2),
    },
    TABLE,
    {
        **gpt2.BIASED,
        "norm.eps": 1e-5,
        "placement": "post",
        "final_norm": False,
        "positions.kind": "learned",
        "positions.offset": 2,
        "embedding_norm": True,
    },
    read_extra=_read,
    write_extra=_write,
    prefix="model.",
    init_std_key="init_std",
    other_hf_architectures=[BARE],
    ignored_keys=["force_bos_token_to_be_generated"],
    architecture="encoder_decoder",
)
