"""Layers one after the other, with what stands before the first and after the last.

Shapes: M micro-batches of a pipeline, B batch, S sequence, T tokens of an encoder, D
model, N query heads, R the largest distance with a learnt bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.architectures.routes import join_routes, split_routes
from maxlm.models.architectures.runs import LayerPlace, LayerRun
from maxlm.models.aux import Aux
from maxlm.models.blocks import (
    BLOCKS,
    MIXERS,
    Block,
    Streams,
    build_block,
    get_kind,
)
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import RaggedBatch
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.frontends import InputVectors
from maxlm.models.layers.attention import AttentionInputs, EncoderOutput
from maxlm.models.layers.linear import Embedding
from maxlm.models.layers.norm import Norm
from maxlm.models.layers.positions import (
    PositionsConfig,
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
from maxlm.models.scan import (
    BlockTurn,
    LayerArrays,
    LayerResult,
    SharedKeys,
    StackedLayers,
    cast_matrices,
    scan_blocks,
)
from maxlm.parallel.config import ParallelConfig, Schedule
from maxlm.parallel.input_vectors import place_vectors
from maxlm.parallel.pipeline import run_circular_pipeline
from maxlm.sharding import AxisRules
from pallas_kernels.chips import get_platform


class TokenInputs(NamedTuple):
    """What layers read of the tokens."""

    positions: jax.Array
    """int [B, S]."""
    segment_ids: jax.Array | None = None
    """int [B, S], 0 for padding; None: each row is one segment."""
    routes: jax.Array | None = None
    """int [B, S, E, k], E layers with experts in their order: the experts of each
    token; -1: the layer's router chooses. None: it does for all."""


LayersFunction = Callable[[jax.Array, TokenInputs], tuple[jax.Array, Aux]]
"""What stands in place of :meth:`Trunk.run_layers` while a 1F1B pipeline runs a loss
without its layers (``optim/step.py``)."""


class KindContext(NamedTuple):
    """What layers of one kind read of the tokens."""

    positions: jax.Array
    """int [B, S]."""
    segment_ids: jax.Array | None
    """int [B, S]."""
    rotary: Rotary | None


class RunContext(NamedTuple):
    """Arrays that all layers of a run read, without gradient."""

    kinds: tuple[KindContext, ...]
    """One for each of ``LayerRun.kinds``: layer i is of kind i modulo their number."""
    encoder_segment_ids: jax.Array | None
    """int [B, T]."""


class RotarySettings(NamedTuple):
    """Settings that angles of positions follow from."""

    positions: PositionsConfig
    rotary_dim: int


class SharedArrays(NamedTuple):
    """Arrays that all layers of a run read, with a gradient."""

    biases: jax.Array | None
    """fp32 [N, 2R + 1], for key − query from −R to R."""
    encoder_states: jax.Array | None
    """[B, T, D]."""
    keys: SharedKeys
    """Keys and values that layers before the run have made."""
    blocks: Params
    """Parameters of the modules that several layers read, by name: of those that layers
    of the run do."""
    embeddings: jax.Array | None
    """[B, S, D], what has entered the first layer; None: no layer of the run reads
    it."""


class RunResult(NamedTuple):
    """What a run of layers hands on."""

    x: jax.Array
    aux: Aux
    keys: SharedKeys
    routes: dict[str, jax.Array | None]
    """By stack int32 [L, B, S, k]: experts of the layers' tokens; None: they are not
    recorded."""


class PreparedRun(NamedTuple):
    """What the layers of a run share, and how each kind of them is run."""

    context: RunContext
    shared: SharedArrays
    bodies: Sequence[Callable[[Block, jax.Array, LayerArrays], LayerResult]]
    """For each of ``LayerRun.kinds``."""


def _get_name_in_run(run_name: str, stack_name: str) -> str:
    """Returns ``full`` of the stack ``layers.full``."""
    return stack_name.removeprefix(f"{run_name}.")


def _join_stacks(run_name: str, stacks: dict[str, Block]) -> Block | nnx.Dict:
    """Returns the stacks of the runs of a name as one module: the only one as it is."""
    if run_name in stacks:
        return stacks[run_name]
    return nnx.Dict(
        {_get_name_in_run(run_name, name): block for name, block in stacks.items()}
    )


def _split_stacks(run: LayerRun, params: Params) -> dict[str, Params]:
    """Returns a run's parameters by stack, from those of all runs of its name."""
    return {
        stack.name: params
        if stack.name == run.name
        else params[_get_name_in_run(run.name, stack.name)]
        for stack in run.stacks
    }


def take_layer_input(layer_inputs: jax.Array | None, index: int) -> jax.Array | None:
    """Returns one layer's [B, S, P] of a stack's [L, B, S, P]."""
    return None if layer_inputs is None else layer_inputs[index]


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
        stacks_by_run_name: dict[str, dict[str, Block]] = {}
        for run in config.layer_runs:
            # A pipelined model has this run alone.
            num_groups = self.num_layer_groups if run.name == "layers" else 1
            stacked = stacks_by_run_name.setdefault(run.name, {})
            for stack in run.stacks:
                stack_context = replace(
                    context, layer_numbers=config.list_layer_numbers(stack.name)
                )
                block = build_block(
                    stack.block, stack_context, cross_attention=cross_attention
                )
                stacked[stack.name] = stack_layers(block, stack.num_layers, num_groups)
        for run_name, stacked in stacks_by_run_name.items():
            setattr(self, run_name, _join_stacks(run_name, stacked))
        self.shared_blocks = self._build_shared_blocks()
        self.final_norm = (
            Norm(config.norm, config.d_model, context) if config.final_norm else None
        )
        self.streams = self._build_streams()

    def _build_shared_blocks(self) -> nnx.Dict:
        """Builds the modules of weights that several layers read, by name."""
        modules: dict[str, nnx.Module] = {}
        for name, block in self.config.shared_blocks.items():
            assert block.mixer is not None
            registered = MIXERS.get(get_kind(block.mixer))
            assert registered.build_shared is not None
            modules[name] = registered.build_shared(
                block.mixer, block.norm, self.context
            )
        return nnx.Dict(modules)

    def _build_streams(self) -> Streams | None:
        config = self.config
        if config.block is None:
            return None
        registered = BLOCKS.get(get_kind(config.block))
        return registered.build_streams(config.block, config.norm, self.context)

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
        stacks: dict[str, Block] = {}
        for run in self.config.layer_runs:
            stacks |= self._get_run_stacks(run)
        return stacks

    def _get_run_module(self, run_name: str) -> Any:
        """Returns the module that holds all stacks of the runs of a name, or is the
        only one."""
        return getattr(self, run_name)

    def _get_run_stacks(self, run: LayerRun) -> dict[str, Block]:
        """Returns the stacks of a run by name."""
        module = self._get_run_module(run.name)
        return {
            stack.name: module
            if stack.name == run.name
            else module[_get_name_in_run(run.name, stack.name)]
            for stack in run.stacks
        }

    def embed_inputs(
        self, x: jax.Array, positions: jax.Array, vectors: InputVectors | None = None
    ) -> jax.Array:
        """Returns embeddings of tokens [..., S, D] as the first layer's input, with
        vectors in place of some."""
        config = self.config
        if config.embedding_scale != 1:
            # Rounded to the compute dtype, as Gemma's published code does.
            x *= jnp.asarray(config.embedding_scale, x.dtype)
        if vectors is not None:
            x = place_vectors(x, vectors.values, vectors.numbers)
        if self.positions is not None:
            x += self.positions(positions + config.positions.offset)
        if config.positions.kind == "sinusoidal":
            x += compute_sinusoids(positions, config.d_model).astype(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def expand_streams(self, x: jax.Array) -> jax.Array:
        """Returns embeddings as all residual streams of the first layer."""
        return x if self.streams is None else self.streams.expand(x)

    def apply_final_norm(self, x: jax.Array) -> jax.Array:
        """Normalises the last layer's output."""
        if self.streams is not None:
            x = self.streams.contract(x)
        return x if self.final_norm is None else self.final_norm(x)

    def run_layers(
        self,
        x: jax.Array,
        context: TokenInputs,
        encoder_output: EncoderOutput | None = None,
        layer_inputs: jax.Array | None = None,
        *,
        record_routes: bool = False,
    ) -> tuple[jax.Array, Aux]:
        """Runs all layers, one after the other or in a pipeline; reverse-mode
        differentiable.

        Args:
            x: [B, S, D], or of several streams [B, S, N, D]; in a pipeline [M, B, ...],
                and so are positions and segment ids.
            layer_inputs: [L, B, S, P], of layers that have such.
            record_routes: whether ``Aux.routes`` are returned; not in a pipeline.
        """
        if self.pipeline_schedule is not None:
            assert not record_routes
            micro_batches = x.shape[0]
            # Each micro-batch's number, which seeds what is random in its layers.
            indices = jnp.arange(micro_batches, dtype=jnp.uint32)
            return run_circular_pipeline(
                self.run_stage,
                get_values(self._get_run_module("layers")),
                x,
                (context, indices),
                micro_batches=micro_batches,
                groups=self.num_layer_groups,
            )
        total = Aux()
        keys: SharedKeys = {}
        embeddings = x
        routes: dict[str, jax.Array | None] = {}
        for run in self.config.layer_runs:
            params = get_values(self._get_run_module(run.name))
            result = self._run_layers_of(
                run,
                params,
                x,
                context,
                encoder_output,
                layer_inputs,
                keys,
                embeddings,
                split_routes(self.config, run, context.routes),
                record_routes=record_routes,
            )
            x = result.x
            keys = result.keys
            total = total.plus(result.aux)
            routes |= result.routes
        if record_routes:
            recorded = {
                name: array for name, array in routes.items() if array is not None
            }
            total = replace(total, routes=join_routes(self.config, recorded))
        return x, total

    def run_stage(
        self,
        layers: Params,
        x: jax.Array,
        context: tuple[TokenInputs, jax.Array],
        part: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        """Runs some layers of a pipeline on x [B, S, D].

        Args:
            layers: their parameters, a part of all along the layer axis.
            context: of the tokens, and the micro-batch's number, uint32.
            part: number of the part among all equal ones, in the order of layers.
        """
        tokens, micro_batch = context
        layers = seed_micro_batch(layers, micro_batch)
        run = next(run for run in self.config.layer_runs if run.name == "layers")
        routes = split_routes(self.config, run, tokens.routes)
        for name, stack_params in _split_stacks(run, layers).items():
            num_layers = jax.tree.leaves(stack_params)[0].shape[0]
            stack_routes = routes[name]
            if stack_routes is not None:
                routes[name] = lax.dynamic_slice_in_dim(
                    stack_routes, part * num_layers, num_layers
                )
        result = self._run_layers_of(
            run, layers, x, tokens, None, None, {}, None, routes
        )
        return result.x, result.aux

    def _run_layers_of(
        self,
        run: LayerRun,
        params: Params,
        x: jax.Array,
        tokens: TokenInputs,
        encoder_output: EncoderOutput | None,
        layer_inputs: jax.Array | None,
        keys: SharedKeys,
        embeddings: jax.Array | None,
        routes: dict[str, jax.Array | None],
        *,
        record_routes: bool = False,
    ) -> RunResult:
        """Runs the layers of a run one after the other, in a scan where their
        parameters are stacked. ``params``: those of all runs of its name, or of whole
        periods; ``keys``: what layers before it have made; ``embeddings``: what has
        entered the first of all layers; ``routes``: of these layers by stack, int [L,
        B, S, k]."""

        prepared = self._prepare_run(
            run, tokens, encoder_output, keys, embeddings, record_routes=record_routes
        )
        context = prepared.context
        shared = prepared.shared
        bodies = prepared.bodies
        blocks = self._get_run_stacks(run)
        inputs_by_stack = self.split_layer_inputs(run, layer_inputs)
        layers = {
            name: StackedLayers(stack_params, inputs_by_stack[name], routes[name])
            for name, stack_params in _split_stacks(run, params).items()
        }
        shared_kinds = self.config.shared_kinds

        if is_unstacked(params):  # as inference stores them
            total = Aux()
            new_keys = dict(keys)
            recorded: dict[str, list[jax.Array]] = {name: [] for name in blocks}
            for place in run.iterate_places():
                name = place.stack.name
                result = self._run_layer_at(
                    run,
                    place,
                    take_stacked_layer(layers[name].params, place.index),
                    x,
                    prepared,
                    new_keys,
                    take_layer_input(layers[name].layer_input, place.index),
                    take_layer_input(routes[name], place.index),
                )
                x = result.x
                if result.aux.routes is not None:
                    recorded[name].append(result.aux.routes)
                total = total.plus(replace(result.aux, routes=None))
                new_keys = self._add_new_keys(run, place, new_keys, result)
            routes_by_stack = {
                name: jnp.stack(arrays) if arrays else None
                for name, arrays in recorded.items()
            }
            return RunResult(x, total, new_keys, routes_by_stack)

        made_here = shared_kinds & set(run.kind_names)
        turns = []
        for index, stack in enumerate(run.turns):
            kind_name = run.kind_names[index]
            source = run.kinds[index].keys_of
            turns.append(
                BlockTurn(
                    stack,
                    bodies[index],
                    writes=kind_name if kind_name in made_here else None,
                    # What layers before the run have made is shared by all of it.
                    reads=source if source in made_here else None,
                )
            )
        names = [stack.name for stack in run.stacks]
        result = scan_blocks(
            [blocks[name] for name in names],
            [layers[name] for name in names],
            turns,
            x,
            context,
            shared,
            keys={name: keys[name] for name in made_here if name in keys},
            cast_shared=self._cast_shared,
            dtype=self.dtype,
            remat=self.config.remat,
        )
        carry = result.carry
        routes_by_stack = dict(zip(names, result.routes, strict=True))
        all_keys = {**keys, **carry.keys}
        return RunResult(carry.x, carry.total, all_keys, routes_by_stack)

    def _prepare_run(
        self,
        run: LayerRun,
        tokens: TokenInputs,
        encoder_output: EncoderOutput | None,
        keys: SharedKeys,
        embeddings: jax.Array | None,
        *,
        record_routes: bool = False,
    ) -> PreparedRun:
        """Returns what the layers of a run share, and how each kind of them is run."""

        def run_layer(
            kind_index: int, block: Block, x: jax.Array, arrays: LayerArrays
        ) -> LayerResult:
            context: RunContext = arrays.context
            shared: SharedArrays = arrays.shared
            kind = run.kinds[kind_index]
            inputs = self._make_attention_inputs(
                kind, context.kinds[kind_index], shared.biases
            )
            inputs = inputs._replace(routes=arrays.routes, record_routes=record_routes)
            if kind.keys_of is not None:
                keys_values = arrays.keys_values or shared.keys[kind.keys_of]
                inputs = inputs._replace(shared=keys_values)
            block_name = self.config.get_shared_block(kind)
            if block_name is not None:
                inputs = inputs._replace(
                    shared_block=bind(
                        self.shared_blocks[block_name], shared.blocks[block_name]
                    ),
                    embeddings=shared.embeddings,
                )
            encoded = None
            if shared.encoder_states is not None:
                encoded = EncoderOutput(
                    shared.encoder_states, context.encoder_segment_ids
                )
            output = block(
                x, inputs, encoder_output=encoded, layer_input=arrays.layer_input
            )
            return LayerResult(output.x, output.aux, output.keys_values)

        encoder_states = None
        encoder_segment_ids = None
        if encoder_output is not None:
            encoder_states = encoder_output.states
            encoder_segment_ids = encoder_output.segment_ids
        context = RunContext(self._list_contexts(run, tokens), encoder_segment_ids)
        shared_params = self._select_shared_blocks(run)
        shared = SharedArrays(
            self.compute_biases(),
            encoder_states,
            keys,
            shared_params,
            embeddings if shared_params else None,
        )
        # A kind's window and scale are compiled in, so each kind has a body of its own.
        bodies = [partial(run_layer, index) for index in range(len(run.kinds))]
        return PreparedRun(context, shared, bodies)

    def run_one_layer(
        self,
        run: LayerRun,
        place: LayerPlace,
        params: Params,
        x: jax.Array,
        tokens: TokenInputs,
        keys: SharedKeys,
        embeddings: jax.Array,
        layer_input: jax.Array | None = None,
        *,
        encoder_output: EncoderOutput | None = None,
    ) -> tuple[jax.Array, SharedKeys]:
        """Runs the layer at a place of a run alone, so that layers can be looked at or
        changed one after the other.

        Args:
            params: the layer's.
            x: [B, S, D], what the layer before returned.
            keys: what layers before it have made, {} for the first.
            embeddings: [B, S, D], what has entered the first layer.
            layer_input: [B, S, P], of layers that have such.

        Returns:
            What the next layer is given as x and keys.
        """
        prepared = self._prepare_run(run, tokens, encoder_output, keys, embeddings)
        result = self._run_layer_at(run, place, params, x, prepared, keys, layer_input)
        return result.x, self._add_new_keys(run, place, keys, result)

    def _run_layer_at(
        self,
        run: LayerRun,
        place: LayerPlace,
        params: Params,
        x: jax.Array,
        prepared: PreparedRun,
        keys: SharedKeys,
        layer_input: jax.Array | None,
        routes: jax.Array | None = None,
    ) -> LayerResult:
        kind = run.kinds[place.kind_index]
        keys_values = keys.get(kind.keys_of) if kind.keys_of else None
        arrays = LayerArrays(
            prepared.context, prepared.shared, layer_input, keys_values, routes
        )
        block = bind(self._get_run_stacks(run)[place.stack.name], params)
        return prepared.bodies[place.kind_index](block, x, arrays)

    def _add_new_keys(
        self, run: LayerRun, place: LayerPlace, keys: SharedKeys, result: LayerResult
    ) -> SharedKeys:
        """Adds the keys and values of a layer, if others read those of its kind."""
        kind_name = run.kind_names[place.kind_index]
        if kind_name not in self.config.shared_kinds or result.keys_values is None:
            return keys
        return {**keys, kind_name: result.keys_values}

    def _select_shared_blocks(self, run: LayerRun) -> Params:
        """Returns parameters of the shared modules that layers of a run read."""
        names = {self.config.get_shared_block(kind) for kind in run.kinds}
        return {
            name: get_values(module)
            for name, module in self.shared_blocks.items()
            if name in names
        }

    def _cast_shared(self, shared: SharedArrays) -> SharedArrays:
        """Casts the matrices of shared modules to the compute dtype."""

        def cast(matrix: jax.Array) -> jax.Array:
            return matrix.astype(self.dtype)

        blocks = {
            name: cast_matrices(self.shared_blocks[name], params, cast)
            for name, params in shared.blocks.items()
        }
        return shared._replace(blocks=blocks)

    def split_layer_inputs(
        self, run: LayerRun, layer_inputs: jax.Array | None
    ) -> dict[str, jax.Array | None]:
        """Returns those of a run's layers by stack, from all layers' [L, B, S, P]."""
        names = [stack.name for stack in run.stacks]
        if layer_inputs is None:
            return dict.fromkeys(names)
        return {
            name: layer_inputs[jnp.asarray(self.config.list_layer_numbers(name))]
            for name in names
        }

    def attention_inputs_by_kind(
        self, run: LayerRun, batch: RaggedBatch
    ) -> list[AttentionInputs]:
        """Returns each kind of layer's inputs for a step of inference."""
        biases = self.compute_biases()
        tokens = TokenInputs(batch.positions)
        contexts = self._list_contexts(run, tokens, batch.lengths)
        inputs = []
        for kind, context in zip(run.kinds, contexts, strict=True):
            if context.rotary is not None and get_platform() == "cpu":
                # Inference's layers are not in a loop: each would compute the cosines
                # anew.
                context = context._replace(rotary=materialize_rotary(context.rotary))
            kind_inputs = self._make_attention_inputs(kind, context, biases)
            inputs.append(kind_inputs._replace(batch=batch))
        return inputs

    def _list_contexts(
        self,
        run: LayerRun,
        tokens: TokenInputs,
        lengths: jax.Array | None = None,
    ) -> tuple[KindContext, ...]:
        """Returns positions, segment ids and angles for each kind of layer."""
        positions = tokens.positions
        segment_ids = tokens.segment_ids
        # Kinds of equal positions and heads share their angles, which are computed once.
        rotary_by_settings: dict[RotarySettings, Rotary] = {}
        contexts = []
        for kind in run.kinds:
            settings = self._get_rotary_settings(kind)
            rotary = None
            if settings is not None:
                rotary = rotary_by_settings.get(settings)
                if rotary is None:
                    rotary = self._compute_rotary(settings, positions, lengths)
                    rotary_by_settings[settings] = rotary
            contexts.append(KindContext(positions, segment_ids, rotary))
        return tuple(contexts)

    def _make_attention_inputs(
        self, kind: LayerKind, context: KindContext, biases: jax.Array | None
    ) -> AttentionInputs:
        config = self.config
        slopes = None
        positions = config.get_positions(kind)
        attention = config.get_attention(kind)
        if positions.kind == "alibi" and attention is not None:
            slopes = jnp.asarray(
                compute_alibi_slopes(attention.num_heads, positions.max_bias)
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

    def _get_rotary_settings(self, kind: LayerKind) -> RotarySettings | None:
        """Returns how layers of a kind turn queries and keys; None: they do not."""
        positions = self.config.get_positions(kind)
        attention = self.config.get_attention(kind)
        if positions.kind != "rope" or attention is None:
            return None
        if attention.latent:
            rotary_dim = attention.latent.rotary_dim
        else:
            rotary_dim = positions.rotary_dim or attention.head_dim
        return RotarySettings(positions, rotary_dim)

    def _compute_rotary(
        self,
        settings: RotarySettings,
        positions: jax.Array,
        lengths: jax.Array | None = None,
    ) -> Rotary:
        """Computes the angles of positions [B, S]."""
        return compute_rotary(
            positions,
            settings.rotary_dim,
            settings.positions.theta,
            settings.positions.scaling,
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
