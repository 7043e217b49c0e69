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
    LogitsChange,
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
from maxlm.parallel.batch_invariance import compute_log_probs_in_tiles

MAX_STOP_IDS = 16
TOP_LOGPROBS = 20
NUM_GROUPS = 128
"""Tokens are drawn in two steps: one of so many groups, then one of its tokens."""
# Below this a temperature no longer fits the range of fp32 logits; the result is greedy
# anyway.
MIN_TEMPERATURE = 1e-30


Array = Any
"""A NumPy array on the host, a jax.Array within a step, and a jax.ShapeDtypeStruct
where a step is compiled before it runs."""


class RowSettings(NamedTuple):
    """Settings of a batch's rows, as in :class:`SamplingConfig`: fp32 or int32 [R], or
    each shard's rows [D, R]."""

    bias_ids: Array
    """int32 [R, 320]; -1: none."""
    bias_values: Array
    """fp32 [R, 320]."""
    repetition_penalty: Array
    frequency_penalty: Array
    presence_penalty: Array
    no_repeat_ngram_size: Array
    min_new_tokens: Array
    stop_ids: Array
    """int32 [R, 16]: tokens that do not come before ``min_new_tokens``; -1: none."""
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    typical_p: Array
    seed: Array
    """uint32 [R]."""
    stream: Array
    """uint32 [R]: tells rows of one seed apart."""
    logprobs_temperature: Array
    """fp32 [R]: what logits are divided by before log-probabilities are taken; 1: the
    model's own."""


def stack_settings(
    configs: Sequence[SamplingConfig | None],
    num_rows: int,
    *,
    stop_ids: Sequence[Sequence[int]] = (),
    streams: Sequence[int] = (),
    logprobs_temperatures: Sequence[float] = (),
) -> RowSettings:
    """Stack the settings of rows, on the host.

    Args:
        configs: of each row; None, and rows that are left out: the defaults, the
            cheapest.
        stop_ids: of each row, the tokens that end its output, at most 16.
        streams: of each row, its random stream in [0, 2**32); default: 0.
        logprobs_temperatures: of each row, what its logits are divided by before
            log-probabilities are taken; default: 1.
    """
    default = SamplingConfig()
    rows = [config or default for config in configs]
    rows += [default] * (num_rows - len(rows))
    bias_ids = np.full((num_rows, MAX_LOGIT_BIASES), -1, np.int32)
    bias_values = np.zeros((num_rows, MAX_LOGIT_BIASES), np.float32)
    for row, config in enumerate(rows):
        num_biases = len(config.logit_bias)
        bias_ids[row, :num_biases] = list(config.logit_bias)
        bias_values[row, :num_biases] = list(config.logit_bias.values())
    all_stop_ids = np.full((num_rows, MAX_STOP_IDS), -1, np.int32)
    for row, ids in enumerate(stop_ids):
        all_stop_ids[row, : len(ids)] = ids
    all_streams = np.zeros(num_rows, np.uint32)
    all_streams[: len(streams)] = streams
    all_logprobs_temperatures = np.ones(num_rows, np.float32)
    all_logprobs_temperatures[: len(logprobs_temperatures)] = logprobs_temperatures

    def stack(name: str, dtype: type[np.generic]) -> np.ndarray:
        # Sizes and temperatures above int32's range mean the same as its largest.
        values = [min(getattr(config, name), 2**31 - 1) for config in rows]
        return np.array(values, dtype)

    return RowSettings(
        bias_ids=bias_ids,
        bias_values=bias_values,
        repetition_penalty=stack("repetition_penalty", np.float32),
        frequency_penalty=stack("frequency_penalty", np.float32),
        presence_penalty=stack("presence_penalty", np.float32),
        no_repeat_ngram_size=stack("no_repeat_ngram_size", np.int32),
        min_new_tokens=stack("min_new_tokens", np.int32),
        stop_ids=all_stop_ids,
        temperature=stack("temperature", np.float32),
        top_k=stack("top_k", np.int32),
        top_p=stack("top_p", np.float32),
        min_p=stack("min_p", np.float32),
        typical_p=stack("typical_p", np.float32),
        seed=np.array([config.seed for config in rows], np.uint32),
        stream=all_streams,
        logprobs_temperature=all_logprobs_temperatures,
    )


def compute_sampling_logits(
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
    temperature = jnp.maximum(settings.temperature, MIN_TEMPERATURE)
    temperature = jnp.where(greedy, 1, temperature)
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
        frequency_penalty = settings.frequency_penalty[..., None] * counts
        logits = logits - frequency_penalty
        return logits - settings.presence_penalty[..., None] * (counts > 0)

    def ban(logits):
        is_early = (lengths - prompt_lengths < settings.min_new_tokens)[..., None]
        is_early = jnp.broadcast_to(is_early, settings.stop_ids.shape)
        none = jnp.zeros_like(logits, bool)
        banned = scatter_tokens("max", none, settings.stop_ids, is_early)
        banned |= find_repeated_ngrams(
            history, lengths, settings.no_repeat_ngram_size, logits
        )
        # A row that would have no token left keeps them all.
        has_others = jnp.any(~banned & (logits > -jnp.inf), axis=-1, keepdims=True)
        return jnp.where(banned & has_others, -jnp.inf, logits)

    counts_output = (settings.frequency_penalty != 0) | (settings.presence_penalty != 0)
    has_bias = jnp.any(settings.bias_ids >= 0, axis=-1)
    penalizes_repetition = settings.repetition_penalty != 1
    bans = (settings.no_repeat_ngram_size > 0) | (settings.min_new_tokens > 0)
    return apply_needed(
        logits,
        (
            (has_bias, add_bias),
            (penalizes_repetition, apply_repetition_penalty),
            (counts_output, penalize_counts),
            (bans, ban),
        ),
    )


def _apply_filters(
    logits: jax.Array, settings: RowSettings, drawn: jax.Array
) -> jax.Array:
    """Applies what keeps some of the tokens of ``drawn`` rows alone."""

    def make_filter(
        keep: Callable[[jax.Array, jax.Array], jax.Array],
        rows: jax.Array,
        setting: jax.Array,
    ) -> LogitsChange:
        """``keep`` marks the tokens that may be drawn, by the setting of each row."""

        def drop_others(logits):
            dropped = rows[..., None] & ~keep(logits, setting)
            return jnp.where(dropped, -jnp.inf, logits)

        return rows, drop_others

    return apply_needed(
        logits,
        (
            make_filter(keep_top_k, drawn & (settings.top_k > 0), settings.top_k),
            make_filter(keep_top_p, drawn & (settings.top_p < 1), settings.top_p),
            make_filter(keep_min_p, drawn & (settings.min_p > 0), settings.min_p),
            make_filter(
                keep_typical, drawn & (settings.typical_p < 1), settings.typical_p
            ),
        ),
    )


def make_keys(settings: RowSettings, positions: jax.Array) -> jax.Array:
    """Returns the random keys of the tokens at positions [R] of each row: they depend
    on the row's seed and stream, and on the position, alone."""

    @jnp.vectorize
    def make_key(seed, stream, position):
        stream_key = jax.random.fold_in(jax.random.key(seed), stream)
        return jax.random.fold_in(stream_key, position)

    return make_key(settings.seed, settings.stream, positions)


def sample_tokens(logits: jax.Array, keys: jax.Array, greedy: jax.Array) -> jax.Array:
    """Draw a token from each row's distribution, or take the likeliest, of equal ones
    the first.

    A token is drawn in two steps, first one of 128 groups of tokens by their sums, then
    one of its tokens by the Gumbel trick: a random number for each token of the
    vocabulary would take most of the time.

    Args:
        logits: fp32 [..., V], as :func:`compute_sampling_logits` returns them.
        keys: random keys [...], one a row (:func:`make_keys`).
        greedy: rows whose likeliest token is taken, bool [...]; if all are, no number
            is drawn.

    Returns:
        int32 [...].
    """

    def draw(row, key):
        # Group g has the tokens g, g + 128, ...: sums over the first dimension are
        # vectorized.
        num_padding = -row.size % NUM_GROUPS
        padded = jnp.pad(row, (0, num_padding), constant_values=-jnp.inf)
        groups = padded.reshape(-1, NUM_GROUPS)
        highest = jnp.max(row)
        # A row without a token (all -inf) must not become NaN.
        highest = jnp.where(jnp.isfinite(highest), highest, 0)
        sums = jnp.sum(jnp.exp(groups - highest), axis=0)
        group_key, token_key = jax.random.split(key)
        group = jax.random.categorical(group_key, jnp.log(sums))
        place = jax.random.categorical(token_key, groups[:, group])
        return (place * NUM_GROUPS + group).astype(jnp.int32)

    for _ in range(keys.ndim):
        draw = jax.vmap(draw)

    def draw_or_take(logits, keys):
        return jnp.where(greedy, find_argmax(logits), draw(logits, keys))

    return lax.cond(
        jnp.all(greedy), lambda x, _: find_argmax(x), draw_or_take, logits, keys
    )


class TokenLogprobs(NamedTuple):
    """Log-probabilities of tokens, and of the likeliest ones in their places."""

    chosen: Array
    """Natural ones of the tokens, fp32 [...]."""
    top_ids: Array
    """Ids of the likeliest tokens, int32 [..., 20], the likeliest first."""
    top: Array
    """fp32 [..., 20]."""


def compute_logprobs(
    logits: jax.Array,
    tokens: jax.Array,
    is_needed: jax.Array,
    needs_top: jax.Array | bool = True,
    *,
    vocab_size: int,
    temperatures: jax.Array | None = None,
    in_tiles: bool = False,
) -> TokenLogprobs:
    """Compute the model's own log-probabilities of tokens, and of the likeliest ones.

    Args:
        logits: the model's, [..., V].
        tokens: int32 [...].
        is_needed: whether any row needs them, bool []; if not, all are 0.
        needs_top: whether any row needs those of the likeliest tokens, bool []; if not,
            these are 0, and nothing is sorted.
        vocab_size: ids that the tokenizer has; no other is among the likeliest, but all
            of the V have a part in what probabilities are divided by.
        temperatures: what logits are divided by before, fp32 [...]; None: 1.
        in_tiles: whether those of ``tokens`` are computed as
            :mod:`maxlm.parallel.batch_invariance` says; then on one device's shard.
    """
    num_top = min(TOP_LOGPROBS, vocab_size)

    def find_top(logits, total):
        top_logits, top_ids = lax.top_k(logits[..., :vocab_size], num_top)
        return top_ids, top_logits - total

    def skip_top(logits, total):
        zeros = jnp.zeros_like(logits[..., :num_top], jnp.float32)
        return zeros.astype(jnp.int32), zeros

    def compute(logits):
        logits = logits.astype(jnp.float32)
        if temperatures is not None:
            logits = logits / temperatures[..., None]
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1) - total
        top_ids, top = lax.cond(needs_top, find_top, skip_top, logits, total)
        if in_tiles:
            rows = logits.reshape(-1, logits.shape[-1])
            tiled = compute_log_probs_in_tiles(rows, tokens.ravel())
            return TokenLogprobs(tiled.reshape(tokens.shape), top_ids, top)
        return TokenLogprobs(chosen[..., 0], top_ids, top)

    def skip(logits):
        chosen = jnp.zeros_like(logits[..., 0], jnp.float32)
        return TokenLogprobs(chosen, *skip_top(logits, None))

    return lax.cond(is_needed, compute, skip, logits)
