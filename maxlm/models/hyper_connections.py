"""Hyper-connections: several residual streams, from which a branch reads a sum and to
which it writes, while they mix.

With streams x_1 … x_N of a token and a branch f, whose own norm is within it::

    x'_k = write_k · f(Σ_j read_j · x_j) + Σ_j mix_jk · x_j

Three forms say what the weights are:

- ``static``: numbers of the layer (Zhu et al. 2024, arXiv:2409.19606, eq. 1–5);
- ``dynamic``: these and a part that follows from the token's streams (eq. 10–13);
- ``constrained``: all follow from the streams, reading and writing by sigmoids, mixing
  by a doubly stochastic matrix (Xie et al. 2025, arXiv:2512.24880, eq. 7–9; DeepSeek-V4).

Weights, and the sums that they weigh, are in fp32 whatever the compute dtype. Each
device has all streams of its own tokens: nothing here is sent.

Shapes: B batch, S sequence, N streams, D model. A pipeline's micro-batches may stand
before B.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from pydantic import Field

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
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import AttentionInputs, EncoderOutput
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import declare, materialize, truncated_normal
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.local import get_layout, make_spec

PLACEMENTS = ("pre", "sandwich", "output")
"""Placements in which a branch has its norms within it, and streams have none."""

INITIAL_SCALE = 0.01
"""Initial factor on what follows from the streams, of both papers."""


class HyperConnectionsConfig(BlockKindConfig):
    """Residual streams that branches read, write and mix by weights of their own."""

    kind: Literal["hyper_connections"] = "hyper_connections"
    num_streams: int = Field(default=4, gt=0)
    """Residual streams: activations between layers are as many times as large."""
    form: Literal["static", "dynamic", "constrained"] = "constrained"
    """Weights of streams: static (learnt numbers), dynamic (plus tanh of a map of each
    stream), constrained (sigmoids, and a doubly stochastic matrix that mixes:
    DeepSeek-V4)."""
    sinkhorn_iterations: int = Field(default=20, gt=0)
    """Times that the constrained form divides by rows' sums and by columns'."""
    eps: float = Field(default=1e-6, gt=0)
    """Added by the constrained form to what it divides by, and to weights that are to
    stay above 0."""


class ConnectionWeights(NamedTuple):
    """A branch's weights of the streams, fp32; static ones without B and S."""

    read: jax.Array
    """[B, S, N]."""
    write: jax.Array
    """[B, S, N]."""
    mix: jax.Array
    """[B, S, N, N]: from the first stream to the second."""


class BranchInput(NamedTuple):
    """What a branch reads of the streams, and how it joins them."""

    x: jax.Array
    """[B, S, D]."""
    write: jax.Array
    mix: jax.Array


def read_streams(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Adds up streams x [B, S, N, D] times weights [B, S, N] → [B, S, D]."""
    wide = x.astype(weights.dtype)
    return jnp.sum(wide * weights[..., None], axis=-2).astype(x.dtype)


def write_streams(
    x: jax.Array, y: jax.Array, write: jax.Array, mix: jax.Array
) -> jax.Array:
    """Mixes streams x [B, S, N, D] and adds a branch's output y [B, S, D] to each."""
    wide = x.astype(mix.dtype)
    # N is small: a product of N × N matrices would leave a matrix unit idle.
    mixed = jnp.sum(wide[..., :, None, :] * mix[..., None], axis=-3)
    written = y.astype(mix.dtype)[..., None, :] * write[..., None]
    return (mixed + written).astype(x.dtype)


def multiply_streams(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies all streams x [B, S, N, D] of a token by kernel [N, D, K] → [B, S,
    K]."""
    layout = get_layout(x)
    return jnp.einsum(
        "...nd,ndk->...k",
        x.astype(kernel.dtype),
        kernel,
        precision=lax.Precision.HIGHEST,
        out_sharding=make_spec((*layout[:-2], ())),
    )


def map_streams(x: jax.Array, kernel: jax.Array, eps: float) -> jax.Array:
    """Divides all streams of a token by their root mean square, and multiplies them:
    [B, S, N, D] · [N, D, K] → [B, S, K]."""
    wide = x.astype(kernel.dtype)
    mean_square = jnp.mean(jnp.square(wide), axis=(-2, -1))
    # Dividing the K products is the same as dividing the N · D inputs.
    return multiply_streams(wide, kernel) * lax.rsqrt(mean_square + eps)[..., None]


def normalise_mixing(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Makes matrices [..., N, N] doubly stochastic by Sinkhorn and Knopp's iterations
    (arXiv:2512.24880, eq. 9), in DeepSeek-V4's order: rows first, by a softmax, columns
    last."""

    def divide(matrix: jax.Array, axis: int) -> jax.Array:
        return matrix / (jnp.sum(matrix, axis=axis, keepdims=True) + eps)

    def iterate(matrix: jax.Array, _: None) -> tuple[jax.Array, None]:
        rows_normalised = divide(matrix, axis=-1)
        return divide(rows_normalised, axis=-2), None

    by_softmax = jax.nn.softmax(logits, axis=-1) + eps
    first = divide(by_softmax, axis=-2)
    matrix, _ = lax.scan(iterate, first, length=iterations - 1)
    return matrix


class StreamConnection(nnx.Module):
    """Joins one branch to the streams."""

    def read(self, x: jax.Array) -> BranchInput:
        """Returns what the branch reads of streams x [B, S, N, D]."""

        def compute(x: jax.Array, params: dict[str, jax.Array]) -> BranchInput:
            weights = self.compute_weights(x, params)
            branch_x = read_streams(x, weights.read)
            return BranchInput(branch_x, weights.write, weights.mix)

        return save_inputs_only(compute)(x, self.materialize_params())

    def write(self, x: jax.Array, y: jax.Array, branch_input: BranchInput) -> jax.Array:
        """Returns streams x [B, S, N, D] with a branch's output y [B, S, D]."""
        write = save_inputs_only(write_streams)
        return write(x, y, branch_input.write, branch_input.mix)

    @abstractmethod
    def materialize_params(self) -> dict[str, jax.Array]:
        """Returns the parameters in fp32, as a device reads them."""

    @abstractmethod
    def compute_weights(
        self, x: jax.Array, params: dict[str, jax.Array]
    ) -> ConnectionWeights:
        """Returns the branch's weights; ``params``: of
        :meth:`materialize_params`."""


class HyperConnection(StreamConnection):
    """The forms static and dynamic: at first, branch number k reads stream k modulo N,
    writes to all, and none mix (arXiv:2409.19606, eq. 14), which is what a residual
    stream does.

    Parameters: ``alpha`` [N, N + 1] (what the branch reads, then how streams mix) and
    ``beta`` [N]; of a dynamic one ``kernel`` [D, N + 2], which makes a stream's row of
    the former and its number of the latter, and ``scales`` [2] of both.

    Args:
        branch: 0 for a layer's mixer, 1 for its feed-forward.
    """

    def __init__(
        self,
        config: HyperConnectionsConfig,
        norm: NormConfig,
        context: BuildContext,
        branch: int,
    ):
        self.rules = context.rules
        self.dtype = accumulation_dtype(context.dtype)
        num_streams = config.num_streams
        self.num_streams = num_streams
        ones = jax.nn.initializers.ones
        zeros = jax.nn.initializers.zeros
        alphas = tuple(
            _make_initial_alpha(num_streams, 2 * layer + branch)
            for layer in context.layer_numbers
        )
        self.alpha = declare(
            (num_streams, num_streams + 1),
            (None, None),
            zeros,
            "vector",
            layer_values=alphas,
        )
        self.beta = declare((num_streams,), (None,), ones, "vector")
        stream_norm = None
        kernel = None
        scales = None
        if config.form == "dynamic":
            wide_context = replace(context, dtype=self.dtype)
            stream_norm = Norm(norm, context.d_model, wide_context)
            # A "table" to optimizers: it is in fp32, and no hidden layer's map.
            kernel = declare(
                (context.d_model, num_streams + 2), ("embed", None), zeros, "table"
            )
            initial_scale = jax.nn.initializers.constant(INITIAL_SCALE)
            scales = declare((2,), (None,), initial_scale, "vector")
        self.norm = stream_norm
        self.kernel = kernel
        self.scales = scales

    def materialize_params(self) -> dict[str, jax.Array]:
        params = {"alpha": self.alpha, "beta": self.beta}
        if self.kernel is not None and self.scales is not None:
            params |= {"kernel": self.kernel, "scales": self.scales}
        return {
            name: materialize(param, self.rules, self.dtype)
            for name, param in params.items()
        }

    def compute_weights(
        self, x: jax.Array, params: dict[str, jax.Array]
    ) -> ConnectionWeights:
        alpha = params["alpha"]
        beta = params["beta"]
        if self.norm is not None:
            products = jnp.einsum(
                "...nd,dk->...nk",
                self.norm(x),
                params["kernel"],
                precision=lax.Precision.HIGHEST,
                out_sharding=make_spec((*get_layout(x)[:-1], ())),
            )
            bounded = jnp.tanh(products)
            alpha_scale, beta_scale = params["scales"]
            alpha = alpha + alpha_scale * bounded[..., : self.num_streams + 1]
            beta = beta + beta_scale * bounded[..., -1]
        return ConnectionWeights(alpha[..., 0], beta, alpha[..., 1:])


def _make_initial_alpha(num_streams: int, number: int) -> tuple[float, ...]:
    """Returns ``alpha`` row by row: eq. 14 for branch ``number`` of the model."""
    values: list[float] = []
    for stream in range(num_streams):
        values.append(float(stream == number % num_streams))
        values.extend(float(stream == other) for other in range(num_streams))
    return tuple(values)


class ConstrainedConnection(StreamConnection):
    """The form constrained. At first weights are nearly alike for all streams, so that
    the model is nearly one with a residual stream.

    Parameters: ``kernel`` [N, D, 2N + N²], ``base`` [2N + N²] and ``scales`` [3], each
    for what is read, written and mixed.
    """

    def __init__(
        self, config: HyperConnectionsConfig, norm: NormConfig, context: BuildContext
    ):
        self.config = config
        self.rules = context.rules
        self.dtype = accumulation_dtype(context.dtype)
        self.norm_eps = norm.eps
        num_streams = config.num_streams
        num_weights = (2 + num_streams) * num_streams
        self.kernel = _declare_streams_kernel(num_streams, num_weights, context)
        zeros = jax.nn.initializers.zeros
        self.base = declare((num_weights,), (None,), zeros, "vector")
        initial_scale = jax.nn.initializers.constant(INITIAL_SCALE)
        self.scales = declare((3,), (None,), initial_scale, "vector")

    def materialize_params(self) -> dict[str, jax.Array]:
        params = {"kernel": self.kernel, "base": self.base, "scales": self.scales}
        return {
            name: materialize(param, self.rules, self.dtype)
            for name, param in params.items()
        }

    def compute_weights(
        self, x: jax.Array, params: dict[str, jax.Array]
    ) -> ConnectionWeights:
        config = self.config
        num_streams = config.num_streams
        products = map_streams(x, params["kernel"], self.norm_eps)
        sections = (num_streams, 2 * num_streams)
        logits = [
            scale * product + base
            for scale, product, base in zip(
                params["scales"],
                jnp.split(products, sections, axis=-1),
                jnp.split(params["base"], sections),
                strict=True,
            )
        ]
        read_logits, write_logits, mix_logits = logits
        read = jax.nn.sigmoid(read_logits) + config.eps
        write = 2 * jax.nn.sigmoid(write_logits)
        matrices = mix_logits.reshape(
            *mix_logits.shape[:-1],
            num_streams,
            num_streams,
            out_sharding=make_spec((*get_layout(x)[:-2], (), ())),
        )
        mix = normalise_mixing(matrices, config.sinkhorn_iterations, config.eps)
        return ConnectionWeights(read, write, mix)


def _declare_streams_kernel(
    num_streams: int, num_weights: int, context: BuildContext
) -> nnx.Param:
    """Declares [N, D, K] for :func:`map_streams`: a "table" to optimizers, for it is in
    fp32, and no hidden layer's map. Random, or else streams would stay alike."""
    return declare(
        (num_streams, context.d_model, num_weights),
        (None, "embed", None),
        truncated_normal(context.init_std),
        "table",
    )


class HyperStreams(nnx.Module):
    """Copies embeddings to all streams; joins them behind the last layer: their sum, or
    of the form constrained one with weights that follow from them.

    Parameters of the latter: ``kernel`` [N, D, N], ``base`` [N], ``scale`` [1].
    """

    def __init__(
        self, config: HyperConnectionsConfig, norm: NormConfig, context: BuildContext
    ):
        self.config = config
        self.rules = context.rules
        self.dtype = accumulation_dtype(context.dtype)
        self.norm_eps = norm.eps
        kernel = None
        base = None
        scale = None
        if config.form == "constrained":
            num_streams = config.num_streams
            kernel = _declare_streams_kernel(num_streams, num_streams, context)
            zeros = jax.nn.initializers.zeros
            base = declare((num_streams,), (None,), zeros, "vector")
            initial_scale = jax.nn.initializers.constant(INITIAL_SCALE)
            scale = declare((1,), (None,), initial_scale, "vector")
        self.kernel = kernel
        self.base = base
        self.scale = scale

    def expand(self, x: jax.Array) -> jax.Array:
        """Maps embeddings [B, S, D] → [B, S, N, D]."""
        shape = (*x.shape[:-1], self.config.num_streams, x.shape[-1])
        return jnp.broadcast_to(x[..., None, :], shape)

    def contract(self, x: jax.Array) -> jax.Array:
        """Maps the last layer's output [B, S, N, D] → [B, S, D]."""
        if self.kernel is None or self.base is None or self.scale is None:
            return jnp.sum(x.astype(self.dtype), axis=-2).astype(x.dtype)
        kernel = materialize(self.kernel, self.rules, self.dtype)
        base = materialize(self.base, self.rules, self.dtype)
        scale = materialize(self.scale, self.rules, self.dtype)

        def join(
            x: jax.Array, kernel: jax.Array, base: jax.Array, scale: jax.Array
        ) -> jax.Array:
            logits = scale * map_streams(x, kernel, self.norm_eps) + base
            weights = jax.nn.sigmoid(logits) + self.config.eps
            return read_streams(x, weights)

        return save_inputs_only(join)(x, kernel, base, scale)


class HyperBlock(Block):
    """A layer whose branches each have a :class:`StreamConnection` to several streams."""

    def __init__(
        self, kind: HyperConnectionsConfig, config: BlockConfig, context: BuildContext
    ):
        require_fitting_block(config)
        super().__init__(config, context, cross_attention=False)

        def build_connection(is_there: bool, branch: int) -> StreamConnection | None:
            if not is_there:
                return None
            if kind.form == "constrained":
                return ConstrainedConnection(kind, config.norm, context)
            return HyperConnection(kind, config.norm, context, branch)

        self.mixer_connection = build_connection(config.mixer is not None, 0)
        self.ffn_connection = build_connection(config.ffn is not None, 1)

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: LayerCache | None = None,
        encoder_output: EncoderOutput | CrossCache | None = None,
        layer_input: jax.Array | None = None,
    ) -> BlockOutput:
        """Runs the layer on x [B, S, N, D]; see :class:`Block`."""
        assert encoder_output is None
        assert layer_input is None
        output = BlockOutput(x)
        if self.mixer_connection is not None:
            branch = self.mixer_connection.read(x)
            mixed: MixerOutput = self.run_mixer(branch.x, inputs, cache)
            x = self.mixer_connection.write(x, mixed.y, branch)
            output = BlockOutput(x, mixed.cache, mixed.aux, mixed.keys_values)
        if self.ffn_connection is not None:
            branch = self.ffn_connection.read(x)
            y, aux = self.run_ffn(branch.x, inputs)
            x = self.ffn_connection.write(x, y, branch)
            output = output._replace(aux=aux.plus(output.aux))
        return output._replace(x=self._scale_output(x))


def require_fitting_block(config: BlockConfig) -> None:
    """Raises MaxlmError: a layer joins streams in a way that hyper-connections are in
    place of."""
    subject = "block.kind=hyper_connections"
    if config.placement not in PLACEMENTS:
        message = f"placement={config.placement} with {subject}"
        fix = f"use {', '.join(PLACEMENTS[:-1])} or {PLACEMENTS[-1]}"
        raise MaxlmError(message, where="model.placement", fix=fix)
    if config.layer_inputs is not None:
        message = f"layer_inputs, which join one stream, with {subject}"
        fix = "set one of them to null"
        raise MaxlmError(message, where="model.layer_inputs", fix=fix)
    for name in ("mixer_scales", "ffn_scales"):
        stream_scale = getattr(config, name).stream
        if stream_scale != 1:
            message = f"{name}.stream={stream_scale} with {subject}, which has weights"
            message += " of its own for streams"
            raise MaxlmError(message, where="model.kinds", fix="leave it out")


HYPER_CONNECTIONS = RegisteredBlock(
    HyperConnectionsConfig, HyperBlock, HyperStreams, mesh_axes=("context", "stage")
)
