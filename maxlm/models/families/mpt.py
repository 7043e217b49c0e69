"""MPT (MosaicML 2023): ALiBi, no biases, LayerNorm without offsets."""

from maxlm.models.families import fields
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.names import QKV_KERNELS, copy, linear

B = "transformer.blocks.{layer}"
TABLE = {
    "transformer.wte.weight": copy("embedding.table", "lm_head.weight"),
    f"{B}.norm_1.weight": copy("attention_norm.scale"),
    f"{B}.attn.Wqkv.weight": linear(*QKV_KERNELS),
    f"{B}.attn.out_proj.weight": linear("attention.out.kernel"),
    f"{B}.norm_2.weight": copy("mlp_norm.scale"),
    f"{B}.ffn.up_proj.weight": linear("mlp.up.kernel"),
    f"{B}.ffn.down_proj.weight": linear("mlp.down.kernel"),
    "transformer.norm_f.weight": copy("final_norm.scale"),
}

MPT = ModelFamily(
    "mpt",
    "MptForCausalLM",
    {
        **fields.map_sizes("n_layers", "d_model", "max_seq_len", "n_heads"),
        "attn_config.clip_qkv": fields.map_number("attention.clip", None),
        "attn_config.softmax_scale": fields.map_number("attention.scale", None),
        "attn_config.alibi": fields.require_value(True, always_write=True),
        # The published code has these two values whatever the file says.
        "attn_config.alibi_bias_max": fields.require_value(8),
        "expansion_ratio": fields.require_value(4, always_write=True),
        "attn_config.attn_type": fields.require_value("multihead_attention"),
        "attn_config.qk_ln": fields.require_value(False),
        "attn_config.prefix_lm": fields.require_value(False),
        "attn_config.attn_uses_sequence_id": fields.require_value(False),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
        "no_bias": fields.require_value(True, always_write=True),
        "norm_type": fields.require_value("low_precision_layernorm"),
        "logit_scale": fields.require_value(None),
        "embedding_fraction": fields.require_value(1.0),
    },
    TABLE,
    {
        "mlp.activation": "gelu",
        "mlp.gated": False,
        "norm.kind": "layernorm",
        "positions.kind": "alibi",
    },
    other_hf_architectures=["MPTForCausalLM"],
    ignored_keys=["init_config", "init_device", "learned_pos_emb", "tokenizer_name", "verbose"],
)
