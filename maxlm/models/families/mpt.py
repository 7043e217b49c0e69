"""MPT (MosaicML 2023): ALiBi, no biases, LayerNorm without offsets."""

from maxlm.models.families.family import ModelFamily
from maxlm.models.families.fields import map_number, map_size, require_value
from maxlm.models.families.forms import QKV_KERNELS, copy, linear
from maxlm.models.families.names import NameTable

B = "transformer.blocks.{layer}"
TABLE: NameTable = {
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
        "vocab_size": map_size("vocab_size"),
        "n_layers": map_size("num_layers"),
        "d_model": map_size("d_model"),
        "max_seq_len": map_size("max_seq_len"),
        "n_heads": map_size("attention.num_heads"),
        "attn_config.clip_qkv": map_number("attention.clip", None),
        "attn_config.softmax_scale": map_number("attention.scale", None),
        "attn_config.alibi": require_value(True, written=True),
        # The published code has these two values whatever the file says.
        "attn_config.alibi_bias_max": require_value(8),
        "expansion_ratio": require_value(4, written=True),
        "attn_config.attn_type": require_value("multihead_attention"),
        "attn_config.qk_ln": require_value(False),
        "attn_config.prefix_lm": require_value(False),
        "attn_config.attn_uses_sequence_id": require_value(False),
        "layer_norm_epsilon": map_number("norm.eps", 1e-5),
        "tie_word_embeddings": require_value(True, ours="tie_embeddings"),
        "no_bias": require_value(True, written=True),
        "norm_type": require_value("low_precision_layernorm"),
        "logit_scale": require_value(None),
        "embedding_fraction": require_value(1.0),
    },
    TABLE,
    {
        "mlp.activation": "gelu",
        "mlp.gated": False,
        "norm.kind": "layernorm",
        "positions.kind": "alibi",
    },
    other_architectures=["MPTForCausalLM"],
    inert=["init_config", "init_device", "learned_pos_emb", "tokenizer_name", "verbose"],
)
