"""A trunk with a table of tokens and an output head: what maxlm calls a model.

Shapes: B batch, S sequence, D model, V vocabulary, K kv heads, H head dim. In inference
a step's tokens are [shards of the batch, S]; see :mod:`maxlm.models.caches`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from jax.typing import DTypeLike

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.mtp import (
    MTP,
    AheadPrediction,
    AheadPredictions,
    MtpBlock,
    list_tokens_ahead,
)
from maxlm.models.architectures.routes import join_routes
from maxlm.models.architectures.trunk import (
    LayersFunction,
    TokenInputs,
    Trunk,
    take_layer_input,
)
from maxlm.models.aux import Aux
from maxlm.models.blocks import Block
from maxlm.models.caches import CacheLayout, LayerCache, RaggedBatch
from maxlm.models.caches.paged import CrossCache
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.frontends import FRONTENDS, Frontend, InputVectors
from maxlm.models.layer_inputs import LayerInputs
from maxlm.models.layers.attention import AttentionInputs, KeysValues
from maxlm.models.layers.linear import Embedding, Linear
from maxlm.models.params import (
    PackedParam,
    PackedWeight,
    ParamReader,
    Params,
    ShardedWeight,
    bind,
    declare,
    get_spec,
    get_values,
    materialize,
    read_weight,
    replace_virtual,
    stack_layers,
    take_stacked_layer,
)
from maxlm.models.remat import apply_remat
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.cross_entropy import LogitsInputs
from maxlm.parallel.linear import multiply_head, multiply_packed_head
from maxlm.parallel.local import make_spec
from maxlm.sharding import AxisRules

Caches = dict[str, tuple[LayerCache, ...]]
"""Each layer's cache, by stack; None: the layer keeps nothing."""


class CrossAttentionCache(NamedTuple):
    """Keys and values of encoders' outputs that a decoder's layers look up (inference);
    D and R as in :class:`~maxlm.models.caches.CacheLayout`."""

    keys_values: dict[str, tuple[KeysValues, ...]]
    """Each layer's keys and values, [D, R, T, K, H], by stack."""
    segment_ids: jax.Array
    """int32 [D, R, T]: 1 for an input's tokens, 0 behind them."""


class CachedOutput(NamedTuple):
    """What a step of inference computes of its tokens."""

    hidden: jax.Array
    """[D, S, D]."""
    caches: Caches
    """With the tokens in them."""
    routes: jax.Array | None = None
    """int8 or int16 [D, S, E, k]: their experts in the E layers that have some; None:
    they are not recorded."""


class Transformer(Trunk):
    """Maps tokens to hidden states to logits; arguments as those of :class:`Trunk`."""

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
        super().__init__(
            config,
            rules=rules,
            dtype=dtype,
            parallel=parallel,
            causal=causal,
            cross_attention=cross_attention,
        )
        vocab_size = config.vocab_size
        self.embedding = Embedding("vocab", vocab_size, self.context)
        self.head = None if config.tie_embeddings else self._build_head()
        self.head_bias = (
            declare((vocab_size,), ("vocab",), jax.nn.initializers.zeros, "vector")
            if config.head_bias
            else None
        )
        residual = {"embed": config.d_model}
        self.auxiliary: Mapping[str, Transformer] = nnx.Dict()
        """Models of their own that are trained beside this one
        (``Task.auxiliary_models``)."""
        self.heads = nnx.Dict(
            {
                name: Linear(
                    residual, {None: width}, self.context, bias=False, role="table"
                )
                for name, width in config.heads.items()
            }
        )
        self.layer_inputs = self._build_layer_inputs()
        self.frontend = self._build_frontend()
        self.mtp = self._build_mtp()
        self.layers_fn: LayersFunction | None = None
        self.num_virtual_tokens = 0

    def _build_head(self) -> Linear:
        residual = {"embed": self.config.d_model}
        vocabulary = {"vocab": self.config.vocab_size}
        return Linear(residual, vocabulary, self.context, bias=False, role="table")

    def _build_layer_inputs(self) -> LayerInputs | None:
        config = self.config
        if config.layer_inputs is None:
            return None
        return LayerInputs(
            config.layer_inputs, config.vocab_size, config.norm, self.context
        )

    def _build_mtp(self) -> MtpBlock | None:
        """Builds the modules that predict tokens further ahead, as one stack."""
        config = self.config
        if config.mtp is None:
            return None
        (run,) = config.mtp_runs
        (stack,) = run.stacks
        return stack_layers(MtpBlock(stack.block, self.context), stack.num_layers)

    @property
    def stacks(self) -> dict[str, Block]:
        """See :attr:`Trunk.stacks`; the modules of ``mtp`` are one more."""
        stacks = super().stacks
        if self.mtp is not None:
            stacks[MTP] = self.mtp
        return stacks

    def _build_frontend(self) -> Frontend | None:
        config = self.config.frontend
        if config is None:
            return None
        return FRONTENDS.get(config.kind).build(config, self.context)

    @property
    def trunks(self) -> dict[str, Trunk]:
        """All trunks, in the order in which they are run, by the prefix of their
        parameters."""
        return {"": self}

    def list_embedding_tables(self) -> dict[str, tuple[str, ...]]:
        """Lists the parameters in which rows are looked up, that of tokens first; each
        with the trunks whose tokens these are, by their prefixes."""
        tables: dict[str, tuple[str, ...]] = {"embedding.table": ("",)}
        if self.layer_inputs is not None:
            tables["layer_inputs.embedding.table"] = ("",)
        for prefix, trunk in self.trunks.items():
            if trunk.positions is not None:
                tables[f"{prefix}positions.table"] = (prefix,)
        return tables

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        vectors: InputVectors | None = None,
        routes: jax.Array | None = None,
        *,
        record_routes: bool = False,
    ) -> tuple[jax.Array, Aux]:
        """Hidden states after the final norm; for training, differentiable in reverse
        mode.

        Args:
            tokens: int [B, S]; on pipeline stages [M, B, S], M micro-batches.
            positions: likewise, restarting at 0 with each segment.
            segment_ids: likewise, 0 for padding; None: each row is one segment.
            vectors: in place of some tokens' embeddings; see :meth:`encode_items`.
            routes: int [B, S, E, k], on stages [M, ...]: the experts of each token in
                the E layers that have experts, in their order, in place of those that
                their routers would choose; -1: they choose. Weights are the routers'
                own (router replay, arXiv 2510.11370).
            record_routes: whether ``Aux.routes`` are the experts that tokens met; not
                on pipeline stages.

        Returns:
            [..., S, D] in the compute dtype, micro-batches split over stages; and what
            layers add.
        """
        x = self.embed(tokens, positions, vectors)
        context = TokenInputs(positions, segment_ids, routes)
        layer_inputs = None
        if self.layer_inputs is not None:
            layer_inputs = self.layer_inputs(tokens, x)
        if layer_inputs is None and not record_routes:
            return self._run_embedded(x, context)
        x = self.expand_streams(x)
        x, aux = self.run_layers(
            x, context, layer_inputs=layer_inputs, record_routes=record_routes
        )
        return self.apply_final_norm(x), aux

    def forward_embedded(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        """Computes hidden states of embedded inputs [..., S, D]."""
        return self._run_embedded(x, TokenInputs(positions, segment_ids))

    def _run_embedded(
        self, x: jax.Array, context: TokenInputs
    ) -> tuple[jax.Array, Aux]:
        run_layers = self.layers_fn or self.run_layers
        x, aux = run_layers(self.expand_streams(x), context)
        return self.apply_final_norm(x), aux

    def encode_items(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Maps a frontend's items to vectors for :class:`InputVectors`, in the compute
        dtype; differentiable in reverse mode.

        Args:
            arrays: by name, [B, I, ...]; on pipeline stages [M, B, I, ...], M
                micro-batches, which every stage computes.

        Returns:
            [B, N, D], or [M, B, N, D].
        """
        assert self.frontend is not None
        batch_shape = next(iter(arrays.values())).shape
        item_dims = len(batch_shape) - len(self._get_item_shape(arrays))
        if item_dims == 2:
            return self.frontend.encode(arrays)
        micro_batches, num_rows = batch_shape[:2]
        joined = {
            name: self._join_micro_batches(array) for name, array in arrays.items()
        }
        vectors = self.frontend.encode(joined)
        # [B · M, N, D] → [M, B, N, D]
        spec = self.rules.spec("batch", None, None, "embed")
        shape = (num_rows, micro_batches, *vectors.shape[1:])
        return vectors.reshape(shape, out_sharding=spec).swapaxes(0, 1)

    def _get_item_shape(self, arrays: Mapping[str, jax.Array]) -> tuple[int, ...]:
        """Returns the shape of an item in the first of the arrays."""
        assert self.config.frontend is not None
        return self.config.frontend.item_arrays()[next(iter(arrays))].shape

    def _join_micro_batches(self, array: jax.Array) -> jax.Array:
        """[M, B, ...] → [B · M, ...]: the axis that is split stands first, so that no
        row moves."""
        array = array.swapaxes(0, 1)
        shape = (array.shape[0] * array.shape[1], *array.shape[2:])
        spec = self.rules.spec("batch", *(None,) * (len(shape) - 1))
        return array.reshape(shape, out_sharding=spec)

    def embed(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        vectors: InputVectors | None = None,
    ) -> jax.Array:
        """Embeds tokens as the first layer's input, with vectors in place of some."""
        if tokens.ndim == 3:  # outside the layers, stages are one more data axis
            split = self.rules.spec("layers", "batch", "seq")
            tokens = reshard(tokens, split)
            positions = reshard(positions, split)
        x = self.embedding(tokens)
        x = replace_virtual(self.embedding.table, x, positions, self.rules)
        return self.embed_inputs(x, positions, vectors)

    def cache_specs(self, layout: CacheLayout) -> Caches:
        """Returns each layer's ``Mixer.cache_spec``."""
        specs: Caches = {}
        stacks = self.stacks
        layer_stacks = list(self.config.layer_stacks)
        if layout.num_mtp_modules:
            (run,) = self.config.mtp_runs
            (stack,) = run.stacks
            layer_stacks.append(stack._replace(num_layers=layout.num_mtp_modules))
        for stack in layer_stacks:
            mixer = stacks[stack.name].mixer
            if mixer is None:
                specs[stack.name] = (None,) * stack.num_layers
                continue
            num_periods = stack.num_layers // len(stack.kinds)
            specs[stack.name] = tuple(
                mixer.cache_spec(layout, kind.window)
                for kind in stack.kinds * num_periods
            )
        return specs

    def forward_with_cache(
        self,
        tokens: jax.Array,
        batch: RaggedBatch,
        caches: Caches,
        cross_cache: CrossAttentionCache | None = None,
        vectors: InputVectors | None = None,
    ) -> tuple[jax.Array, Caches]:
        """Computes, for inference, hidden states [D, S, D] of tokens int [D, S] that
        follow the caches', with vectors in place of some; and the caches with them in
        it."""
        output = self.run_with_cache(tokens, batch, caches, cross_cache, vectors)
        return output.hidden, output.caches

    def run_with_cache(
        self,
        tokens: jax.Array,
        batch: RaggedBatch,
        caches: Caches,
        cross_cache: CrossAttentionCache | None = None,
        vectors: InputVectors | None = None,
        *,
        record_routes: bool = False,
    ) -> CachedOutput:
        """Does what :meth:`forward_with_cache` does; ``record_routes``: whether the
        experts of tokens are returned, too. Layers are not scanned: a loop over them
        would copy each one's weights and cache out of their stacks, at every token."""
        x = self.embed(tokens, batch.positions, vectors)
        layer_inputs = None
        if self.layer_inputs is not None:
            layer_inputs = self.layer_inputs(tokens, x)
        embeddings = x
        x = self.expand_streams(x)
        stacks = self.stacks
        shared_kinds = self.config.shared_kinds
        shared_caches: dict[str, LayerCache] = {}
        new_caches: dict[str, list[LayerCache]] = {}
        routes: dict[str, list[jax.Array]] = {}
        for run in self.config.layer_runs:
            inputs_by_kind = self.attention_inputs_by_kind(run, batch)
            params_by_stack = {
                stack.name: get_values(stacks[stack.name]) for stack in run.stacks
            }
            inputs_by_stack = self.split_layer_inputs(run, layer_inputs)
            for place in run.iterate_places():
                name = place.stack.name
                source = run.kinds[place.kind_index].keys_of
                cache = caches[name][place.index]
                if source is not None:
                    # It has these tokens: the layer that it is of has run.
                    cache = shared_caches[source]
                encoded = None
                if cross_cache is not None:
                    key, value = cross_cache.keys_values[name][place.index]
                    encoded = CrossCache(key, value, cross_cache.segment_ids)
                inputs = inputs_by_kind[place.kind_index]
                block_name = self.config.get_shared_block(run.kinds[place.kind_index])
                shared_block = None
                if block_name is not None:
                    inputs = inputs._replace(embeddings=embeddings)
                    shared_block = self.shared_blocks[block_name]
                inputs = inputs._replace(record_routes=record_routes)
                settings, arrays = split_static_inputs(inputs)
                params = take_stacked_layer(params_by_stack[name], place.index)
                x, cache, layer_routes = run_cached_block(
                    stacks[name],
                    settings,
                    shared_block,
                    params,
                    None if shared_block is None else get_values(shared_block),
                    x,
                    arrays,
                    cache,
                    encoded,
                    take_layer_input(inputs_by_stack[name], place.index),
                )
                if layer_routes is not None:
                    routes.setdefault(name, []).append(layer_routes)
                if source is not None:
                    cache = caches[name][place.index]  # an empty tree
                kind_name = run.kind_names[place.kind_index]
                if kind_name in shared_kinds:
                    shared_caches[kind_name] = cache
                new_caches.setdefault(name, []).append(cache)
        # Those of mtp's modules stay: predict_ahead_with_cache advances them.
        caches = caches | {name: tuple(layers) for name, layers in new_caches.items()}
        all_routes = join_routes(self.config, routes) if record_routes else None
        return CachedOutput(self.apply_final_norm(x), caches, all_routes)

    def predict_ahead_with_cache(
        self,
        module: int,
        hidden: jax.Array,
        tokens: jax.Array,
        batch: RaggedBatch,
        caches: Caches,
    ) -> tuple[jax.Array, Caches]:
        """Runs one of the modules of ``mtp``, for inference.

        Args:
            module: its number, from 0.
            hidden: [D, S, D], behind the final norm or the module before.
            tokens: int [D, S]: the tokens ``module`` + 1 places ahead.
            batch: of the tokens that ``hidden`` is of.
            caches: of a layout in which the module has one.

        Returns:
            Hidden states [D, S, D] for the model's head, which tell the tokens one
            place further ahead; and the caches with these tokens in the module's.
        """
        assert self.mtp is not None
        (run,) = self.config.mtp_runs
        (inputs,) = self.attention_inputs_by_kind(run, batch)
        embedded = self.embed(tokens, batch.positions)
        block = bind(self.mtp, take_stacked_layer(get_values(self.mtp), module))
        x = block.join_inputs(hidden, embedded)
        layers = list(caches[MTP])
        output = block(x, inputs, layers[module])
        layers[module] = output.cache
        return block.output_norm(output.x), caches | {MTP: tuple(layers)}

    def predict_ahead(
        self,
        hidden: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        targets: jax.Array,
        weights: jax.Array,
    ) -> AheadPredictions | None:
        """Runs the modules of ``mtp``, for training; differentiable in reverse mode.

        Args:
            hidden: [B, S, D], behind the final norm.
            targets: int [B, S]: the token after each.
            weights: fp32 [B, S]: of its loss.

        Returns:
            Each module's prediction; None: the model has no modules.
        """
        config = self.config.mtp
        if self.mtp is None or config is None:
            return None
        steps = list_tokens_ahead(
            targets,
            weights,
            segment_ids,
            config.num_modules,
            self.rules,
            balanced=self.parallel.balance_sequence,
        )
        (run,) = self.config.mtp_runs
        biases = self.compute_biases()
        tokens = TokenInputs(positions, segment_ids)
        (context,) = self._list_contexts(run, tokens)
        inputs = self._make_attention_inputs(run.kinds[0], context, biases)
        params = get_values(self.mtp)

        def run_module(
            params: Params, hidden: jax.Array, embedded: jax.Array
        ) -> tuple[jax.Array, Aux]:
            assert self.mtp is not None
            block = bind(self.mtp, params)
            x = block.join_inputs(hidden, embedded)
            output = block(x, inputs)
            return block.output_norm(output.x), output.aux

        run_module = apply_remat(run_module, self.config.remat, is_loop_body=False)
        predictions = []
        total = Aux()
        for index, step in enumerate(steps):
            embedded = self.embed(step.inputs, positions)
            module_params = take_stacked_layer(params, index)
            hidden, aux = run_module(module_params, hidden, embedded)
            total = total.plus(aux)
            predictions.append(AheadPrediction(hidden, step.targets, step.weights))
        return AheadPredictions(tuple(predictions), config.loss_weight, total)

    def prepare_logits(self, hidden: jax.Array) -> LogitsInputs:
        """Returns the maps from hidden states to logits; training fuses them with the
        loss."""
        wide = accumulation_dtype(self.dtype)
        hidden = self._scale_to_logits(hidden)
        bias = None
        if self.head_bias is not None:
            bias = read_weight(self.head_bias, self.rules, wide).value
        kernel = read_weight(self._head_param, self.rules, self.dtype)
        if self.head is None:
            # A tied head is the table [V, D] transposed.
            gathered = None if kernel.gathered is None else kernel.gathered.T
            layout = kernel.compute_layout[::-1]
            kernel = ShardedWeight(kernel.value.T, layout, gathered)
        return LogitsInputs(
            hidden,
            head=kernel.value,
            head_layout=kernel.compute_layout,
            gathered_head=kernel.gathered,
            bias=bias,
            soft_cap=self.config.logit_cap,
            product=(self.head or self.embedding).product,
        )

    @property
    def _head_param(self) -> nnx.Param:
        """The output head [D, V], or the table [V, D] that it is tied to."""
        return self.embedding.table if self.head is None else self.head.kernel

    def _read_packed_head(self) -> PackedWeight | None:
        """Returns the output head where it is packed, and no adapter changes it."""
        stored = self._head_param.get_value()
        if not isinstance(stored, PackedParam):
            return None
        spec = get_spec(self._head_param)
        weight = stored.read_kernel(ParamReader(spec, self.rules, self.dtype))
        assert isinstance(weight, PackedWeight)
        return weight

    def _scale_to_logits(self, hidden: jax.Array) -> jax.Array:
        """Returns hidden states whose products with the head are logits."""
        scale = self.config.logit_scale
        if scale == 1:
            return hidden
        # Scaled hidden states give scaled logits, and are far fewer.
        wide = accumulation_dtype(self.dtype)
        return (hidden.astype(wide) * scale).astype(hidden.dtype)

    def apply_head(self, name: str, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., S, D] by one of ``config.heads`` → fp32 [..., S,
        width]."""
        dtype = accumulation_dtype(self.dtype)
        kernel = materialize(self.heads[name].kernel, self.rules, dtype)
        return jnp.matmul(hidden.astype(dtype), kernel, precision="highest")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [B, S, D] → fp32 logits [B, S, V] (inference)."""
        dtype = accumulation_dtype(self.dtype)
        spec = self.rules.spec("batch", "seq", "vocab")
        packed = self._read_packed_head()
        if packed is not None:
            hidden = self._scale_to_logits(hidden)
            logits = multiply_packed_head(
                hidden, packed.arrays, packed.operand, spec, dtype
            )
        else:
            head = self.prepare_logits(hidden)
            kernel = reshard(head.head, make_spec(head.head_layout))
            logits = multiply_head(
                head.hidden,
                kernel,
                spec,
                dtype,
                product=head.product,
                column_major=self.head is None,
            )
        if self.head_bias is not None:
            bias = read_weight(self.head_bias, self.rules, dtype).value
            logits += reshard(bias, self.rules.spec("vocab"))
        cap = self.config.logit_cap
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return reshard(logits, self.rules.spec("batch", "seq", None))


class BlockSettings(NamedTuple):
    """The fields of :class:`AttentionInputs` that are no arrays."""

    scale: float
    window: int | None
    causal: bool
    record_routes: bool


def split_static_inputs(
    inputs: AttentionInputs,
) -> tuple[BlockSettings, AttentionInputs]:
    """Splits inputs into what a program is compiled for and arrays."""
    settings = BlockSettings(
        inputs.scale, inputs.window, inputs.causal, inputs.record_routes
    )
    arrays = inputs._replace(**dict.fromkeys(BlockSettings._fields))
    return settings, arrays


# Layers alike are traced once, which is half of the time that a program of many layers
# takes to build; inlined, so that the compiler sees the same program as without.
@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def run_cached_block(
    block: Block,
    settings: BlockSettings,
    shared_block: nnx.Module | None,
    params: Params,
    shared_params: Params | None,
    x: jax.Array,
    arrays: AttentionInputs,
    cache: LayerCache,
    encoder_output: CrossCache | None,
    layer_input: jax.Array | None,
) -> tuple[jax.Array, LayerCache, jax.Array | None]:
    """Runs one layer with its cache, for inference.

    Args:
        block: the stack that the layer is of.
        settings: stand in for those fields of ``arrays``, which are None there.
        shared_block: the module of weights that the layer shares, if it does.
        params: the layer's own.
        shared_params: those of ``shared_block``.
        x: [shards of the batch, S, D], or of several streams [..., N, D].
        layer_input: [shards of the batch, S, P], of a layer that has one.

    Returns:
        x behind the layer, the cache with the tokens in it, and where they are
        recorded the tokens' experts, int32 [shards of the batch, S, k].
    """
    inputs = arrays._replace(**settings._asdict())
    if shared_block is not None:
        assert shared_params is not None
        inputs = inputs._replace(shared_block=bind(shared_block, shared_params))
    output = bind(block, params)(x, inputs, cache, encoder_output, layer_input)
    return output.x, output.cache, output.aux.routes


class DecoderConfig(TransformerConfig):
    """A causal decoder; see configs/models for published sizes."""

    architecture: Literal["decoder"] = "decoder"
    transformer_type = "decoder"

    def build(
        self,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ) -> "Decoder":
        """Builds the model; arguments as those of :class:`Transformer`."""
        return Decoder(self, rules=rules, dtype=dtype, parallel=parallel)


class Decoder(Transformer):
    """A transformer that continues its input."""

    config: DecoderConfig
