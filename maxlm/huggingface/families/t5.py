"""T5 (Raffel et al. 2020, arXiv 1910.10683), T5 v1.1, Flan-T5 and UL2 (Tay et al. 2022,
arXiv 2205.05131): encoder and decoder, learnt biases by distance, RMSNorm, no scale in
attention."""

from typing import Any

from maxlm.huggingface.families import fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, copy, linear, map_linears
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}


def _table(config: TransformerConfig) -> NameTable:
    """Layers of the encoder are counted by ``{encoder_layer}``."""
    e = "encoder.block.{encoder_layer}"
    d = "decoder.block.{layer}"
    assert config.mlp is not None
    mlp = {"wi_0": "gate", "wi_1": "up"} if config.mlp.gated else {"wi": "up"}
    mlp["wo"] = "down"
    bias = "SelfAttention.relative_attention_bias.weight"
    return {
        "shared.weight": copy(
            "embedding.table", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
        f"encoder.block.0.layer.0.{bias}": copy("encoder.relative"),
        f"{e}.layer.0.layer_norm.weight": copy("encoder.layers.attention_norm.scale"),
        **map_linears(f"{e}.layer.0.SelfAttention", "encoder.layers.attention", **ATTENTION),
        f"{e}.layer.1.layer_norm.weight": copy("encoder.layers.mlp_norm.scale"),
        **map_linears(f"{e}.layer.1.DenseReluDense", "encoder.layers.mlp", **mlp),
        "encoder.final_layer_norm.weight": copy("encoder.final_norm.scale"),
        f"decoder.block.0.layer.0.{bias}": copy("relative"),
        f"{d}.layer.0.layer_norm.weight": copy("attention_norm.scale"),
        **map_linears(f"{d}.layer.0.SelfAttention", "attention", **ATTENTION),
        f"{d}.layer.1.layer_norm.weight": copy("cross_norm.scale"),
        **map_linears(f"{d}.layer.1.EncDecAttention", "cross", **ATTENTION),
        f"{d}.layer.2.layer_norm.weight": copy("mlp_norm.scale"),
        **map_linears(f"{d}.layer.2.DenseReluDense", "mlp", **mlp),
        "decoder.final_layer_norm.weight": copy("final_norm.scale"),
        "lm_head.weight": linear("head.kernel"),
    }  # fmt: skip


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    plain = [*fields.ACTIVATIONS]
    kinds = [*plain, *(f"gated-{name}" for name in plain)]
    kind = reader.read_implemented("feed_forward_proj", "relu", *kinds)
    gated = kind.startswith("gated-")
    # As the library reads it: "gated-gelu" is the approximation.
    name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    reader.read_implemented("dense_act_fn", None, name)
    reader.read_implemented("is_gated_act", None, gated)
    settings["mlp"] |= {"activation": fields.ACTIVATIONS[name], "gated": gated}
    settings.setdefault("num_layers", settings["encoder_layers"])
    # T5 v1.0 has a tied head and scales what it sees, v1.1 a head of its own and does
    # not. transformers 5 writes true in any case, and tells them apart by another name.
    says_tied = reader.flag("tie_word_embeddings", True)
    is_scaled = reader.flag("scale_decoder_outputs", says_tied)
    has_head = "lm_head.weight" in reader.tensors
    settings["tie_embeddings"] = says_tied and (is_scaled or not has_head)
    settings["logit_scale"] = settings["d_model"] ** -0.5 if is_scaled else 1.0


def _write(config: TransformerConfig) -> dict[str, Any]:
    assert config.mlp is not None
    name = fields.to_hf_activation(config.mlp.activation)
    if config.mlp.gated:
        name = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
    return {
        "feed_forward_proj": name,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1,
    }


T5 = ModelFamily(
    "t5",
    "T5ForConditionalGeneration",
    {
        "vocab_size": fields.map_size("vocab_size"),
        "num_decoder_layers": fields.map_layer_count("num_layers", None),
        "num_layers": fields.map_layer_count("encoder_layers"),
        "d_model": fields.map_size("d_model"),
        "n_positions": fields.map_size(
            "max_seq_len", 512
        ),  # of pretraining; nothing depends on it
        "num_heads": fields.map_size("attention.num_heads"),
        "d_kv": fields.map_size("attention.head_dim"),
        "d_ff": fields.map_size("mlp.d_ff"),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-6),
        "relative_attention_num_buckets": fields.map_size("positions.buckets", 32),
        "relative_attention_max_distance": fields.map_size(
            "positions.max_distance", 128
        ),
        "decoder_start_token_id": fields.map_size("start_id", 0, least=0),
        "is_encoder_decoder": fields.require_value(True, always_write=True),
    },
    _table,
    {"attention.scale": 1.0, "positions.kind": "relative"},
    read_extra=_read,
    write_extra=_write,
    ignored_keys=["initializer_factor"],
    init_std_key=None,
    other_hf_architectures=["T5WithLMHeadModel"],  # of early files
    # Of cross-attention, in old files; the published code never reads it.
    ignored_tensors=(
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
    architecture="encoder_decoder",
)
