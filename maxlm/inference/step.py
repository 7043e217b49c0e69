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
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from maxlm.inference.adapter_slots import add_adapters
from maxlm.inference.generative_model import GenerativeModel
from maxlm.inference.sampling import (
    TOP_LOGPROBS,
    Array,
    RowSettings,
    TokenLogprobs,
    compute_logprobs,
    compute_sampling_logits,
    make_keys,
    sample_tokens,
)
from maxlm.models.architectures.transformer import Caches, CrossAttentionCache
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.models.frontends import InputVectors
from maxlm.models.layers.linear import set_product
from maxlm.models.params import Params, bind
from maxlm.parallel.decode_kernels import DecodeKernels, PagedKernel
from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules

PROMPT_BLOCK = 32
"""Tokens of a prompt whose logits are held at once, where their log-probabilities are
requested."""


@dataclass(frozen=True)
class EngineSpec:
    """What all of an engine's programs are compiled for, whatever a step's sizes."""

    layout: CacheLayout
    """Of the caches."""
    windows: tuple[int | None, ...]
    """The windows of the page tables that steps are given, as
    :func:`~maxlm.models.caches.layout.list_paged_windows` returns them."""
    max_length: int
    """Tokens of the longest sequence, virtual ones included."""
    vocab_size: int
    """Ids that the tokenizer has; no other is drawn."""
    kernels: DecodeKernels | None = None
    """What steps multiply and attend with where they support it; None: what a forward
    pass in training does."""


class StepSizes(NamedTuple):
    """Sizes that a step is compiled for."""

    num_rows: int
    """b."""
    row_tokens: int
    """G."""
    chunk_tokens: int
    """C; 0: nothing is prefilled."""
    num_chunks: int
    """F."""
    max_steps: int
    """Tokens that rows may decode one after the other; 1 with chunks or drafts."""


class EngineState(NamedTuple):
    """Arrays that stay on the devices between steps; give them up to the step."""

    caches: Caches
    cross_cache: CrossAttentionCache | None


class StepInputs(NamedTuple):
    """Arrays that the host sends."""

    tokens: Array
    """int32 [D, b, G]."""
    computed: Array
    """int32 [D, b]: tokens of each row that its cache has; -1: no sequence decodes
    there."""
    counts: Array
    """int32 [D, b]: how many of the G ``tokens`` of each row are real; with several
    steps, how many of these the row takes part in."""
    num_steps: Array
    """int32 []."""
    chunk_tokens: Array
    """int32 [D, C], chunk after chunk."""
    chunk_targets: Array
    """int32 [D, C]: the token that follows each of them, where its log-probability is
    requested; -1: it is not."""
    chunk_rows: Array
    """int32 [D, F]: the row of each chunk's sequence."""
    chunk_starts: Array
    """int32 [D, F]: tokens of each chunk's sequence before it."""
    chunk_sizes: Array
    """int32 [D, F]; 0: there is no such chunk."""
    chunk_lengths: Array
    """int32 [D, F]: tokens of each chunk's sequence that are known, those after the
    chunk included; scaling of RoPE by a sequence's length reads it."""
    page_tables: tuple[Array, ...]
    """int32 [D, R, M], for each window."""
    settings: RowSettings
    """[D, R]."""
    history: Array
    """int32 [D, R, T]: each row's tokens, where a setting of sampling reads them;
    otherwise zeros."""
    prompt_lengths: Array
    """int32 [D, R]."""
    allowed: Array
    """uint32 [D, b·G + F, ⌈V / 32⌉]: tokens that grammars allow, a bit each."""
    has_grammar: Array
    """bool []: whether ``allowed`` is to be looked at."""
    forced_tokens: Array
    """int32 [D, b·G + F]: results in place of drawn ones; -1: draw."""
    needs_logprobs: Array
    """bool []."""
    adapter_masks: Array | None = None
    """bool [D, R, slots · rank]: columns of each row's adapter; None: the model has no
    slots."""
    chunk_vectors: jax.Array | None = None
    """[D, C, d_model] in the compute dtype: vectors in place of tokens of the chunks,
    at their places; None: the engine takes none, or there are no chunks."""
    chunk_vector_numbers: Array | None = None
    """int32 [D, C]: for each token of the chunks 1 + its place where it has a vector,
    else 0."""


class StepOutputs(NamedTuple):
    """Arrays that the host reads."""

    tokens: Array
    """int32 [steps, D, b·G + F]."""
    logprobs: TokenLogprobs
    """[steps, D, b·G + F, ...]."""
    prompt_logprobs: TokenLogprobs
    """[D, C, ...]."""


def make_ragged_batch(
    inputs: StepInputs,
    sizes: StepSizes,
    layout: CacheLayout,
    windows: tuple[int | None, ...],
    rules: AxisRules,
    attention_kernel: PagedKernel | None = None,
) -> RaggedBatch:
    """Places a step's tokens in their sequences and pages."""

    def place_tokens(*shard_inputs):
        # Each shard sees its part of the arrays with a leading axis of size 1.
        squeezed = jax.tree.map(lambda x: x[0], shard_inputs)
        placed = _place_shard_tokens(sizes, layout, windows, *squeezed)
        return jax.tree.map(lambda x: x[None].astype(jnp.int32), placed)

    by_shard = rules.spec("batch")
    placed = map_shards(place_tokens, by_shard, by_shard)(
        inputs.computed,
        inputs.counts,
        inputs.chunk_rows,
        inputs.chunk_starts,
        inputs.chunk_sizes,
        inputs.chunk_lengths,
        inputs.page_tables,
    )
    return RaggedBatch(
        *placed,
        windows=windows,
        uniform_rows=(sizes.num_rows, sizes.row_tokens),
        attention_kernel=attention_kernel,
    )


def _place_shard_tokens(
    sizes: StepSizes,
    layout: CacheLayout,
    windows: tuple[int | None, ...],
    computed: jax.Array,
    counts: jax.Array,
    chunk_rows: jax.Array,
    chunk_starts: jax.Array,
    chunk_sizes: jax.Array,
    chunk_lengths: jax.Array,
    page_tables: tuple[jax.Array, ...],
) -> tuple[jax.Array | tuple[jax.Array, ...], ...]:
    """The arrays of a :class:`RaggedBatch`, in its order, of one shard."""
    b, G, C, F, _ = sizes
    page_size = layout.page_size

    # Tokens of the decoding rows, G a row.
    offsets = jnp.arange(G, dtype=jnp.int32)
    is_real = (computed[:, None] >= 0) & (offsets < counts[:, None])
    positions = jnp.where(is_real, computed[:, None] + offsets, 0)
    is_real = is_real.reshape(-1)
    positions = positions.reshape(-1)
    # Of a decoding row, each token's sequence is known up to that token.
    lengths = positions + 1
    # Which of the b rows and F chunks each token belongs to.
    owner = jnp.repeat(jnp.arange(b, dtype=jnp.int32), G)

    # Tokens of the chunks behind them, then padding up to C: it is at position 0 of a
    # sequence of one token, and nothing reads its results.
    chunk_ends = jnp.cumsum(chunk_sizes)
    if C:
        places = jnp.arange(C, dtype=jnp.int32)
        chunk = _find_chunk_indices(chunk_ends, places)
        in_chunk = chunk < F
        chunk = jnp.minimum(chunk, F - 1)
        # A chunk's first token is at the chunk's start in its sequence.
        chunk_positions = chunk_starts[chunk] + places
        first_places = chunk_ends - chunk_sizes
        chunk_positions = chunk_positions - first_places[chunk]
        is_real = jnp.concatenate([is_real, in_chunk])
        positions = jnp.concatenate(
            [positions, jnp.where(in_chunk, chunk_positions, 0)]
        )
        lengths = jnp.concatenate(
            [lengths, jnp.where(in_chunk, chunk_lengths[chunk], 1)]
        )
        owner = jnp.concatenate([owner, b + chunk])

    # Attention counts all G tokens of a row as its queries; keys behind a row's real
    # tokens are masked by position.
    row_kv_lengths = jnp.where(computed >= 0, computed + G, 0)
    chunk_kv_lengths = jnp.where(chunk_sizes > 0, chunk_starts + chunk_sizes, 0)
    kv_lengths = jnp.concatenate([row_kv_lengths, chunk_kv_lengths])
    query_starts = jnp.concatenate(
        [
            jnp.arange(b, dtype=jnp.int32) * G,
            b * G + chunk_ends - chunk_sizes,
            b * G + chunk_sizes.sum()[None],
        ]
    )

    tables = []
    slots = []
    # kv_lengths count G tokens of every row: they may reach past the longest sequence's
    # last page.
    num_extra_pages = -(-(G - 1) // page_size)
    for window, table in zip(windows, page_tables, strict=True):
        table = jnp.pad(table, ((0, 0), (0, num_extra_pages)))
        table = jnp.concatenate([table[:b], table[chunk_rows]])
        page = table[owner, positions // page_size]
        slot = page * page_size + positions % page_size
        # A slot past the last page: what is written there is dropped.
        past_last_slot = layout.count_pages(window) * page_size
        slots.append(jnp.where(is_real, slot, past_last_slot))
        tables.append(table)
    return (
        positions,
        lengths,
        kv_lengths,
        query_starts,
        chunk_rows,
        tuple(tables),
        tuple(slots),
    )


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
        params: as :func:`~maxlm.inference.params.prepare_params` returns them.
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
    bound = base
    if adapters is not None:
        mask = _spread_adapter_masks(inputs, sizes, model.rules).astype(model.dtype)
        bound = bind(model, add_adapters(params, adapters, mask))
    advance = partial(_run_once, bound, spec, sizes)
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
    outputs = StepOutputs(drawn.tokens, drawn.logprobs, prompt_logprobs)
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
            chunk = _find_chunk_indices(chunk_ends, jnp.arange(C))
            rows = jnp.concatenate([rows, chunk_rows[jnp.minimum(chunk, F - 1)]])
        return masks[rows][None]

    by_shard = rules.spec("batch")
    return map_shards(spread, by_shard, by_shard)(
        inputs.adapter_masks, inputs.chunk_rows, inputs.chunk_sizes
    )


def _find_chunk_indices(chunk_ends: jax.Array, places: jax.Array) -> jax.Array:
    """Finds the chunk of each place among the C tokens of chunks: int32; F for padding
    behind the last chunk.

    Args:
        chunk_ends: the place where each chunk ends, int32 [F].
    """
    chunk = jnp.searchsorted(chunk_ends, places, side="right")
    return chunk.astype(jnp.int32)


class DrawnTokens(NamedTuple):
    """What one step draws."""

    tokens: jax.Array
    """int32 [D, b·G + F]."""
    logprobs: TokenLogprobs
    """[D, b·G + F, ...]."""


StepFunction = Callable[
    [StepInputs, EngineState], tuple[EngineState, jax.Array, DrawnTokens]
]
"""Returns the state, the hidden states [D, C, d_model] of the chunks, and what is
drawn."""


def _run_once(
    bound: GenerativeModel,
    spec: EngineSpec,
    sizes: StepSizes,
    inputs: StepInputs,
    state: EngineState,
) -> tuple[EngineState, jax.Array, DrawnTokens]:
    """A :data:`StepFunction` of a model with its parameters."""
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
    hidden, caches = bound.forward_with_cache(
        tokens, batch, state.caches, state.cross_cache, _get_vectors(inputs)
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

    def sample(flags, *shard_arrays):
        squeezed = jax.tree.map(lambda x: x[0], shard_arrays)
        drawn = _sample_shard(spec.vocab_size, flags, *squeezed)
        return jax.tree.map(lambda x: x[None], drawn)

    by_shard = rules.spec("batch")
    flags = inputs.has_grammar, inputs.needs_logprobs
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
    drawn = map_shards(sample, in_specs, by_shard)(flags, *arrays)
    return state, chunk_states, DrawnTokens(*drawn)


def _get_vectors(inputs: StepInputs) -> InputVectors | None:
    """Returns the vectors in place of a step's tokens [D, b·G + C]."""
    if inputs.chunk_vectors is None or inputs.chunk_vector_numbers is None:
        return None
    _, b, G = inputs.tokens.shape
    # Rows that decode have tokens alone.
    numbers = jnp.pad(inputs.chunk_vector_numbers, ((0, 0), (b * G, 0)))
    return InputVectors(inputs.chunk_vectors, numbers)


def _sample_shard(
    vocab_size: int,
    flags: tuple[jax.Array, jax.Array],
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
        flags: ``has_grammar`` and ``needs_logprobs`` of :class:`StepInputs`.
        logits: [results, V].
        rows, lengths: of each result, int32 [results].
        settings, history, prompt_lengths: of each row.
    """
    has_grammar, needs_logprobs = flags
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
    drawn = sample_tokens(processed, make_keys(settings, lengths), greedy)
    tokens = jnp.where(forced_tokens >= 0, forced_tokens, drawn)
    logprobs = compute_logprobs(logits, tokens, needs_logprobs, vocab_size=vocab_size)
    return tokens, logprobs


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
            logits, targets, jnp.ones((), bool), vocab_size=vocab_size
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
