"""Samples the next token of each of a batch's rows, by settings of its own.

Settings are arrays, so that none of them compiles anything anew, and what no row needs
takes no time. They act in the order of :class:`SamplingConfig`, which is that of
transformers 5.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlm.config.sampling import MAX_LOGIT_BIASES, SamplingConfig
from maxlm.inference.logits_processors import (
    apply_needed,
    count_tokens,
    find_argmax,
    find_repeated_ngrams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    mask_from_bits,
    scatter_tokens,
)

MAX_STOP_IDS = 16
TOP_LOGPROBS = 20
GROUPS = 128
# Below this a temperature no longer fits the range of fp32 logits; the result is greedy
# anyway.
COLDEST = 1e-30
_SIZES = ("no_repeat_ngram_size", "min_new_tokens", "top_k")


class RowSettings(NamedTuple):
    """Settings of a batch's rows, as in :class:`SamplingConfig`: fp32 or int32 [R], or
    each shard's rows [D, R]."""

    bias_ids: jax.Array
    """int32 [R, 320]; -1: none."""
    bias_values: jax.Array
    """fp32 [R, 320]."""
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    no_repeat_ngram_size: jax.Array
    min_new_tokens: jax.Array
    stop_ids: jax.Array
    """int32 [R, 16]: tokens that do not come before ``min_new_tokens``; -1: none."""
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    seed: jax.Array
    """uint32 [R]."""
    stream: jax.Array
    """uint32 [R]: tells rows of one seed apart."""


def stack_settings(
    configs: Sequence[SamplingConfig | None],
    num_rows: int,
    *,
    stop_ids: Sequence[Sequence[int]] = (),
    streams: Sequence[int] = (),
) -> RowSettings:
    """Stack the settings of rows, on the host.

    Args:
        configs: of each row; None, and rows that are left out: the defaults, the
            cheapest.
        stop_ids: of each row, the tokens that end its output, at most 16.
        streams: of each row, its random stream in [0, 2**32); default: 0.
    """
    default = SamplingConfig()
    rows = [config or default for config in configs]
    rows += [default] * (num_rows - len(rows))
    columns: dict[str, Any] = {
        "bias_ids": np.full((num_rows, MAX_LOGIT_BIASES), -1, np.int32),
        "bias_values": np.zeros((num_rows, MAX_LOGIT_BIASES), np.float32),
        "stop_ids": np.full((num_rows, MAX_STOP_IDS), -1, np.int32),
        "seed": np.array([config.seed for config in rows], np.uint32),
        "stream": np.zeros(num_rows, np.uint32),
    }
    for row, config in enumerate(rows):
        columns["bias_ids"][row, : len(config.logit_bias)] = [*config.logit_bias]
        columns["bias_values"][row, : len(config.logit_bias)] = [
            *config.logit_bias.values()
        ]
    for row, ids in enumerate(stop_ids):
        columns["stop_ids"][row, : len(ids)] = ids
    columns["stream"][: len(streams)] = streams
    for name in RowSettings._fields:
        if name not in columns:
            # Sizes and temperatures beyond this mean the same.
            values = [min(getattr(config, name), 2**31 - 1) for config in rows]
            columns[name] = np.array(values, np.int32 if name in _SIZES else np.float32)
    return RowSettings(**columns)


def process_logits(
    logits: jax.Array,
    settings: RowSettings,
    history: jax.Array,
    prompt_lengths: jax.Array,
    lengths: jax.Array,
    *,
    vocab_size: int,
    allowed: jax.Array | None = None,
    has_grammar: jax.Array | bool = True,
) -> jax.Array:
    """Return the logits of the distributions that the rows' next tokens are drawn from.

    For several positions of each row (a draft to verify) map it over logits [R, G, V],
    lengths [R, G] and allowed [R, G, words] alone.

    Args:
        logits: the model's, [R, V].
        history: each row's prompt, then its output, int32 [R, T]; anything behind.
        prompt_lengths: tokens of the prompt, int32 [R].
        lengths: tokens of prompt and output before the one to draw, int32 [R].
        vocab_size: ids that the tokenizer has; no other is drawn.
        allowed: tokens that a grammar allows next, uint32 [R, words], token v in bit v
            % 32 of word v // 32; all bits set: no grammar.
        has_grammar: whether ``allowed`` is looked at, bool [].

    Returns:
        fp32 [R, V], -inf for tokens that are not drawn; at temperature 0 the likeliest
        is taken. If the ban on repeated n-grams and ``min_new_tokens`` would leave a
        row no token, they leave them all.
    """
    logits = logits.astype(jnp.float32)
    vocab = logits.shape[-1]
    if vocab_size < vocab:
        ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(ids < vocab_size, logits, -jnp.inf)
    if allowed is not None:

        def mask(logits):
            return jnp.where(mask_from_bits(allowed, vocab), logits, -jnp.inf)

        logits = lax.cond(has_grammar, mask, lambda x: x, logits)
    logits = _apply_penalties(logits, settings, history, prompt_lengths, lengths)
    greedy = settings.temperature == 0
    temperature = jnp.where(greedy, 1, jnp.maximum(settings.temperature, COLDEST))
    return _apply_filters(logits / temperature[..., None], settings, ~greedy)


def _apply_penalties(
    logits: jax.Array,
    settings: RowSettings,
    history: jax.Array,
    prompt_lengths: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Applies what changes single tokens' logits: bias, penalties, bans."""

    def add_bias(logits):
        return scatter_tokens("add", logits, settings.bias_ids, settings.bias_values)

    def apply_repetition_penalty(logits):
        starts = jnp.zeros_like(lengths)
        penalty = settings.repetition_penalty[..., None]
        counts = count_tokens(history, starts, lengths, logits)
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(counts > 0, penalized, logits)

    def penalize_counts(logits):
        counts = count_tokens(history, prompt_lengths, lengths, logits)
        frequency, presence = settings.frequency_penalty, settings.presence_penalty
        return (
            logits - frequency[..., None] * counts - presence[..., None] * (counts > 0)
        )

    def ban(logits):
        early = (lengths - prompt_lengths < settings.min_new_tokens)[..., None]
        early = jnp.broadcast_to(early, settings.stop_ids.shape)
        marked = scatter_tokens(
            "max", jnp.zeros_like(logits, bool), settings.stop_ids, early
        )
        marked |= find_repeated_ngrams(
            history, lengths, settings.no_repeat_ngram_size, logits
        )
        left = jnp.any(~marked & (logits > -jnp.inf), axis=-1, keepdims=True)
        return jnp.where(marked & left, -jnp.inf, logits)

    counted = (settings.frequency_penalty != 0) | (settings.presence_penalty != 0)
    changes = (
        (jnp.any(settings.bias_ids >= 0, axis=-1), add_bias),
        (settings.repetition_penalty != 1, apply_repetition_penalty),
        (counted, penalize_counts),
        ((settings.no_repeat_ngram_size > 0) | (settings.min_new_tokens > 0), ban),
    )
    return apply_needed(logits, changes)


def _apply_filters(
    logits: jax.Array, settings: RowSettings, drawn: jax.Array
) -> jax.Array:
    """Applies what keeps some of the tokens of ``drawn`` rows alone."""

    def drop(
        keep: Callable[..., jax.Array], rows: jax.Array, *setting: jax.Array
    ) -> Any:
        def change(logits):
            return jnp.where(
                rows[..., None] & ~keep(logits, *setting), -jnp.inf, logits
            )

        return rows, change

    changes = (
        drop(keep_top_k, drawn & (settings.top_k > 0), settings.top_k),
        drop(keep_top_p, drawn & (settings.top_p < 1), settings.top_p),
        drop(keep_min_p, drawn & (settings.min_p > 0), settings.min_p),
        drop(keep_typical, drawn & (settings.typical_p < 1), settings.typical_p),
    )
    return apply_needed(logits, changes)


def make_keys(settings: RowSettings, positions: jax.Array) -> jax.Array:
    """Returns the random keys of the tokens at positions [R] of each row: they depend
    on the row's seed and stream, and on the position, alone."""

    @jnp.vectorize
    def make_key(seed, stream, position):
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed), stream), position
        )

    return make_key(settings.seed, settings.stream, positions)


def sample_tokens(logits: jax.Array, keys: jax.Array, greedy: jax.Array) -> jax.Array:
    """Draw a token from each row's distribution, or take the likeliest, of equal ones
    the first.

    A token is drawn in two steps, first one of 128 groups of tokens by their sums, then
    one of its tokens by the Gumbel trick: a random number for each token of the
    vocabulary would take most of the time.

    Args:
        logits: fp32 [..., V], as :func:`process_logits` returns them.
        keys: random keys [...], one a row (:func:`make_keys`).
        greedy: rows whose likeliest token is taken, bool [...]; if all are, no number
            is drawn.

    Returns:
        int32 [...].
    """

    def draw(row, key):
        # Group g has the tokens g, g + 128, ...: sums over the first dimension are
        # vectorized.
        groups = jnp.pad(
            row, (0, -row.size % GROUPS), constant_values=-jnp.inf
        ).reshape(-1, GROUPS)
        highest = jnp.max(row)
        sums = jnp.sum(
            jnp.exp(groups - jnp.where(jnp.isfinite(highest), highest, 0)), axis=0
        )
        group_key, token_key = jax.random.split(key)
        group = jax.random.categorical(group_key, jnp.log(sums))
        place = jax.random.categorical(token_key, groups[:, group])
        return (place * GROUPS + group).astype(jnp.int32)

    for _ in range(keys.ndim):
        draw = jax.vmap(draw)

    def draw_or_take(logits, keys):
        return jnp.where(greedy, find_argmax(logits), draw(logits, keys))

    return lax.cond(
        jnp.all(greedy), lambda x, _: find_argmax(x), draw_or_take, logits, keys
    )


class TokenLogprobs(NamedTuple):
    """Log-probabilities of tokens, and of the likeliest ones in their places."""

    chosen: Any
    """Natural ones of the tokens, fp32 [...]."""
    top_ids: Any
    """Ids of the likeliest tokens, int32 [..., 20], the likeliest first."""
    top: Any
    """fp32 [..., 20]."""


def compute_logprobs(
    logits: jax.Array, tokens: jax.Array, wanted: jax.Array, *, vocab_size: int
) -> TokenLogprobs:
    """Compute the model's own log-probabilities of tokens, and of the likeliest ones.

    Args:
        logits: the model's, [..., V].
        tokens: int32 [...].
        wanted: whether any row needs them, bool []; if not, all are 0.
        vocab_size: ids that the tokenizer has; no other is among the likeliest.
    """
    size = min(TOP_LOGPROBS, vocab_size)

    def compute(logits):
        logits = logits.astype(jnp.float32)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1) - total
        values, ids = lax.top_k(logits[..., :vocab_size], size)
        return TokenLogprobs(chosen[..., 0], ids, values - total)

    def skip(logits):
        none = jnp.zeros_like(logits[..., 0], jnp.float32)
        several = jnp.zeros_like(logits[..., :size], jnp.float32)
        return TokenLogprobs(none, several.astype(jnp.int32), several)

    return lax.cond(wanted, compute, skip, logits)
