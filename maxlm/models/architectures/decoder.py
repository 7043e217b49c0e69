"""Decoder-only language models: GPT-2, Llama and their like, by configuration."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from pydantic import Field, model_validator

from maxlm.config import Config
from maxlm.models.blocks import Block, scan_blocks
from maxlm.models.layers.attention import AttentionConfig, KVCache
from maxlm.models.layers.embedding import Embedding
from maxlm.models.layers.linear import Linear
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.positions import PositionsConfig, rotary
from maxlm.models.params import compute_view, stack
from maxlm.models.remat import RematPolicy
from maxlm.sharding import AxisRules


class DecoderConfig(Config):
    """A causal decoder; see configs/models for published sizes."""

    architecture: Literal["decoder"] = "decoder"
    vocab_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    d_model: int = Field(gt=0)
    max_seq_len: int = Field(gt=0)
    """Longest sequence the model is meant for; the rows of a learned position table."""
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = NormConfig()
    positions: PositionsConfig = PositionsConfig()
    tie_embeddings: bool = False
    """Use the embedding table as the output head: fewer parameters, usual below a billion."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights (truncated normal)."""
    remat: RematPolicy = "full"
    """What the backward pass keeps: none (everything, most memory), matmuls, attention, full
    (only each layer's input: least memory, one more forward pass)."""

    @model_validator(mode="after")
    def _rope_pairs(self):
        if self.positions.kind == "rope" and self.attention.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, not {self.attention.head_dim}")
        return self


class Decoder(nnx.Module):
    """Tokens to hidden states to logits.

    Args:
        rules: compute layout of parameters and activations.
        dtype: compute dtype; parameters are fp32.
    """

    def __init__(self, config: DecoderConfig, *, rules: AxisRules, dtype: Any):
        self.config, self.rules, self.dtype = config, rules, dtype
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        D, std = config.d_model, config.init_std
        self.embedding = Embedding("vocab", config.vocab_size, D, std, **kw)
        self.positions = (
            Embedding(None, config.max_seq_len, D, std, **kw)
            if config.positions.kind == "learned"
            else None
        )
        block = Block(config.attention, config.mlp, config.norm, D, config.num_layers, std, **kw)
        self.layers = stack(block, config.num_layers)
        self.final_norm = Norm(config.norm, D, **kw)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                {"embed": D}, {"vocab": config.vocab_size}, bias=False, std=std, role="table", **kw
            )
        )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm.

        Args:
            tokens: int [B, S].
            positions: int [B, S], restarting at 0 with each segment.
            segment_ids: int [B, S], 0 for padding; None: each row is one segment.
            cache: stacked by layer, [L, B, T, K, H] (inference); see inference/cache.py.

        Returns:
            [B, S, D] in the compute dtype, and the cache with these tokens in it.
        """
        config = self.config
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        turns = None
        if config.positions.kind == "rope":
            turns = rotary(positions, config.attention.head_dim, config.positions.theta)

        def body(block: Block, x: jax.Array, layer_cache: KVCache | None):
            return block(x, positions, segment_ids, turns, layer_cache)

        x, cache = scan_blocks(self.layers, body, x, cache, remat=config.remat)
        return self.final_norm(x), cache

    def unembedding(self) -> jax.Array:
        """The output head [D, V] in its compute layout and dtype."""
        if self.head is not None:
            return compute_view(self.head.kernel, self.rules, self.dtype)
        return compute_view(self.embedding.table, self.rules, self.dtype).T

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] → fp32 logits [B, S, V] (inference; training fuses the loss)."""
        logits = jnp.einsum(
            "bsd,dv->bsv",
            hidden,
            self.unembedding(),
            preferred_element_type=jnp.float32,
            out_sharding=self.rules.spec("batch", "seq", "vocab"),
        )
        return reshard(logits, self.rules.spec("batch", "seq", None))
