"""MPT (MosaicML 2023): ALiBi, no biases, LayerNorm without offsets."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

B = "transformer.blocks.{layer}"
QKV = ("attention.query.kernel", "attention.key.kernel", "attention.value.kernel")
TABLE: NameTable = {
    "transformer.wte.weight": copy("embedding.table", "lm_head.weight"),
    f"{B}.norm_1.weight": copy("attention_norm.scale"),
    f"{B}.attn.Wqkv.weight": linear(*QKV),
    f"{B}.attn.out_proj.weight": linear("attention.out.kernel"),
    f"{B}.norm_2.weight": copy("mlp_norm.scale"),
    f"{B}.ffn.up_proj.weight": linear("mlp.up.kernel"),
    f"{B}.ffn.down_proj.weight": linear("mlp.down.kernel"),
    "transformer.norm_f.weight": copy("final_norm.scale"),
}
# What the library adds to nested mappings of its own.
_NAMES = """
    _name_or_path architectures attn_impl chunk_size_feed_forward dtype id2label
    is_encoder_decoder label2id model_type output_attentions output_hidden_states problem_type
    return_dict
"""
NESTED = tuple(_NAMES.split())


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("d_model"), reader.size("n_heads")
    own = reader.read_nested("attn_config", *NESTED)
    own.require("alibi_bias_max", 8)  # the published code has 8 whatever this says
    own.require("alibi", True)
    own.require("attn_type", "multihead_attention")
    own.require("qk_ln", False)
    own.require("prefix_lm", False)
    own.require("attn_uses_sequence_id", False)
    attention = {
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "clip": own.number("clip_qkv", None),
        "scale": own.number("softmax_scale", None),
    }
    reader.require("no_bias", True)
    reader.require("norm_type", "low_precision_layernorm")
    reader.require("logit_scale", None)
    reader.require("embedding_fraction", 1.0)
    # The published code has four widths whatever this says.
    reader.require("expansion_ratio", 4)
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("n_layers"),
        "d_model": width,
        "max_seq_len": reader.size("max_seq_len"),
        "attention": attention,
        "mlp": {"d_ff": 4 * width, "activation": "gelu", "gated": False},
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_epsilon", 1e-5)},
        "positions": {"kind": "alibi"},
        "tie_embeddings": reader.require("tie_word_embeddings", True),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    attention = config.attention
    assert config.mlp is not None
    if config.mlp.d_ff != 4 * config.d_model:
        raise MaxlmError(
            f"mlp.d_ff={config.mlp.d_ff} with d_model={config.d_model}",
            fix="MPT's published code knows an FFN of four times the width alone",
        )
    return {
        "vocab_size": config.vocab_size,
        "n_layers": config.num_layers,
        "d_model": config.d_model,
        "n_heads": attention.num_heads,
        "max_seq_len": config.max_seq_len,
        "expansion_ratio": 4,
        "layer_norm_epsilon": config.norm.eps,
        "initializer_range": config.init_std,
        "no_bias": True,
        "tie_word_embeddings": True,
        "attn_config": {
            "alibi": True,
            "clip_qkv": attention.clip,
            "softmax_scale": attention.scale,
        },
    }


MPT = ModelFamily(
    "mpt",
    "mpt",
    "MptForCausalLM",
    _read,
    _write,
    lambda config: TABLE,
    other_architectures=["MPTForCausalLM"],
    inert=["init_config", "init_device", "learned_pos_emb", "tokenizer_name", "verbose"],
)
