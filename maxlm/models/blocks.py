"""Joins a mixer and a feed-forward into a layer.

Shapes: B batch, S sequence, D model, N residual streams, P width of a layer's input.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx
from pydantic import Field

from maxlm.config import Config
from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.models.aux import Aux
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, LayerCache
from maxlm.models.caches.paged import CrossCache
from maxlm.models.costs import BranchCosts, get_costs, list_branch_costs
from maxlm.models.layer_inputs import LayerInputBranch, LayerInputsConfig
from maxlm.models.layers.attention import (
    Attention,
    AttentionConfig,
    AttentionInputs,
    EncoderOutput,
    KeysValues,
)
from maxlm.models.layers.latent import LatentAttention
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.mlp import Mlp, MlpConfig
from maxlm.models.layers.moe import Moe, MoeConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import declare, materialize
from maxlm.models.remat import save_inputs_only
from maxlm.sharding.supported import ReshapingAxis

Placement = Literal[
    "pre", "post", "sandwich", "output", "normed", "parallel", "parallel_shared"
]


class Mixer(Protocol):
    """Mixes tokens along the sequence: attention, or a state that passes from one to
    the next.

    Like an FFN it may state its ``costs()`` for the plan; see
    :mod:`maxlm.models.costs`.
    """

    name: str
    """The first part of its parameters' names within a layer."""

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: LayerCache | None
    ) -> MixerOutput:
        """Maps x [B, S, D]."""
        ...

    def cache_spec(self, layout: CacheLayout, window: int | None) -> LayerCache:
        """Returns a layer's cache: a pytree with a
        :class:`~maxlm.models.caches.CacheArraySpec` for each array; an empty one is
        zeros."""
        ...


class FeedForward(Protocol):
    """Maps each token by itself: an MLP, or a mixture of experts.

    A :class:`Moe` is also told each token's experts, where these are given."""

    name: str

    def feed(
        self, x: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """Maps [B, S, D] to the same; returns also what the layer adds to the loss and
        the log. ``segment_ids`` are int [B, S], 0 for padding, None where there is
        none."""
        ...


def build_attention(
    config: AttentionConfig, norm: NormConfig, context: BuildContext
) -> Attention | LatentAttention:
    """Builds multi-head or latent attention, as the config says."""
    if config.latent is None:
        return Attention(config, norm, context)
    return LatentAttention(config, norm, context)


@dataclass(frozen=True)
class RegisteredMixer:
    """A mixer by its kind.

    Args:
        config: a class with a ``kind`` of its own, for ``model.mixer``.
        build: called with the config, the model's :class:`NormConfig` and a
            :class:`~maxlm.models.build_context.BuildContext`.
        mesh_axes: the axes on which it may be trained, of those that reshape what it
            sees: with ``context`` x [B, S, D] is split along S, its tokens in another
            order; with ``stage`` it runs in a program on pipeline stages. Runs that
            need others are refused.
        build_shared: called like ``build``, for a config that
            :class:`ReadsSharedBlock`; returns the module of the weights that layers
            share.
    """

    config: type[Config]
    build: Callable[..., Mixer]
    mesh_axes: Collection[ReshapingAxis] = ()
    build_shared: Callable[..., nnx.Module] | None = None


@dataclass(frozen=True)
class RegisteredFeedForward:
    """A feed-forward by its kind.

    Args:
        config: a class with a ``kind`` of its own, for ``model.ffn``.
        build: called with the config and a
            :class:`~maxlm.models.build_context.BuildContext`.
    """

    config: type[Config]
    build: Callable[..., FeedForward]


MIXERS = Registry[RegisteredMixer](
    "mixer",
    {
        "sparse_attention": "maxlm.models.mixers:SPARSE_ATTENTION",
        "mamba": "maxlm.models.mixers:MAMBA",
        "mamba_heads": "maxlm.models.mixers:MAMBA_HEADS",
        "mamba2": "maxlm.models.mixers:MAMBA2",
        "gated_delta_net": "maxlm.models.mixers:GATED_DELTA_NET",
        "kimi_delta_attention": "maxlm.models.mixers:KIMI_DELTA_ATTENTION",
        "lightning": "maxlm.models.mixers:LIGHTNING",
        "short_conv": "maxlm.models.mixers:SHORT_CONV",
        "parallel_heads": "maxlm.models.parallel_heads:PARALLEL_HEADS",
        "shared_block": "maxlm.models.shared_block:SHARED_BLOCK",
    },
)
MIXERS.register(
    "attention",
    RegisteredMixer(AttentionConfig, build_attention, ("context", "stage")),
)
FEED_FORWARDS = Registry[RegisteredFeedForward]("ffn")
FEED_FORWARDS.register("mlp", RegisteredFeedForward(MlpConfig, Mlp))
FEED_FORWARDS.register("moe", RegisteredFeedForward(MoeConfig, Moe))


class BlockKindConfig(Config):
    """Settings of a kind of block: how branches join the residual stream. Each has a
    ``kind`` of its own."""

    num_streams: int = 1
    """Residual streams [B, S, D] that layers hand on: with several, x is [B, S, N,
    D]."""


class Streams(Protocol):
    """What stands before the first layer and behind the last one where a model has
    several residual streams."""

    def expand(self, x: jax.Array) -> jax.Array:
        """Maps embeddings [B, S, D] → [B, S, N, D]."""
        ...

    def contract(self, x: jax.Array) -> jax.Array:
        """Maps the last layer's output [B, S, N, D] → [B, S, D]."""
        ...


@dataclass(frozen=True)
class RegisteredBlock:
    """A kind of block beside :class:`Block`.

    Args:
        config: a :class:`BlockKindConfig` with a ``kind`` of its own, for
            ``model.block``.
        build: called with the kind's config, a layer's :class:`BlockConfig` and a
            :class:`~maxlm.models.build_context.BuildContext`; returns a
            :class:`Block`.
        build_streams: called with the kind's config, the model's :class:`NormConfig`
            and a ``BuildContext``; returns a module that is :class:`Streams`.
        mesh_axes: as those of a :class:`RegisteredMixer`.
    """

    config: type[BlockKindConfig]
    build: Callable[..., "Block"]
    build_streams: Callable[..., Any]
    mesh_axes: Collection[ReshapingAxis] = ("context",)


BLOCKS = Registry[RegisteredBlock](
    "block",
    {
        "altup": "maxlm.models.altup:ALTUP",
        "hyper_connections": "maxlm.models.hyper_connections:HYPER_CONNECTIONS",
    },
)
BlockKindChoice = Annotated[
    BlockKindConfig, RegisteredConfig(BLOCKS, get_config=attrgetter("config"))
]

# Attention, MLPs and experts have settings of their own, and so no ``kind`` among these.
MixerConfig = Annotated[
    Config, RegisteredConfig(MIXERS, get_config=attrgetter("config"))
]
FeedForwardConfig = Annotated[
    Config, RegisteredConfig(FEED_FORWARDS, get_config=attrgetter("config"))
]


class BranchScales(Config):
    """Factors where a branch joins the residual stream."""

    stream: float = Field(default=1.0, gt=0)
    """Factor on what the branch is added to."""
    output: float = Field(default=1.0, gt=0)
    """Factor on what the branch adds."""


class BlockConfig(NamedTuple):
    """What a layer is built of. Hashable: layers of equal ones share a stack."""

    mixer: Config | None
    """An :class:`AttentionConfig`, or the config of another kind in ``MIXERS``."""
    ffn: Config | None
    """An :class:`MlpConfig`, a :class:`MoeConfig`, or the config of another kind in
    ``FEED_FORWARDS``."""
    norm: NormConfig
    placement: Placement
    residual_scale: float = 1.0
    mixer_scales: BranchScales = BranchScales()
    ffn_scales: BranchScales = BranchScales()
    layer_inputs: LayerInputsConfig | None = None
    """How it reads an input of its own; None: it has none."""
    scales_output: bool = False
    """Whether its output is multiplied by a learnt number."""
    kind: BlockKindConfig | None = None
    """Another kind of block than :class:`Block`."""


class BlockOutput(NamedTuple):
    """A layer's output, and what comes with it."""

    x: jax.Array
    """The residual stream [B, S, D], or several [B, S, N, D]."""
    cache: LayerCache = None
    """With a cache: the same with these tokens in it."""
    aux: Aux = Aux()
    """What the layer adds to the loss and the log."""
    keys_values: KeysValues | None = None
    """What later layers may read; see :class:`MixerOutput`."""


@runtime_checkable
class ContainsAttention(Protocol):
    """A mixer's config with attention as a part of it."""

    attention: AttentionConfig


def find_attention(mixer: Config | None) -> AttentionConfig | None:
    """Returns the attention of a mixer, or within it; None: it has none."""
    if isinstance(mixer, AttentionConfig):
        return mixer
    if isinstance(mixer, ContainsAttention):
        return mixer.attention
    return None


@runtime_checkable
class ContainsMixer(Protocol):
    """A mixer's config with another mixer as a part of it."""

    mixer: Config


@runtime_checkable
class ReadsSharedBlock(Protocol):
    """A mixer's config whose layers read weights that other layers read too: those of a
    module outside of their stacks (``RegisteredMixer.build_shared``), which they find
    in :class:`AttentionInputs`."""

    block: str
    """Name of the module among those of the model, ``shared_blocks.*``."""

    @property
    def shared_settings(self) -> Config:
        """Settings of the module: equal in all layers that name it."""
        ...


def list_mixer_parts(mixer: Config) -> list[Config]:
    """Lists a mixer and those within it."""
    if isinstance(mixer, ContainsMixer):
        return [mixer, *list_mixer_parts(mixer.mixer)]
    return [mixer]


def get_kind(config: Config) -> str:
    """Returns the kind by which a mixer or feed-forward is registered. Each kind's
    config has it, and ``Config`` does not declare it."""
    kind = getattr(config, "kind")  # noqa: B009
    assert isinstance(kind, str)
    return kind


def normalizes_itself(config: Config) -> bool:
    """Returns whether a mixer or feed-forward has the norm of its input itself."""
    return getattr(config, "normalizes_itself", False)


class Block(nnx.Module):
    """A mixer and a feed-forward, each added to the residual stream; or one of them.

    ==================  ====================================================
    placement           a branch f, with its own norms
    ==================  ====================================================
    pre                 x + f(norm(x))
    post                norm(x + f(x))
    sandwich            x + norm(f(norm(x)))
    output              x + norm(f(x))
    normed              norm(x) + f(norm(x))
    parallel            x + attention(norm(x)) + mlp(norm(x))
    parallel_shared     the same, with one norm for both
    ==================  ====================================================

    What a branch adds is multiplied by ``residual_scale`` first. A mixer or feed-forward
    whose config says ``normalizes_itself`` has no norm before it.

    Args:
        cross_attention: whether the layer looks at an encoder's output as well.
    """

    def __init__(
        self, config: BlockConfig, context: BuildContext, *, cross_attention: bool
    ):
        placement = config.placement
        has_pre_norms = placement != "output"
        has_post_norms = placement in ("sandwich", "output")

        def build_norm(is_there: bool) -> Norm | None:
            if not is_there:
                return None
            return Norm(config.norm, context.d_model, context)

        self.rules = context.rules
        self.placement = placement
        self.residual_scale = config.residual_scale
        self.mixer_scales = config.mixer_scales
        self.ffn_scales = config.ffn_scales
        self.mixer_name = ""
        self.ffn_name = ""
        mixer_config: Any = config.mixer
        has_mixer = mixer_config is not None
        needs_mixer_norm = has_mixer and not normalizes_itself(mixer_config)
        self.attention_norm = build_norm(needs_mixer_norm and has_pre_norms)
        if has_mixer:
            registered = MIXERS.get(get_kind(mixer_config))
            mixer = registered.build(mixer_config, config.norm, context)
            self.mixer_name = mixer.name
            setattr(self, mixer.name, mixer)
        self.attention_post_norm = build_norm(has_mixer and has_post_norms)

        self.cross_norm = build_norm(cross_attention)
        cross = None
        if cross_attention:
            assert isinstance(mixer_config, AttentionConfig)
            cross = Attention(mixer_config, config.norm, context)
        self.cross = cross

        ffn_config: Any = config.ffn
        has_ffn = ffn_config is not None
        # With one norm for both, it stands before the mixer, if there is one.
        shares_norm = placement == "parallel_shared" and has_mixer
        needs_norm = has_ffn and not normalizes_itself(ffn_config)
        self.mlp_norm = build_norm(needs_norm and has_pre_norms and not shares_norm)
        if has_ffn:
            ffn = FEED_FORWARDS.get(get_kind(ffn_config)).build(ffn_config, context)
            self.ffn_name = ffn.name
            setattr(self, ffn.name, ffn)
        self.mlp_post_norm = build_norm(has_ffn and has_post_norms)
        self.layer_input = (
            LayerInputBranch(config.layer_inputs, config.norm, context)
            if config.layer_inputs is not None
            else None
        )
        self.output_scale = (
            declare((1,), (None,), jax.nn.initializers.ones, "vector")
            if config.scales_output
            else None
        )

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: LayerCache | None = None,
        encoder_output: EncoderOutput | CrossCache | None = None,
        layer_input: jax.Array | None = None,
    ) -> BlockOutput:
        """Runs the layer on x [B, S, D].

        Args:
            cache: of the sequences that the tokens continue; None: there are none.
            encoder_output: for the layer's cross-attention.
            layer_input: [B, S, P], of this layer alone; see
                :class:`~maxlm.models.layer_inputs.LayerInputs`.
        """
        is_parallel = self.placement in ("parallel", "parallel_shared")
        if is_parallel and self.mixer is not None and self.ffn is not None:
            output = self._run_parallel(x, inputs, cache)
        else:
            output = self._run_branches(x, inputs, cache, encoder_output)
        x = output.x
        input_branch = self.layer_input
        if input_branch is not None:
            assert layer_input is not None
            x = x + input_branch(x, layer_input)
        return output._replace(x=self._scale_output(x))

    def run_mixer(
        self, x: jax.Array, inputs: AttentionInputs, cache: LayerCache | None
    ) -> MixerOutput:
        """Runs the mixer between its norms; y is what it adds to the stream x."""
        assert self.mixer is not None
        output = self.mixer(self._norm_before(self.attention_norm, x), inputs, cache)
        y = self._finish_branch(output.y, self.attention_post_norm, self.mixer_scales)
        return output._replace(y=y)

    def run_ffn(self, x: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, Aux]:
        """Runs the feed-forward between its norms; returns what it adds to the stream
        x, and to the loss and the log."""
        y, aux = self._feed(self._norm_before(self.mlp_norm, x), inputs)
        return self._finish_branch(y, self.mlp_post_norm, self.ffn_scales), aux

    def _feed(self, x: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, Aux]:
        """Runs the feed-forward without its norms."""
        ffn = self.ffn
        assert ffn is not None
        if isinstance(ffn, Moe):
            return ffn.feed(
                x,
                inputs.segment_ids,
                inputs.routes,
                record_routes=inputs.record_routes,
            )
        return ffn.feed(x, inputs.segment_ids)

    def _run_parallel(
        self, x: jax.Array, inputs: AttentionInputs, cache: LayerCache | None
    ) -> BlockOutput:
        """Adds both branches of x."""
        assert self.mixer is not None
        assert self.ffn is not None
        assert self.attention_norm is not None
        mixer_input = self.attention_norm(x)
        ffn_input = mixer_input if self.mlp_norm is None else self.mlp_norm(x)
        mixed = self.mixer(mixer_input, inputs, cache)
        z, aux = self._feed(ffn_input, inputs)
        x = x + self._scale(mixed.y, self.mixer_scales)
        x = x + self._scale(z, self.ffn_scales)
        return BlockOutput(x, mixed.cache, aux.plus(mixed.aux), mixed.keys_values)

    def _run_branches(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: LayerCache | None,
        encoder_output: EncoderOutput | CrossCache | None,
    ) -> BlockOutput:
        """Adds one branch after the other to x."""
        mixed = MixerOutput(x)
        if self.mixer is not None:
            x = self._enter_branch(self.attention_norm, x)
            mixed = self.run_mixer(x, inputs, cache)
            x = self._join(x, mixed.y, self.attention_norm, self.mixer_scales)
        if encoder_output is not None and self.cross is not None:
            y = self.cross.cross_attend(
                self._norm_before(self.cross_norm, x), inputs, encoder_output
            )
            no_scales = BranchScales()
            y = self._scale(y, no_scales)
            x = self._join(x, y, self.cross_norm, no_scales)
        aux = Aux()
        if self.ffn is not None:
            x = self._enter_branch(self.mlp_norm, x)
            y, aux = self.run_ffn(x, inputs)
            x = self._join(x, y, self.mlp_norm, self.ffn_scales)
        return BlockOutput(x, mixed.cache, aux.plus(mixed.aux), mixed.keys_values)

    def costs(self) -> tuple[BranchCosts, ...]:
        """Costs of one layer, by branch."""
        branches = []
        if self.mixer is not None:
            branches.extend(list_branch_costs("mixer", self.mixer_name, self.mixer))
        if self.ffn is not None:
            branches.append(BranchCosts("ffn", self.ffn_name, get_costs(self.ffn)))
        if self.layer_input is not None:
            input_costs = get_costs(self.layer_input)
            branches.append(BranchCosts("ffn", "layer_input", input_costs))
        if self.cross is not None:
            # Its keys and values are made of the encoder's output.
            cross_costs = self.cross.costs(kv_input="memory")
            branches.append(BranchCosts("cross_attention", "cross", cross_costs))
        return tuple(branches)

    @property
    def mixer(self) -> Mixer | None:
        return getattr(self, self.mixer_name) if self.mixer_name else None

    @property
    def ffn(self) -> FeedForward | None:
        return getattr(self, self.ffn_name) if self.ffn_name else None

    def _enter_branch(self, norm: Norm | None, x: jax.Array) -> jax.Array:
        """Returns what a branch's output is added to: x, or with placement normed the
        branch's input."""
        return x if norm is None or self.placement != "normed" else norm(x)

    def _norm_before(self, norm: Norm | None, x: jax.Array) -> jax.Array:
        """Returns a branch's input."""
        if norm is None or self.placement in ("post", "normed"):
            return x
        return norm(x)

    def _finish_branch(
        self, y: jax.Array, post_norm: Norm | None, scales: BranchScales
    ) -> jax.Array:
        """Returns what a branch of output y adds."""
        return self._scale(y if post_norm is None else post_norm(y), scales)

    def _join(
        self, x: jax.Array, y: jax.Array, norm: Norm | None, scales: BranchScales
    ) -> jax.Array:
        """Adds y to the residual stream x."""
        if scales.stream != 1:
            x = x * scales.stream
        if self.placement != "post":
            return x + y
        assert norm is not None
        return norm(x + y)

    def _scale_output(self, x: jax.Array) -> jax.Array:
        """Multiplies x by the layer's learnt number, if it has one."""
        if self.output_scale is None:
            return x
        scale = materialize(self.output_scale, self.rules, x.dtype)
        return save_inputs_only(lambda x, scale: x * scale)(x, scale)

    def _scale(self, y: jax.Array, scales: BranchScales) -> jax.Array:
        """Scales what a branch adds."""
        factor = self.residual_scale * scales.output
        return y if factor == 1 else y * factor


def build_block(
    config: BlockConfig, context: BuildContext, *, cross_attention: bool
) -> Block:
    """Builds a layer of its kind."""
    if config.kind is None:
        return Block(config, context, cross_attention=cross_attention)
    return BLOCKS.get(get_kind(config.kind)).build(config.kind, config, context)
