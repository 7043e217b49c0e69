"""Tiny models with random weights, and PEFT's adapters of them, whose files a test
changes."""

from typing import Any

import numpy as np

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 34,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""Names of the maps of attention."""


ADAPTERS: dict[str, str] = {
    **dict.fromkeys(
        (
            *(
                "lora",
                "rslora",
                "dora",
                "pissa",
                "pissa_ranks",
                "patterns",
                "one_layer",
            ),
            *(
                "all_linear",
                "embedding",
                "saved",
                "tokens",
                "head_tokens",
                "ia3",
                "prefix",
                "prompt",
            ),
        ),
        "llama",
    ),
    **dict.fromkeys(("tied", "tied_embedding", "tied_tokens"), "tied"),
    **dict.fromkeys(("biases", "own_biases", "biased_dora"), "qwen"),
    **dict.fromkeys(("fused", "fused_dora", "fused_ia3", "gpt2_prefix"), "gpt2"),
    **dict.fromkeys(("experts", "all_experts"), "mixtral"),
}
"""The base of each adapter."""


def build_bases() -> dict[str, Any]:
    """Llama with grouped heads, with a tied head too, one with biases, GPT-2 (whose
    matrices are [inputs, outputs]) and Mixtral, in fp32."""
    import torch
    import transformers

    torch.manual_seed(0)
    untied = SIZES | {"tie_word_embeddings": False}
    mixtral = untied | {
        "intermediate_size": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    gpt2 = transformers.GPT2Config(
        vocab_size=61,
        n_positions=32,
        n_embd=24,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=True,
    )
    mixtral_config = transformers.MixtralConfig(**mixtral, sliding_window=None)
    mixtral_config._experts_implementation = "eager"
    tied = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    bases = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**untied)),
        "tied": transformers.LlamaForCausalLM(tied),
        "qwen": transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**untied, use_sliding_window=False)
        ),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "mixtral": transformers.MixtralForCausalLM(mixtral_config),
    }
    for model in bases.values():
        model.eval()
        model.requires_grad_(True)
        randomize(model)
    return bases


def randomize(model: Any, spread: float = 0.1) -> None:
    """Adds normal noise to what is trained."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape))


def list_adapters() -> dict[str, Any]:
    """Returns the settings of each adapter."""
    import peft

    def lora(**settings: Any) -> Any:
        values = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
        return peft.LoraConfig(**values | {"task_type": "CAUSAL_LM"} | settings)

    def prefix() -> Any:
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    factors = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
    factors |= {"feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    gpt2_factors = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    gpt2_factors |= {"feedforward_modules": ["mlp.c_proj"], "task_type": "CAUSAL_LM"}
    return {
        "lora": lora(),
        "rslora": lora(use_rslora=True),
        "dora": lora(use_dora=True),
        "pissa": lora(init_lora_weights="pissa"),
        "pissa_ranks": lora(init_lora_weights="pissa", rank_pattern={"q_proj": 5}),
        "patterns": lora(
            rank_pattern={r"layers\.0\..*q_proj": 4}, alpha_pattern={"down_proj": 3}
        ),
        "one_layer": lora(layers_to_transform=[1]),
        "all_linear": lora(target_modules="all-linear"),
        "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
        "saved": lora(modules_to_save=["lm_head", "model.norm"]),
        "tokens": lora(trainable_token_indices=[3, 5]),
        "head_tokens": lora(
            trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]}
        ),
        "tied": lora(),
        "tied_embedding": lora(target_modules=["embed_tokens", "q_proj"]),
        "tied_tokens": lora(trainable_token_indices=[3, 5]),
        "biases": lora(target_modules=ATTENTION, bias="all"),
        "own_biases": lora(target_modules=["q_proj"], bias="lora_only"),
        "biased_dora": lora(target_modules=ATTENTION, use_dora=True),
        "fused": lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
        "fused_dora": lora(
            target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True
        ),
        "experts": lora(target_modules=["q_proj"], target_parameters=experts),
        "all_experts": lora(target_modules="all-linear"),
        "ia3": peft.IA3Config(**factors),
        "fused_ia3": peft.IA3Config(**gpt2_factors),
        "prefix": prefix(),
        "gpt2_prefix": prefix(),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }


def write_adapter(base: Any, config: Any, folder: Any) -> None:
    """Writes a random adapter of a copy of a base."""
    from copy import deepcopy

    import peft
    import torch

    torch.manual_seed(1)
    model = peft.get_peft_model(deepcopy(base), deepcopy(config)).eval()
    randomize(model)
    model.save_pretrained(folder)


TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
