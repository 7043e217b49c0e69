"""Grok-1's maths in torch, written from its published code (xAI 2024): transformers
does not have it. Tensors are named as in the safetensors port."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

CONFIG: dict[str, Any] = {
    "architectures": ["Grok1ModelForCausalLM"],
    "model_type": "grok-1",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "attn_output_multiplier": 0.08838834764831845,
    "max_attn_value": 30.0,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "router_aux_loss_coef": 0.001,
}
C = SimpleNamespace(**CONFIG)


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return (
            x / torch.sqrt((x * x).mean(-1, keepdim=True) + C.rms_norm_eps) * self.scale
        )


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Each pair (i, i + H/2) of x [B, N, S, H] as a complex number, times exp(i ·
    angle)."""
    half = x.shape[-1] // 2
    rates = C.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rates
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class GrokAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = linear(C.hidden_size, C.num_attention_heads * C.head_dim)
        self.k_proj = linear(C.hidden_size, C.num_key_value_heads * C.head_dim)
        self.v_proj = linear(C.hidden_size, C.num_key_value_heads * C.head_dim)
        self.o_proj = linear(C.num_attention_heads * C.head_dim, C.hidden_size)

    def forward(self, x):
        rows, length, _ = x.shape

        def heads(y):
            return y.view(rows, length, -1, C.head_dim).transpose(1, 2)

        group = C.num_attention_heads // C.num_key_value_heads
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotated(q), rotated(k)
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        scores = q @ k.transpose(2, 3) * C.attn_output_multiplier
        scores = C.max_attn_value * torch.tanh(scores / C.max_attn_value)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(rows, length, -1))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = linear(C.hidden_size, C.intermediate_size)
        self.linear_v = linear(C.hidden_size, C.intermediate_size)
        self.linear_1 = linear(C.intermediate_size, C.hidden_size)

    def forward(self, x):
        return self.linear_1(
            F.gelu(self.linear(x), approximate="tanh") * self.linear_v(x)
        )


class GrokMoe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = linear(C.hidden_size, C.num_experts)
        self.experts = nn.ModuleList(Expert() for _ in range(C.num_experts))

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        least = shares.topk(C.num_experts_per_tok).values[..., -1:]
        # Every expert serves every token, most with weight 0.
        shares = torch.where(shares >= least, shares, torch.zeros_like(shares))
        return sum(
            shares[..., i, None] * expert(x) for i, expert in enumerate(self.experts)
        )


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.pre_attn_norm = RMSNorm(C.hidden_size)
        self.post_attn_norm = RMSNorm(C.hidden_size)
        self.pre_moe_norm = RMSNorm(C.hidden_size)
        self.post_moe_norm = RMSNorm(C.hidden_size)
        self.attn = GrokAttention()
        self.moe_block = GrokMoe()

    def forward(self, x):
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x)))
        return x + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x)))


class Grok1(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(**CONFIG, is_encoder_decoder=False)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(C.vocab_size, C.hidden_size)
        self.model.layers = nn.ModuleList(Layer() for _ in range(C.num_hidden_layers))
        self.model.norm = RMSNorm(C.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        table: Any = self.model.embed_tokens
        x = table(input_ids) * C.embedding_multiplier_scale
        for layer in self.model.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = layer(x)
        norm: Any = self.model.norm
        return SimpleNamespace(
            logits=norm(x) @ table.weight.T * C.output_multiplier_scale
        )

    def generate(self, ids: torch.Tensor, generation_config: Any) -> torch.Tensor:
        """Greedily, without a cache."""
        with torch.no_grad():
            for _ in range(generation_config.max_new_tokens):
                ids = torch.cat([ids, self(ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids

    def save_pretrained(self, folder: str | Path) -> None:
        """As transformers' models do."""
        path = Path(folder)
        path.mkdir(exist_ok=True)
        save_file(self.state_dict(), path / "model.safetensors")
        kind = str(next(self.parameters()).dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(CONFIG | {"dtype": kind}))


def build(seed: int = 0) -> Grok1:
    """A model whose every parameter matters."""
    torch.manual_seed(seed)
    model = Grok1().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(
                spread * torch.randn(parameter.shape) + (parameter.ndim == 1)
            )
    return model
