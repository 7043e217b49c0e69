"""Decoder-only language models: GPT-2, Llama and their like, by configuration."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.aux import Aux
from maxlm.models.blocks import Block, scan_blocks, scan_cached
from maxlm.models.layers.attention import AttentionConfig, KVCache
from maxlm.models.layers.embedding import Embedding
from maxlm.models.layers.linear import Linear
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.moe import MoeConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.positions import PositionsConfig, Rotary, rotary
from maxlm.models.params import Params, Weight, stack, values, weight
from maxlm.models.remat import RematPolicy
from maxlm.parallel.config import ParallelConfig, Schedule
from maxlm.parallel.local import spec_of
from maxlm.parallel.pipeline import pipeline
from maxlm.sharding import AxisRules

Where = tuple[jax.Array, jax.Array | None]
"""Positions and segment ids."""
Layers = Callable[[jax.Array, Where], tuple[jax.Array, Aux]]


class DecoderConfig(Config):
    """A causal decoder; see configs/models for published sizes."""

    architecture: Literal["decoder"] = "decoder"
    vocab_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    d_model: int = Field(gt=0)
    max_seq_len: int = Field(gt=0)
    """Longest sequence the model is meant for; the rows of a learned position table."""
    attention: AttentionConfig
    mlp: MlpConfig | None = None
    moe: MoeConfig | None = None
    """A mixture of experts in place of ``mlp``."""
    norm: NormConfig = NormConfig()
    positions: PositionsConfig = PositionsConfig()
    tie_embeddings: bool = False
    """Use the embedding table as the output head: fewer parameters, usual below a billion."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights (truncated normal)."""
    remat: RematPolicy = "full"
    """What the backward pass keeps: none (all but norms and activations, most memory), matmuls,
    mlp, attention, full (only each layer's input: least memory, one more forward pass)."""

    @model_validator(mode="after")
    def _one_kind_of_mlp(self):
        if (self.mlp is None) == (self.moe is None):
            if self.mlp is None:
                raise MaxlmError("neither mlp nor moe", fix="give one of them")
            raise MaxlmError("both mlp and moe", fix="set one of them to null")
        return self

    @model_validator(mode="after")
    def _rope_pairs(self):
        if self.positions.kind == "rope" and self.attention.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, not {self.attention.head_dim}")
        return self

    def build(
        self, *, rules: AxisRules, dtype: Any, parallel: ParallelConfig = ParallelConfig()
    ) -> "Decoder":
        """The model; see :class:`Decoder`."""
        return Decoder(self, rules=rules, dtype=dtype, parallel=parallel)

    @property
    def position_limit(self) -> int | None:
        """Positions it can be run at; None: any, if not equally well past ``max_seq_len``."""
        return self.max_seq_len if self.positions.kind == "learned" else None

    def attention_flops(self, seq_len: int) -> float:
        """Forward FLOPs a token of attention's two products, masked pairs included: 4 N H S L."""
        width = self.attention.num_heads * self.attention.head_dim
        return 4.0 * self.num_layers * width * seq_len

    @property
    def expert_share(self) -> float:
        """The share of a layer's routed experts that a token meets; 1 without experts."""
        return self.moe.experts_per_token / self.moe.num_experts if self.moe else 1.0

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

        def narrowed(layer: Any) -> Any:
            if layer is None:
                return None
            d_ff = max(1, round(layer.d_ff / self.d_model * d_model / 8)) * 8
            return layer.model_copy(update={"d_ff": d_ff})

        return self.model_copy(
            update={
                "vocab_size": min(self.vocab_size, vocab_size),
                "num_layers": min(self.num_layers, num_layers),
                "d_model": d_model,
                "max_seq_len": seq_len,
                "attention": self.attention.model_copy(update=heads),
                "mlp": narrowed(self.mlp),
                "moe": narrowed(self.moe),
            }
        )


class Decoder(nnx.Module):
    """Tokens to hidden states to logits.

    Args:
        rules: compute layout of parameters and activations.
        dtype: compute dtype; parameters are fp32.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rules: AxisRules,
        dtype: Any,
        parallel: ParallelConfig = ParallelConfig(),
    ):
        self.config, self.rules, self.dtype, self.parallel = config, rules, dtype, parallel
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        D, std = config.d_model, config.init_std
        self.embedding = Embedding("vocab", config.vocab_size, D, std, **kw)
        self.positions = (
            Embedding(None, config.max_seq_len, D, std, **kw)
            if config.positions.kind == "learned"
            else None
        )
        mlp = config.mlp or config.moe
        assert mlp is not None
        layers = (config.attention, mlp, config.norm, D, config.num_layers, std)
        block = Block(*layers, parallel=parallel, **kw)
        self.layers = stack(block, config.num_layers, self.layer_groups)
        self.final_norm = Norm(config.norm, D, **kw)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                {"embed": D}, {"vocab": config.vocab_size}, bias=False, std=std, role="table", **kw
            )
        )
        self.between: Layers | None = None

    @property
    def schedule(self) -> Schedule | None:
        """How layers are pipelined over stages; None: they are not."""
        return self.parallel.schedule if self.rules.layers else None

    @property
    def layer_groups(self) -> int:
        """Groups of layers a pipeline stage holds."""
        return self.parallel.layer_groups if self.schedule == "circular" else 1

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        """Hidden states after the final norm; for training, differentiable in reverse mode.

        Args:
            tokens: int [B, S]; on pipeline stages [M, B, S], M micro-batches.
            positions: likewise, restarting at 0 with each segment.
            segment_ids: likewise, 0 for padding; None: each row is one segment.

        Returns:
            [..., S, D] in the compute dtype, micro-batches split over stages; and what layers add.
        """
        run = self.between or self.run_layers
        x, aux = run(self.embed(tokens, positions), (positions, segment_ids))
        return self.final_norm(x), aux

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The first layer's input."""
        if tokens.ndim == 3:  # outside the layers, stages are one more data axis
            split = self.rules.spec("layers", "batch", "seq")
            tokens, positions = reshard(tokens, split), reshard(positions, split)
        x = self.embedding(tokens)
        return x if self.positions is None else x + self.positions(positions)

    def run_layers(self, x: jax.Array, where: Where) -> tuple[jax.Array, Aux]:
        """All layers, one after the other or in a pipeline."""
        if self.schedule is None:
            return self.stage(values(self.layers), x, where)
        return pipeline(
            self.stage,
            values(self.layers),
            x,
            where,
            micro_batches=x.shape[0],
            groups=self.layer_groups,
        )

    def stage(self, layers: Params, x: jax.Array, where: Where) -> tuple[jax.Array, Aux]:
        """Some layers.

        Args:
            layers: the parameters of ``self.layers``, or a part of them along the layer axis.
            x: [B, S, D].
            where: positions and segment ids [B, S].
        """

        def layer(block: Block, x: jax.Array, context: Any) -> tuple[jax.Array, Aux]:
            positions, segment_ids, turns = context
            x, _, aux = block(x, positions, segment_ids, turns, None)
            return x, aux

        context = (*where, self.rotary(where[0]))
        how: Any = {"dtype": self.dtype, "remat": self.config.remat}
        return scan_blocks(self.layers, layers, layer, x, context, **how)

    def rotary(self, positions: jax.Array) -> Rotary | None:
        """The angles of positions, where the model turns queries and keys."""
        if self.config.positions.kind != "rope":
            return None
        return rotary(positions, self.config.attention.head_dim, self.config.positions.theta)

    def cached(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """For inference: hidden states of tokens that come after those in the cache.

        Args:
            tokens, positions: int [B, S].
            cache: stacked by layer, [L, B, T, K, H]; see inference/cache.py.

        Returns:
            [B, S, D], and the cache with these tokens in it.
        """
        turns = self.rotary(positions)

        def layer(block: Block, x: jax.Array, cache: Any):
            x, cache, _ = block(x, positions, None, turns, cache)
            return x, cache

        x, cache = scan_cached(self.layers, layer, self.embed(tokens, positions), cache)
        return self.final_norm(x), cache

    def unembedding(self) -> Weight:
        """The output head [D, V] in the compute dtype."""
        if self.head is not None:
            return weight(self.head.kernel, self.rules, self.dtype)
        table = weight(self.embedding.table, self.rules, self.dtype)
        whole = None if table.whole is None else table.whole.T
        return Weight(table.value.T, table.used[::-1], whole)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] → fp32 logits [B, S, V] (inference; training fuses the loss)."""
        head, used, _ = self.unembedding()
        logits = jnp.einsum(
            "bsd,dv->bsv",
            hidden,
            reshard(head, spec_of(used)),
            preferred_element_type=jnp.float32,
            out_sharding=self.rules.spec("batch", "seq", "vocab"),
        )
        return reshard(logits, self.rules.spec("batch", "seq", None))
