"""A block of attention and an MLP whose weights several layers read, before another
mixer in each of them (Zamba: Glorioso et al. 2024, arXiv 2405.16712, §2; Zamba2: arXiv
2411.15242, §2).

Shapes: B batch, S sequence, D model, N query heads, K kv heads, H head dim, F hidden
layer of the MLP, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.blocks import (
    MIXERS,
    MixerConfig,
    RegisteredMixer,
    find_attention,
    get_kind,
    normalizes_itself,
)
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, LayerCache
from maxlm.models.costs import (
    BranchCosts,
    LayerCosts,
    MatrixGroup,
    get_costs,
    prefix_names,
)
from maxlm.models.layers.attend import AttentionInputs, ProjectionTerms
from maxlm.models.layers.attention import Attention
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.mlp import HiddenTerms, Mlp, MlpConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import SHARED_BLOCKS


class SharedSettings(Config):
    """Settings of the weights that layers share."""

    attention: AttentionConfig
    mlp: MlpConfig


class SharedBlockConfig(Config):
    """A mixer that reads, beside the stream, what a block of attention and an MLP makes
    of it; layers that name the same block share its weights."""

    kind: Literal["shared_block"] = "shared_block"
    normalizes_itself: ClassVar[bool] = True

    block: str = Field(default="block0", pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the block: layers of this name read the same weights,
    ``shared_blocks.<name>``, and have the same attention, mlp and norm."""
    attention: AttentionConfig
    """Of the block. It reads the stream and the embeddings side by side, 2·d_model
    wide."""
    mlp: MlpConfig
    """Of the block, behind attention."""
    mixer: MixerConfig
    """What the layer adds to the stream, by the kind it is registered with: it reads
    the stream plus a map of the block's output."""
    attention_rank: int | None = Field(default=None, gt=0)
    """Rank of maps of the layer's own beside the block's to queries, keys and values
    (LoRA); null: it has none."""
    mlp_rank: int | None = Field(default=None, gt=0)
    """The same beside those to the MLP's hidden layer."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if find_attention(self.mixer) is not None or normalizes_itself(self.mixer):
            message = f"mixer.kind={get_kind(self.mixer)} within a shared_block"
            fix = "name a recurrence or a convolution, such as mamba2"
            raise MaxlmError(message, where="mixer", fix=fix)
        if self.attention.latent is not None:
            message = "latent attention in a shared_block"
            raise MaxlmError(message, where="attention.latent", fix="set it to null")
        if self.attention.shares_keys or self.attention.keys_as_values:
            message = "a shared_block without maps to its own keys and values"
            fix = "leave shares_keys and keys_as_values out"
            raise MaxlmError(message, where="attention", fix=fix)
        return self

    @property
    def shared_settings(self) -> SharedSettings:
        """See :class:`~maxlm.models.blocks.ReadsSharedBlock`."""
        return SharedSettings(attention=self.attention, mlp=self.mlp)

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns the same kind with small heads, an MLP four heads wide and ranks of
        at most half a head."""

        def shrink_rank(rank: int | None) -> int | None:
            return None if rank is None else min(rank, max(1, head_dim // 2))

        shrink = getattr(self.mixer, "shrunk", None)
        mixer = self.mixer if shrink is None else shrink(head_dim, seq_len)
        return self.model_copy(
            update={
                "attention": self.attention.shrunk(head_dim, seq_len),
                "mlp": self.mlp.model_copy(update={"d_ff": 4 * head_dim}),
                "mixer": mixer,
                "attention_rank": shrink_rank(self.attention_rank),
                "mlp_rank": shrink_rank(self.mlp_rank),
            }
        )


class SharedBlock(nnx.Module):
    """The weights that layers share: ``mlp(norm(attention(norm(input))))``, without a
    residual stream of its own. Its input is [B, S, 2·D], its output [B, S, D]."""

    def __init__(
        self, config: SharedBlockConfig, norm: NormConfig, context: BuildContext
    ):
        input_dim = 2 * context.d_model
        self.attention_norm = Norm(norm, input_dim, context)
        self.attention = Attention(config.attention, norm, context, input_dim=input_dim)
        self.mlp_norm = Norm(norm, context.d_model, context)
        self.mlp = Mlp(config.mlp, context)

    @property
    def joint_projections(self) -> tuple[tuple[str, ...], ...]:
        """See :class:`~maxlm.models.layers.attention.Attention`."""
        return tuple(
            tuple(f"{name}.{part}" for part in group)
            for name, module in (("attention", self.attention), ("mlp", self.mlp))
            for group in module.joint_projections
        )


class LowRankMaps(nnx.Module):
    """Maps of one input through a vector of rank R each, or all through one: ``(x · A)
    · B``, with B at 0 before training (LoRA, Hu et al. 2021, arXiv 2106.09685, §4.1).

    Args:
        a_names: names of the maps A.
        b_outputs: names of the maps B, which read the vectors of these by turns, and
            their output axes.
    """

    def __init__(
        self,
        input_dim: int,
        rank: int,
        a_names: Sequence[str],
        b_outputs: Mapping[str, Mapping[str, int]],
        context: BuildContext,
    ):
        self.a_names = tuple(a_names)
        self.b_names = tuple(b_outputs)
        for name in self.a_names:
            inner = Linear({"embed": input_dim}, {"latent": rank}, context, bias=False)
            setattr(self, name, inner)
        zeros = jax.nn.initializers.zeros
        for name, outputs in b_outputs.items():
            # The input axis has the name of the residual stream's, as where latent
            # attention reads a vector: kernels are stored split over its mesh axes.
            outer = Linear(
                {"embed": rank}, outputs, context, bias=False, initializer=zeros
            )
            setattr(self, name, outer)

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Maps x [B, S, inputs] to what each map B gives, [B, S, *outputs]."""
        inner: list[Linear] = [getattr(self, name) for name in self.a_names]
        outer: list[Linear] = [getattr(self, name) for name in self.b_names]
        vectors = project(x, *inner)
        if len(vectors) == 1:
            return list(project(vectors[0], *outer))
        return [b(vector) for b, vector in zip(outer, vectors, strict=True)]

    def costs(self) -> LayerCosts:
        """See :mod:`maxlm.models.costs`."""
        a_kernels = tuple(f"{name}.kernel" for name in self.a_names)
        b_kernels = tuple(f"{name}.kernel" for name in self.b_names)
        # The maps beside which these stand read the same.
        groups = [MatrixGroup(a_kernels, kept_products=(), shares_input=True)]
        b_groups = [b_kernels]
        sum_kept_as = "mlp_up"
        if len(a_kernels) > 1:
            b_groups = [(kernel,) for kernel in b_kernels]
            sum_kept_as = "qkv"
        for names in b_groups:
            group = MatrixGroup(
                names, "latent", kept_products=(), sum_kept_as=sum_kept_as
            )
            groups.append(group)
        return LayerCosts(tuple(groups))


class SharedBlockMixer(nnx.Module):
    """``mixer(norm(x + linear(block([x, embeddings]))))``, with a block whose weights
    are not the layer's own; the cache is the pair of attention's and the mixer's.

    Parameters of the layer: ``attention_lora`` with ``query_a`` [2·D, R], ``query_b``
    [R, N, H] and those of key and value; ``mlp_lora`` with ``a`` [D, R], ``gate_b`` and
    ``up_b`` [R, F]; ``linear`` [D, D]; ``norm``; and the mixer's.
    """

    name = "shared"

    def __init__(
        self, config: SharedBlockConfig, norm: NormConfig, context: BuildContext
    ):
        self.config = config
        self.attention_lora = _build_attention_lora(config, context)
        self.mlp_lora = _build_mlp_lora(config, context)
        # Its outputs have another axis than its inputs, which FSDP splits.
        self.linear = Linear(
            {"embed": context.d_model},
            {"latent": context.d_model},
            context,
            bias=False,
        )
        self.norm = Norm(norm, context.d_model, context)
        registered = MIXERS.get(get_kind(config.mixer))
        mixer = registered.build(config.mixer, norm, context)
        self.mixer_name = mixer.name
        setattr(self, mixer.name, mixer)
        # Of the block's parts, for their costs and caches; the trunk has their weights.
        self._context = context
        self._norm_config = norm

    @property
    def joint_projections(self) -> tuple[tuple[str, ...], ...]:
        """See :class:`~maxlm.models.layers.attention.Attention`."""
        mixer = getattr(self, self.mixer_name)
        return tuple(
            tuple(f"{self.mixer_name}.{part}" for part in group)
            for group in getattr(mixer, "joint_projections", ())
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`; x is the stream, not normalised."""
        block = inputs.shared_block
        assert isinstance(block, SharedBlock)
        assert inputs.embeddings is not None
        attention_cache, mixer_cache = (None, None) if cache is None else cache
        both = jnp.concatenate([x, inputs.embeddings], axis=-1)
        attended = self._attend(
            block, block.attention_norm(both), inputs, attention_cache
        )
        y = self._feed(block, block.mlp_norm(attended.y))
        mixer_input = self.norm(x + self.linear(y, seq_axis="residual"))
        mixed = getattr(self, self.mixer_name)(mixer_input, inputs, mixer_cache)
        caches = None if cache is None else (attended.cache, mixed.cache)
        return MixerOutput(mixed.y, caches, attended.aux.plus(mixed.aux))

    def _attend(
        self,
        block: SharedBlock,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: LayerCache | None,
    ) -> MixerOutput:
        terms = ProjectionTerms()
        if self.attention_lora is not None:
            terms = ProjectionTerms(*self.attention_lora(x))
        return block.attention(x, inputs, cache, terms)

    def _feed(self, block: SharedBlock, x: jax.Array) -> jax.Array:
        if self.mlp_lora is None:
            return block.mlp(x)
        up, *gates = self.mlp_lora(x)
        return block.mlp(x, HiddenTerms(up, gates[0] if gates else None))

    def cache_spec(self, layout: CacheLayout, window: int | None) -> LayerCache:
        """A layer's caches; see :mod:`maxlm.models.caches`."""
        mixer = getattr(self, self.mixer_name)
        return (
            self._build_block().attention.cache_spec(layout, window),
            mixer.cache_spec(layout, window),
        )

    def branch_costs(self, name: str) -> tuple[BranchCosts, ...]:
        """Counts costs of one layer, those of the block's weights by their places in
        the trunk; see :func:`~maxlm.models.costs.list_branch_costs`."""
        block = self._build_block()
        path = f"{SHARED_BLOCKS}.{self.config.block}"
        return (
            BranchCosts(
                "mixer", f"{path}.attention", get_costs(block.attention), is_shared=True
            ),
            BranchCosts("ffn", f"{path}.mlp", get_costs(block.mlp), is_shared=True),
            BranchCosts("mixer", name, self._count_layer_costs()),
        )

    def _count_layer_costs(self) -> LayerCosts:
        """Counts costs of the layer's own weights."""
        mixer = get_costs(getattr(self, self.mixer_name))
        groups = list(prefix_names(self.mixer_name, mixer.matrices))
        linear = MatrixGroup(
            ("linear.kernel",), kept_products=(), is_in_stream_layout=True
        )
        groups.append(linear)
        for name in ("attention_lora", "mlp_lora"):
            lora: LowRankMaps | None = getattr(self, name)
            if lora is not None:
                groups += prefix_names(name, lora.costs().matrices)
        matrices = tuple(
            replace(group, is_beside_attention=True, reads_attention_input=False)
            for group in groups
        )
        return replace(mixer, matrices=matrices)

    def _build_block(self) -> SharedBlock:
        """Builds the block's declarations."""
        return SharedBlock(self.config, self._norm_config, self._context)


def _build_attention_lora(
    config: SharedBlockConfig, context: BuildContext
) -> LowRankMaps | None:
    if config.attention_rank is None:
        return None
    attention = config.attention
    num_kv_heads = attention.num_kv_heads
    outputs = {
        "query_b": {"heads": attention.num_heads, "head_dim": attention.head_dim},
        "key_b": {"kv_heads": num_kv_heads, "head_dim": attention.head_dim},
        "value_b": {"kv_heads": num_kv_heads, "head_dim": attention.value_dim},
    }
    input_dim = 2 * context.d_model
    names = ("query_a", "key_a", "value_a")
    return LowRankMaps(input_dim, config.attention_rank, names, outputs, context)


def _build_mlp_lora(
    config: SharedBlockConfig, context: BuildContext
) -> LowRankMaps | None:
    if config.mlp_rank is None:
        return None
    hidden = {"mlp": config.mlp.d_ff}
    outputs = {"up_b": hidden}
    if config.mlp.gated:
        outputs["gate_b"] = hidden
    return LowRankMaps(context.d_model, config.mlp_rank, ("a",), outputs, context)


SHARED_BLOCK = RegisteredMixer(
    SharedBlockConfig, SharedBlockMixer, ("context",), build_shared=SharedBlock
)
"""The mesh axes are attention's; those of the other mixer are asked of its own kind."""
