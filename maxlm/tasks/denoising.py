"""Span corruption (T5) and mixtures of denoisers (UL2): write what was taken out of a
text.

Spans of n tokens (Raffel et al. 2020, §3.1.4), with sentinels <0>, <1>, ... counted
downwards:

    tokens     a b c d e f g
    noise          c d     g
    inputs     a b <0> e f <1> eos
    targets    <0> c d <1> g eos

No last sentinel follows in the targets, as in the authors' code and unlike the paper's
figure. What changes tokens is pure in its arrays and its random generator.
"""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArraySpec
from maxlm.tasks.task import SourceInputs, Vocabulary
from maxlm.tasks.text import ENCODER_ARRAYS, Row, TextTask

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
# Sequences are as long as tiles and shards like.
_MULTIPLE = 8
# The texts of published tokenizers' sentinels.
_SENTINEL = "<extra_id_{}>"


class SentinelIds(NamedTuple):
    """The ids that stand for no text."""

    first_sentinel: int
    """Span i's sentinel is ``first_sentinel − i``."""
    eos: int
    decoder_start_id: int = 0
    """The token that a decoder reads first; T5's is its padding."""
    bos_ids: tuple[int, ...] = ()
    """Tokens that every input begins with; T5's with none, BART's with <s>."""


class Denoiser(NamedTuple):
    """One way of taking tokens out of a document. The defaults are T5's."""

    density: float = 0.15
    """The share of tokens taken out; of a suffix the mean share, at most a half."""
    mean_span: float | None = 3.0
    """Mean tokens of a span. None: one suffix behind a prefix (prefix language
    modelling), of which every length is as likely as the others, up to twice the
    mean."""
    mode_token_id: int | None = None
    """An id put before the inputs, which tells the model the kind of task; None puts
    none."""

    def count_noise_and_spans(self, n: int) -> tuple[int, int]:
        """Counts (tokens taken out of n, spans they lie in); for a suffix the most.
        Neither falls as n grows, and nothing is taken out of fewer than two tokens."""
        if n < 2:
            return 0, 0
        if self.mean_span is None:  # The mean of 1 ... m is (m + 1) / 2.
            return min(max(round(2 * self.density * n) - 1, 1), n - 1), 1
        noise = min(max(round(n * self.density), 1), n - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, n - noise)

    def max_lengths(self, n: int) -> tuple[int, int]:
        """Returns the most (inputs, targets) of n tokens, mode and ends included;
        neither falls as n grows. A row of several documents takes more: each has its
        own ends and spans."""
        noise, spans = self.count_noise_and_spans(n)
        fewest = noise if self.mean_span else spans
        return n - fewest + spans + 1 + int(
            self.mode_token_id is not None
        ), noise + spans + 1

    def draw_noise(self, n: int, rng: Generator) -> Flags:
        """Draws which of n tokens are taken out, bool [n]: runs of both kinds in turn,
        the first one kept, of lengths as likely as any others that add up; or a
        suffix."""
        noise, spans = self.count_noise_and_spans(n)
        if spans == 0:
            return np.zeros(n, bool)
        if self.mean_span is None:
            return np.arange(n) >= n - rng.integers(1, noise, endpoint=True)
        kept, taken = (
            _draw_composition(n - noise, spans, rng),
            _draw_composition(noise, spans, rng),
        )
        return np.repeat(
            np.arange(2 * spans) % 2 == 1, np.stack([kept, taken], axis=1).ravel()
        )


def compute_max_lengths(n: int, denoisers: Sequence[Denoiser]) -> tuple[int, int]:
    """Returns (inputs, targets) lengths that hold one document of at most n tokens,
    whichever denoiser is drawn."""
    inputs, targets = zip(*(each.max_lengths(n) for each in denoisers), strict=True)
    return max(inputs), max(targets)


def replace_spans(tokens: Ids, noise: Flags, special: SentinelIds) -> tuple[Ids, Ids]:
    """Returns (inputs, targets) of tokens [n], see the module. There are sentinels for
    all spans: see :meth:`DenoisingTask.check`."""
    opens = noise & ~np.concatenate([[False], noise[:-1]])
    number = np.cumsum(opens) - 1
    inputs = np.where(opens, special.first_sentinel - number, tokens)[opens | ~noise]
    sentinels = special.first_sentinel - number[opens]
    targets = np.insert(tokens[noise], np.flatnonzero(opens[noise]), sentinels)
    inputs, targets = (
        np.append(ids, special.eos).astype(np.int32) for ids in (inputs, targets)
    )
    return inputs, targets


def corrupt_tokens(
    tokens: Ids, denoiser: Denoiser, special: SentinelIds, rng: Generator
) -> tuple[Ids, Ids]:
    """Returns (inputs, targets) of one document's tokens [n], int32, with its bos, the
    mode token and their ends."""
    inputs, targets = replace_spans(
        tokens, denoiser.draw_noise(tokens.size, rng), special
    )
    mode = () if denoiser.mode_token_id is None else (denoiser.mode_token_id,)
    return np.array([*special.bos_ids, *mode, *inputs], np.int32), targets


def corrupt_row(
    tokens: Ids,
    segment_ids: Ids,
    denoisers: Sequence[Denoiser],
    special: SentinelIds,
    rng: Generator,
    *,
    encoder_len: int,
    decoder_len: int,
) -> dict[str, np.ndarray]:
    """Corrupts a packed row's segments, each by a denoiser drawn for it, packed again
    on both sides under the numbers they had. A segment for which either has no room
    left is cut short: each has ends of its own, so that several take more than
    :func:`compute_max_lengths` says of one.

    Args:
        tokens, segment_ids: int32 [S], as the loader's; segments adjoin, 0 is padding.

    Returns:
        Of the encoder, int32 [encoder_len] input_tokens, input_positions and
        input_segment_ids; of the decoder, int32 [decoder_len] tokens (the targets one
        step later, behind the start id), targets, positions and segment_ids, and fp32
        weights, 1 where there is a target. All are 0 in padding.
    """
    used = {"input_": 0, "": 0}
    names = ("tokens", "positions", "segment_ids")
    row: dict[str, np.ndarray] = {"weights": np.zeros(decoder_len, np.float32)}
    row |= {name: np.zeros(decoder_len, np.int32) for name in (*names, "targets")}
    row |= {f"input_{name}": np.zeros(encoder_len, np.int32) for name in names}

    def place(side: str, number: int, size: int, **arrays: np.ndarray | int) -> None:
        own = slice(used[side], used[side] + size)
        arrays |= {"positions": np.arange(size), "segment_ids": number}
        for name, array in arrays.items():
            row[side + name][own] = array
        used[side] += size

    rates = np.full(len(denoisers), 1 / len(denoisers))
    borders = np.flatnonzero(np.diff(segment_ids)) + 1
    for piece, numbers in zip(
        np.split(tokens, borders), np.split(segment_ids, borders), strict=True
    ):
        if piece.size == 0 or numbers[0] == 0:
            continue
        denoiser = denoisers[rng.choice(rates.size, p=rates)]
        free = encoder_len - used["input_"], decoder_len - used[""]
        inputs, targets = corrupt_tokens(piece, denoiser, special, rng)
        if inputs.size > free[0] or targets.size > free[1]:
            kept = _count_fitting(
                piece.size, denoiser, (free[0] - len(special.bos_ids), free[1])
            )
            if kept == 0:
                continue
            inputs, targets = corrupt_tokens(piece[:kept], denoiser, special, rng)
        place("input_", numbers[0], inputs.size, tokens=inputs)
        shifted = np.concatenate([[special.decoder_start_id], targets[:-1]])
        place("", numbers[0], targets.size, tokens=shifted, targets=targets, weights=1)
    return row


def _draw_composition(total: int, parts: int, rng: Generator) -> NDArray[np.integer]:
    """``parts`` positive numbers that add up to ``total``, all such equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _count_fitting(n: int, denoiser: Denoiser, free: tuple[int, int]) -> int:
    """Counts how many of n tokens surely fit (inputs, targets) of these lengths; 0: too
    few to take any out of."""

    def is_too_long(m: int) -> bool:
        return any(
            own > room for own, room in zip(denoiser.max_lengths(m), free, strict=True)
        )

    fits = bisect_left(range(2, n + 1), True, key=is_too_long)
    return fits + 1 if fits else 0


class DenoisingTask(TextTask):
    """Settings of span corruption and UL2; they need an encoder and a decoder.
    ``data.seq_len`` is that of the text before anything is taken out."""

    architecture: ClassVar[str] = "encoder_decoder"

    encoder_len: int | None = Field(default=None, gt=0)
    """Tokens of an input row; null: what a row of one document needs, rounded up to
    8."""
    decoder_len: int | None = Field(default=None, gt=0)
    """Tokens of an output row; null: as for ``encoder_len``."""
    sentinels: int = Field(default=100, gt=0)
    """Ids that stand for spans taken out."""
    first_sentinel: int | None = Field(default=None, ge=0)
    """Id of the first sentinel, others count down from it; null: the last of the
    model's table, of which the tokenizer must leave so many free. T5's is 32,099."""

    @property
    @abstractmethod
    def denoisers(self) -> tuple[Denoiser, ...]:
        """The denoisers, one of which is drawn for each document."""

    def row_lengths(self, seq_len: int) -> tuple[int, int]:
        encoder, decoder = compute_max_lengths(seq_len, self.denoisers)
        encoder, decoder = (-(-n // _MULTIPLE) * _MULTIPLE for n in (encoder, decoder))
        return self.decoder_len or decoder, self.encoder_len or encoder

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        _, encoder_len = self.row_lengths(seq_len)
        inputs = dict.fromkeys(ENCODER_ARRAYS, BatchArraySpec.of_tokens(encoder_len))
        return super().batch_arrays(seq_len) | inputs

    def make_row_transform(
        self, inputs: SourceInputs
    ) -> Callable[[Row, Generator], Row]:
        return partial(self._corrupt_row, inputs.vocabulary, inputs.start_id)

    def _corrupt_row(
        self, vocabulary: Vocabulary, start_id: int, row: Row, rng: Generator
    ) -> Row:
        first = (
            vocabulary.size - 1 if self.first_sentinel is None else self.first_sentinel
        )
        ids = SentinelIds(first, vocabulary.eos, start_id, vocabulary.bos_ids)
        tokens, segment_ids = row["tokens"], row["segment_ids"]
        decoder_len, encoder_len = self.row_lengths(tokens.size)
        # Without the marks that documents open and close with: each piece gets its own.
        opens = np.diff(segment_ids, prepend=0) != 0
        closes = np.diff(segment_ids, append=0) != 0
        mark = (opens & np.isin(tokens, vocabulary.bos_ids)) | (
            closes & (tokens == vocabulary.eos)
        )
        return corrupt_row(
            *(tokens[~mark], segment_ids[~mark], self.denoisers, ids, rng),
            encoder_len=encoder_len,
            decoder_len=decoder_len,
        )

    @property
    def reserved_ids(self) -> Mapping[str, int | None]:
        return {"first_sentinel": self.first_sentinel}

    @property
    def num_ids_to_reserve(self) -> int:
        return self.sentinels if self.first_sentinel is None else 0

    def with_special_tokens(self, ids: Mapping[str, int]) -> Self:
        first = ids.get(_SENTINEL.format(0))
        if first is None:
            return self
        number = next(n for n in count(1) if ids.get(_SENTINEL.format(n)) != first - n)
        return self.model_copy(update={"first_sentinel": first, "sentinels": number})

    def for_small_model(self) -> Self:
        lengths = {"encoder_len": None, "decoder_len": None}
        return super().for_small_model().model_copy(update=lengths)

    def check(self, seq_len: int, vocab_size: int) -> None:
        super().check(seq_len, vocab_size)
        spans = max(
            denoiser.count_noise_and_spans(seq_len)[1] for denoiser in self.denoisers
        )
        if spans > self.sentinels:
            raise MaxlmError(
                f"data.seq_len={seq_len} tokens can have {spans} spans taken out, and "
                f"there are "
                f"{self.sentinels} sentinels",
                where="task.sentinels",
                fix=f"set it to {spans} or more, or shorten the sequences",
            )
        given = {"encoder_len": self.encoder_len, "decoder_len": self.decoder_len}
        needed = compute_max_lengths(seq_len, self.denoisers)
        for (name, length), least in zip(given.items(), needed, strict=True):
            if length is not None and length < least:
                what = f"{length} is too short for what data.seq_len={seq_len} tokens become"
                fix = f"set it to {least} or more, to null, or shorten the sequences"
                raise MaxlmError(what, where=f"task.{name}", fix=fix)

    @model_validator(mode="after")
    def _all_sentinels(self):
        if self.first_sentinel is not None and self.first_sentinel + 1 < self.sentinels:
            raise MaxlmError(
                f"first_sentinel={self.first_sentinel} has no {self.sentinels} ids at "
                f"and below it",
                fix=f"use fewer sentinels: {self.first_sentinel + 1}",
            )
        return self


class SpanCorruptionTask(DenoisingTask):
    """T5's (Raffel et al. 2020, §3.1.4): 568 tokens become 512 and 114."""

    kind: Literal["span_corruption"] = "span_corruption"
    density: float = Field(default=0.15, gt=0, lt=1)
    """The share of tokens taken out."""
    mean_span: float = Field(default=3.0, ge=1)
    """Mean tokens of a span."""

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        return (Denoiser(density=self.density, mean_span=self.mean_span),)


class Ul2Task(DenoisingTask):
    """UL2's mixture (Tay et al. 2022, table 1): regular spans, a sequence's end,
    extreme spans."""

    kind: Literal["ul2"] = "ul2"
    regular_id: int | None = Field(default=None, ge=0)
    """Id put before inputs of the regular denoisers, [NLU] in UL2; null: none."""
    sequential_id: int | None = Field(default=None, ge=0)
    """Id before inputs of the sequential denoiser, [S2S]."""
    extreme_id: int | None = Field(default=None, ge=0)
    """Id before inputs of the extreme denoisers, [NLG]."""

    @property
    def reserved_ids(self) -> Mapping[str, int | None]:
        modes = ("regular_id", "sequential_id", "extreme_id")
        return {**super().reserved_ids, **{name: getattr(self, name) for name in modes}}

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        return (
            Denoiser(0.15, 3, self.regular_id),
            Denoiser(0.15, 8, self.regular_id),
            Denoiser(0.25, None, self.sequential_id),
            Denoiser(0.5, 3, self.extreme_id),
            Denoiser(0.5, 8, self.extreme_id),
            Denoiser(0.15, 64, self.extreme_id),
            Denoiser(0.5, 64, self.extreme_id),
        )
