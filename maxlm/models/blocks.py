"""Joins layers into blocks, and blocks into a scanned stack."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from maxlm.config import Config
from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.models.aux import Aux
from maxlm.models.caches import CacheLayout
from maxlm.models.caches.paged import CrossCache
from maxlm.models.costs import BranchCosts, get_costs
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import (
    Attention,
    AttentionConfig,
    AttentionInputs,
    EncoderOutput,
    LatentAttention,
)
from maxlm.models.layers.mlp import Mlp, MlpConfig
from maxlm.models.layers.moe import Moe, MoeConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import Params, ParamSpec, bind, is_leaf, param_specs
from maxlm.models.remat import RematPolicy, apply_remat
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.layers import scan_layers
from maxlm.parallel.local import LANES, axis_size, get_layout
from maxlm.sharding import AxisRules
from maxlm.sharding.supported import ReshapingAxis

Placement = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]


class Mixer(Protocol):
    """Mixes tokens along the sequence: attention, or a state that passes from one to
    the next.

    Like an FFN it may state its ``costs()`` for the plan; see
    :mod:`maxlm.models.costs`.
    """

    name: str
    """The first part of its parameters' names within a layer."""

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Maps [B, S, D] to the same; also gives the cache with these tokens (None if
        None was)."""
        ...

    def cache_spec(self, layout: CacheLayout, window: int | None) -> Any:
        """Returns a layer's cache: a pytree with a
        :class:`~maxlm.models.caches.CacheArraySpec` for each array; an empty one is
        zeros."""
        ...


class FeedForward(Protocol):
    """Maps each token by itself: an MLP, or a mixture of experts."""

    name: str

    def feed(
        self, x: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """Maps [B, S, D] to the same; returns also what the layer adds to the loss and
        the log. ``segment_ids`` are int [B, S], 0 for padding, None where there is
        none."""
        ...


def build_attention(
    config: AttentionConfig, *sizes: Any, **kwargs: Any
) -> Attention | LatentAttention:
    """Builds multi-head or latent attention, as the config says."""
    return (Attention if config.latent is None else LatentAttention)(
        config, *sizes, **kwargs
    )


@dataclass(frozen=True)
class RegisteredMixer:
    """A mixer by its kind.

    Args:
        config: a class with a ``kind`` of its own, for ``model.mixer``.
        build: called with (config, norm config, d_model, number of layers, standard
            deviation of initial weights) and the keywords rules, dtype and parallel.
        mesh_axes: the axes on which it may be trained, of those that reshape what it
            sees: with ``context`` x [B, S, D] is split along S, its tokens in another
            order; with ``stage`` it runs in a program on pipeline stages. Runs that
            need others are refused.
    """

    config: type[Config]
    build: Callable[..., Mixer]
    mesh_axes: Collection[ReshapingAxis] = ()


@dataclass(frozen=True)
class RegisteredFeedForward:
    """A feed-forward by its kind.

    Args:
        config: a class with a ``kind`` of its own, for ``model.ffn``.
        build: called with (config, d_model, number of layers, standard deviation of
            initial weights) and the keywords rules and dtype.
    """

    config: type[Config]
    build: Callable[..., FeedForward]


MIXERS = Registry[RegisteredMixer]("mixer")
MIXERS.register(
    "attention",
    RegisteredMixer(AttentionConfig, build_attention, ("context", "stage")),
)
FEED_FORWARDS = Registry[RegisteredFeedForward]("ffn")
FEED_FORWARDS.register("mlp", RegisteredFeedForward(MlpConfig, Mlp))
FEED_FORWARDS.register("moe", RegisteredFeedForward(MoeConfig, Moe))

# Attention, MLPs and experts have settings of their own, and so no ``kind`` among these.
MixerConfig = Annotated[
    Config, RegisteredConfig(MIXERS, get_config=attrgetter("config"))
]
FeedForwardConfig = Annotated[
    Config, RegisteredConfig(FEED_FORWARDS, get_config=attrgetter("config"))
]


class Block(nnx.Module):
    """Attention and an MLP (or a mixture of experts), each added to the residual
    stream.

    ==================  ====================================================
    placement           a branch f, with its own norms
    ==================  ====================================================
    pre                 x + f(norm(x))
    post                norm(x + f(x))
    sandwich            x + norm(f(norm(x)))
    parallel            x + attention(norm(x)) + mlp(norm(x))
    parallel_shared     the same, with one norm for both
    ==================  ====================================================

    Args:
        depth: layers of the whole model, for the initial size of what they add.
        cross_attention: whether the layer looks at an encoder's output as well.
    """

    def __init__(
        self,
        mixer_config: Any,
        ffn_config: Any,
        norm_config: NormConfig,
        placement: Placement,
        d_model: int,
        depth: int,
        init_std: float,
        *,
        cross_attention: bool,
        rules: AxisRules,
        dtype: Any,
        parallel: ParallelConfig,
    ):
        self.placement = placement
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        sizes = (d_model, depth, init_std)
        norm = partial(Norm, norm_config, d_model, **kw)
        sandwich = placement == "sandwich"
        outer = (norm_config, *sizes)
        self.attention_norm = norm()
        registered = MIXERS.get(mixer_config.kind)
        mixer = registered.build(mixer_config, *outer, parallel=parallel, **kw)
        self.mixer_name = mixer.name
        setattr(self, mixer.name, mixer)
        self.attention_post_norm = norm() if sandwich else None
        self.cross_norm = norm() if cross_attention else None
        cross = partial(Attention, mixer_config, *outer, parallel=parallel, **kw)
        self.cross = cross() if cross_attention else None
        self.mlp_norm = norm() if placement != "parallel_shared" else None
        registered_ffn = FEED_FORWARDS.get(ffn_config.kind)
        ffn = registered_ffn.build(ffn_config, *sizes, **kw)
        self.ffn_name = ffn.name
        setattr(self, ffn.name, ffn)
        self.mlp_post_norm = norm() if sandwich else None

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: Any = None,
        encoder_output: EncoderOutput | CrossCache | None = None,
    ) -> tuple[jax.Array, Any, Aux]:
        """x [B, S, D] → the same, the layer's cache with these tokens in it, and what
        the layer adds to the loss and the log."""
        if self.placement in ("parallel", "parallel_shared"):
            y = self.attention_norm(x)
            z = y if self.mlp_norm is None else self.mlp_norm(x)
            y, cache = self.mixer(y, inputs, cache)
            z, aux = self.ffn.feed(z, inputs.segment_ids)
            return x + y + z, cache, aux
        y, cache = self.mixer(self._before(self.attention_norm, x), inputs, cache)
        x = self._joined(x, y, self.attention_norm, self.attention_post_norm)
        if encoder_output is not None and self.cross is not None:
            y = self.cross.cross_attend(
                self._before(self.cross_norm, x), inputs, encoder_output
            )
            x = self._joined(x, y, self.cross_norm, None)
        y, aux = self.ffn.feed(self._before(self.mlp_norm, x), inputs.segment_ids)
        return self._joined(x, y, self.mlp_norm, self.mlp_post_norm), cache, aux

    def costs(self) -> tuple[BranchCosts, ...]:
        """Costs of one layer, by branch."""
        mixer: Any = self.mixer
        ffn: Any = self.ffn
        own = BranchCosts("mixer", mixer.name, get_costs(mixer))
        feed = BranchCosts("ffn", ffn.name, get_costs(ffn))
        if self.cross is None:
            return own, feed
        return (
            own,
            feed,
            BranchCosts("cross_attention", "cross", self.cross.costs("memory")),
        )

    @property
    def mixer(self) -> Mixer:
        return getattr(self, self.mixer_name)

    @property
    def ffn(self) -> FeedForward:
        return getattr(self, self.ffn_name)

    def _before(self, norm: Norm | None, x: jax.Array) -> jax.Array:
        return x if norm is None or self.placement == "post" else norm(x)

    def _joined(
        self, x: jax.Array, y: jax.Array, norm: Norm | None, after: Norm | None
    ) -> jax.Array:
        if self.placement == "post":
            assert norm is not None
            return norm(x + y)
        return x + (y if after is None else after(y))


Body = Callable[[Any, Any, Any, Any], tuple[Any, Aux]]
"""``(block, x, context, shared) -> (x, aux)`` for one layer."""


def scan_blocks(
    block: nnx.Module,
    params: Params,
    bodies: Sequence[Body],
    x: Any,
    context: Any,
    shared: Any = None,
    *,
    dtype: Any,
    remat: RematPolicy = "none",
) -> tuple[Any, Aux]:
    """Runs a stacked block layer after layer; returns x after all, and their ``Aux``
    added up. Compile time does not grow with depth.

    Args:
        params: of the block, whose structure alone is used (``params.stack_layers``).
        bodies: what layers do with it, by turns.
        context, shared: arrays that every layer reads, without and with a gradient.
        dtype: of matrices in use, and of their gradients until all layers are through.
    """

    def layer(body, own, carry, context, shared):
        x, total = carry
        x, aux = body(bind(block, own), x, context, shared)
        return x, jax.tree.map(jnp.add, total, aux)

    def cast(
        spec: ParamSpec, held: Any
    ) -> Any:  # an array, or what is held for its gradient
        castable = spec.role == "matrix" and jnp.issubdtype(spec.dtype, jnp.floating)
        return (
            jax.tree.map(partial(cast_without_hoisting, dtype=dtype), held)
            if castable
            else held
        )

    def cast_all(own: Params) -> Params:
        specs = jax.tree.map(
            _declare_step_values, param_specs(block), own, is_leaf=is_leaf
        )
        return jax.tree.map(cast, specs, own)

    first = jax.tree.map(lambda a: a[0], params)
    _, aux = jax.eval_shape(
        lambda own: bodies[0](bind(block, own), x, context, shared), first
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, accumulation_dtype(s.dtype)), aux)
    alone = len(bodies) == 1 and len(jax.tree.leaves(params)[0]) > 1
    layers = [
        apply_remat(partial(layer, body), remat, is_loop_body=alone) for body in bodies
    ]
    return scan_layers(
        layers, params, (x, zeros), context, shared=shared, cast=cast_all
    )


def _declare_step_values(spec: Any, held: Any) -> Any:
    """A parameter's declarations, with those of a vector for what a leaf holds for one
    training step alone (``Leaf.seed_dropout``): it stays as it is."""
    if not is_leaf(spec):
        return spec
    value = ParamSpec((), (), jax.nn.initializers.zeros, "vector")
    names = [part.name for part in fields(spec) if getattr(spec, part.name) is None]
    return replace(spec, **{n: value for n in names if getattr(held, n) is not None})


def cast_without_hoisting(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts one layer's x to ``dtype``, where it stands: XLA:TPU would cast all layers'
    parameters before the loop, with their dimensions turned around, and hold these
    copies throughout."""
    if x.dtype == dtype:
        return x
    to = jnp.finfo(dtype)
    x = lax.reduce_precision(x, to.nexp, to.nmant).astype(dtype)
    if x.shape[-1] // axis_size(get_layout(x)[-1]) < LANES:
        return x  # a TPU keeps so narrow a shard turned around to begin with
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
