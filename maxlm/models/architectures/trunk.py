"""Layers one after the other, with what stands before the first and after the last."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.models.architectures.config import LayerKind, LayerStack, TransformerConfig
from maxlm.models.aux import Aux
from maxlm.models.blocks import Block, scan_blocks
from maxlm.models.caches import RaggedBatch
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import AttentionInputs, EncoderOutput
from maxlm.models.layers.linear import Embedding
from maxlm.models.layers.norm import Norm
from maxlm.models.layers.positions import (
    compute_alibi_slopes,
    compute_relative_biases,
    compute_sinusoids,
)
from maxlm.models.layers.rope import Rotary, compute_rotary, materialize_rotary
from maxlm.models.params import (
    Params,
    bind,
    declare,
    get_values,
    is_unstacked,
    materialize,
    seed_micro_batch,
    stack_layers,
    take_stacked_layer,
    truncated_normal,
)
from maxlm.parallel.config import ParallelConfig, Schedule
from maxlm.parallel.pipeline import run_circular_pipeline
from maxlm.sharding import AxisRules
from pallas_kernels.chips import get_platform

PositionsAndSegments = tuple[jax.Array, jax.Array | None]
"""Positions and segment ids."""
LayersFunction = Callable[[jax.Array, PositionsAndSegments], tuple[jax.Array, Aux]]


class Trunk(nnx.Module):
    """A transformer without its table of tokens and its head.

    Args:
        rules: compute layout of parameters and activations.
        dtype: compute dtype; parameters are fp32.
        causal: whether tokens see those before them alone.
        cross_attention: whether layers look at an encoder's output as well.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rules: AxisRules,
        dtype: Any,
        parallel: ParallelConfig = ParallelConfig(),
        causal: bool = True,
        cross_attention: bool = False,
    ):
        self.config, self.rules, self.dtype, self.parallel = (
            config,
            rules,
            dtype,
            parallel,
        )
        self.causal = causal
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        D, std, positions = config.d_model, config.init_std, config.positions
        rows = config.max_seq_len + positions.offset
        learned = positions.kind == "learned"
        self.positions = Embedding(None, rows, D, std, **kw) if learned else None
        self.embedding_norm = (
            Norm(config.norm, D, **kw) if config.embedding_norm else None
        )
        biases: dict[str, Any] = {"init": truncated_normal(std), "role": "table"}
        relative = positions.kind == "relative"
        shape = (positions.buckets, config.attention.num_heads if relative else 0)
        self.relative = declare(shape, (None, "heads"), **biases) if relative else None
        for part in config.layer_stacks:
            ffn = config.ffn or (config.mlp if part.dense else config.moe)
            assert ffn is not None
            sizes = (config.placement, D, config.num_layers, std)
            how = {"cross_attention": cross_attention, "parallel": parallel, **kw}
            block = Block(
                config.mixer or config.attention, ffn, config.norm, *sizes, **how
            )
            groups = self.num_layer_groups if part.name == "layers" else 1
            setattr(self, part.name, stack_layers(block, part.num_layers, groups))
        self.final_norm = Norm(config.norm, D, **kw) if config.final_norm else None

    @property
    def pipeline_schedule(self) -> Schedule | None:
        """Schedule of layers over pipeline stages; None: they are not pipelined."""
        return self.parallel.schedule if self.rules.layers else None

    @property
    def num_layer_groups(self) -> int:
        """Groups of layers a pipeline stage holds."""
        return self.parallel.layer_groups if self.pipeline_schedule == "circular" else 1

    @property
    def stacks(self) -> dict[str, Block]:
        """The stacks of layers by name."""
        return {
            part.name: getattr(self, part.name) for part in self.config.layer_stacks
        }

    def embed_inputs(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns embeddings of tokens [..., S, D] as the first layer's input."""
        config = self.config
        if config.embedding_scale != 1:
            x *= jnp.asarray(config.embedding_scale, x.dtype)
        if self.positions is not None:
            x += self.positions(positions + config.positions.offset)
        if config.positions.kind == "sinusoidal":
            x += compute_sinusoids(positions, config.d_model).astype(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def apply_final_norm(self, x: jax.Array) -> jax.Array:
        """Normalises the last layer's output."""
        return x if self.final_norm is None else self.final_norm(x)

    def run_layers(
        self,
        x: jax.Array,
        context: PositionsAndSegments,
        encoder_output: EncoderOutput | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Runs all layers, one after the other or in a pipeline; reverse-mode
        differentiable."""
        if self.pipeline_schedule is not None:
            return run_circular_pipeline(
                self.run_stage,
                get_values(self.stacks["layers"]),
                x,
                (context, jnp.arange(x.shape[0], dtype=jnp.uint32)),
                micro_batches=x.shape[0],
                groups=self.num_layer_groups,
            )
        total = Aux()
        for part in self.config.layer_stacks:
            x, aux = self._run(
                part, get_values(self.stacks[part.name]), x, context, encoder_output
            )
            total = total.plus(aux)
        return x, total

    def run_stage(
        self,
        layers: Params,
        x: jax.Array,
        context: tuple[PositionsAndSegments, jax.Array],
    ) -> tuple[jax.Array, Aux]:
        """Runs some layers of a pipeline on x [B, S, D]: those of ``layers``, or a part
        of them along the layer axis; ``context``: of the tokens, and the micro-batch's
        number, uint32."""
        tokens, micro_batch = context
        layers = seed_micro_batch(layers, micro_batch)
        part = next(part for part in self.config.layer_stacks if part.name == "layers")
        return self._run(part, layers, x, tokens, None)

    def _run(
        self,
        part: LayerStack,
        layers: Params,
        x: jax.Array,
        where: PositionsAndSegments,
        encoder_output: EncoderOutput | None,
    ) -> tuple[jax.Array, Aux]:
        def layer(number: int, block: Block, x: jax.Array, context: Any, shared: Any):
            kinds, segments = context
            biases, states = shared
            inputs = self._attention_inputs(part.kinds[number], kinds[number], biases)
            encoded = None if states is None else EncoderOutput(states, segments)
            x, _, aux = block(x, inputs, encoder_output=encoded)
            return x, aux

        bodies = [partial(layer, number) for number in range(len(part.kinds))]
        states: Any = encoder_output and encoder_output.states
        segments = encoder_output and encoder_output.segment_ids
        context = self._contexts(part, where), segments
        shared = self.relative_biases(), states
        if is_unstacked(layers):  # as inference holds them
            total = Aux()
            for number in range(part.num_layers):
                block = bind(self.stacks[part.name], take_stacked_layer(layers, number))
                x, aux = bodies[number % len(bodies)](block, x, context, shared)
                total = total.plus(aux)
            return x, total
        how: Any = {"dtype": self.dtype, "remat": self.config.remat}
        return scan_blocks(
            self.stacks[part.name], layers, bodies, x, context, shared, **how
        )

    def attention_inputs_by_kind(
        self, stack: LayerStack, batch: RaggedBatch
    ) -> list[AttentionInputs]:
        """Returns each kind of layer's inputs for a step of inference."""
        biases = self.relative_biases()
        where = (batch.positions, None)
        contexts = self._contexts(stack, where, batch.lengths)
        if get_platform() == "cpu":
            contexts = tuple(
                (*rest, turns and materialize_rotary(turns))
                for *rest, turns in contexts
            )
        return [
            self._attention_inputs(kind, context, biases)._replace(batch=batch)
            for kind, context in zip(stack.kinds, contexts, strict=True)
        ]

    def _contexts(
        self,
        part: LayerStack,
        where: PositionsAndSegments,
        lengths: jax.Array | None = None,
    ) -> tuple[Any, ...]:
        """Returns positions, segment ids and angles for each kind of layer."""
        turns = {
            kind.positions: self.rotary(kind, where[0], lengths) for kind in part.kinds
        }
        return tuple((*where, turns[kind.positions]) for kind in part.kinds)

    def _attention_inputs(
        self, kind: LayerKind, context: tuple[Any, Any, Any], biases: Any
    ) -> AttentionInputs:
        slopes = None
        config = self.config
        if config.positions.kind == "alibi":
            own = kind.positions or config.positions
            slopes = jnp.asarray(
                compute_alibi_slopes(config.attention.num_heads, own.max_bias)
            )
        scale = config.score_scale(kind)
        return AttentionInputs(
            *context, slopes, biases, scale, kind.window, self.causal
        )

    def rotary(
        self, kind: LayerKind, positions: jax.Array, lengths: jax.Array | None = None
    ) -> Rotary | None:
        """Returns the angles of positions, where the model turns queries and keys."""
        own = kind.positions or self.config.positions
        attention = self.config.attention
        if own.kind != "rope":
            return None
        size = own.rotary_dim or attention.head_dim
        size = attention.latent.rotary_dim if attention.latent else size
        how = (own.theta, own.scaling, accumulation_dtype(self.dtype))
        return compute_rotary(positions, size, *how, lengths=lengths)

    def relative_biases(self) -> jax.Array | None:
        """Returns terms added to scores by distance, fp32 [N, 2R+1], where they are
        learnt."""
        if self.relative is None:
            return None
        table = materialize(self.relative, self.rules, accumulation_dtype(self.dtype))
        return compute_relative_biases(table, self.config.positions, causal=self.causal)
