"""Alternating updates: a layer runs on one of several residual streams and corrects all
of them (Baykal et al. 2023, arXiv 2301.13310), with a learnt low-rank path beside
attention (LAuReL, Menghani et al. 2024, arXiv 2411.07501); both as Gemma 3n's published
code has them.

Shapes: B batch, S sequence, D model, N streams, P width of a layer's input.
"""

from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.models.blocks import (
    Block,
    BlockConfig,
    BlockKindConfig,
    BlockOutput,
    RegisteredBlock,
)
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import LayerCache
from maxlm.models.caches.paged import CrossCache
from maxlm.models.costs import BranchCosts, get_costs
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import AttentionInputs, EncoderOutput
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import declare, materialize, truncated_normal
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.local import get_layout, make_spec

_LEAST_MEAN_SQUARE = 1e-5
"""Of a projected stream, whose root is divided by."""


class AltUpConfig(BlockKindConfig):
    """Several residual streams, of which a layer reads one and corrects all."""

    kind: Literal["altup"] = "altup"
    num_streams: int = Field(default=4, gt=1)
    """Residual streams [B, S, D]: what layers hand on is as many times as large."""
    active: int = Field(default=0, ge=0)
    """The stream that attention and MLP read, from 0 on."""
    correct_scale: bool = True
    """Multiply the corrected active stream by D learnt numbers before a layer's own
    input is joined with it (``layer_inputs``)."""
    laurel_rank: int | None = Field(default=None, gt=0)
    """Width of a learnt low-rank path beside attention (LAuReL); null: there is
    none."""
    coefficient_clip: float | None = Field(default=None, gt=0)
    """Cut the weights of both maps to coefficients off at ± this; null: they are
    free."""

    @model_validator(mode="after")
    def _active_is_there(self) -> Self:
        if self.active >= self.num_streams:
            raise MaxlmError(
                f"active={self.active} of num_streams={self.num_streams}, counted from 0",
                fix="name a stream that is there",
            )
        return self


class AltUp(nnx.Module):
    """Predicts all streams from what enters a layer, and corrects the predictions by
    what the layer makes of one of them (algorithm 1).

    With r(x) = tanh(W norm(x) / D), the prediction of stream m is x_m + Σ_n P(r(x_a))_mn
    x_n, where a is the active stream; with y the layer's output, stream m becomes its
    prediction p_m plus (1 + C(r(y))_m) (y − p_a).
    """

    def __init__(
        self,
        config: AltUpConfig,
        norm: NormConfig,
        context: BuildContext,
        *,
        scales_output: bool,
    ):
        self.config = config
        self.rules = context.rules
        self.wide_dtype = accumulation_dtype(context.dtype)
        d_model = context.d_model
        num_streams = config.num_streams
        normal = truncated_normal(context.init_std)
        self.router_norm = Norm(norm, d_model, context)
        # Tables to optimizers: like a router's they are no maps between hidden layers.
        self.router = declare(
            (d_model, num_streams),
            ("embed", None),
            normal,
            "table",
            contracting_dims=(0,),
        )
        self.prediction = declare(
            (num_streams, num_streams**2),
            (None, None),
            normal,
            "table",
            contracting_dims=(0,),
        )
        self.correction = declare(
            (num_streams, num_streams),
            (None, None),
            normal,
            "table",
            contracting_dims=(0,),
        )
        self.output_scale = (
            declare((d_model,), (None,), jax.nn.initializers.ones, "vector")
            if scales_output
            else None
        )

    def predict(self, x: jax.Array) -> jax.Array:
        """Maps streams [B, S, N, D] to their predictions."""
        num_streams = self.config.num_streams
        coefficients = self._compute_coefficients(
            x[..., self.config.active, :], self.prediction
        )
        spec = make_spec((*get_layout(x)[:2], (), ()))
        shape = (*x.shape[:2], num_streams, num_streams)
        coefficients = coefficients.reshape(shape, out_sharding=spec)

        def mix(x: jax.Array, coefficients: jax.Array) -> jax.Array:
            wide = x.astype(coefficients.dtype)
            # [B, S, to, from, D]: a few products for each number, which a compiler
            # fuses; a matrix product of N × N would leave its unit idle.
            products = coefficients[..., None] * wide[:, :, None]
            return (wide + products.sum(3)).astype(x.dtype)

        return save_inputs_only(mix)(x, coefficients)

    def correct(self, predictions: jax.Array, y: jax.Array) -> jax.Array:
        """Corrects predictions [B, S, N, D] by the layer's output y [B, S, D]."""
        active = self.config.active
        coefficients = self._compute_coefficients(y, self.correction)

        def add(
            predictions: jax.Array, y: jax.Array, coefficients: jax.Array
        ) -> jax.Array:
            wide = predictions.astype(coefficients.dtype)
            change = y.astype(wide.dtype) - wide[..., active, :]
            corrected = wide + (1 + coefficients)[..., None] * change[:, :, None]
            return corrected.astype(predictions.dtype)

        return save_inputs_only(add)(predictions, y, coefficients)

    def scale_output(self, x: jax.Array) -> jax.Array:
        """Multiplies x [B, S, D] by D learnt numbers, if there are such."""
        if self.output_scale is None:
            return x
        scale = materialize(self.output_scale, self.rules, x.dtype)
        return save_inputs_only(lambda x, scale: x * scale)(x, scale)

    def _compute_coefficients(self, x: jax.Array, table: nnx.Param) -> jax.Array:
        """Maps x [B, S, D] by a table [N, outputs] of tanh(W norm(x) / D), fp32 or
        wider."""
        dtype = self.wide_dtype
        normed = self.router_norm(x).astype(dtype) / x.shape[-1]
        router = materialize(self.router, self.rules, dtype)
        weights = materialize(table, self.rules, dtype)
        clip = self.config.coefficient_clip
        if clip is not None:
            weights = jnp.clip(weights, -clip, clip)
        spec = make_spec((*get_layout(x)[:2], ()))

        def multiply(x: jax.Array, weights: jax.Array) -> jax.Array:
            # A TPU multiplies fp32 in bf16 otherwise.
            return jnp.einsum(
                "bsi,io->bso",
                x,
                weights,
                precision=lax.Precision.HIGHEST,
                out_sharding=spec,
            )

        return multiply(jnp.tanh(multiply(normed, router)), weights)


class Laurel(nnx.Module):
    """A low-rank path: x + norm(R L x) (arXiv 2411.07501, §2, LAuReL-LR)."""

    def __init__(self, rank: int, norm: NormConfig, context: BuildContext):
        residual = {"embed": context.d_model}
        latent = {"latent": rank}
        self.left = Linear(residual, latent, context, bias=False)
        self.right = Linear(
            latent, residual, context, bias=False, std=context.residual_std
        )
        self.norm = Norm(norm, context.d_model, context)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, D] → the same shape."""
        narrow = self.left(x, seq_axis="residual")
        return x + self.norm(self.right(narrow, seq_axis="residual"))


class AltUpBlock(Block):
    """A :class:`Block` on one of several streams, which corrects all of them.

    With ``laurel_rank`` what enters the MLP's branch is (x + attention's branch +
    laurel(norm(x))) / √2. A layer's own input is joined with the active stream and
    added to all streams but the first.
    """

    def __init__(self, kind: AltUpConfig, config: BlockConfig, context: BuildContext):
        has_branches = config.mixer is not None and config.ffn is not None
        if not has_branches or config.placement not in ("pre", "sandwich"):
            raise MaxlmError(
                "block.kind=altup in layers without a mixer, an ffn and a norm before "
                "each",
                where="model.block",
                fix="use placement=pre or sandwich, and give every layer both",
            )
        super().__init__(config, context, cross_attention=False)
        self.kind = kind
        has_layer_input = config.layer_inputs is not None
        self.altup = AltUp(
            kind,
            config.norm,
            context,
            scales_output=kind.correct_scale and has_layer_input,
        )
        self.laurel = (
            Laurel(kind.laurel_rank, config.norm, context)
            if kind.laurel_rank is not None
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
        """Runs the layer on streams x [B, S, N, D]; see :meth:`Block.__call__`."""
        active = self.kind.active
        predictions = self.altup.predict(x)
        output = self._run_active(predictions[..., active, :], inputs, cache)
        x = self.altup.correct(predictions, output.x)
        if self.layer_input is not None:
            assert layer_input is not None
            y = self.altup.scale_output(x[..., active, :])
            y = self.layer_input(y, layer_input)
            # All streams but the first.
            others = x[..., 1:, :] + y[:, :, None]
            x = jnp.concatenate([x[..., :1, :], others], axis=-2)
        return output._replace(x=self._scale_output(x))

    def _run_active(
        self, x: jax.Array, inputs: AttentionInputs, cache: LayerCache | None
    ) -> BlockOutput:
        """Runs attention and MLP on one stream x [B, S, D]."""
        assert self.mixer is not None
        assert self.attention_norm is not None
        normed = self.attention_norm(x)
        mixed = self.mixer(normed, inputs, cache)
        y = self._finish_branch(mixed.y, self.attention_post_norm, self.mixer_scales)
        x = self._join(x, y, self.attention_norm, self.mixer_scales)
        if self.laurel is not None:
            x = (x + self.laurel(normed)) * jnp.asarray(2**-0.5, x.dtype)
        y, aux = self.run_ffn(x, inputs)
        x = self._join(x, y, self.mlp_norm, self.ffn_scales)
        return BlockOutput(x, mixed.cache, aux.plus(mixed.aux), mixed.keys_values)

    def costs(self) -> tuple[BranchCosts, ...]:
        """See :meth:`Block.costs`; Laurel counts as a mixer's."""
        branches = super().costs()
        if self.laurel is None:
            return branches
        return (*branches, BranchCosts("mixer", "laurel", get_costs(self.laurel)))


class AltUpStreams(nnx.Module):
    """Makes all streams of embeddings by a map each, and one of all at the end; what a
    map gives is scaled to the root mean square of the first stream."""

    def __init__(self, kind: AltUpConfig, norm: NormConfig, context: BuildContext):
        residual = {"embed": context.d_model}
        outputs = {"latent": context.d_model}  # "embed" is taken by the inputs

        def build_maps() -> nnx.Dict:
            return nnx.Dict(
                {
                    f"stream_{stream}": Linear(residual, outputs, context, bias=False)
                    for stream in range(1, kind.num_streams)
                }
            )

        self.wide_dtype = accumulation_dtype(context.dtype)
        self.expansions = build_maps()
        self.contractions = build_maps()

    def expand(self, x: jax.Array) -> jax.Array:
        """Maps embeddings [B, S, D] → [B, S, N, D]."""
        maps: list[Linear] = list(self.expansions.values())
        streams = project(x, *maps, seq_axis="residual")
        rescaled = [self._rescale(stream, x) for stream in streams]
        return jnp.stack([x, *rescaled], axis=-2)

    def contract(self, x: jax.Array) -> jax.Array:
        """Maps streams [B, S, N, D] to their mean [B, S, D]."""
        maps: list[Linear] = list(self.contractions.values())
        first = x[..., 0, :]
        total = first.astype(self.wide_dtype)
        for number, linear in enumerate(maps, 1):
            stream = linear(x[..., number, :], seq_axis="residual")
            rescaled = self._rescale(stream, first)
            total = total + rescaled.astype(self.wide_dtype)
        return (total / (1 + len(maps))).astype(x.dtype)

    def _rescale(self, stream: jax.Array, target: jax.Array) -> jax.Array:
        """Scales a stream [B, S, D] to the root mean square of ``target``, and lays it
        out as that is."""

        def compute_mean_square(x: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(x), axis=-1, keepdims=True)

        def rescale(x: jax.Array, target: jax.Array) -> jax.Array:
            wide = x.astype(self.wide_dtype)
            mean_square = jnp.maximum(compute_mean_square(wide), _LEAST_MEAN_SQUARE)
            size = jnp.sqrt(compute_mean_square(target.astype(self.wide_dtype)))
            return (wide * size * lax.rsqrt(mean_square)).astype(x.dtype)

        stream = reshard(stream, make_spec(get_layout(target)))
        return save_inputs_only(rescale)(stream, target)


ALTUP = RegisteredBlock(AltUpConfig, AltUpBlock, AltUpStreams)
