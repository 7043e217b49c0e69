"""Small GGUF files, made of the tiny models of tests/models/published.py."""

from pathlib import Path
from typing import Any

import numpy as np

from maxlm.huggingface.gguf.container import read_gguf
from maxlm.huggingface.gguf.tensors import place_tensor
from maxlm.huggingface.gguf.writer import GgufFileWriter, TensorSpec
from maxlm.run.convert import convert
from tests.models.published import folder_of, golden

WITHOUT_BIASES = ("olmo2", "cohere")
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"use_sliding_window": False, "layer_types": None},
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3": {
        "query_pre_attn_scalar": 10,
        "_sliding_window_pattern": None,
        "sliding_window_pattern": 6,
        "layer_types": [
            *["sliding_attention"] * 5,
            "full_attention",
            *["sliding_attention"] * 2,
        ],
    },
    "phi3": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "olmo2": {"attention_bias": False},
    "olmoe": {"num_key_value_heads": 6},
    "smollm3": {
        "no_rope_layers": [1, 1, 1, 0],
        "use_sliding_window": False,
        "layer_types": None,
    },
    "deepseek_v2": {
        "topk_method": "greedy",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "mscale": 0.9,
            "mscale_all_dim": 0.9,
            "original_max_position_embeddings": 12,
        },
    },
    # llama.cpp's norms of latent vectors have the same eps as the others.
    "deepseek_v3": {"rms_norm_eps": 1e-6},
    "cohere": {"attention_bias": False},
}
"""Settings in place of those that llama.cpp has no word for."""
MODELS = (
    *("llama", "llama3", "llama_biases", "llama_yarn", "llama_linear", "mistral"),
    *("mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3", "phi", "phi3", "phi3_longrope", "gpt2", "starcoder2", "falcon_7b"),
    *("falcon_40b", "gpt_neox", "olmo2", "granite", "stablelm", "cohere", "bloom"),
    *("olmoe", "smollm3", "deepseek_v2", "deepseek_v3"),
)


def write_model(name: str, folder: Path, quantization: str | None = None) -> Path:
    """Writes a tiny model as ``hf``, ``run`` and ``model.gguf`` in a folder; returns the
    latter."""
    tensors = golden(name).tensors
    if name in WITHOUT_BIASES:
        tensors = {
            key: x for key, x in tensors.items() if not key.endswith("proj.bias")
        }
    if name == "olmoe":
        # llama.cpp has it with as many heads of keys as of queries alone.
        tensors = {key: _widen_key_heads(key, x, 6 // 2) for key, x in tensors.items()}
    changes = CHANGES.get(name, {})
    source = folder_of(name, folder / "hf", tensors, **changes)
    convert(source, folder / "run")
    target = folder / "model.gguf"
    convert(folder / "run", target, quantization=quantization)
    return target


def _widen_key_heads(name: str, tensor: np.ndarray, times: int) -> np.ndarray:
    """Keys and values for so many times the heads."""
    if any(part in name for part in ("k_proj", "v_proj", "k_norm")):
        return np.concatenate([tensor] * times)
    return tensor


def split_latent_maps(path: Path, target: Path) -> None:
    """Writes a file of DeepSeek's as llama.cpp's conversion has written it since April
    2025: keys' and values' maps from latent vectors apart."""
    file = read_gguf(path)
    sizes = {
        key.removeprefix("deepseek2."): value for key, value in file.metadata.items()
    }
    rank = sizes["attention.kv_lora_rank"]
    key_size = sizes["attention.key_length"]
    value_size = sizes["attention.value_length"]
    rotary_size = sizes["rope.dimension_count"]
    metadata = {
        key: value
        for key, value in file.metadata.items()
        if key not in ("general.architecture", "general.alignment")
    }
    metadata |= {
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": rank + rotary_size,
        "deepseek2.attention.value_length": rank,
        "deepseek2.attention.key_length_mla": key_size,
        "deepseek2.attention.value_length_mla": value_size,
    }
    tensors: dict[str, np.ndarray] = {}
    for name, place in file.tensors.items():
        values = place_tensor(place, name).dequantize()
        if not name.endswith("attn_kv_b.weight"):
            tensors[name] = values
            continue
        by_head = values.reshape(sizes["attention.head_count"], -1, rank)
        keys, values = np.split(by_head, [key_size - rotary_size], axis=1)
        start = name.removesuffix("attn_kv_b.weight")
        tensors[f"{start}attn_k_b.weight"] = keys.transpose(0, 2, 1)
        tensors[f"{start}attn_v_b.weight"] = values
    specs = {name: TensorSpec("F32", values.shape) for name, values in tensors.items()}
    writer = GgufFileWriter(target, "deepseek2", metadata, specs)
    for name, values in tensors.items():
        writer.write(name, values)


def list_llama_shapes(
    num_layers: int,
    d_model: int,
    d_ff: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
    num_experts: int = 0,
    *,
    head: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Lists the tensors of a model of llama.cpp's architecture llama."""
    head_dim = d_model // num_heads
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab_size, d_model),
        "output_norm.weight": (d_model,),
    }
    if head:
        shapes["output.weight"] = (vocab_size, d_model)
    lead = (num_experts,) if num_experts else ()
    end = "_exps" if num_experts else ""
    for layer in range(num_layers):
        block = f"blk.{layer}"
        shapes |= {
            f"{block}.attn_norm.weight": (d_model,),
            f"{block}.ffn_norm.weight": (d_model,),
            f"{block}.attn_q.weight": (d_model, d_model),
            f"{block}.attn_k.weight": (num_kv_heads * head_dim, d_model),
            f"{block}.attn_v.weight": (num_kv_heads * head_dim, d_model),
            f"{block}.attn_output.weight": (d_model, d_model),
            f"{block}.ffn_gate{end}.weight": (*lead, d_ff, d_model),
            f"{block}.ffn_up{end}.weight": (*lead, d_ff, d_model),
            f"{block}.ffn_down{end}.weight": (*lead, d_model, d_ff),
        }
        if num_experts:
            shapes[f"{block}.ffn_gate_inp.weight"] = (num_experts, d_model)
    return shapes


def write_random(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Writes a file of normal numbers in fp32, without a tokenizer."""
    sizes = {f"{architecture}.{key}": value for key, value in metadata.items()}
    specs = {name: TensorSpec("F32", shape) for name, shape in shapes.items()}
    general = {"general.file_type": 0, "tokenizer.ggml.model": "none"}
    writer = GgufFileWriter(path, architecture, general | sizes, specs)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.write(name, random.normal(size=shape).astype(np.float32))
