"""Tokens taken out of documents, for a model to put back: span corruption, UL2's mixture, masking.

NumPy alone, for the host: every function is pure in its arrays and its random generator.

Spans of n tokens (Raffel et al. 2020, §3.1.4), with sentinels <0>, <1>, ... counted downwards:

    tokens     a b c d e f g
    noise          c d     g
    inputs     a b <0> e f <1> eos
    targets    <0> c d <1> g eos

No last sentinel follows in the targets, as in the authors' code and unlike the paper's figure.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]


class SentinelIds(NamedTuple):
    """The ids that stand for no text."""

    first_sentinel: int
    """Span i's sentinel is ``first_sentinel − i``."""
    sentinels: int
    """How many the vocabulary has."""
    eos: int
    start: int = 0
    """The token that a decoder reads first; T5's is its padding."""
    opening: tuple[int, ...] = ()
    """Tokens that every input begins with; T5's with none, BART's with <s>."""


class Denoiser(Config):
    """One way of taking tokens out. The defaults are T5's."""

    kind: Literal["spans", "prefix"] = "spans"
    """spans: many, anywhere; prefix: one, all behind a prefix (prefix language modelling), of
    which every length is as likely as the others, up to twice the mean."""
    density: float = Field(default=0.15, gt=0, lt=1)
    """The share of tokens taken out; of "prefix" the mean share, at most a half."""
    mean_span: float = Field(default=3.0, ge=1)
    """Mean tokens of a span; of "prefix" unused."""
    rate: float = Field(default=1.0, gt=0)
    """How often it is drawn, as a share of all rates' sum."""
    mode: int | None = Field(default=None, ge=0)
    """An id put before the inputs, which tells the model the kind of task; None puts none."""

    @model_validator(mode="after")
    def _uniform(self):
        if self.kind == "prefix" and self.density > 0.5:
            raise MaxlmError(
                f"density={self.density} with kind=prefix, whose share is uniform",
                fix="use at most 0.5",
            )
        return self


def make_ul2_denoisers(
    regular: int | None = None, sequential: int | None = None, extreme: int | None = None
) -> tuple[Denoiser, ...]:
    """The mixture of denoisers of UL2, all equally often (Tay et al. 2022, table 1): R twice, S
    once, X four times.

    Args:
        regular, sequential, extreme: ids of the mode tokens [R], [S] and [X]; None for none.
    """

    def spans(mode: int | None, mean: float, density: float) -> Denoiser:
        return Denoiser(mode=mode, mean_span=mean, density=density)

    return (
        spans(regular, 3, 0.15),
        spans(regular, 8, 0.15),
        Denoiser(mode=sequential, kind="prefix", density=0.25),
        spans(extreme, 3, 0.5),
        spans(extreme, 8, 0.5),
        spans(extreme, 64, 0.15),
        spans(extreme, 64, 0.5),
    )


def count_spans(n: int, density: float, mean_span: float) -> tuple[int, int]:
    """(tokens taken out of n, spans they lie in); neither falls as n grows.

    At least one token is, and at least one stays, before every span; so nothing is taken out of
    fewer than two tokens.
    """
    if n < 2:
        return 0, 0
    noise = min(max(round(n * density), 1), n - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, n - noise)


def compute_lengths(n: int, density: float, mean_span: float) -> tuple[int, int]:
    """(inputs, targets) that n tokens become, their ends included; neither falls as n grows."""
    noise, spans = count_spans(n, density, mean_span)
    return n - noise + spans + 1, noise + spans + 1


def draw_span_noise(n: int, density: float, mean_span: float, rng: Generator) -> Flags:
    """Which of n tokens are taken out, bool [n]: runs of both kinds in turn, the first one kept,
    of lengths as likely as any others that add up."""
    noise, spans = count_spans(n, density, mean_span)
    if spans == 0:
        return np.zeros(n, bool)
    kept, taken = _composition(n - noise, spans, rng), _composition(noise, spans, rng)
    runs = np.stack([kept, taken], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, runs)


def draw_suffix_noise(n: int, density: float, rng: Generator) -> Flags:
    """The same for a suffix: 1 to m tokens, each number as likely as the others, where m ≤ n − 1
    makes the mean n · density, to within a half or where n − 1 cuts it."""
    noise = np.zeros(n, bool)
    if n >= 2:
        noise[n - rng.integers(1, _longest_suffix(n, density), endpoint=True) :] = True
    return noise


def replace_spans(tokens: Ids, noise: Flags, special: SentinelIds) -> tuple[Ids, Ids]:
    """(inputs, targets) of tokens [n]; see the module.

    Raises:
        MaxlmError: more spans than sentinels.
    """
    opens = noise & ~np.concatenate([[False], noise[:-1]])
    number = np.cumsum(opens) - 1
    if opens.sum() > special.sentinels:
        raise MaxlmError(
            f"{opens.sum()} spans of {tokens.size} tokens and {special.sentinels} sentinels",
            fix="shorten sequences, lengthen spans, or give the vocabulary more sentinels",
        )
    inputs = np.where(opens, special.first_sentinel - number, tokens)[opens | ~noise]
    sentinels = special.first_sentinel - number[opens]
    targets = np.insert(tokens[noise], np.flatnonzero(opens[noise]), sentinels)
    return _ended(inputs, special), _ended(targets, special)


def corrupt_tokens(
    tokens: Ids, denoiser: Denoiser, special: SentinelIds, rng: Generator
) -> tuple[Ids, Ids]:
    """(inputs, targets) of one document's tokens [n], int32, with the opening, the mode token and
    their ends.

    Raises:
        MaxlmError: more spans than sentinels.
    """
    if denoiser.kind == "prefix":
        noise = draw_suffix_noise(tokens.size, denoiser.density, rng)
    else:
        noise = draw_span_noise(tokens.size, denoiser.density, denoiser.mean_span, rng)
    inputs, targets = replace_spans(tokens, noise, special)
    mode = () if denoiser.mode is None else (denoiser.mode,)
    return np.array([*special.opening, *mode, *inputs], np.int32), targets


def draw_denoiser(denoisers: Sequence[Denoiser], rng: Generator) -> Denoiser:
    """One of them, by their rates."""
    rates = np.array([denoiser.rate for denoiser in denoisers])
    return denoisers[rng.choice(rates.size, p=rates / rates.sum())]


def compute_max_lengths(n: int, denoisers: Sequence[Denoiser]) -> tuple[int, int]:
    """The (inputs, targets) lengths that hold one document of at most n tokens, whichever denoiser
    is drawn. A row of several takes more, as each has its own ends and modes, and a span."""
    found = [_max_lengths(n, denoiser) for denoiser in denoisers]
    return max(inputs for inputs, _ in found), max(targets for _, targets in found)


def count_max_spans(n: int, denoisers: Sequence[Denoiser]) -> int:
    """Spans taken out of at most n tokens, whichever denoiser is drawn."""
    many = [d for d in denoisers if d.kind == "spans"]
    return max((count_spans(n, d.density, d.mean_span)[1] for d in many), default=1)


class CorruptedRow(NamedTuple):
    """One row of an encoder and of a decoder."""

    encoder: dict[str, np.ndarray]
    """int32 [S_enc] tokens, positions and segment_ids; 0 in padding."""
    decoder: dict[str, np.ndarray]
    """int32 [S_dec] tokens (the targets one step later, behind the start id), targets, positions
    and segment_ids, and fp32 weights, 1 where there is a target; 0 in padding."""
    left_out: int
    """Tokens that found no room."""


def corrupt_row(
    tokens: Ids,
    segment_ids: Ids,
    denoisers: Sequence[Denoiser],
    special: SentinelIds,
    rng: Generator,
    *,
    encoder_len: int,
    decoder_len: int,
) -> CorruptedRow:
    """A packed row's segments, each by a denoiser drawn for it, packed again on both sides under
    the numbers they had. A segment for which either has no room left is cut short: each has ends
    of its own, so that several take more than :func:`compute_max_lengths` says of one.

    Args:
        tokens, segment_ids: int32 [S], as the loader's; segments adjoin, 0 is padding.
        encoder_len, decoder_len: S_enc and S_dec; see :func:`compute_max_lengths`.

    Raises:
        MaxlmError: more spans in a segment than sentinels.
    """
    encoder = _empty(encoder_len, "tokens")
    decoder = _empty(decoder_len, "tokens", "targets")
    decoder["weights"] = np.zeros(decoder_len, np.float32)
    at, to, left_out = 0, 0, 0
    borders = np.flatnonzero(np.diff(segment_ids)) + 1
    for piece, numbers in zip(
        np.split(tokens, borders), np.split(segment_ids, borders), strict=True
    ):
        if piece.size == 0 or numbers[0] == 0:
            continue
        denoiser, free = draw_denoiser(denoisers, rng), (encoder_len - at, decoder_len - to)
        inputs, targets = corrupt_tokens(piece, denoiser, special, rng)
        if inputs.size > free[0] or targets.size > free[1]:
            kept = _count_fitting(piece.size, denoiser, (free[0] - len(special.opening), free[1]))
            left_out += piece.size - kept
            if kept == 0:
                continue
            inputs, targets = corrupt_tokens(piece[:kept], denoiser, special, rng)
        _place(encoder, at, numbers[0], tokens=inputs)
        shifted = np.concatenate([[special.start], targets[:-1]])
        _place(decoder, to, numbers[0], tokens=shifted, targets=targets, weights=1)
        at, to = at + inputs.size, to + targets.size
    return CorruptedRow(encoder, decoder, left_out)


class MaskedRow(NamedTuple):
    """A row in which an encoder predicts masked tokens; arrays [S]."""

    tokens: Ids
    targets: Ids
    """The token that a chosen place held; 0 elsewhere."""
    weights: NDArray[np.float32]
    """1 where a place was chosen."""


def mask_tokens(
    tokens: Ids,
    segment_ids: Ids,
    rng: Generator,
    *,
    mask_id: int,
    special: Flags,
    share: float = 0.15,
    masked: float = 0.8,
    random: float = 0.1,
    starts_word: Flags | None = None,
) -> MaskedRow:
    """A row with tokens masked (Devlin et al. 2019, §3.1): ``share`` of those that are neither
    special nor padding are chosen, rounded and at least one. Of the chosen, each on its own, a part
    becomes the mask, a part another id, and the rest stays.

    Args:
        tokens, segment_ids: int32 [S], as the loader's; 0 is padding.
        special: bool [V], ids that are never chosen, nor put for another.
        masked, random: the parts that become ``mask_id``, and any id that is not special.
        starts_word: bool [V], ids with which a word begins; None chooses tokens. Words are chosen
            whole, in random order, while they fit what is left of the share: it may stay short of
            it, by less than the shortest word left. Special tokens and segments' ends end words.
    """
    candidate = (segment_ids != 0) & ~special[tokens]
    places = np.flatnonzero(candidate)
    budget = max(1, round(share * places.size)) if places.size else 0
    if starts_word is None:
        chosen = rng.choice(places, budget, replace=False)
    else:
        begins = starts_word[tokens] | ~candidate
        begins[1:] |= segment_ids[1:] != segment_ids[:-1]
        chosen = places[_whole_words(np.cumsum(begins)[places], budget, rng)]
    chosen = np.sort(chosen)

    out, targets, weights = tokens.copy(), np.zeros_like(tokens), np.zeros(tokens.size, np.float32)
    targets[chosen], weights[chosen] = tokens[chosen], 1
    lot = rng.random(chosen.size)
    out[chosen[lot < masked]] = mask_id
    other = chosen[(lot >= masked) & (lot < masked + random)]
    out[other] = rng.choice(np.flatnonzero(~special), other.size)
    return MaskedRow(out, targets, weights)


def _whole_words(words: NDArray[np.integer], budget: int, rng: Generator) -> Flags:
    """Flags those tokens [n] whose words, given by number, fill the budget."""
    _, word_of, sizes = np.unique(words, return_inverse=True, return_counts=True)
    chosen = np.zeros(sizes.size, bool)
    for word in rng.permutation(sizes.size):
        size = int(sizes[word])
        if size <= budget:
            chosen[word], budget = True, budget - size
        if budget == 0:
            break
    return chosen[word_of]


def _composition(total: int, parts: int, rng: Generator) -> NDArray[np.integer]:
    """``parts`` positive numbers that add up to ``total``, all such equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _longest_suffix(n: int, density: float) -> int:
    """The mean of 1 ... m is (m + 1) / 2."""
    return min(max(round(2 * density * n) - 1, 1), n - 1)


def _max_lengths(n: int, denoiser: Denoiser) -> tuple[int, int]:
    mode = int(denoiser.mode is not None)
    if denoiser.kind == "spans" or n < 2:
        inputs, targets = compute_lengths(n, denoiser.density, denoiser.mean_span)
    else:  # one sentinel and an end on each side
        inputs, targets = n - 1 + 2, _longest_suffix(n, denoiser.density) + 2
    return inputs + mode, targets


def _count_fitting(n: int, denoiser: Denoiser, free: tuple[int, int]) -> int:
    """How many of n tokens surely fit (inputs, targets) of these lengths; 0: too few to take any
    out of."""

    def too_long(m: int) -> bool:
        inputs, targets = _max_lengths(m, denoiser)
        return inputs > free[0] or targets > free[1]

    fits = bisect_left(range(2, n + 1), True, key=too_long)  # lengths never fall as m grows
    return fits + 1 if fits else 0


def _ended(ids: np.ndarray, special: SentinelIds) -> Ids:
    return np.append(ids, special.eos).astype(np.int32)


def _empty(size: int, *names: str) -> dict[str, np.ndarray]:
    return {name: np.zeros(size, np.int32) for name in (*names, "positions", "segment_ids")}


def _place(side: dict[str, np.ndarray], at: int, number: int, **arrays: np.ndarray | int) -> None:
    """Writes one segment, whose arrays have its tokens' length, into a side."""
    size = np.size(arrays["tokens"])
    own = slice(at, at + size)
    side["positions"][own] = np.arange(size)
    side["segment_ids"][own] = number
    for name, array in arrays.items():
        side[name][own] = array
