"""Multi-token prediction: modules behind the layers that predict tokens further ahead
(DeepSeek-V3, arXiv 2412.19437, §2.2).

Module k makes, of what stands behind the layers (or the module before it) and of the
embedding of the token k places ahead, hidden states that the model's head maps to the
token after that. In training their losses join the model's.

Shapes: B batch, S sequence, D model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard
from pydantic import Field

from maxlm.config import Config
from maxlm.models.architectures.pattern import PatternEntry
from maxlm.models.architectures.runs import LayerRun, LayerStack, PatternLayer
from maxlm.models.aux import Aux
from maxlm.models.blocks import Block, BlockConfig
from maxlm.models.build_context import BuildContext
from maxlm.models.costs import BranchCosts, LayerCosts, MatrixGroup
from maxlm.models.layers.linear import Linear
from maxlm.models.layers.norm import Norm
from maxlm.parallel.context import sequence_order_indices
from maxlm.parallel.local import axis_size
from maxlm.sharding import AxisRules

MTP = "mtp"
"""Name of the modules' stack."""


class MtpConfig(Config):
    """Modules behind the layers that predict tokens further ahead."""

    num_modules: int = Field(default=1, gt=0, le=16)
    """Tokens predicted beside the next one, a module each."""
    layer: PatternEntry | None = None
    """Kind of each module's layer, by its name in `kinds` or by its settings; null: that
    of the model's last layer."""
    loss_weight: float = Field(default=0.3, ge=0)
    """Weight of the mean of the modules' losses; DeepSeek-V3 has 0.3, and 0.1 for the
    last third of its tokens."""


class MtpBlock(Block):
    """A layer with what joins its two inputs before it, and a norm behind it."""

    def __init__(self, config: BlockConfig, context: BuildContext):
        super().__init__(config, context, cross_attention=False)
        d_model = context.d_model

        def build_norm() -> Norm:
            return Norm(config.norm, d_model, context)

        self.token_norm = build_norm()
        self.hidden_norm = build_norm()
        # Its outputs have another axis than its inputs, which FSDP splits.
        self.join = Linear(
            {"embed": 2 * d_model}, {"latent": d_model}, context, bias=False
        )
        self.output_norm = build_norm()

    def join_inputs(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        """Maps hidden states and embeddings of tokens ahead, [B, S, D] each, to the
        layer's input."""
        normed = [self.token_norm(embedded), self.hidden_norm(hidden)]
        return self.join(jnp.concatenate(normed, axis=-1), seq_axis="residual")

    def costs(self) -> tuple[BranchCosts, ...]:
        """See :meth:`Block.costs`; the map that joins inputs counts as a mixer's."""
        join = LayerCosts((MatrixGroup(("kernel",)),))
        return (*super().costs(), BranchCosts("mixer", "join", join))


class AheadPrediction(NamedTuple):
    """What a module predicts."""

    hidden: jax.Array
    """[B, S, D], for the model's head."""
    targets: jax.Array
    """int [B, S]: the token further ahead."""
    weights: jax.Array
    """fp32 [B, S]; 0 where there is none in the document."""


class AheadPredictions(NamedTuple):
    """What all modules predict."""

    predictions: tuple[AheadPrediction, ...]
    loss_weight: float
    """Weight of the mean of their losses."""
    aux: Aux
    """What their layers add to the loss and the log."""


def make_mtp_run(num_modules: int, layer: PatternLayer) -> LayerRun:
    """Describes the modules as a run of layers, for whoever counts them."""
    kinds = (layer.kind,)
    stack = LayerStack(MTP, num_modules, kinds, layer.block)
    return LayerRun(MTP, num_modules, kinds, (stack,), (0,), (layer.kind_name,))


def take_next(
    x: jax.Array, rules: AxisRules, *, balanced: bool, fill: int = 0
) -> jax.Array:
    """Returns for each token the value [B, S] of the one after it in its row, ``fill``
    for the last; not differentiable. Rows that are split over devices are gathered,
    which takes a number a token."""
    padding = ((0, 0), (0, 1))
    num_shards = axis_size(rules.mesh_axes("seq"))
    if num_shards == 1:
        return jnp.pad(x[:, 1:], padding, constant_values=fill)
    whole_rows = rules.spec("batch", None)
    order = sequence_order_indices(x.shape[1], num_shards, balanced)
    place_of_token = jnp.argsort(jnp.asarray(order))
    whole = reshard(x, whole_rows)
    in_order = whole.at[:, place_of_token].get(out_sharding=whole_rows)
    following = jnp.pad(in_order[:, 1:], padding, constant_values=fill)
    reordered = following.at[:, jnp.asarray(order)].get(out_sharding=whole_rows)
    return reshard(reordered, rules.spec("batch", "seq"))


class TokensAhead(NamedTuple):
    """Tokens of one module's step."""

    inputs: jax.Array
    """int [B, S]: tokens k places ahead, which the module reads."""
    targets: jax.Array
    """int [B, S]: the tokens after these."""
    weights: jax.Array
    """fp32 [B, S]."""


def list_tokens_ahead(
    targets: jax.Array,
    weights: jax.Array,
    segment_ids: jax.Array | None,
    num_modules: int,
    rules: AxisRules,
    *,
    balanced: bool,
) -> Sequence[TokensAhead]:
    """Lists what each module reads and predicts.

    Args:
        targets: int [B, S]: the token after each.
        weights: fp32 [B, S]: of its loss.
        segment_ids: int [B, S]; a token in another document than the one that it is
            predicted from has no weight.
    """
    steps: list[TokensAhead] = []
    for _ in range(num_modules):
        inputs = targets
        targets = take_next(inputs, rules, balanced=balanced)
        weights = take_next(weights, rules, balanced=balanced)
        if segment_ids is not None:
            next_ids = take_next(segment_ids, rules, balanced=balanced)
            weights = jnp.where(next_ids == segment_ids, weights, 0)
        steps.append(TokensAhead(inputs, targets, weights))
    return steps
