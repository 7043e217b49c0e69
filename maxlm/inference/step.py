"""One dispatch of the engine as a pure function: tokens of many sequences in, their
next ones out.

The first b rows decode, G tokens each (the last one and drafts behind it), and up to F
prompts have a chunk of C tokens in all. Sizes are compiled in (:class:`StepSizes`);
everything else, lengths and settings of sampling included, is an array.

Shapes: D shards of the batch, R rows of a shard (the first b decode, the others wait or
are prefilled), M pages and T tokens of the longest sequence, V ids of the model's
vocabulary. A step has b·G + F results: a token drawn behind each of the rows' tokens,
then one behind each chunk.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from maxlm.inference.adapter_slots import add_adapters
from maxlm.inference.generative_model import GenerativeModel
from maxlm.inference.mtp_drafts import guess_ahead
from maxlm.inference.params import unstack_params
from maxlm.inference.sampling import (
    TOP_LOGPROBS,
    RowSettings,
    TokenLogprobs,
    compute_logprobs,
    compute_sampling_logits,
    make_keys,
    sample_tokens,
)
from maxlm.inference.step_arrays import (
    EngineSpec,
    EngineState,
    StepInputs,
    StepOutputs,
    StepSizes,
    find_chunk_indices,
    make_ragged_batch,
)
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.frontends import InputVectors
from maxlm.models.layers.linear import set_product
from maxlm.models.params import Params, bind
from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules

PROMPT_BLOCK = 32
"""Tokens of a prompt whose logits are held at once, where their log-probabilities are
requested."""


def _run_step(
    model: GenerativeModel,
    spec: EngineSpec,
    sizes: StepSizes,
    params: Params,
    state: EngineState,
    inputs: StepInputs,
    adapters: Mapping[str, Sequence[jax.Array]] | None = None,
) -> tuple[EngineState, StepOutputs]:
    """Runs one dispatch.

    Args:
        params: as :func:`~maxlm.inference.params.prepare_params` returns them, or with
            ``spec.shares_params`` as they are stored.
        adapters: A and B of all slots, as :func:`add_adapters` takes them.
    """
    by_shard = model.rules.spec("batch")
    replicated = PartitionSpec()
    inputs = jax.tree.map(
        lambda x: reshard(x, by_shard if x.ndim else replicated), inputs
    )
    if spec.kernels is not None:
        model = set_product(model, spec.kernels.multiply)
    base = bind(model, params)
    mask = None
    if adapters is not None:
        mask = _spread_adapter_masks(inputs, sizes, model.rules).astype(model.dtype)

    def advance(
        inputs: StepInputs, state: EngineState
    ) -> tuple[EngineState, jax.Array, DrawnTokens]:
        step_params = params
        if spec.shares_params:
            # They seem to change from step to step: otherwise what a layer gathers and
            # casts would be moved out of the loop over steps, and held for all layers.
            step_params, inputs = lax.optimization_barrier((params, inputs))
        step_base = bind(model, step_params)
        bound = step_base
        if adapters is not None:
            assert mask is not None
            if spec.shares_params:
                step_params = unstack_params(model, step_params)
            bound = bind(model, add_adapters(step_params, adapters, mask))
        return _run_once(bound, step_base, spec, sizes, inputs, state)

    if sizes.max_steps == 1:
        state, chunk_states, drawn = advance(inputs, state)
        drawn = jax.tree.map(lambda x: x[None], drawn)
    else:
        # Steps with chunks are never repeated, so that none is without its states.
        state, drawn = _run_steps(advance, sizes, inputs, state)
        chunk_states = None
    prompt_logprobs = _compute_prompt_logprobs(
        base, spec.vocab_size, chunk_states, inputs
    )
    drafts = None if drawn.drafts is None else drawn.drafts[-1]
    outputs = StepOutputs(
        drawn.tokens, drawn.logprobs, prompt_logprobs, drafts, drawn.routes
    )
    return state, jax.tree.map(lambda x: reshard(x, replicated), outputs)


run_step = jax.jit(
    _run_step, static_argnames=("model", "spec", "sizes"), donate_argnames="state"
)
# A decoding step's sums are of few numbers. One loop is faster for them than a call of
# XLA's library for CPUs (left to matrix products here), and than two programs, one that
# sums parts and one that sums their sums (the rewriter that is turned off).
_SUMS_AS_LOOPS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}
run_decoding_step = jax.jit(
    _run_step,
    static_argnames=("model", "spec", "sizes"),
    donate_argnames="state",
    compiler_options=_SUMS_AS_LOOPS,
)
"""The same for sizes without chunks, on a CPU."""


def _spread_adapter_masks(
    inputs: StepInputs, sizes: StepSizes, rules: AxisRules
) -> jax.Array:
    """Each token's mask, [D, b·G + C, slots · rank]."""
    b, G, C, F, _ = sizes

    def spread(masks, chunk_rows, chunk_sizes):
        masks, chunk_rows, chunk_sizes = masks[0], chunk_rows[0], chunk_sizes[0]
        rows = jnp.repeat(jnp.arange(b, dtype=jnp.int32), G)
        if C:
            chunk_ends = jnp.cumsum(chunk_sizes)
            chunk = find_chunk_indices(chunk_ends, jnp.arange(C))
            rows = jnp.concatenate([rows, chunk_rows[jnp.minimum(chunk, F - 1)]])
        return masks[rows][None]

    by_shard = rules.spec("batch")
    return map_shards(spread, by_shard, by_shard)(
        inputs.adapter_masks, inputs.chunk_rows, inputs.chunk_sizes
    )


class DrawnTokens(NamedTuple):
    """What one step draws."""

    tokens: jax.Array
    """int32 [D, b·G + F]."""
    logprobs: TokenLogprobs
    """[D, b·G + F, ...]."""
    drafts: jax.Array | None = None
    """int32 [D, b + F, drafts]: what modules of ``mtp`` guess to come next."""
    routes: jax.Array | None = None
    """[D, b·G + C, E, k]: the experts of the tokens that were read."""


StepFunction = Callable[
    [StepInputs, EngineState], tuple[EngineState, jax.Array, DrawnTokens]
]
"""Returns the state, the hidden states [D, C, d_model] of the chunks, and what is
drawn."""


def _run_once(
    bound: GenerativeModel,
    base: GenerativeModel,
    spec: EngineSpec,
    sizes: StepSizes,
    inputs: StepInputs,
    state: EngineState,
) -> tuple[EngineState, jax.Array, DrawnTokens]:
    """A :data:`StepFunction` of a model with its parameters; ``base`` is the same
    without adapters."""
    b, G, C, _, _ = sizes
    rules = bound.rules
    num_shards = inputs.computed.shape[0]
    batch = make_ragged_batch(
        inputs,
        sizes,
        spec.layout,
        spec.windows,
        rules,
        attention_kernel=None if spec.kernels is None else spec.kernels.attention,
    )
    row_tokens = _merge_row_tokens(inputs.tokens, rules)
    tokens = jnp.concatenate([row_tokens, inputs.chunk_tokens], axis=1)
    hidden, caches, routes = bound.run_with_cache(
        tokens,
        batch,
        state.caches,
        state.cross_cache,
        _get_vectors(inputs),
        record_routes=spec.record_routes,
    )
    state = state._replace(caches=caches)

    # A token is drawn behind every token of a decoding row, and behind the last one of
    # each chunk. The row of each of these results:
    rows = jnp.repeat(jnp.arange(b, dtype=jnp.int32), G)
    rows = jnp.broadcast_to(
        rows, (num_shards, b * G), out_sharding=rules.spec("batch", None)
    )
    rows = jnp.concatenate([rows, inputs.chunk_rows], axis=1)
    sampled_states = hidden[:, : b * G]
    chunk_states = hidden[:, b * G :]
    if C:
        last = jnp.maximum(jnp.cumsum(inputs.chunk_sizes, axis=1) - 1, 0)
        last_states = jnp.take_along_axis(chunk_states, last[..., None], axis=1)
        sampled_states = jnp.concatenate([sampled_states, last_states], axis=1)
    logits = bound.logits(sampled_states)

    # Tokens of the sequence before each result; 0 where no sequence decodes.
    offsets = jnp.arange(1, G + 1, dtype=jnp.int32)
    computed = inputs.computed[..., None]
    row_lengths = jnp.where(computed < 0, 0, computed + offsets)
    row_lengths = _merge_row_tokens(row_lengths, rules)
    chunk_lengths = inputs.chunk_starts + inputs.chunk_sizes
    lengths = jnp.concatenate([row_lengths, chunk_lengths], axis=1)

    drawn_tokens, logprobs = _sample(rules, spec, inputs, logits, rows, lengths)
    drafts = None
    if spec.num_mtp_drafts:
        assert isinstance(base, Decoder)
        caches, drafts = guess_ahead(
            base,
            spec,
            sizes,
            inputs,
            batch,
            hidden,
            drawn_tokens,
            state.caches,
            partial(_sample_drafts, rules, spec, inputs),
        )
        state = state._replace(caches=caches)
    return state, chunk_states, DrawnTokens(drawn_tokens, logprobs, drafts, routes)


def _sample(
    rules: AxisRules,
    spec: EngineSpec,
    inputs: StepInputs,
    logits: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, TokenLogprobs]:
    """Draws the tokens of a step's results; see :func:`_sample_shard`."""

    def sample(flags, *shard_arrays):
        squeezed = jax.tree.map(lambda x: x[0], shard_arrays)
        drawn = _sample_shard(spec, flags, *squeezed)
        return jax.tree.map(lambda x: x[None], drawn)

    by_shard = rules.spec("batch")
    flags = inputs.has_grammar, inputs.needs_logprobs, inputs.needs_top_logprobs
    arrays = (
        logits,
        rows,
        lengths,
        inputs.settings,
        inputs.history,
        inputs.prompt_lengths,
        inputs.allowed,
        inputs.forced_tokens,
    )
    in_specs = (PartitionSpec(), *(by_shard,) * len(arrays))
    return map_shards(sample, in_specs, by_shard)(flags, *arrays)


def _sample_drafts(
    rules: AxisRules,
    spec: EngineSpec,
    inputs: StepInputs,
    logits: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Draws a guess for each sequence, int32 [D, b + F], with the random numbers that
    the model will draw the token with; grammars, and tokens that the host does not know
    yet, are not looked at."""

    def sample(*shard_arrays):
        squeezed = jax.tree.map(lambda x: x[0], shard_arrays)
        return _draw_shard(spec.vocab_size, *squeezed)[None]

    by_shard = rules.spec("batch")
    arrays = (
        logits,
        rows,
        lengths,
        inputs.settings,
        inputs.history,
        inputs.prompt_lengths,
    )
    return map_shards(sample, (by_shard,) * len(arrays), by_shard)(*arrays)


def _get_vectors(inputs: StepInputs) -> InputVectors | None:
    """Returns the vectors in place of a step's tokens [D, b·G + C]."""
    if inputs.chunk_vectors is None or inputs.chunk_vector_numbers is None:
        return None
    _, b, G = inputs.tokens.shape
    # Rows that decode have tokens alone.
    numbers = jnp.pad(inputs.chunk_vector_numbers, ((0, 0), (b * G, 0)))
    return InputVectors(inputs.chunk_vectors, numbers)


def _sample_shard(
    spec: EngineSpec,
    flags: tuple[jax.Array, jax.Array, jax.Array],
    logits: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
    settings: RowSettings,
    history: jax.Array,
    prompt_lengths: jax.Array,
    allowed: jax.Array,
    forced_tokens: jax.Array,
) -> tuple[jax.Array, TokenLogprobs]:
    """Draws the tokens of one shard's results, and computes their log-probabilities.

    Args:
        flags: ``has_grammar``, ``needs_logprobs`` and ``needs_top_logprobs`` of
            :class:`StepInputs`.
        logits: [results, V].
        rows, lengths: of each result, int32 [results].
        settings, history, prompt_lengths: of each row.
    """
    has_grammar, needs_logprobs, needs_top_logprobs = flags
    drawn = _draw_shard(
        spec.vocab_size,
        logits,
        rows,
        lengths,
        settings,
        history,
        prompt_lengths,
        allowed=allowed,
        has_grammar=has_grammar,
    )
    tokens = jnp.where(forced_tokens >= 0, forced_tokens, drawn)
    logprobs = compute_logprobs(
        logits,
        tokens,
        needs_logprobs,
        needs_top_logprobs,
        vocab_size=spec.vocab_size,
        temperatures=settings.logprobs_temperature[rows],
        in_tiles=spec.batch_invariant,
    )
    return tokens, logprobs


def _draw_shard(
    vocab_size: int,
    logits: jax.Array,
    rows: jax.Array,
    lengths: jax.Array,
    settings: RowSettings,
    history: jax.Array,
    prompt_lengths: jax.Array,
    *,
    allowed: jax.Array | None = None,
    has_grammar: jax.Array | bool = False,
) -> jax.Array:
    """Draws the tokens of one shard's results, int32 [results]; arguments as those of
    :func:`_sample_shard`."""
    settings = jax.tree.map(lambda x: x[rows], settings)
    processed = compute_sampling_logits(
        logits,
        settings,
        history[rows],
        prompt_lengths[rows],
        lengths,
        vocab_size=vocab_size,
        allowed=allowed,
        has_grammar=has_grammar,
    )
    # Nothing reads what is drawn where no sequence is (length 0): greedy is cheapest.
    greedy = (settings.temperature == 0) | (lengths == 0)
    return sample_tokens(processed, make_keys(settings, lengths), greedy)


def _run_steps(
    advance: StepFunction, sizes: StepSizes, inputs: StepInputs, state: EngineState
) -> tuple[EngineState, DrawnTokens]:
    """Steps of decoding rows, each with the token that the last one drew; a row whose
    output has ended writes nothing more. What is drawn has an axis of steps in
    front."""
    b = sizes.num_rows

    def run_next(carry):
        step, inputs, state, outputs = carry
        state, _, drawn = advance(inputs, state)
        outputs = jax.tree.map(
            lambda stacked, x: lax.dynamic_update_index_in_dim(stacked, x, step, 0),
            outputs,
            drawn,
        )
        tokens = drawn.tokens
        stops = inputs.settings.stop_ids[:, :b]
        has_stopped = jnp.any(tokens[..., None] == stops, axis=-1)
        ended = has_stopped | (inputs.counts <= step + 1)
        # Rows without a sequence stay at −1.
        is_decoding = inputs.computed >= 0
        computed = jnp.where(ended, -1, inputs.computed + is_decoding)
        # The drawn token goes to the place behind those computed; at −1, nowhere.
        is_next_place = jnp.arange(inputs.history.shape[-1]) == computed[..., None]
        written = jnp.where(is_next_place, tokens[..., None], inputs.history[:, :b])
        inputs = inputs._replace(
            tokens=tokens[..., None],
            computed=computed,
            history=lax.dynamic_update_slice(inputs.history, written, (0, 0, 0)),
        )
        return step + 1, inputs, state, outputs

    def make_empty(x: jax.ShapeDtypeStruct) -> jax.Array:
        layout = PartitionSpec(None, *x.sharding.spec)
        return jnp.zeros((sizes.max_steps, *x.shape), x.dtype, out_sharding=layout)

    _, _, drawn = jax.eval_shape(advance, inputs, state)
    outputs = jax.tree.map(make_empty, drawn)
    start = jnp.zeros((), jnp.int32), inputs, state, outputs
    _, _, state, outputs = lax.while_loop(
        lambda carry: carry[0] < inputs.num_steps, run_next, start
    )
    return state, outputs


def _compute_prompt_logprobs(
    bound: GenerativeModel,
    vocab_size: int,
    chunk_states: jax.Array | None,
    inputs: StepInputs,
) -> TokenLogprobs:
    """Log-probabilities of the tokens that follow those of the chunks, where they are
    requested, [D, C, ...].

    Tokens with a target go first, in blocks of ``PROMPT_BLOCK``, so that few logits are
    held at once, and no more blocks are computed than these tokens fill.
    """
    D, C = inputs.chunk_tokens.shape
    num_top = min(TOP_LOGPROBS, vocab_size)
    by_shard = bound.rules.spec("batch")
    zeros = TokenLogprobs(
        chosen=jnp.zeros((D, C), jnp.float32, out_sharding=by_shard),
        top_ids=jnp.zeros((D, C, num_top), jnp.int32, out_sharding=by_shard),
        top=jnp.zeros((D, C, num_top), jnp.float32, out_sharding=by_shard),
    )
    if chunk_states is None or not C:
        return zeros
    block = min(PROMPT_BLOCK, C)
    has_target = inputs.chunk_targets >= 0
    order = jnp.argsort(~has_target, axis=1, stable=True)
    num_targets = jnp.max(reshard(jnp.sum(has_target, axis=1), PartitionSpec()))

    def compute_block(carry):
        start, logprobs = carry
        # The last block may overlap the one before: it computes the same values again.
        start = jnp.minimum(start, C - block)
        places = lax.dynamic_slice_in_dim(order, start, block, 1)
        targets = jnp.take_along_axis(inputs.chunk_targets, places, axis=1)
        states = jnp.take_along_axis(chunk_states, places[..., None], axis=1)
        logits = bound.logits(states)
        targets = jnp.maximum(targets, 0)
        block_logprobs = compute_logprobs(
            logits,
            targets,
            jnp.ones((), bool),
            inputs.needs_top_logprobs,
            vocab_size=vocab_size,
        )
        write = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return start + block, jax.tree.map(write, logprobs, block_logprobs)

    def compute_blocks(zeros):
        start = jnp.zeros((), jnp.int32)
        _, logprobs = lax.while_loop(
            lambda carry: carry[0] < num_targets, compute_block, (start, zeros)
        )
        return logprobs

    # The condition looks superfluous beside the loop's own. But where all tokens fit in
    # one block, nothing in the loop's body changes from turn to turn, and XLA hoists
    # it out of the loop: it would be computed in every step.
    logprobs = lax.cond(num_targets > 0, compute_blocks, lambda zeros: zeros, zeros)
    # Back from the order of blocks to that of tokens. One without a target gets the
    # values of the token with a target before it, which the host does not read.
    rank = jnp.maximum(jnp.cumsum(has_target, axis=1) - 1, 0)

    def restore_order(x: jax.Array) -> jax.Array:
        index = rank.reshape(D, C, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(restore_order, logprobs)


def _merge_row_tokens(x: jax.Array, rules: AxisRules) -> jax.Array:
    """[D, b, G] → [D, b·G]."""
    return x.reshape(x.shape[0], -1, out_sharding=rules.spec("batch", None))
