"""What papers and the config.json beside published weights say of each preset, but for the sizes
that parameter counts tell; written by hand, not from configs/models."""

from typing import Any

Facts = dict[str, Any]

# What each fact is called in a model's config.
NAMES = {
    "kind": "architecture",
    "heads": "attention.num_heads",
    "kv_heads": "attention.num_kv_heads",
    "head_dim": "attention.head_dim",
    "context": "max_seq_len",
    "window": "attention.window",
    "scale": "attention.scale",
    "soft_cap": "attention.soft_cap",
    "clip": "attention.clip",
    "qk_norm": "attention.qk_norm",
    "q_rank": "attention.latent.q_rank",
    "kv_rank": "attention.latent.kv_rank",
    "latent_rotary": "attention.latent.rotary_dim",
    "value_dim": "attention.latent.value_dim",
    "positions": "positions.kind",
    "theta": "positions.theta",
    "rotary": "positions.rotary_dim",
    "offset": "positions.offset",
    "max_bias": "positions.max_bias",
    "buckets": "positions.buckets",
    "max_distance": "positions.max_distance",
    "scaling": "positions.scaling.kind",
    "factor": "positions.scaling.factor",
    "trained_at": "positions.scaling.original_length",
    "low": "positions.scaling.low_freq_factor",
    "high": "positions.scaling.high_freq_factor",
    "fast": "positions.scaling.beta_fast",
    "slow": "positions.scaling.beta_slow",
    "mscale": "positions.scaling.mscale",
    "mscale_all_dim": "positions.scaling.mscale_all_dim",
    "pattern": "pattern",
    "norm": "norm.kind",
    "eps": "norm.eps",
    "zero_centred": "norm.zero_centred",
    "placement": "placement",
    "final_norm": "final_norm",
    "embedding_norm": "embedding_norm",
    "embedding_scale": "embedding_scale",
    "tied": "tie_embeddings",
    "logit_scale": "logit_scale",
    "logit_cap": "logit_cap",
    "activation": "mlp.activation",
    "gated": "mlp.gated",
    "head_activation": "head_activation",
    "start": "start_id",
    "dense_layers": "dense_layers",
    "expert_activation": "moe.activation",
    "expert_gated": "moe.gated",
    "experts": "moe.num_experts",
    "met": "moe.experts_per_token",
    "shared": "moe.shared_experts",
    "score": "moe.score",
    "renormalise": "moe.renormalise",
    "routed_scale": "moe.scale",
    "groups": "moe.groups",
    "groups_met": "moe.groups_per_token",
    "selection_bias": "moe.selection_bias",
    "balance": "moe.balance_loss",
}

PLAIN: Facts = {"kind": "decoder", "window": None, "soft_cap": None, "clip": None}
PLAIN |= {"qk_norm": False, "kv_rank": None, "rotary": None, "scaling": None, "pattern": ()}
PLAIN |= {"zero_centred": False, "placement": "pre", "final_norm": True, "embedding_norm": False}
PLAIN |= {"embedding_scale": 1, "logit_scale": 1, "logit_cap": None, "dense_layers": 0}


def of(family: Facts, heads: int, kv_heads: int, head_dim: int, context: int, **own: Any) -> Facts:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "context": context}
    return PLAIN | {"scale": head_dim**-0.5} | family | sizes | own


def experts(experts: int, met: int, balance: float, **own: Any) -> Facts:
    """``balance``: in the convention of ``moe.balance_loss``."""
    plain: Facts = {"expert_activation": "silu", "expert_gated": True, "shared": 0}
    plain |= {"activation": None, "gated": None, "score": "softmax", "renormalise": True}
    plain |= {"routed_scale": 1, "groups": 1, "groups_met": 1, "selection_bias": False}
    return plain | {"experts": experts, "met": met, "balance": balance} | own


ROPE: Facts = {"positions": "rope", "theta": 1e4}
RMS: Facts = {"norm": "rmsnorm", "eps": 1e-5}
LAYERNORM: Facts = {"norm": "layernorm", "eps": 1e-5}
SWIGLU: Facts = {"activation": "silu", "gated": True}
GEGLU: Facts = {"activation": "gelu_tanh", "gated": True}
RELU: Facts = {"activation": "relu", "gated": False}
GELU: Facts = {"activation": "gelu", "gated": False}
GELU_TANH: Facts = {"activation": "gelu_tanh", "gated": False}

GPT2 = LAYERNORM | GELU_TANH | {"positions": "learned", "tied": True}
LLAMA = ROPE | RMS | SWIGLU | {"tied": False}
LLAMA1 = LLAMA | {"eps": 1e-6}
LLAMA3 = LLAMA | {"theta": 5e5}
LLAMA3_1 = LLAMA3 | {"scaling": "llama3", "factor": 8, "low": 1, "high": 4, "trained_at": 8192}
LLAMA3_2 = LLAMA3_1 | {"factor": 32, "tied": True}
SMOLLM2 = LLAMA | {"theta": 1e5, "tied": True}
MIXTRAL = LLAMA | {"theta": 1e6}
QWEN2_5 = LLAMA | {"theta": 1e6, "eps": 1e-6}
QWEN3 = QWEN2_5 | {"qk_norm": True}
GEMMA = ROPE | RMS | GEGLU | {"eps": 1e-6, "zero_centred": True, "tied": True}
FALCON = ROPE | LAYERNORM | GELU | {"placement": "parallel", "tied": True}
PHI = ROPE | LAYERNORM | GELU_TANH | {"placement": "parallel_shared", "rotary": 32, "tied": False}
PHI3 = LLAMA | {"window": 2047}
ALIBI: Facts = {"positions": "alibi", "max_bias": 8, "tied": True}
BLOOM = LAYERNORM | GELU_TANH | ALIBI | {"embedding_norm": True}
MPT = LAYERNORM | GELU | ALIBI
GROK = ROPE | RMS | {"placement": "sandwich", "soft_cap": 30, "tied": True}
GROK |= {"embedding_scale": 78.38367176906169, "logit_scale": 0.5773502691896257}
# The coefficient was not published; this is Switch's (Fedus et al. 2021, section 2.2).
GROK |= experts(8, 2, 0.01, expert_activation="gelu_tanh", renormalise=False)
DBRX = ROPE | LAYERNORM | {"theta": 5e5, "clip": 8, "tied": False}
DEEPSEEK = LLAMA | {"eps": 1e-6, "kv_rank": 512, "latent_rotary": 64, "value_dim": 128}
DEEPSEEK |= {"scaling": "yarn", "factor": 40, "trained_at": 4096, "fast": 32, "slow": 1}
DEEPSEEK |= {"mscale": 0.707, "mscale_all_dim": 0.707, "dense_layers": 1}
POST: Facts = {"placement": "post", "final_norm": False, "embedding_norm": True}
BERT = LAYERNORM | GELU | POST | {"kind": "encoder", "positions": "learned", "eps": 1e-12}
BERT |= {"head_activation": "gelu", "tied": True}
BART = LAYERNORM | GELU | POST | {"kind": "encoder_decoder", "positions": "learned"}
BART |= {"offset": 2, "start": 2, "tied": True}
T5_V1_1: Facts = RMS | GEGLU | {"kind": "encoder_decoder", "eps": 1e-6, "scale": 1, "start": 0}
T5_V1_1 |= {"positions": "relative", "buckets": 32, "max_distance": 128, "tied": False}


def gemma2(*sizes: int, query: int, width: int) -> Facts:
    """Every other layer, the first among them, sees 4096 tokens.

    Args:
        query: what queries are divided by the root of, as for Gemma 3.
        width: of the model, whose root embeddings are multiplied by.
    """
    own: Facts = {"scale": query**-0.5, "soft_cap": 50, "logit_cap": 30, "placement": "sandwich"}
    own |= {"embedding_scale": width**0.5, "pattern": ((4096, 1e4, None), (None, 1e4, None))}
    return of(GEMMA, *sizes, **own)


def gemma3(*sizes: int, query: int, width: int, window: int, factor: int | None = None) -> Facts:
    """Five layers with a window before each that sees everything.

    Args:
        factor: positions are divided by it where layers see everything.
    """
    own: Facts = {"scale": query**-0.5, "qk_norm": True, "placement": "sandwich", "theta": 1e6}
    own |= {"scaling": factor and "linear", "factor": factor, "embedding_scale": width**0.5}
    return of(GEMMA, *sizes, pattern=5 * ((window, 1e4, None),) + ((None, 1e6, factor),), **own)


def deepseek(heads: int, routed: int, q_rank: int | None, **own: Any) -> Facts:
    """``routed``: experts, of which six serve a token, besides two that serve all."""
    moe = experts(routed, 6, 0.001, shared=2, renormalise=False, **own)
    return of(DEEPSEEK | moe | SWIGLU, heads, heads, 128 + 64, 163840, q_rank=q_rank)


def t5(heads: int, head_dim: int, width: int, mlp: Facts = RELU) -> Facts:
    """``width``: of the model, whose root logits are divided by."""
    first: Facts = {"tied": True, "logit_scale": width**-0.5}
    return of(T5_V1_1 | mlp | first, heads, heads, head_dim, 512)


# Heads, key heads, size of a head, context; then what is a preset's own.
FACTS: dict[str, Facts] = {
    "gpt2": of(GPT2, 12, 12, 64, 1024),
    "gpt2_medium": of(GPT2, 16, 16, 64, 1024),
    "gpt2_large": of(GPT2, 20, 20, 64, 1024),
    "gpt2_xl": of(GPT2, 25, 25, 64, 1024),
    "llama_7b": of(LLAMA1, 32, 32, 128, 2048),
    "llama_13b": of(LLAMA1, 40, 40, 128, 2048),
    "llama_33b": of(LLAMA1, 52, 52, 128, 2048),
    "llama_65b": of(LLAMA1, 64, 64, 128, 2048, eps=1e-5),
    "llama2_7b": of(LLAMA, 32, 32, 128, 4096),
    "llama2_13b": of(LLAMA, 40, 40, 128, 4096),
    "llama2_70b": of(LLAMA, 64, 8, 128, 4096),
    "llama3_8b": of(LLAMA3, 32, 8, 128, 8192),
    "llama3_70b": of(LLAMA3, 64, 8, 128, 8192),
    "llama3_405b": of(LLAMA3, 128, 8, 128, 8192),
    "llama3_1_8b": of(LLAMA3_1, 32, 8, 128, 131072),
    "llama3_1_70b": of(LLAMA3_1, 64, 8, 128, 131072),
    "llama3_1_405b": of(LLAMA3_1, 128, 8, 128, 131072),
    "llama3_2_1b": of(LLAMA3_2, 32, 8, 64, 131072),
    "llama3_2_3b": of(LLAMA3_2, 24, 8, 128, 131072),
    "llama3_3_70b": of(LLAMA3_1, 64, 8, 128, 131072),
    "smollm2_135m": of(SMOLLM2, 9, 3, 64, 8192),
    "smollm2_360m": of(SMOLLM2, 15, 5, 64, 8192),
    "smollm2_1_7b": of(SMOLLM2, 32, 32, 64, 8192, theta=1.3e5),
    "mistral_7b": of(LLAMA, 32, 8, 128, 32768, window=4096),
    "mixtral_8x7b": of(MIXTRAL | experts(8, 2, 2 * 0.02), 32, 8, 128, 32768),
    "mixtral_8x22b": of(MIXTRAL | experts(8, 2, 2 * 0.001), 48, 8, 128, 65536),
    "qwen2_5_0_5b": of(QWEN2_5, 14, 2, 64, 32768, tied=True),
    "qwen2_5_1_5b": of(QWEN2_5, 12, 2, 128, 131072, tied=True),
    "qwen2_5_3b": of(QWEN2_5, 16, 2, 128, 32768, tied=True),
    "qwen2_5_7b": of(QWEN2_5, 28, 4, 128, 131072),
    "qwen2_5_14b": of(QWEN2_5, 40, 8, 128, 131072, eps=1e-5),
    "qwen2_5_32b": of(QWEN2_5, 40, 8, 128, 131072, eps=1e-5),
    "qwen2_5_72b": of(QWEN2_5, 64, 8, 128, 131072, eps=1e-5),
    "qwen3_0_6b": of(QWEN3, 16, 8, 128, 40960, tied=True),
    "qwen3_1_7b": of(QWEN3, 16, 8, 128, 40960, tied=True),
    "qwen3_4b": of(QWEN3, 32, 8, 128, 40960, tied=True),
    "qwen3_8b": of(QWEN3, 32, 8, 128, 40960),
    "qwen3_14b": of(QWEN3, 40, 8, 128, 40960),
    "qwen3_32b": of(QWEN3, 64, 8, 128, 40960),
    "qwen3_30b_a3b": of(QWEN3 | experts(128, 8, 8 * 0.001), 32, 4, 128, 40960),
    "qwen3_235b_a22b": of(QWEN3 | experts(128, 8, 8 * 0.001), 64, 4, 128, 40960),
    "gemma_2b": of(GEMMA, 8, 1, 256, 8192, embedding_scale=2048**0.5),
    "gemma_7b": of(GEMMA, 16, 16, 256, 8192, embedding_scale=3072**0.5),
    "gemma2_2b": gemma2(8, 4, 256, 8192, query=256, width=2304),
    "gemma2_9b": gemma2(16, 8, 256, 8192, query=256, width=3584),
    "gemma2_27b": gemma2(32, 16, 128, 8192, query=144, width=4608),
    "gemma3_270m": gemma3(4, 1, 256, 32768, query=256, width=640, window=512),
    "gemma3_1b": gemma3(4, 1, 256, 32768, query=256, width=1152, window=512),
    "gemma3_4b": gemma3(8, 4, 256, 131072, query=256, width=2560, window=1024, factor=8),
    "gemma3_12b": gemma3(16, 8, 256, 131072, query=256, width=3840, window=1024, factor=8),
    "gemma3_27b": gemma3(32, 16, 128, 131072, query=168, width=5376, window=1024, factor=8),
    "falcon_7b": of(FALCON, 71, 1, 64, 2048, placement="parallel_shared"),
    "falcon_40b": of(FALCON, 128, 8, 64, 2048),
    "falcon_180b": of(FALCON, 232, 8, 64, 2048),
    "phi_1_5": of(PHI, 32, 32, 64, 2048),
    "phi_2": of(PHI, 32, 32, 80, 2048),
    "phi3_mini": of(PHI3, 32, 32, 96, 4096),
    "phi3_medium": of(PHI3, 40, 10, 128, 4096),
    "bloom_560m": of(BLOOM, 16, 16, 64, 2048),
    "bloom_1b1": of(BLOOM, 16, 16, 96, 2048),
    "bloom_1b7": of(BLOOM, 16, 16, 128, 2048),
    "bloom_3b": of(BLOOM, 32, 32, 80, 2048),
    "bloom_7b1": of(BLOOM, 32, 32, 128, 2048),
    "bloom_176b": of(BLOOM, 112, 112, 128, 2048),
    "mpt_7b": of(MPT, 32, 32, 128, 2048),
    "mpt_30b": of(MPT, 64, 64, 112, 8192),
    "grok_1": of(GROK, 48, 8, 128, 8192),
    "dbrx": of(DBRX | experts(16, 4, 4 * 0.05), 48, 8, 128, 32768),
    "deepseek_v2": deepseek(128, 160, 1536, groups=8, groups_met=3, routed_scale=16),
    "deepseek_v2_lite": deepseek(16, 64, None),
    "bert_base": of(BERT, 12, 12, 64, 512),
    "bert_large": of(BERT, 16, 16, 64, 512),
    "t5_small": t5(8, 64, 512),
    "t5_base": t5(12, 64, 768),
    "t5_large": t5(16, 64, 1024),
    "t5_3b": t5(32, 128, 1024),
    "t5_11b": t5(128, 128, 1024),
    "t5_v1_1_small": of(T5_V1_1, 6, 6, 64, 512),
    "t5_v1_1_base": of(T5_V1_1, 12, 12, 64, 512),
    "t5_v1_1_large": of(T5_V1_1, 16, 16, 64, 512),
    "t5_v1_1_xl": of(T5_V1_1, 32, 32, 64, 512),
    "t5_v1_1_xxl": of(T5_V1_1, 64, 64, 64, 512),
    "ul2_20b": t5(16, 256, 4096, SWIGLU),
    "bart_base": of(BART, 12, 12, 64, 1024),
    "bart_large": of(BART, 16, 16, 64, 1024),
}
