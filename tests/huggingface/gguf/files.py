"""Small GGUF files, made of the tiny models of tests/models/published.py."""

from pathlib import Path
from typing import Any

import numpy as np

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
    "cohere": {"attention_bias": False},
}
"""Settings in place of those that llama.cpp has no word for."""
MODELS = (
    *("llama", "llama3", "llama_biases", "llama_yarn", "llama_linear", "mistral"),
    *("mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3", "phi", "phi3", "phi3_longrope", "gpt2", "starcoder2", "falcon_7b"),
    *("falcon_40b", "gpt_neox", "olmo2", "granite", "stablelm", "cohere", "bloom"),
)


def write_model(name: str, folder: Path, quantization: str | None = None) -> Path:
    """Writes a tiny model as ``hf``, ``run`` and ``model.gguf`` in a folder; returns the
    latter."""
    tensors = golden(name).tensors
    if name in WITHOUT_BIASES:
        tensors = {
            key: x for key, x in tensors.items() if not key.endswith("proj.bias")
        }
    changes = CHANGES.get(name, {})
    source = folder_of(name, folder / "hf", tensors, **changes)
    convert(source, folder / "run")
    target = folder / "model.gguf"
    convert(folder / "run", target, quantization=quantization)
    return target


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
