"""One dispatch of the engine as a pure function: tokens of many sequences in, their
next ones out.

The first b rows decode, G tokens each (the last one and drafts behind it), and up to F
prompts have a chunk of C tokens in all. Sizes are compiled in (:class:`StepSizes`);
everything else, lengths and settings of sampling included, is an array. Leading axes D
count shards of the batch.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from maxlm.inference.adapter_slots import add_adapters
from maxlm.inference.sampling import (
    TOP_LOGPROBS,
    RowSettings,
    TokenLogprobs,
    compute_logprobs,
    make_keys,
    process_logits,
    sample_tokens,
)
from maxlm.models.architectures import Decoder, EncoderDecoder
from maxlm.models.architectures.transformer import Caches, CrossAttentionCache
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.models.layers.linear import set_product
from maxlm.models.params import Params, bind
from maxlm.parallel.decode_kernels import DecodeKernels, PagedKernel
from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules

Array = Any
"""A NumPy array on the host, a jax.Array within a step."""
PROMPT_BLOCK = 32
"""Tokens of a prompt whose logits are held at once, where their log-probabilities are
wanted."""


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
    """int32 [D, b]: how many of ``tokens`` are a row's own; with several steps, how
    many of these it takes part in."""
    num_steps: Array
    """int32 []."""
    chunk_tokens: Array
    """int32 [D, C], chunk after chunk."""
    chunk_targets: Array
    """int32 [D, C]: the token that follows each of them, where its log-probability is
    wanted; -1: it is not."""
    chunk_rows: Array
    """int32 [D, F]."""
    chunk_starts: Array
    """int32 [D, F]: tokens of each chunk's sequence before it."""
    chunk_sizes: Array
    """int32 [D, F]; 0: there is no such chunk."""
    chunk_lengths: Array
    """int32 [D, F]: tokens of its sequence that are known, those behind it included."""
    page_tables: tuple[Array, ...]
    """int32 [D, R, M], for each window."""
    settings: RowSettings
    """[D, R]."""
    history: Array
    """int32 [D, R, T]: each row's tokens, where a setting of sampling looks at them."""
    prompt_lengths: Array
    """int32 [D, R]."""
    allowed: Array
    """uint32 [D, b·G + F, words]: tokens that grammars allow."""
    has_grammar: Array
    """bool []: whether ``allowed`` is to be looked at."""
    forced_tokens: Array
    """int32 [D, b·G + F]: results in place of drawn ones; -1: draw."""
    logprobs_wanted: Array
    """bool []."""
    adapter_masks: Array | None = None
    """bool [D, R, slots · rank]: columns of each row's adapter; None: the model has no
    slots."""


class StepOutputs(NamedTuple):
    """Arrays that the host reads; b·G + F results a step, those of chunks behind the
    rows'."""

    tokens: Array
    """int32 [steps, D, b·G + F]."""
    logprobs: TokenLogprobs
    """[steps, D, b·G + F, ...]."""
    prompt_logprobs: TokenLogprobs
    """[D, C, ...]."""


def make_ragged_batch(
    inputs: StepInputs,
    shape: StepSizes,
    layout: CacheLayout,
    windows: tuple[int | None, ...],
    rules: AxisRules,
    attention_kernel: PagedKernel | None = None,
) -> RaggedBatch:
    """Places a step's tokens in their sequences and pages."""
    b, G, C, F, _ = shape

    def local(*given):
        given = jax.tree.map(lambda x: x[0], given)
        computed, counts, rows, starts, sizes, lengths, page_tables = given
        offsets = jnp.arange(G, dtype=jnp.int32)
        live = (computed[:, None] >= 0) & (offsets < counts[:, None])
        positions = jnp.where(live, computed[:, None] + offsets, 0)
        live = live.reshape(-1)
        positions = positions.reshape(-1)
        known = positions + 1
        owner = jnp.repeat(jnp.arange(b, dtype=jnp.int32), G)
        ends = jnp.cumsum(sizes)
        if C:
            place = jnp.arange(C, dtype=jnp.int32)
            chunk = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
            inside = chunk < F
            chunk = jnp.minimum(chunk, F - 1)
            own = starts[chunk] + place - (ends - sizes)[chunk]
            live = jnp.concatenate([live, inside])
            positions = jnp.concatenate([positions, jnp.where(inside, own, 0)])
            known = jnp.concatenate([known, jnp.where(inside, lengths[chunk], 1)])
            owner = jnp.concatenate([owner, b + chunk])
        # A row has all of its G tokens for attention; keys behind its own are not
        # looked at.
        decoding = jnp.where(computed >= 0, computed + G, 0)
        kv_lengths = jnp.concatenate(
            [decoding, jnp.where(sizes > 0, starts + sizes, 0)]
        )
        query_starts = jnp.concatenate(
            [
                jnp.arange(b, dtype=jnp.int32) * G,
                b * G + ends - sizes,
                b * G + sizes.sum()[None],
            ]
        )
        tables, slots = [], []
        for window, table in zip(windows, page_tables, strict=True):
            table = jnp.pad(table, ((0, 0), (0, -(-(G - 1) // layout.page_size))))
            table = jnp.concatenate([table[:b], table[rows]])
            page = table[owner, positions // layout.page_size]
            slot = page * layout.page_size + positions % layout.page_size
            slots.append(
                jnp.where(live, slot, layout.count_pages(window) * layout.page_size)
            )
            tables.append(table)
        made = (
            positions,
            known,
            kv_lengths,
            query_starts,
            rows,
            tuple(tables),
            tuple(slots),
        )
        return jax.tree.map(lambda x: x[None].astype(jnp.int32), made)

    given = (
        inputs.computed,
        inputs.counts,
        inputs.chunk_rows,
        inputs.chunk_starts,
        inputs.chunk_sizes,
        inputs.chunk_lengths,
        inputs.page_tables,
    )
    shards = rules.spec("batch")
    made = map_shards(local, shards, shards)(*given)
    return RaggedBatch(
        *made,
        windows=windows,
        uniform_rows=(b, G),
        attention_kernel=attention_kernel,
    )


def _run_step(
    model: Decoder | EncoderDecoder,
    shape: StepSizes,
    layout: CacheLayout,
    windows: tuple[int | None, ...],
    vocab_size: int,
    params: Params,
    state: EngineState,
    inputs: StepInputs,
    adapters: Mapping[str, Sequence[jax.Array]] | None = None,
    *,
    kernels: DecodeKernels | None = None,
) -> tuple[EngineState, StepOutputs]:
    """Runs one dispatch.

    Args:
        layout: of ``state``'s caches.
        windows: the model's ``cache_windows``.
        vocab_size: ids that the tokenizer has; no other is drawn.
        params: as :func:`~maxlm.inference.params.prepare_params` returns them.
        adapters: A and B of all slots, as :func:`add_adapters` takes them.
        kernels: what it multiplies and attends with where they support it; None: what
            a forward pass in training does.
    """
    split = model.rules.spec("batch")
    whole = PartitionSpec()
    inputs = jax.tree.map(lambda x: reshard(x, split if x.ndim else whole), inputs)
    if kernels is not None:
        model = set_product(model, kernels.multiply)
    attention_kernel = None if kernels is None else kernels.attention
    adapted = bound = bind(model, params)
    if adapters is not None:
        mask = _spread_adapter_masks(inputs, shape, model.rules).astype(model.dtype)
        adapted = bind(model, add_adapters(params, adapters, mask))
    advance = partial(
        _run_once, adapted, shape, layout, windows, vocab_size, attention_kernel
    )
    if shape.max_steps == 1:
        state, hidden, step = advance(inputs, state)
        outputs = jax.tree.map(lambda x: x[None], step)
    else:
        state, outputs = _run_steps(advance, shape, inputs, state)
        hidden = None
    prompt = _compute_prompt_logprobs(bound, vocab_size, hidden, inputs)
    tokens, logprobs = outputs
    outputs = StepOutputs(tokens, logprobs, prompt)
    return state, jax.tree.map(lambda x: reshard(x, whole), outputs)


run_step = jax.jit(
    _run_step,
    static_argnums=(0, 1, 2, 3, 4),
    static_argnames="kernels",
    donate_argnums=6,
)
# A loop adds up few numbers faster than XLA's library for CPUs, and than the tree of
# two programs that the compiler makes of it.
_SUMS_AS_LOOPS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}
run_decoding_step = jax.jit(
    _run_step,
    static_argnums=(0, 1, 2, 3, 4),
    static_argnames="kernels",
    donate_argnums=6,
    compiler_options=_SUMS_AS_LOOPS,
)
"""The same, of a shape without chunks, on a CPU."""


def _spread_adapter_masks(
    inputs: StepInputs, shape: StepSizes, rules: AxisRules
) -> jax.Array:
    """Each token's mask, [D, b·G + C, slots · rank]."""
    b, G, C, F, _ = shape

    def local(masks, rows, sizes):
        masks, rows, sizes = masks[0], rows[0], sizes[0]
        owners = jnp.repeat(jnp.arange(b, dtype=jnp.int32), G)
        if C:
            chunks = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(C), side="right")
            owners = jnp.concatenate([owners, rows[jnp.minimum(chunks, F - 1)]])
        return masks[owners][None]

    shards = rules.spec("batch")
    given = inputs.adapter_masks, inputs.chunk_rows, inputs.chunk_sizes
    return map_shards(local, shards, shards)(*given)


def _run_once(
    bound, shape, layout, windows, vocab_size, attention_kernel, inputs, state
):
    """The caches, the chunks' hidden states [D, C, D], and (tokens, logprobs) of each
    result."""
    b, G, C, _, _ = shape
    rules = bound.rules
    D = inputs.computed.shape[0]
    batch = make_ragged_batch(inputs, shape, layout, windows, rules, attention_kernel)
    tokens = jnp.concatenate(
        [_merge(inputs.tokens, rules), inputs.chunk_tokens], axis=1
    )
    hidden, caches = bound.forward_with_cache(
        tokens, batch, state.caches, state.cross_cache
    )
    state = state._replace(caches=caches)
    # What is drawn from: every token of a decoding row, the last one of each chunk.
    rows = jnp.repeat(jnp.arange(b, dtype=jnp.int32), G)
    rows = jnp.broadcast_to(rows, (D, b * G), out_sharding=rules.spec("batch", None))
    rows = jnp.concatenate([rows, inputs.chunk_rows], axis=1)
    decoded, chunks = hidden[:, : b * G], hidden[:, b * G :]
    if C:
        last = jnp.maximum(jnp.cumsum(inputs.chunk_sizes, axis=1) - 1, 0)
        ends = jnp.take_along_axis(chunks, last[..., None], axis=1)
        decoded = jnp.concatenate([decoded, ends], axis=1)
    logits = bound.logits(decoded)
    offsets = jnp.arange(1, G + 1, dtype=jnp.int32)
    computed = inputs.computed[..., None]
    lengths = _merge(jnp.where(computed < 0, 0, computed + offsets), rules)
    lengths = jnp.concatenate(
        [lengths, inputs.chunk_starts + inputs.chunk_sizes], axis=1
    )

    def local(flags, *given):
        has_grammar, logprobs_wanted = flags
        logits, rows, lengths, settings, history, prompt_lengths, allowed, forced = (
            jax.tree.map(lambda x: x[0], given)
        )
        own = jax.tree.map(lambda x: x[rows], settings)
        processed = process_logits(
            logits,
            own,
            history[rows],
            prompt_lengths[rows],
            lengths,
            vocab_size=vocab_size,
            allowed=allowed,
            has_grammar=has_grammar,
        )
        # Where no sequence is, the length is 0, and nothing reads what is drawn.
        greedy = (own.temperature == 0) | (lengths == 0)
        drawn = sample_tokens(processed, make_keys(own, lengths), greedy)
        tokens = jnp.where(forced >= 0, forced, drawn)
        logprobs = compute_logprobs(
            logits, tokens, logprobs_wanted, vocab_size=vocab_size
        )
        return jax.tree.map(lambda x: x[None], (tokens, logprobs))

    shards = rules.spec("batch")
    given = (
        rows,
        lengths,
        inputs.settings,
        inputs.history,
        inputs.prompt_lengths,
        inputs.allowed,
    )
    given = *given, inputs.forced_tokens
    flags = inputs.has_grammar, inputs.logprobs_wanted
    specs = PartitionSpec(), *(shards,) * (1 + len(given))
    return state, chunks, map_shards(local, specs, shards)(flags, logits, *given)


def _run_steps(advance, shape: StepSizes, inputs: StepInputs, state: EngineState):
    """Steps of decoding rows, each with the token that the last one drew; a row whose
    output has ended writes nothing more."""
    b = shape.num_rows

    def body(carry):
        step, inputs, state, outputs = carry
        state, _, result = advance(inputs, state)
        outputs = jax.tree.map(
            lambda all_, own: lax.dynamic_update_index_in_dim(all_, own, step, 0),
            outputs,
            result,
        )
        tokens = result[0]
        stops = inputs.settings.stop_ids[:, :b]
        ended = jnp.any(tokens[..., None] == stops, axis=-1) | (
            inputs.counts <= step + 1
        )
        computed = jnp.where(ended, -1, inputs.computed + (inputs.computed >= 0))
        at = jnp.arange(inputs.history.shape[-1]) == computed[..., None]
        written = jnp.where(at, tokens[..., None], inputs.history[:, :b])
        inputs = inputs._replace(
            tokens=tokens[..., None],
            computed=computed,
            history=lax.dynamic_update_slice(inputs.history, written, (0, 0, 0)),
        )
        return step + 1, inputs, state, outputs

    _, _, one = jax.eval_shape(advance, inputs, state)
    empty = jax.tree.map(
        lambda x: jnp.zeros(
            (shape.max_steps, *x.shape),
            x.dtype,
            out_sharding=PartitionSpec(None, *x.sharding.spec),
        ),
        one,
    )
    start = jnp.zeros((), jnp.int32), inputs, state, empty
    _, _, state, outputs = lax.while_loop(
        lambda carry: carry[0] < inputs.num_steps, body, start
    )
    return state, outputs


def _compute_prompt_logprobs(bound, vocab_size, hidden, inputs) -> TokenLogprobs:
    """Log-probabilities of the tokens that follow those of the chunks, where they are
    wanted, [D, C, ...]; a block at a time, so that few logits are held, and no more
    blocks than these fill."""
    D, C = inputs.chunk_tokens.shape
    size = min(TOP_LOGPROBS, vocab_size)
    shapes: Any = (
        ((D, C), jnp.float32),
        ((D, C, size), jnp.int32),
        ((D, C, size), jnp.float32),
    )
    layout = bound.rules.spec("batch")
    none = TokenLogprobs(*(jnp.zeros(*s, out_sharding=layout) for s in shapes))
    if not C:
        return none
    block = min(PROMPT_BLOCK, C)
    wanted = inputs.chunk_targets >= 0
    order = jnp.argsort(~wanted, axis=1, stable=True)
    most = jnp.max(reshard(jnp.sum(wanted, axis=1), PartitionSpec()))

    def compute_block(carry):
        start, found = carry
        start = jnp.minimum(start, C - block)
        own = lax.dynamic_slice_in_dim(order, start, block, 1)
        targets = jnp.take_along_axis(inputs.chunk_targets, own, axis=1)
        logits = bound.logits(jnp.take_along_axis(hidden, own[..., None], axis=1))
        targets = jnp.maximum(targets, 0)
        logprobs = compute_logprobs(
            logits, targets, jnp.ones((), bool), vocab_size=vocab_size
        )
        write = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return start + block, jax.tree.map(write, found, logprobs)

    def compute_blocks(none):
        start = jnp.zeros((), jnp.int32)
        return lax.while_loop(
            lambda carry: carry[0] < most, compute_block, (start, none)
        )[1]

    # Of one block nothing changes from turn to turn, and XLA computes it before the
    # loop asks.
    found = lax.cond(most > 0, compute_blocks, lambda none: none, none)
    rank = jnp.maximum(jnp.cumsum(wanted, axis=1) - 1, 0)

    def pick(x: jax.Array) -> jax.Array:
        index = rank.reshape(D, C, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(pick, found)


def _merge(x: jax.Array, rules: AxisRules) -> jax.Array:
    """[D, b, G] → [D, b·G]."""
    return x.reshape(x.shape[0], -1, out_sharding=rules.spec("batch", None))
