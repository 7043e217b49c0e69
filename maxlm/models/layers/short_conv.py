"""Gated short convolutions (LFM2; Liquid AI 2025, arXiv 2511.23404, §2): what a token
sees of those before it is a window of a few.

Shapes: B batch, S sequence, D model and channels, W width of the window.
"""

from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from maxlm.config import Config
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import (
    CacheArraySpec,
    CacheLayout,
    RecurrentCache,
)
from maxlm.models.costs import LayerCosts, MatrixGroup
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.channel_conv import (
    convolve_channels,
    convolve_channels_cached,
)
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mamba import uniform
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import NormConfig
from maxlm.models.params import declare, materialize
from maxlm.models.remat import save_inputs_only


class ShortConvConfig(Config):
    """A convolution of each channel between two gates."""

    kind: Literal["short_conv"] = "short_conv"

    conv_width: int = Field(default=3, gt=1)
    """Tokens that a token sees: itself and those before it."""
    bias: bool = False
    """Offsets on the projections and the convolution."""


class ShortConv(nnx.Module):
    """``out(out_gate(x) · conv(in_gate(x) · value(x)))``; the convolution begins anew
    with each document.

    Parameters: ``in_gate``, ``out_gate``, ``value`` and ``out`` [D, D]; ``conv_weight``
    [D, W] and ``conv_bias`` [D].
    """

    name = "short_conv"
    joint_projections = (("in_gate", "out_gate", "value"),)

    def __init__(
        self, config: ShortConvConfig, norm: NormConfig, context: BuildContext
    ):
        del norm
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        self.balance_sequence = context.parallel.balance_sequence
        self.num_channels = context.d_model
        residual = {"embed": context.d_model}
        channels = {"mlp": self.num_channels}
        bias = config.bias
        self.in_gate = Linear(residual, channels, context, bias=bias)
        self.out_gate = Linear(residual, channels, context, bias=bias)
        self.value = Linear(residual, channels, context, bias=bias)
        self.out = Linear(
            channels, residual, context, bias=bias, std=context.residual_std
        )
        init = uniform(config.conv_width**-0.5)
        shape = (self.num_channels, config.conv_width)
        self.conv_weight = declare(shape, ("mlp", None), init, "table")
        self.conv_bias = (
            declare(shape[:1], ("mlp",), jax.nn.initializers.zeros, "vector")
            if bias
            else None
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: RecurrentCache | None = None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`."""
        in_gate, out_gate, value = (
            checkpoint_name(product, "qkv")  # which remat policies keep
            for product in project(x, self.in_gate, self.out_gate, self.value)
        )
        gated = save_inputs_only(lambda gate, value: gate * value)(in_gate, value)
        weight = materialize(self.conv_weight, self.rules, self.dtype)
        bias = None
        if self.conv_bias is not None:
            bias = materialize(self.conv_bias, self.rules, self.dtype)
        if cache is None:
            y = convolve_channels(
                gated,
                weight,
                bias,
                inputs,
                rules=self.rules,
                balanced=self.balance_sequence,
            )
        else:
            y, cache = convolve_channels_cached(
                gated, weight, bias, inputs, cache, rules=self.rules
            )
        y = save_inputs_only(lambda gate, y: gate * y)(out_gate, y)
        return MixerOutput(self.out(y, seq_axis="residual"), cache)

    def cache_spec(self, layout: CacheLayout, window: int | None) -> RecurrentCache:
        """A layer's cache, the last inputs of its convolution; see
        :mod:`maxlm.models.caches`."""
        del window
        slots = self.config.conv_width - 1
        shape = (layout.num_shards, layout.num_rows, slots, self.num_channels)
        return RecurrentCache(CacheArraySpec(shape, ("batch", None, None, "mlp")))

    def costs(self) -> LayerCosts:
        """Counts costs of one layer; see :mod:`maxlm.models.costs`."""
        # Two gates, and a product and a sum for each token of the window.
        num_channels = self.num_channels
        conv_width = self.config.conv_width
        maps = ("in_gate.kernel", "out_gate.kernel", "value.kernel")
        matrices = (
            MatrixGroup(maps, kept_products=maps),
            MatrixGroup(("out.kernel",), "mlp"),
        )
        return LayerCosts(
            matrices,
            extra_flops=num_channels * (2 + 2 * conv_width),
            flops_axes=("mlp",),
            halo_elements=num_channels * (conv_width - 1),
            # Behind the first gate, the convolution and the second gate.
            intermediate_elements=3 * num_channels,
        )
