"""Layers one after the other, with what stands before the first and after the last.

Shapes: M micro-batches of a pipeline, B batch, S sequence, T tokens of an encoder, D
model, N query heads, R the largest distance with a learnt bias.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maxlm.models.architectures.config import LayerKind, LayerStack, TransformerConfig
from maxlm.models.aux import Aux
from maxlm.models.blocks import Block, scan_blocks
from maxlm.models.build_context import BuildContext
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
"""Positions, int [B, S], and segment ids, int [B, S] with 0 for padding; None: each row
is one segment."""
LayersFunction = Callable[[jax.Array, PositionsAndSegments], tuple[jax.Array, Aux]]
"""What stands in place of :meth:`Trunk.run_layers` while a 1F1B pipeline runs a loss
without its layers (``optim/step.py``)."""


class KindContext(NamedTuple):
    """What layers of one kind read of the tokens."""

    positions: jax.Array
    """int [B, S]."""
    segment_ids: jax.Array | None
    """int [B, S]."""
    rotary: Rotary | None


class StackContext(NamedTuple):
    """Arrays that all layers of a stack read, without gradient."""

    kinds: tuple[KindContext, ...]
    """One for each of ``LayerStack.kinds``: layer i is of kind i modulo their
    number."""
    encoder_segment_ids: jax.Array | None
    """int [B, T]."""


class SharedArrays(NamedTuple):
    """Arrays that all layers of a stack read, with a gradient."""

    biases: jax.Array | None
    """fp32 [N, 2R + 1], for key − query from −R to R."""
    encoder_states: jax.Array | None
    """[B, T, D]."""


class Trunk(nnx.Module):
    """A transformer without its table of tokens and its head.

    Args:
        rules: compute layout of parameters and activations.
        dtype: compute dtype; parameters are fp32.
        parallel: methods by which attention and layers are split over devices.
        causal: whether tokens see those before them alone.
        cross_attention: whether layers look at an encoder's output as well.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
        causal: bool = True,
        cross_attention: bool = False,
    ):
        self.config = config
        self.rules = rules
        self.dtype = dtype
        self.parallel = parallel
        self.causal = causal
        context = BuildContext(
            rules=rules,
            dtype=dtype,
            d_model=config.d_model,
            num_layers=config.num_layers,
            init_std=config.init_std,
            parallel=parallel,
        )
        self.context = context
        self.positions = self._build_learned_positions()
        self.embedding_norm = (
            Norm(config.norm, config.d_model, context)
            if config.embedding_norm
            else None
        )
        self.relative = self._declare_relative_biases()
        mixer = config.mixer or config.attention
        for stack in config.layer_stacks:
            ffn = config.ffn or (config.mlp if stack.dense else config.moe)
            assert ffn is not None
            block = Block(
                mixer,
                ffn,
                config.norm,
                config.placement,
                context,
                cross_attention=cross_attention,
            )
            # A pipelined model has this stack alone.
            num_groups = self.num_layer_groups if stack.name == "layers" else 1
            layers = stack_layers(block, stack.num_layers, num_groups)
            setattr(self, stack.name, layers)
        self.final_norm = (
            Norm(config.norm, config.d_model, context) if config.final_norm else None
        )

    def _build_learned_positions(self) -> Embedding | None:
        positions = self.config.positions
        if positions.kind != "learned":
            return None
        num_rows = self.config.max_seq_len + positions.offset
        return Embedding(None, num_rows, self.context)

    def _declare_relative_biases(self) -> nnx.Param | None:
        """Declares the table [buckets, N] of biases by distance."""
        positions = self.config.positions
        if positions.kind != "relative":
            return None
        shape = (positions.buckets, self.config.attention.num_heads)
        init = truncated_normal(self.config.init_std)
        return declare(shape, (None, "heads"), init, "table")

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
            stack.name: getattr(self, stack.name) for stack in self.config.layer_stacks
        }

    def embed_inputs(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns embeddings of tokens [..., S, D] as the first layer's input."""
        config = self.config
        if config.embedding_scale != 1:
            # Rounded to the compute dtype, as Gemma's published code does.
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
        differentiable. x is [B, S, D], in a pipeline [M, B, S, D], and so are positions
        and segment ids."""
        if self.pipeline_schedule is not None:
            micro_batches = x.shape[0]
            # Each micro-batch's number, which seeds what is random in its layers.
            indices = jnp.arange(micro_batches, dtype=jnp.uint32)
            return run_circular_pipeline(
                self.run_stage,
                get_values(self.stacks["layers"]),
                x,
                (context, indices),
                micro_batches=micro_batches,
                groups=self.num_layer_groups,
            )
        total = Aux()
        for stack in self.config.layer_stacks:
            params = get_values(self.stacks[stack.name])
            x, aux = self._run_stack(stack, params, x, context, encoder_output)
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
        stack = next(
            stack for stack in self.config.layer_stacks if stack.name == "layers"
        )
        return self._run_stack(stack, layers, x, tokens, None)

    def _run_stack(
        self,
        stack: LayerStack,
        params: Params,
        x: jax.Array,
        tokens: PositionsAndSegments,
        encoder_output: EncoderOutput | None,
    ) -> tuple[jax.Array, Aux]:
        """Runs the layers of a stack one after the other, in a scan where their
        parameters are stacked."""

        def run_layer(
            kind_index: int,
            block: Block,
            x: jax.Array,
            context: StackContext,
            shared: SharedArrays,
        ) -> tuple[jax.Array, Aux]:
            inputs = self._make_attention_inputs(
                stack.kinds[kind_index], context.kinds[kind_index], shared.biases
            )
            encoded = None
            if shared.encoder_states is not None:
                encoded = EncoderOutput(
                    shared.encoder_states, context.encoder_segment_ids
                )
            x, _, aux = block(x, inputs, encoder_output=encoded)
            return x, aux

        # A kind's window and scale are compiled in, so each kind has a body of its own.
        bodies = [partial(run_layer, index) for index in range(len(stack.kinds))]
        encoder_states = None
        encoder_segment_ids = None
        if encoder_output is not None:
            encoder_states = encoder_output.states
            encoder_segment_ids = encoder_output.segment_ids
        context = StackContext(self._list_contexts(stack, tokens), encoder_segment_ids)
        shared = SharedArrays(self.compute_biases(), encoder_states)
        block = self.stacks[stack.name]

        if is_unstacked(params):  # as inference stores them
            total = Aux()
            for layer in range(stack.num_layers):
                bound = bind(block, take_stacked_layer(params, layer))
                x, aux = bodies[layer % len(bodies)](bound, x, context, shared)
                total = total.plus(aux)
            return x, total
        return scan_blocks(
            block,
            params,
            bodies,
            x,
            context,
            shared,
            dtype=self.dtype,
            remat=self.config.remat,
        )

    def attention_inputs_by_kind(
        self, stack: LayerStack, batch: RaggedBatch
    ) -> list[AttentionInputs]:
        """Returns each kind of layer's inputs for a step of inference."""
        biases = self.compute_biases()
        contexts = self._list_contexts(stack, (batch.positions, None), batch.lengths)
        inputs = []
        for kind, context in zip(stack.kinds, contexts, strict=True):
            if context.rotary is not None and get_platform() == "cpu":
                # Inference's layers are not in a loop: each would compute the cosines
                # anew.
                context = context._replace(rotary=materialize_rotary(context.rotary))
            kind_inputs = self._make_attention_inputs(kind, context, biases)
            inputs.append(kind_inputs._replace(batch=batch))
        return inputs

    def _list_contexts(
        self,
        stack: LayerStack,
        tokens: PositionsAndSegments,
        lengths: jax.Array | None = None,
    ) -> tuple[KindContext, ...]:
        """Returns positions, segment ids and angles for each kind of layer."""
        positions, segment_ids = tokens
        # Kinds of equal positions share their angles, which are computed once.
        rotary_by_positions = {
            kind.positions: self._compute_rotary(kind, positions, lengths)
            for kind in stack.kinds
        }
        return tuple(
            KindContext(positions, segment_ids, rotary_by_positions[kind.positions])
            for kind in stack.kinds
        )

    def _make_attention_inputs(
        self, kind: LayerKind, context: KindContext, biases: jax.Array | None
    ) -> AttentionInputs:
        config = self.config
        slopes = None
        if config.positions.kind == "alibi":
            positions = kind.positions or config.positions
            slopes = jnp.asarray(
                compute_alibi_slopes(config.attention.num_heads, positions.max_bias)
            )
        return AttentionInputs(
            positions=context.positions,
            segment_ids=context.segment_ids,
            rotary=context.rotary,
            slopes=slopes,
            biases=biases,
            scale=config.score_scale(kind),
            window=kind.window,
            causal=self.causal,
        )

    def _compute_rotary(
        self, kind: LayerKind, positions: jax.Array, lengths: jax.Array | None = None
    ) -> Rotary | None:
        """Computes the angles of positions [B, S], where the model turns queries and
        keys."""
        settings = kind.positions or self.config.positions
        if settings.kind != "rope":
            return None
        attention = self.config.attention
        if attention.latent:
            rotary_dim = attention.latent.rotary_dim
        else:
            rotary_dim = settings.rotary_dim or attention.head_dim
        return compute_rotary(
            positions,
            rotary_dim,
            settings.theta,
            settings.scaling,
            accumulation_dtype(self.dtype),
            lengths=lengths,
        )

    def compute_biases(self) -> jax.Array | None:
        """Returns terms added to scores by distance, fp32 [N, 2R + 1], where they are
        learnt."""
        if self.relative is None:
            return None
        table = materialize(self.relative, self.rules, accumulation_dtype(self.dtype))
        return compute_relative_biases(table, self.config.positions, causal=self.causal)
