"""What is written in the config.json of published models, as facts: preset → values.

Left out are names, versions and mappings of labels and tasks, but for one of each sort.
"""

from typing import Any

Values = dict[str, Any]


def sizes(
    layers: int, width: int, heads: int, ff: int, kv_heads: int | None = None, **more: Any
) -> Values:
    """Return the keys that most families share, and ``more``."""
    found = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    found |= {"intermediate_size": ff}
    return found | ({} if kv_heads is None else {"num_key_value_heads": kv_heads}) | more


def qwen(layers: int, *rest: int, **more: Any) -> Values:
    return sizes(layers, *rest, max_window_layers=layers, **more)


def gpt2(layers: int, width: int, heads: int) -> Values:
    return {"n_layer": layers, "n_embd": width, "n_head": heads}


def bloom(layers: int, width: int, heads: int, **more: Any) -> Values:
    return {"n_layer": layers, "n_embed": width, "num_attention_heads": heads} | more


def falcon(layers: int, width: int, heads: int, **more: Any) -> Values:
    found = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return found | more


def t5(layers: int, width: int, heads: int, head_dim: int, ff: int) -> Values:
    found = {"num_layers": layers, "d_model": width, "num_heads": heads}
    return found | {"d_kv": head_dim, "d_ff": ff}


def t5_v1_1(layers: int, *rest: int) -> Values:
    return t5(layers, *rest) | {"num_decoder_layers": layers}


def bart(layers: int, width: int, heads: int, ff: int, **more: Any) -> Values:
    found: Values = {"d_model": width, "num_hidden_layers": layers}
    for side in ("encoder", "decoder"):
        found |= {f"{side}_layers": layers, f"{side}_attention_heads": heads}
        found |= {f"{side}_ffn_dim": ff}
    return found | more


GPT2: Values = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
LLAMA: Values = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
LLAMA1: Values = LLAMA | {
    "max_sequence_length": 2048,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
}
LLAMA2: Values = LLAMA | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA3: Values = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA3_1_SCALING: Values = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA3_1: Values = LLAMA3 | {
    "eos_token_id": 128001,
    "rope_scaling": LLAMA3_1_SCALING,
    "tie_word_embeddings": False,
}
LLAMA3_0: Values = LLAMA3_1 | {"max_position_embeddings": 8192, "rope_scaling": None}
LLAMA3_2: Values = LLAMA3_1 | {
    "rope_scaling": LLAMA3_1_SCALING | {"factor": 32.0},
    "tie_word_embeddings": True,
}
SMOLLM2: Values = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
MISTRAL: Values = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL: Values = MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN2: Values = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_cache": True,
    "use_sliding_window": False,
}
QWEN2_32K: Values = QWEN2 | {
    "max_position_embeddings": 32768,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "vocab_size": 151936,
}
QWEN2_128K: Values = QWEN2_32K | {
    "max_position_embeddings": 131072,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
QWEN3: Values = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
    "vocab_size": 151936,
}
QWEN3_MOE: Values = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
GEMMA: Values = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA1: Values = GEMMA | {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None}
GEMMA2: Values = GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "sliding_window": 4096,
}
GEMMA3: Values = GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "vocab_size": 262144,
}
# What files of models that see images too have for the text.
GEMMA3_TEXT: Values = GEMMA3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}
FALCON: Values = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "model_type": "falcon",
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
PHI: Values = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 51200,
}
PHI3: Values = LLAMA | {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
BLOOM: Values = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "offset_alibi": 100,
    "pad_token_id": 3,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
MPT: Values = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in", "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "model_type": "mpt",
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
DEEPSEEK: Values = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
BERT: Values = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
T5: Values = {
    "architectures": ["T5WithLMHeadModel"],
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "n_positions": 512,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"early_stopping": True, "num_beams": 4}},
    "vocab_size": 32128,
}
T5_V1_1: Values = {key: value for key, value in T5.items() if key != "n_positions"} | {
    "architectures": ["T5ForConditionalGeneration"],
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
BART: Values = {
    "_num_labels": 3,
    "activation_dropout": 0.1,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["BartModel"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "classif_dropout": 0.1,
    "classifier_dropout": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": True,
    "encoder_layerdrop": 0.0,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "model_type": "bart",
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "num_beams": 4,
    "pad_token_id": 1,
    "scale_embedding": False,
    "use_cache": True,
    "vocab_size": 50265,
}

PUBLISHED: dict[str, Values] = {
    "gpt2": GPT2 | gpt2(12, 768, 12),
    "gpt2_medium": GPT2 | gpt2(24, 1024, 16),
    "gpt2_large": GPT2 | gpt2(36, 1280, 20),
    "gpt2_xl": GPT2 | gpt2(48, 1600, 25),
    "llama_7b": LLAMA1 | sizes(32, 4096, 32, 11008),
    "llama_13b": LLAMA1 | sizes(40, 5120, 40, 13824),
    "llama_33b": LLAMA1 | sizes(60, 6656, 52, 17920),
    "llama_65b": LLAMA1 | sizes(80, 8192, 64, 22016, rms_norm_eps=1e-5),
    "llama2_7b": LLAMA2 | sizes(32, 4096, 32, 11008, 32),
    "llama2_13b": LLAMA2 | sizes(40, 5120, 40, 13824, 40),
    "llama2_70b": LLAMA2 | sizes(80, 8192, 64, 28672, 8),
    "llama3_8b": LLAMA3_0 | sizes(32, 4096, 32, 14336, 8),
    "llama3_70b": LLAMA3_0 | sizes(80, 8192, 64, 28672, 8),
    "llama3_405b": LLAMA3_0 | sizes(126, 16384, 128, 53248, 8),
    "llama3_1_8b": LLAMA3_1 | sizes(32, 4096, 32, 14336, 8),
    "llama3_1_70b": LLAMA3_1 | sizes(80, 8192, 64, 28672, 8),
    "llama3_1_405b": LLAMA3_1 | sizes(126, 16384, 128, 53248, 8),
    "llama3_2_1b": LLAMA3_2 | sizes(16, 2048, 32, 8192, 8, head_dim=64),
    "llama3_2_3b": LLAMA3_2 | sizes(28, 3072, 24, 8192, 8, head_dim=128),
    "llama3_3_70b": LLAMA3_1 | sizes(80, 8192, 64, 28672, 8),
    "smollm2_135m": SMOLLM2 | sizes(30, 576, 9, 1536, 3, initializer_range=0.041666666666666664),
    "smollm2_360m": SMOLLM2 | sizes(32, 960, 15, 2560, 5),
    "smollm2_1_7b": SMOLLM2 | sizes(24, 2048, 32, 8192, 32, rope_theta=130000),
    "mistral_7b": MISTRAL | sizes(32, 4096, 32, 14336, 8),
    "mixtral_8x7b": MIXTRAL | sizes(32, 4096, 32, 14336, 8),
    "mixtral_8x22b": MIXTRAL
    | sizes(56, 6144, 48, 16384, 8)
    | {"max_position_embeddings": 65536, "router_aux_loss_coef": 0.001},
    "qwen2_5_0_5b": QWEN2_32K | qwen(24, 896, 14, 4864, 2),
    "qwen2_5_1_5b": QWEN2_128K
    | qwen(28, 1536, 12, 8960, 2)
    | {"tie_word_embeddings": True, "vocab_size": 151936},
    "qwen2_5_3b": QWEN2_32K | qwen(36, 2048, 16, 11008, 2),
    "qwen2_5_7b": QWEN2_128K | qwen(28, 3584, 28, 18944, 4),
    "qwen2_5_14b": QWEN2_128K | qwen(48, 5120, 40, 13824, 8, rms_norm_eps=1e-5),
    "qwen2_5_32b": QWEN2_128K | qwen(64, 5120, 40, 27648, 8, rms_norm_eps=1e-5),
    "qwen2_5_72b": QWEN2_128K | qwen(80, 8192, 64, 29568, 8, rms_norm_eps=1e-5),
    "qwen3_0_6b": QWEN3 | qwen(28, 1024, 16, 3072, 8, tie_word_embeddings=True),
    "qwen3_1_7b": QWEN3 | qwen(28, 2048, 16, 6144, 8, tie_word_embeddings=True),
    "qwen3_4b": QWEN3 | qwen(36, 2560, 32, 9728, 8, tie_word_embeddings=True),
    "qwen3_8b": QWEN3 | qwen(36, 4096, 32, 12288, 8, tie_word_embeddings=False),
    "qwen3_14b": QWEN3 | qwen(40, 5120, 40, 17408, 8, tie_word_embeddings=False),
    "qwen3_32b": QWEN3 | qwen(64, 5120, 64, 25600, 8, tie_word_embeddings=False),
    "qwen3_30b_a3b": QWEN3_MOE | qwen(48, 2048, 32, 6144, 4, moe_intermediate_size=768),
    "qwen3_235b_a22b": QWEN3_MOE | qwen(94, 4096, 64, 12288, 4, moe_intermediate_size=1536),
    "gemma_2b": GEMMA1 | sizes(18, 2048, 8, 16384, 1),
    "gemma_7b": GEMMA1 | sizes(28, 3072, 16, 24576, 16),
    "gemma2_2b": GEMMA2 | sizes(26, 2304, 8, 9216, 4, query_pre_attn_scalar=256),
    "gemma2_9b": GEMMA2
    | sizes(42, 3584, 16, 14336, 8)
    | {"query_pre_attn_scalar": 256, "sliding_window_size": 4096},
    "gemma2_27b": GEMMA2
    | sizes(46, 4608, 32, 36864, 16)
    | {"head_dim": 128, "query_pre_attn_scalar": 144},
    "gemma3_270m": GEMMA3
    | sizes(18, 640, 4, 2048, 1)
    | {
        "_sliding_window_pattern": 6,
        "eos_token_id": 1,
        "layer_types": [*(["sliding_attention"] * 5 + ["full_attention"]) * 3],
        "use_bidirectional_attention": False,
    },
    "gemma3_1b": GEMMA3 | sizes(26, 1152, 4, 6912, 1, sliding_window_pattern=6),
    "gemma3_4b": GEMMA3_TEXT | sizes(34, 2560, 8, 10240, 4),
    "gemma3_12b": GEMMA3_TEXT | sizes(48, 3840, 16, 15360, 8),
    "gemma3_27b": GEMMA3_TEXT
    | sizes(62, 5376, 32, 21504, 16)
    | {"head_dim": 128, "query_pre_attn_scalar": 168},
    "falcon_7b": FALCON | falcon(32, 4544, 71, multi_query=True, new_decoder_architecture=False),
    "falcon_40b": FALCON | falcon(60, 8192, 128, new_decoder_architecture=True, num_kv_heads=8),
    "falcon_180b": FALCON | falcon(80, 14848, 232, new_decoder_architecture=True, num_kv_heads=8),
    "phi_1_5": PHI | sizes(24, 2048, 32, 8192, partial_rotary_factor=0.5),
    "phi_2": PHI | sizes(32, 2560, 32, 10240, 32, partial_rotary_factor=0.4),
    "phi3_mini": PHI3 | sizes(32, 3072, 32, 8192, 32),
    "phi3_medium": PHI3 | sizes(40, 5120, 40, 17920, 10),
    "bloom_560m": BLOOM | bloom(24, 1024, 16, n_inner=None, pretraining_tp=1),
    "bloom_1b1": BLOOM | bloom(24, 1536, 16),
    "bloom_1b7": BLOOM | bloom(24, 2048, 16),
    "bloom_3b": BLOOM | bloom(30, 2560, 32),
    "bloom_7b1": BLOOM | bloom(30, 4096, 32),
    "bloom_176b": BLOOM | bloom(70, 14336, 112, pretraining_tp=4),
    "mpt_7b": MPT | {"d_model": 4096, "max_seq_len": 2048, "n_heads": 32, "n_layers": 32},
    "mpt_30b": MPT | {"d_model": 7168, "max_seq_len": 8192, "n_heads": 64, "n_layers": 48},
    "grok_1": sizes(64, 6144, 48, 32768, 8)
    | {
        "architectures": ["Grok1ModelForCausalLM"],
        "attn_output_multiplier": 0.08838834764831845,
        "bos_token_id": 1,
        "embedding_multiplier_scale": 78.38367176906169,
        "eos_token_id": 2,
        "max_attn_value": 30.0,
        "max_position_embeddings": 8192,
        "model_type": "grok-1",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "output_multiplier_scale": 0.5773502691896257,
        "output_router_logits": False,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 131072,
    },
    "dbrx": {
        "architectures": ["DbrxForCausalLM"],
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
        "d_model": 6144,
        "emb_pdrop": 0.0,
        "ffn_config": {
            "ffn_hidden_size": 10752,
            "model_type": "",
            "moe_jitter_eps": 0.01,
            "moe_loss_weight": 0.05,
            "moe_num_experts": 16,
            "moe_top_k": 4,
        },
        "initializer_range": 0.02,
        "max_seq_len": 32768,
        "model_type": "dbrx",
        "n_heads": 48,
        "n_layers": 40,
        "output_router_logits": False,
        "resid_pdrop": 0.0,
        "router_aux_loss_coef": 0.05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 100352,
    },
    "deepseek_v2": DEEPSEEK
    | sizes(60, 5120, 128, 12288, 128)
    | {
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "n_routed_experts": 160,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 16.0,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v2_lite": DEEPSEEK
    | sizes(27, 2048, 16, 10944, 16)
    | {"moe_intermediate_size": 1408, "n_routed_experts": 64, "q_lora_rank": None},
    "bert_base": BERT | sizes(12, 768, 12, 3072),
    "bert_large": BERT
    | sizes(24, 1024, 16, 4096)
    | {
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "t5_small": T5 | t5(6, 512, 8, 64, 2048),
    "t5_base": T5 | t5(12, 768, 12, 64, 3072),
    "t5_large": T5 | t5(24, 1024, 16, 64, 4096),
    "t5_3b": T5 | t5(24, 1024, 32, 128, 16384),
    "t5_11b": T5 | t5(24, 1024, 128, 128, 65536),
    "t5_v1_1_small": T5_V1_1 | t5_v1_1(8, 512, 6, 64, 1024),
    "t5_v1_1_base": T5_V1_1 | t5_v1_1(12, 768, 12, 64, 2048),
    "t5_v1_1_large": T5_V1_1 | t5_v1_1(24, 1024, 16, 64, 2816),
    "t5_v1_1_xl": T5_V1_1 | t5_v1_1(24, 2048, 32, 64, 5120),
    "t5_v1_1_xxl": T5_V1_1 | t5_v1_1(24, 4096, 64, 64, 10240),
    "ul2_20b": T5 | t5_v1_1(32, 4096, 16, 256, 16384) | {"feed_forward_proj": "gated-silu"},
    "bart_base": BART | bart(6, 768, 12, 3072, normalize_embedding=True),
    "bart_large": BART | bart(12, 1024, 16, 4096, force_bos_token_to_be_generated=False),
}
# Of models without a preset of their own: what else is written there.
MORE: dict[str, Values] = {
    "falcon2_11b": FALCON
    | {
        "activation": "gelu",
        "ff_factor": 4,
        "ffn_hidden_size": 16384,
        "hidden_size": 4096,
        "max_position_embeddings": 8192,
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 32,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "num_ln_in_parallel_attn": 1,
        "rope_scaling": None,
        "rope_theta": 500042.0,
        "tie_word_embeddings": False,
    },
}
