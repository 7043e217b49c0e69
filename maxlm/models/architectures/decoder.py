"""Decoder-only language models: GPT-2, Llama and their like, by configuration."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from pydantic import Field, model_validator

from maxlm.config import Config
from maxlm.models.blocks import Block, scan_blocks, scan_cached
from maxlm.models.layers.attention import AttentionConfig, KVCache
from maxlm.models.layers.embedding import Embedding
from maxlm.models.layers.linear import Linear
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.positions import PositionsConfig, rotary
from maxlm.models.params import Weight, stack, weight
from maxlm.models.remat import RematPolicy
from maxlm.parallel.local import spec_of
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
    """What the backward pass keeps: none (all but norms and activations, most memory), matmuls,
    attention, full (only each layer's input: least memory, one more forward pass)."""

    @model_validator(mode="after")
    def _rope_pairs(self):
        if self.positions.kind == "rope" and self.attention.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, not {self.attention.head_dim}")
        return self

    def build(self, *, rules: AxisRules, dtype: Any) -> "Decoder":
        """The model; see :class:`Decoder`."""
        return Decoder(self, rules=rules, dtype=dtype)

    @property
    def position_limit(self) -> int | None:
        """Positions it can be run at; None: any, if not equally well past ``max_seq_len``."""
        return self.max_seq_len if self.positions.kind == "learned" else None

    def attention_flops(self, seq_len: int) -> float:
        """Forward FLOPs a token of attention's two products, masked pairs included: 4 N H S L."""
        width = self.attention.num_heads * self.attention.head_dim
        return 4.0 * self.num_layers * width * seq_len

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        """[L, B, T, K, H] of the keys that generation keeps, and again of the values."""
        attention = self.attention
        return (self.num_layers, batch, length, attention.num_kv_heads, attention.head_dim)

    def shrunk(
        self, *, vocab_size: int, num_layers: int, head_dim: int, seq_len: int
    ) -> "DecoderConfig":
        """A small model of the same structure: the ratio of query to kv heads stays (up to 8), so
        do that of the FFN to the width, ties, biases, norms, positions, gating and remat.

        Args:
            vocab_size, num_layers: upper bounds.
            head_dim, seq_len: the new sizes.
        """
        group = min(self.attention.num_heads // self.attention.num_kv_heads, 8)
        kv_heads = 1 if self.attention.num_kv_heads == 1 else 2
        heads = {
            "num_heads": group * kv_heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
        }
        d_model = group * kv_heads * head_dim
        d_ff = max(1, round(self.mlp.d_ff / self.d_model * d_model / 8)) * 8
        return self.model_copy(
            update={
                "vocab_size": min(self.vocab_size, vocab_size),
                "num_layers": min(self.num_layers, num_layers),
                "d_model": d_model,
                "max_seq_len": seq_len,
                "attention": self.attention.model_copy(update=heads),
                "mlp": self.mlp.model_copy(update={"d_ff": d_ff}),
            }
        )


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

        context = (positions, segment_ids, turns)
        if cache is None:
            x = scan_blocks(
                self.layers,
                lambda block, x, context: block(x, *context, None)[0],
                x,
                context,
                remat=config.remat,
            )
        else:
            x, cache = scan_cached(
                self.layers, lambda block, x, cache: block(x, *context, cache), x, cache
            )
        return self.final_norm(x), cache

    def unembedding(self) -> Weight:
        """The output head [D, V] in the compute dtype."""
        if self.head is not None:
            return weight(self.head.kernel, self.rules, self.dtype)
        table, (rows, columns) = weight(self.embedding.table, self.rules, self.dtype)
        return Weight(table.T, (columns, rows))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] → fp32 logits [B, S, V] (inference; training fuses the loss)."""
        head, used = self.unembedding()
        logits = jnp.einsum(
            "bsd,dv->bsv",
            hidden,
            reshard(head, spec_of(used)),
            preferred_element_type=jnp.float32,
            out_sharding=self.rules.spec("batch", "seq", "vocab"),
        )
        return reshard(logits, self.rules.spec("batch", "seq", None))
