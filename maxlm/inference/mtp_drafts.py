"""Tokens that a model's modules of ``mtp`` guess within a step, for the next one to
verify (DeepSeek-V3, arXiv 2412.19437, §5.4.3).

Behind the model's own pass each module runs over all tokens of the step, as in
training: module k reads, beside what stands behind the layers (or the module before)
at a place, the token k places ahead, and tells the one after that. At a sequence's last
token, module 1 reads the token that was just drawn and guesses the next, module 2 reads
that guess, and so on. Guesses beyond the modules' number are made by the last module:
it reads its own output and guess, one place further on.

A module keeps keys and values in pages of its own, on the model's page tables. Tokens
that were guessed and not drawn are overwritten as those of the model are. Two entries
are not exactly those of a training pass, and affect guesses alone: at the end of a
shared prefix, the token ahead may be that of the sequence that computed it; and modules
behind the first keep the guess that they read at a step's last tokens, where it was not
what came.

Shapes: as in :mod:`maxlm.inference.step_arrays`; n = b + F sequences, S = b·G + C
tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.inference.step_arrays import (
    EngineSpec,
    StepInputs,
    StepSizes,
    find_chunk_indices,
    make_ragged_batch,
)
from maxlm.models.architectures.transformer import Caches, Decoder
from maxlm.models.caches import RaggedBatch
from maxlm.parallel.local import map_shards

DraftSampler = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Draws a token for each sequence of logits [D, n, V], the rows int32 [D, n] and the
tokens before it int32 [D, n]."""


class SequenceEnds(NamedTuple):
    """Of each sequence of a step, its last token that stays."""

    places: jax.Array
    """int32 [D, n]: its place among the S tokens."""
    positions: jax.Array
    """int32 [D, n]: its position in the sequence; -1: there is no sequence."""
    next_tokens: jax.Array
    """int32 [D, n]: the token drawn behind it."""


def guess_ahead(
    model: Decoder,
    spec: EngineSpec,
    sizes: StepSizes,
    inputs: StepInputs,
    batch: RaggedBatch,
    hidden: jax.Array,
    drawn_tokens: jax.Array,
    caches: Caches,
    sample: DraftSampler,
) -> tuple[Caches, jax.Array]:
    """Runs the modules of ``mtp`` behind the model's own pass of a step.

    Args:
        model: with its parameters.
        inputs, batch: of the step.
        hidden: [D, S, d_model], behind the final norm.
        drawn_tokens: int32 [D, b·G + F]: the step's results.
        caches: with the model's own layers advanced.

    Returns:
        The caches with the modules' advanced, and int32 [D, n, drafts]: the guesses
        behind the token drawn last for each row and chunk.
    """
    num_modules = spec.layout.num_mtp_modules
    ends = _find_ends(model, sizes, inputs, drawn_tokens)
    by_row = model.rules.spec("batch", None)
    rows = jnp.broadcast_to(
        jnp.arange(sizes.num_rows, dtype=jnp.int32),
        (inputs.computed.shape[0], sizes.num_rows),
        out_sharding=by_row,
    )
    rows = jnp.concatenate([rows, inputs.chunk_rows], axis=1)
    # Tokens of each sequence before the one that is drawn next.
    lengths = jnp.where(ends.positions < 0, 0, ends.positions + 2)

    # The token drawn, then the guesses.
    candidates = [ends.next_tokens]
    last_states = hidden
    for module in range(num_modules):
        tokens = _list_tokens_ahead(
            model, sizes, module, inputs, ends, drawn_tokens, candidates
        )
        hidden, caches = model.predict_ahead_with_cache(
            module, hidden, tokens, batch, caches
        )
        last_states = jnp.take_along_axis(hidden, ends.places[..., None], axis=1)
        candidates.append(sample(model.logits(last_states), rows, lengths))
        lengths += 1

    for num_further in range(1, 1 + spec.num_mtp_drafts - num_modules):
        # Past the last page there is none to guess for.
        positions = jnp.minimum(ends.positions + num_further, spec.max_length - 1)
        positions = jnp.where(ends.positions < 0, -1, positions)
        tokens = candidates[-1]
        further_inputs, further_sizes = _place_single_tokens(
            sizes, inputs, tokens, positions
        )
        further_batch = make_ragged_batch(
            further_inputs,
            further_sizes,
            spec.layout,
            spec.windows,
            model.rules,
            attention_kernel=None if spec.kernels is None else spec.kernels.attention,
        )
        last_states, caches = model.predict_ahead_with_cache(
            num_modules - 1, last_states, tokens, further_batch, caches
        )
        candidates.append(sample(model.logits(last_states), rows, lengths))
        lengths += 1
    return caches, jnp.stack(candidates[1:], axis=-1)


def _find_ends(
    model: Decoder, sizes: StepSizes, inputs: StepInputs, drawn_tokens: jax.Array
) -> SequenceEnds:
    """Finds where each sequence stands after a step: behind the guesses that the model
    drew too."""
    b, G, _, _, _ = sizes

    def find(
        row_tokens: jax.Array,
        computed: jax.Array,
        counts: jax.Array,
        chunk_starts: jax.Array,
        chunk_sizes: jax.Array,
        drawn: jax.Array,
    ) -> SequenceEnds:
        row_drawn = drawn[0, : b * G].reshape(b, G)
        is_guess = jnp.arange(1, G) < counts[0, :, None]
        is_drawn_too = (row_drawn[:, :-1] == row_tokens[0, :, 1:]) & is_guess
        num_accepted = jnp.cumprod(is_drawn_too, axis=1).sum(axis=1, dtype=jnp.int32)
        row_places = jnp.arange(b, dtype=jnp.int32) * G + num_accepted
        row_positions = jnp.where(computed[0] < 0, -1, computed[0] + num_accepted)

        chunk_ends = jnp.cumsum(chunk_sizes[0])
        chunk_places = b * G + jnp.maximum(chunk_ends - 1, 0)
        chunk_positions = chunk_starts[0] + chunk_sizes[0] - 1
        chunk_positions = jnp.where(chunk_sizes[0] > 0, chunk_positions, -1)

        places = jnp.concatenate([row_places, chunk_places])
        positions = jnp.concatenate([row_positions, chunk_positions])
        next_tokens = jnp.concatenate([drawn[0][row_places], drawn[0, b * G :]])
        return SequenceEnds(places[None], positions[None], next_tokens[None])

    by_shard = model.rules.spec("batch")
    return map_shards(find, by_shard, by_shard)(
        inputs.tokens,
        inputs.computed,
        inputs.counts,
        inputs.chunk_starts,
        inputs.chunk_sizes,
        drawn_tokens,
    )


def _list_tokens_ahead(
    model: Decoder,
    sizes: StepSizes,
    module: int,
    inputs: StepInputs,
    ends: SequenceEnds,
    drawn_tokens: jax.Array,
    candidates: list[jax.Array],
) -> jax.Array:
    """Returns, for each token of a step, the token ``module`` + 1 places ahead, int32
    [D, S]; behind a sequence's last token ``candidates``, int32 [D, n] each: the drawn
    one, and the guesses there are."""
    b, G, C, F, _ = sizes

    def list_tokens(
        drawn: jax.Array,
        places: jax.Array,
        candidates: jax.Array,
        chunk_sizes: jax.Array,
        following: jax.Array,
    ) -> jax.Array:
        last_candidate = candidates.shape[-1] - 1
        # Of rows, the token ahead of place x is what was drawn at x + module.
        place = jnp.arange(b * G, dtype=jnp.int32)
        row = place // G
        ahead = place + module
        num_beyond = ahead - places[0, row]
        from_candidates = candidates[0, row, jnp.clip(num_beyond, 0, last_candidate)]
        from_drawn = drawn[0, jnp.minimum(ahead, len(drawn[0]) - 1)]
        tokens = jnp.where(num_beyond >= 0, from_candidates, from_drawn)
        if C:
            chunk_ends = jnp.cumsum(chunk_sizes[0])
            chunk = find_chunk_indices(chunk_ends, jnp.arange(C))
            chunk = jnp.minimum(chunk, F - 1)
            known = following[0, :, module]
            num_beyond = jnp.clip(-1 - known, 0, last_candidate)
            from_candidates = candidates[0, b + chunk, num_beyond]
            chunk_tokens = jnp.where(known >= 0, known, from_candidates)
            tokens = jnp.concatenate([tokens, chunk_tokens])
        return tokens[None]

    by_shard = model.rules.spec("batch")
    return map_shards(list_tokens, by_shard, by_shard)(
        drawn_tokens,
        ends.places,
        jnp.stack(candidates, axis=-1),
        inputs.chunk_sizes,
        inputs.chunk_following,
    )


def _place_single_tokens(
    sizes: StepSizes, inputs: StepInputs, tokens: jax.Array, positions: jax.Array
) -> tuple[StepInputs, StepSizes]:
    """Returns a step's inputs with one token of each sequence, int32 [D, n], at
    ``positions`` (-1: none), as far as :func:`make_ragged_batch` reads them."""
    b = sizes.num_rows
    has_chunk = inputs.chunk_sizes > 0
    chunk_starts = jnp.maximum(positions[:, b:], 0)
    single_inputs = inputs._replace(
        tokens=tokens[:, :b, None],
        computed=positions[:, :b],
        counts=jnp.ones_like(inputs.counts),
        chunk_tokens=tokens[:, b:],
        chunk_starts=chunk_starts,
        chunk_sizes=has_chunk.astype(jnp.int32),
        chunk_lengths=chunk_starts + 1,
    )
    single_sizes = StepSizes(
        num_rows=b,
        row_tokens=1,
        chunk_tokens=sizes.num_chunks,
        num_chunks=sizes.num_chunks,
        max_steps=1,
    )
    return single_inputs, single_sizes
