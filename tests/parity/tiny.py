"""Random tiny models of transformers, one or more a family, with unusual sizes."""

from typing import Any

# Sizes that no published model has: kv heads other than heads, heads that do not make up the width,
# odd numbers of layers, windows shorter than the sequences that are compared.
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 40,
}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **settings}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 97, "n_positions": 40, "n_embd": 28, "n_layer": 3, "n_head": 4},
    ),
    "gpt2_narrow": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 51,
            "n_positions": 33,
            "n_embd": 30,
            "n_layer": 1,
            "n_head": 5,
            "n_inner": 34,
            "activation_function": "gelu",
        },
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama_biases": (
        "LlamaForCausalLM",
        LLAMA | {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "llama_linear": ("LlamaForCausalLM", LLAMA | rope("linear", factor=3.0)),
    "llama_dynamic": (
        "LlamaForCausalLM",
        LLAMA | {"max_position_embeddings": 16} | rope("dynamic", factor=2.5),
    ),
    "llama_yarn": (
        "LlamaForCausalLM",
        LLAMA | rope("yarn", factor=4.0, original_max_position_embeddings=12, beta_fast=8.0),
    ),
    "llama3": (
        "LlamaForCausalLM",
        LLAMA
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=24,
        ),
    ),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"hidden_size": 48},
    ),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {k: v for k, v in LLAMA.items() if k != "head_dim"}
        | {
            "hidden_size": 48,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "gemma2": (
        "Gemma2ForCausalLM",
        LLAMA
        | {
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        LLAMA
        | {
            "num_hidden_layers": 8,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            },
        },
    ),
    "gemma3_global": (
        "Gemma3ForCausalLM",
        LLAMA | {"layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 7},
    ),
    "falcon_7b": (
        "FalconForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "bias": False,
            "alibi": False,
            "max_position_embeddings": 40,
        },
    ),
    "falcon_40b": (
        "FalconForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "max_position_embeddings": 40,
        },
    ),
    "falcon_rw": (
        "FalconForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "multi_query": False,
            "parallel_attn": False,
            "new_decoder_architecture": False,
            "bias": True,
            "alibi": False,
            "max_position_embeddings": 40,
        },
    ),
    "phi": (
        "PhiForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 40,
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {k: v for k, v in LLAMA.items() if k != "head_dim"}
        | {"hidden_size": 48, "sliding_window": 7, "pad_token_id": 0},
    ),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": 97, "hidden_size": 42, "n_layer": 3, "n_head": 6},
    ),
    "mpt": (
        "MptForCausalLM",
        {
            "vocab_size": 97,
            "d_model": 42,
            "n_layers": 3,
            "n_heads": 6,
            "max_seq_len": 40,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "vocab_size": 97,
            "d_model": 48,
            "n_heads": 6,
            "n_layers": 3,
            "max_seq_len": 40,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.3, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 20,
                "moe_num_experts": 5,
                "moe_top_k": 3,
                "ffn_act_fn": {"name": "silu"},
            },
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        LLAMA
        | {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 40,
            "intermediate_size": 44,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "q_lora_rank": 14,
            "kv_lora_rank": 18,
            "qk_rope_head_dim": 6,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "n_routed_experts": 12,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "max_position_embeddings": 40,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=12,
                mscale=0.707,
                mscale_all_dim=0.9,
            ),
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2ForCausalLM",
        {
            "vocab_size": 97,
            "hidden_size": 36,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 18,
            "qk_rope_head_dim": 6,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "topk_method": "greedy",
            "first_k_dense_replace": 2,
            "max_position_embeddings": 40,
        },
    ),
    "bert": (
        "BertForMaskedLM",
        {
            "vocab_size": 97,
            "hidden_size": 42,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "intermediate_size": 50,
            "max_position_embeddings": 40,
            "type_vocab_size": 3,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 97,
            "d_model": 42,
            "d_kv": 10,
            "d_ff": 50,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 5,
            "relative_attention_num_buckets": 10,
            "relative_attention_max_distance": 17,
        },
    ),
    "t5_v1_1": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 97,
            "d_model": 42,
            "d_kv": 10,
            "d_ff": 50,
            "num_layers": 3,
            "num_heads": 5,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "ul2": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 97,
            "d_model": 42,
            "d_kv": 8,
            "d_ff": 50,
            "num_layers": 1,
            "num_decoder_layers": 2,
            "num_heads": 6,
            "feed_forward_proj": "gated-silu",
            "tie_word_embeddings": False,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "vocab_size": 97,
            "d_model": 42,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 50,
            "decoder_ffn_dim": 50,
            "max_position_embeddings": 40,
            "scale_embedding": True,
        },
    ),
}

# All groups may be chosen from, and no layer is dense.
_ALL = CASES["deepseek_v2"][1] | {"topk_group": 4, "first_k_dense_replace": 0}
CASES["deepseek_v2_groups"] = "DeepseekV2ForCausalLM", _ALL


def build(name: str, seed: int = 0) -> Any:
    """A model in fp32 whose every parameter matters: norms and biases are not at their start."""
    import torch
    import transformers

    architecture, settings = CASES[name]
    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    config = cls.config_class(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return randomize(cls(config).eval(), untie=settings.get("tie_word_embeddings") is False)


def randomize(model: Any, *, untie: bool = False) -> Any:
    """A new model, with every parameter drawn from torch's generator.

    Args:
        untie: give T5 an output head of its own, which transformers ties and published weights do
            not.
    """
    import torch

    if untie and hasattr(model, "shared"):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            noise = spread * torch.randn(parameter.shape)
            one = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(noise + (1 if one else 0))
    return model
