"""Arrays and sizes of one dispatch of the engine (:mod:`maxlm.inference.step`), and its
tokens' places in their sequences and pages.

Shapes: D shards of the batch, R rows of a shard (the first b decode, the others wait or
are prefilled), G tokens of a decoding row, F chunks of C tokens in all, M pages and T
tokens of the longest sequence, V ids of the model's vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.inference.sampling import Array, RowSettings, TokenLogprobs
from maxlm.models.architectures.transformer import Caches, CrossAttentionCache
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.parallel.decode_kernels import DecodeKernels, PagedKernel
from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules


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
    num_mtp_drafts: int = 0
    """Tokens that the model's modules of ``mtp`` guess behind each drawn one; 0: they
    are not run."""
    kernels: DecodeKernels | None = None
    """What steps multiply and attend with where they support it; None: what a forward
    pass in training does."""
    batch_invariant: bool = False
    """Whether all sums of a token have one order; then ``kernels`` do."""
    shares_params: bool = False
    """Whether steps read parameters as they are stored, and not as
    :func:`~maxlm.inference.params.prepare_params` lays them out."""
    record_routes: bool = False
    """Whether steps return the experts of their tokens."""


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
    needs_top_logprobs: Array
    """bool []: whether those of the likeliest tokens are needed too."""
    adapter_masks: Array | None = None
    """bool [D, R, slots · rank]: columns of each row's adapter; None: the model has no
    slots."""
    chunk_vectors: jax.Array | None = None
    """[D, C, d_model] in the compute dtype: vectors in place of tokens of the chunks,
    at their places; None: the engine takes none, or there are no chunks."""
    chunk_vector_numbers: Array | None = None
    """int32 [D, C]: for each token of the chunks 1 + its place where it has a vector,
    else 0."""
    chunk_following: Array | None = None
    """int32 [D, C, modules]: for each token of the chunks the one of its sequence that
    each module of ``mtp`` reads beside it, 1, 2, ... places ahead; -1 - i: the i-th
    behind those that are known. None: nothing is guessed so."""


class StepOutputs(NamedTuple):
    """Arrays that the host reads."""

    tokens: Array
    """int32 [steps, D, b·G + F]."""
    logprobs: TokenLogprobs
    """[steps, D, b·G + F, ...]."""
    prompt_logprobs: TokenLogprobs
    """[D, C, ...]."""
    drafts: Array | None = None
    """int32 [D, b + F, drafts]: what modules of ``mtp`` guess behind the token that is
    drawn last for each row, and for each chunk; None: there are none."""
    routes: Array | None = None
    """int8 or int16 [steps, D, b·G + C, E, k]: the experts of the tokens in the E
    layers that have some; None: they are not recorded."""


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
        chunk = find_chunk_indices(chunk_ends, places)
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


def find_chunk_indices(chunk_ends: jax.Array, places: jax.Array) -> jax.Array:
    """Finds the chunk of each place among the C tokens of chunks: int32; F for padding
    behind the last chunk.

    Args:
        chunk_ends: the place where each chunk ends, int32 [F].
    """
    chunk = jnp.searchsorted(chunk_ends, places, side="right")
    return chunk.astype(jnp.int32)
