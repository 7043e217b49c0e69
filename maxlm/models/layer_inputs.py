"""Inputs of each layer's own: a second embedding of the tokens, of which every layer
reads its part (Gemma 3n's per-layer embeddings).

Shapes: B batch, S sequence, D model, L layers, P width of a layer's input.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from pydantic import Field

from maxlm.config import Config
from maxlm.models.build_context import BuildContext
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.linear import Embedding, Linear
from maxlm.models.layers.mlp import ACTIVATIONS, Activation
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.remat import save_inputs_only


class LayerInputsConfig(Config):
    """Inputs of each layer's own, made of its token and of the token's embedding."""

    width: int = Field(gt=0)
    """Numbers that a layer reads."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of their table, row 0 for tokens beyond it; null: the model's."""
    activation: Activation = "gelu_tanh"
    """Activation of the gate by which a layer reads them."""


class LayerInputs(nnx.Module):
    """Makes the inputs of all layers: (norm(W x / √D) + √P · row of the token) / √2,
    where x is the token's embedding."""

    def __init__(
        self,
        config: LayerInputsConfig,
        vocab_size: int,
        norm: NormConfig,
        context: BuildContext,
    ):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        self.num_layers = context.num_layers
        self.d_model = context.d_model
        self.num_rows = config.vocab_size or vocab_size
        all_widths = context.num_layers * config.width
        self.embedding = Embedding("vocab", self.num_rows, context, width=all_widths)
        self.projection = Linear(
            {"embed": context.d_model}, {None: all_widths}, context, bias=False
        )
        self.norm = Norm(norm, config.width, context)

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """Maps tokens int [B, S] and their embeddings [B, S, D] → [L, B, S, P]."""
        shape = (*tokens.shape, self.num_layers, self.config.width)
        by_layer = self.rules.spec("batch", "seq", None, None)

        known_tokens = jnp.where(tokens < self.num_rows, tokens, 0)
        rows = self.embedding(known_tokens)
        rows = reshard(rows, self.rules.spec("batch", "seq", None))
        rows = rows.reshape(shape, out_sharding=by_layer)

        projected = self.projection(x) * jnp.asarray(self.d_model**-0.5, x.dtype)
        projected = projected.reshape(shape, out_sharding=by_layer)
        projected = self.norm(projected)

        # Rounded to the compute dtype, as Gemma's published code does.
        row_scale = jnp.asarray(self.config.width**0.5, rows.dtype)
        sum_scale = jnp.asarray(2**-0.5, rows.dtype)

        def combine(rows: jax.Array, projected: jax.Array) -> jax.Array:
            return (rows * row_scale + projected) * sum_scale

        combined = save_inputs_only(combine)(rows, projected)
        layers_first = jnp.moveaxis(combined, 2, 0)
        return reshard(layers_first, self.rules.spec(None, "batch", "seq", "mlp"))


class LayerInputBranch(nnx.Module):
    """Adds what a layer makes of its own input to the residual stream x:
    norm(W (activation(G x) · input))."""

    def __init__(
        self, config: LayerInputsConfig, norm: NormConfig, context: BuildContext
    ):
        self.activation: Activation = config.activation
        residual = {"embed": context.d_model}
        # Split like an MLP's hidden layer.
        hidden = {"mlp": config.width}
        self.gate = Linear(residual, hidden, context, bias=False)
        self.out = Linear(
            hidden, residual, context, bias=False, std=context.residual_std
        )
        self.norm = Norm(norm, context.d_model, context)

    def __call__(self, x: jax.Array, layer_input: jax.Array) -> jax.Array:
        """Maps x [B, S, D] and the layer's input [B, S, P] to what is added, [B, S,
        D]."""
        activate = ACTIVATIONS[self.activation]

        def multiply(gate: jax.Array, layer_input: jax.Array) -> jax.Array:
            wide = accumulation_dtype(gate.dtype)
            gated = activate(gate.astype(wide)) * layer_input.astype(wide)
            return gated.astype(gate.dtype)

        gated = save_inputs_only(multiply)(self.gate(x), layer_input)
        return self.norm(self.out(gated, seq_axis="residual"))
