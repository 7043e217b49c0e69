"""A trunk with a table of tokens and an output head: what maxlm calls a model."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.trunk import LayersFunction, Trunk
from maxlm.models.aux import Aux
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.models.caches.paged import CrossCache
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import AttentionInputs, KeysValues
from maxlm.models.layers.linear import Embedding, Linear
from maxlm.models.params import (
    Params,
    ShardedWeight,
    bind,
    declare,
    get_values,
    materialize,
    read_weight,
    replace_virtual,
    take_stacked_layer,
)
from maxlm.parallel.cross_entropy import LogitsInputs
from maxlm.parallel.linear import multiply_head
from maxlm.parallel.local import make_spec
from maxlm.sharding import AxisRules

Caches = dict[str, tuple[Any, ...]]
"""Each layer's cache, by stack."""


class CrossAttentionCache(NamedTuple):
    """Keys and values of encoders' outputs that a decoder's layers look up (inference);
    D and R as in :class:`~maxlm.models.caches.CacheLayout`."""

    keys_values: dict[str, tuple[KeysValues, ...]]
    """Each layer's keys and values, [D, R, T, K, H], by stack."""
    segment_ids: Any
    """int32 [D, R, T]: 1 for an input's tokens, 0 behind them."""


class Transformer(Trunk):
    """Maps tokens to hidden states to logits; ``kwargs``: arguments of
    :class:`Trunk`."""

    def __init__(
        self, config: TransformerConfig, *, rules: AxisRules, dtype: Any, **kwargs: Any
    ):
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        super().__init__(config, **kwargs, **kw)
        D, std, vocab = config.d_model, config.init_std, config.vocab_size
        self.embedding = Embedding("vocab", vocab, D, std, **kw)
        own = {"bias": False, "std": std, "role": "table", **kw}
        self.head = (
            None
            if config.tie_embeddings
            else Linear({"embed": D}, {"vocab": vocab}, **own)
        )
        zeros = jax.nn.initializers.zeros
        offsets = config.head_bias
        self.head_bias = (
            declare((vocab,), ("vocab",), zeros, "vector") if offsets else None
        )
        maps = {
            n: Linear({"embed": D}, {None: width}, **own)
            for n, width in config.heads.items()
        }
        self.heads = nnx.Dict(maps)
        self.layers_fn: LayersFunction | None = None
        self.num_virtual_tokens = 0

    @property
    def trunks(self) -> dict[str, Trunk]:
        """All trunks, in the order in which they are run, by the prefix of their
        parameters."""
        return {"": self}

    def list_embedding_tables(self) -> dict[str, tuple[str, ...]]:
        """Lists the parameters in which rows are looked up, that of tokens first; each
        with the trunks whose tokens these are, by their prefixes."""
        tables: dict[str, tuple[str, ...]] = {"embedding.table": ("",)}
        for prefix, trunk in self.trunks.items():
            if trunk.positions is not None:
                tables[f"{prefix}positions.table"] = (prefix,)
        return tables

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Hidden states after the final norm; for training, differentiable in reverse
        mode.

        Args:
            tokens: int [B, S]; on pipeline stages [M, B, S], M micro-batches.
            positions: likewise, restarting at 0 with each segment.
            segment_ids: likewise, 0 for padding; None: each row is one segment.

        Returns:
            [..., S, D] in the compute dtype, micro-batches split over stages; and what
            layers add.
        """
        return self.forward_embedded(
            self.embed(tokens, positions), positions, segment_ids
        )

    def forward_embedded(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        """Computes hidden states of inputs [..., S, D] that a frontend has embedded."""
        x, aux = (self.layers_fn or self.run_layers)(x, (positions, segment_ids))
        return self.apply_final_norm(x), aux

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeds tokens as the first layer's input."""
        if tokens.ndim == 3:  # outside the layers, stages are one more data axis
            split = self.rules.spec("layers", "batch", "seq")
            tokens, positions = reshard(tokens, split), reshard(positions, split)
        x = self.embedding(tokens)
        x = replace_virtual(self.embedding.table, x, positions, self.rules)
        return self.embed_inputs(x, positions)

    def cache_specs(self, layout: CacheLayout) -> Caches:
        """Returns each layer's ``Mixer.cache_spec``."""
        return {
            part.name: tuple(
                self.stacks[part.name].mixer.cache_spec(layout, kind.window)
                for kind in part.kinds * (part.num_layers // len(part.kinds))
            )
            for part in self.config.layer_stacks
        }

    def forward_with_cache(
        self,
        tokens: jax.Array,
        batch: RaggedBatch,
        caches: Caches,
        cross_cache: CrossAttentionCache | None = None,
    ) -> tuple[jax.Array, Caches]:
        """Computes, for inference, hidden states [D, S, D] of tokens int [D, S] that
        follow the caches', and the caches with them in it. Layers are not scanned: a
        loop over them would copy each one's weights and cache out of their stacks, at
        every token."""
        x = self.embed(tokens, batch.positions)
        written = {}
        for part in self.config.layer_stacks:
            stack = self.stacks[part.name]
            kinds = self.attention_inputs_by_kind(part, batch)
            own, written[part.name] = get_values(stack), []
            for layer, cache in enumerate(caches[part.name]):
                inputs = kinds[layer % len(kinds)]
                encoded = None
                if cross_cache is not None:
                    keys = cross_cache.keys_values[part.name][layer]
                    encoded = CrossCache(*keys, cross_cache.segment_ids)
                settings = BlockSettings(inputs.scale, inputs.window, inputs.causal)
                arrays = inputs._replace(scale=None, window=None, causal=None)
                params = take_stacked_layer(own, layer)
                x, cache = run_cached_block(
                    stack, settings, params, x, arrays, cache, encoded
                )
                written[part.name].append(cache)
        return self.apply_final_norm(x), {
            name: tuple(own) for name, own in written.items()
        }

    def prepare_logits(self, hidden: jax.Array) -> LogitsInputs:
        """Returns the maps from hidden states to logits; training fuses them with the
        loss."""
        scale = self.config.logit_scale
        bias = None
        if scale != 1:
            hidden = (hidden.astype(accumulation_dtype(self.dtype)) * scale).astype(
                hidden.dtype
            )
        if self.head_bias is not None:
            bias = read_weight(
                self.head_bias, self.rules, accumulation_dtype(self.dtype)
            ).value
        table = self.embedding.table if self.head is None else self.head.kernel
        kernel = read_weight(table, self.rules, self.dtype)
        if self.head is None:
            whole = None if kernel.gathered is None else kernel.gathered.T
            kernel = ShardedWeight(kernel.value.T, kernel.compute_layout[::-1], whole)
        return LogitsInputs(hidden, *kernel, bias, self.config.logit_cap)

    def apply_head(self, name: str, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., S, D] by one of ``config.heads`` → fp32 [..., S,
        width]."""
        dtype = accumulation_dtype(self.dtype)
        kernel = materialize(self.heads[name].kernel, self.rules, dtype)
        return jnp.matmul(hidden.astype(dtype), kernel, precision="highest")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [B, S, D] → fp32 logits [B, S, V] (inference)."""
        head = self.prepare_logits(hidden)
        dtype = accumulation_dtype(self.dtype)
        kernel = reshard(head.head, make_spec(head.head_layout))
        spec = self.rules.spec("batch", "seq", "vocab")
        logits = multiply_head(
            head.hidden,
            kernel,
            spec,
            dtype,
            product=(self.head or self.embedding).product,
            column_major=self.head is None,
        )
        if head.bias is not None:
            logits += reshard(head.bias, self.rules.spec("vocab"))
        cap = head.soft_cap
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return reshard(logits, self.rules.spec("batch", "seq", None))


class BlockSettings(NamedTuple):
    """The fields of :class:`AttentionInputs` that are no arrays."""

    scale: float
    window: int | None
    causal: bool


# Layers alike are traced once, which is half of the time that a program of many layers
# takes to build; inlined, so that the compiler sees the same program as without.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def run_cached_block(
    block: Any,
    settings: BlockSettings,
    params: Params,
    x: jax.Array,
    arrays: AttentionInputs,
    cache: Any,
    encoder_output: CrossCache | None,
) -> tuple[jax.Array, Any]:
    """Runs one layer with its cache, for inference.

    Args:
        block: the stack that the layer is of.
        settings: stand in for those fields of ``arrays``, which are None there.
        params: the layer's own.
        x: [D, S, model dimension].

    Returns:
        x behind the layer, and the cache with the tokens in it.
    """
    inputs = arrays._replace(**settings._asdict())
    x, cache, _ = bind(block, params)(x, inputs, cache, encoder_output)
    return x, cache


class DecoderConfig(TransformerConfig):
    """A causal decoder; see configs/models for published sizes."""

    architecture: Literal["decoder"] = "decoder"

    def build(self, **kwargs: Any) -> "Decoder":
        """Builds the model; ``kwargs``: arguments of :class:`Transformer`."""
        return Decoder(self, **kwargs)


class Decoder(Transformer):
    """A transformer that continues its input."""

    config: DecoderConfig
