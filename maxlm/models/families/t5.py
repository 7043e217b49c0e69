"""T5 (Raffel et al. 2020, arXiv 1910.10683), T5 v1.1, Flan-T5 and UL2 (Tay et al. 2022, arXiv
2205.05131): encoder and decoder, learnt biases by distance, RMSNorm, no scale in attention."""

from typing import Any

from maxlm.models.architectures.encoder_decoder import EncoderDecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear
from maxlm.models.families.gpt2 import ACTIVATIONS, to_hf_activation
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

SHORT = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))


def _attention(theirs: str, ours: str) -> NameTable:
    return {f"{theirs}.{x}.weight": linear(f"{ours}.{name}.kernel") for x, name in SHORT}


def _mlp(theirs: str, ours: str, gated: bool) -> NameTable:
    names = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    return {
        f"{theirs}.{x}.weight": linear(f"{ours}.{name}.kernel")
        for x, name in (names | {"wo": "down"}).items()
    }


def _table(config: EncoderDecoderConfig) -> NameTable:
    """Layers of the encoder are counted by ``{encoder_layer}``."""
    assert config.mlp is not None
    e, d, gated = "encoder.block.{encoder_layer}", "decoder.block.{layer}", config.mlp.gated
    bias = "SelfAttention.relative_attention_bias.weight"
    return {
        "shared.weight": copy(
            "embedding.table", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
            *(["lm_head.weight"] if config.tie_embeddings else []),
        ),
        f"encoder.block.0.layer.0.{bias}": copy("encoder.relative"),
        f"{e}.layer.0.layer_norm.weight": copy("encoder.layers.attention_norm.scale"),
        **_attention(f"{e}.layer.0.SelfAttention", "encoder.layers.attention"),
        f"{e}.layer.1.layer_norm.weight": copy("encoder.layers.mlp_norm.scale"),
        **_mlp(f"{e}.layer.1.DenseReluDense", "encoder.layers.mlp", gated),
        "encoder.final_layer_norm.weight": copy("encoder.final_norm.scale"),
        f"decoder.block.0.layer.0.{bias}": copy("relative"),
        f"{d}.layer.0.layer_norm.weight": copy("attention_norm.scale"),
        **_attention(f"{d}.layer.0.SelfAttention", "attention"),
        f"{d}.layer.1.layer_norm.weight": copy("cross_norm.scale"),
        **_attention(f"{d}.layer.1.EncDecAttention", "cross"),
        f"{d}.layer.2.layer_norm.weight": copy("mlp_norm.scale"),
        **_mlp(f"{d}.layer.2.DenseReluDense", "mlp", gated),
        "decoder.final_layer_norm.weight": copy("final_norm.scale"),
        "lm_head.weight": linear("head.kernel"),
    }  # fmt: skip


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("d_model"), reader.size("num_heads")
    how = reader.get("feed_forward_proj", "relu")
    reader.require(
        "feed_forward_proj", "relu", *(f"{x}{y}" for x in ("", "gated-") for y in ACTIVATIONS)
    )
    gated, name = how.startswith("gated-"), how.removeprefix("gated-")
    # As the library reads it: "gated-gelu" is the approximation.
    name = "gelu_new" if how == "gated-gelu" else name
    reader.require("is_encoder_decoder", True)
    reader.require("dense_act_fn", None, name)
    reader.require("is_gated_act", None, gated)
    # T5 v1.0 has a tied head and scales what it sees, v1.1 a head of its own and does not.
    # transformers 5 writes true in any case, and tells them apart by another name.
    tied = reader.flag("tie_word_embeddings", True)
    scaled = reader.flag("scale_decoder_outputs", tied)
    tied = tied and (scaled or "lm_head.weight" not in reader.tensors)
    return {
        "architecture": "encoder_decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("num_decoder_layers", None) or reader.size("num_layers"),
        "encoder_layers": reader.size("num_layers"),
        "d_model": width,
        "start_id": reader.size("decoder_start_token_id", 0, least=0),
        "max_seq_len": reader.size("n_positions", 512),  # of pretraining; nothing depends on it
        "attention": {
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": reader.size("d_kv"),
            "scale": 1.0,
        },
        "mlp": {"d_ff": reader.size("d_ff"), "activation": ACTIVATIONS[name], "gated": gated},
        "norm": {"kind": "rmsnorm", "eps": reader.number("layer_norm_epsilon", 1e-6)},
        "positions": {
            "kind": "relative",
            "buckets": reader.size("relative_attention_num_buckets", 32),
            "max_distance": reader.size("relative_attention_max_distance", 128),
        },
        "tie_embeddings": tied,
        "logit_scale": width**-0.5 if scaled else 1.0,
    }


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    name = to_hf_activation(config.mlp.activation)
    if config.mlp.gated:
        name = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
    return {
        "vocab_size": config.vocab_size,
        "num_decoder_layers": config.num_layers,
        "num_layers": config.encoder_layers,
        "d_model": config.d_model,
        "n_positions": config.max_seq_len,
        "num_heads": config.attention.num_heads,
        "d_kv": config.attention.head_dim,
        "d_ff": config.mlp.d_ff,
        "feed_forward_proj": name,
        "layer_norm_epsilon": config.norm.eps,
        "relative_attention_num_buckets": config.positions.buckets,
        "relative_attention_max_distance": config.positions.max_distance,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1,
        "decoder_start_token_id": config.start_id,
        "is_encoder_decoder": True,
    }


T5 = ModelFamily(
    "t5",
    "t5",
    "T5ForConditionalGeneration",
    _read,
    _write,
    _table,
    inert=["initializer_factor"],
    other_architectures=["T5WithLMHeadModel"],  # of early files
    # Of cross-attention, in old files; the published code never reads it.
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    shape="encoder_decoder",
)
