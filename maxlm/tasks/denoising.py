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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
_LENGTH_MULTIPLE = 8
"""Rows are as long as a multiple of this, as tiles and shards like."""
_SENTINEL = "<extra_id_{}>"
"""Texts of published tokenizers' sentinels, by their number."""


class NoiseAndSpans(NamedTuple):
    """What a denoiser takes out of a document."""

    num_noise: int
    """Tokens taken out."""
    num_spans: int
    """Spans that they lie in."""


class InputsAndTargets(NamedTuple):
    """Lengths, in tokens, of what the encoder reads and the decoder writes."""

    inputs: int
    targets: int


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

    def count_noise_and_spans(self, n: int) -> NoiseAndSpans:
        """Counts what is taken out of n tokens; for a suffix the most. Neither count
        falls as n grows, and nothing is taken out of fewer than two tokens."""
        if n < 2:
            return NoiseAndSpans(0, 0)
        if self.mean_span is None:
            # The mean of 1 ... m is (m + 1) / 2.
            longest_suffix = round(2 * self.density * n) - 1
            return NoiseAndSpans(_clamp(longest_suffix, 1, n - 1), 1)
        num_noise = _clamp(round(n * self.density), 1, n - 1)
        num_spans = max(round(num_noise / self.mean_span), 1)
        # Each span has a token, and one that stays before it.
        num_spans = min(num_spans, num_noise, n - num_noise)
        return NoiseAndSpans(num_noise, num_spans)

    def max_lengths(self, n: int) -> InputsAndTargets:
        """Returns the longest inputs and targets of n tokens, mode and ends included;
        neither falls as n grows. A row of several documents takes more: each has its
        own ends and spans."""
        num_noise, num_spans = self.count_noise_and_spans(n)
        # A suffix is of one token at least: a span.
        fewest_taken = num_noise if self.mean_span else num_spans
        # A sentinel for each span, an end, and the mode's token.
        num_mode = int(self.mode_token_id is not None)
        inputs = n - fewest_taken + num_spans + 1 + num_mode
        targets = num_noise + num_spans + 1
        return InputsAndTargets(inputs, targets)

    def draw_noise(self, n: int, rng: Generator) -> Flags:
        """Draws which of n tokens are taken out, bool [n]: runs of both kinds in turn,
        the first one kept, of lengths as likely as any others that add up; or a
        suffix."""
        num_noise, num_spans = self.count_noise_and_spans(n)
        if num_spans == 0:
            return np.zeros(n, bool)
        if self.mean_span is None:
            suffix = rng.integers(1, num_noise, endpoint=True)
            return np.arange(n) >= n - suffix
        staying = _draw_composition(n - num_noise, num_spans, rng)
        taken = _draw_composition(num_noise, num_spans, rng)
        # Runs in turn: staying, taken, staying, taken, ...
        run_lengths = np.stack([staying, taken], axis=1).ravel()
        is_taken = np.arange(2 * num_spans) % 2 == 1
        return np.repeat(is_taken, run_lengths)


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def compute_max_lengths(n: int, denoisers: Sequence[Denoiser]) -> InputsAndTargets:
    """Returns lengths that hold one document of at most n tokens, whichever denoiser is
    drawn."""
    lengths = [denoiser.max_lengths(n) for denoiser in denoisers]
    return InputsAndTargets(
        inputs=max(length.inputs for length in lengths),
        targets=max(length.targets for length in lengths),
    )


def replace_spans(tokens: Ids, noise: Flags, special: SentinelIds) -> tuple[Ids, Ids]:
    """Returns (inputs, targets) of tokens [n], see the module. There are sentinels for
    all spans: see :meth:`DenoisingTask.check`."""
    follows_noise = np.concatenate([[False], noise[:-1]])
    opens_span = noise & ~follows_noise
    # The sentinel of each token's span, or of the span before it; [n].
    span_number = np.cumsum(opens_span) - 1
    sentinels = special.first_sentinel - span_number
    # Of the inputs a span keeps its first place, which becomes its sentinel.
    stays = opens_span | ~noise
    inputs = np.where(opens_span, sentinels, tokens)[stays]
    # Of the targets each span has its sentinel before it.
    taken = tokens[noise]
    span_starts = np.flatnonzero(opens_span[noise])
    targets = np.insert(taken, span_starts, sentinels[opens_span])
    inputs = np.append(inputs, special.eos).astype(np.int32)
    targets = np.append(targets, special.eos).astype(np.int32)
    return inputs, targets


def corrupt_tokens(
    tokens: Ids, denoiser: Denoiser, special: SentinelIds, rng: Generator
) -> tuple[Ids, Ids]:
    """Returns (inputs, targets) of one document's tokens [n], int32, with its bos, the
    mode token and their ends."""
    noise = denoiser.draw_noise(tokens.size, rng)
    inputs, targets = replace_spans(tokens, noise, special)
    prefix = list(special.bos_ids)
    if denoiser.mode_token_id is not None:
        prefix.append(denoiser.mode_token_id)
    return np.array([*prefix, *inputs], np.int32), targets


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
    row: dict[str, np.ndarray] = {
        "weights": np.zeros(decoder_len, np.float32),
        "tokens": np.zeros(decoder_len, np.int32),
        "positions": np.zeros(decoder_len, np.int32),
        "segment_ids": np.zeros(decoder_len, np.int32),
        "targets": np.zeros(decoder_len, np.int32),
        "input_tokens": np.zeros(encoder_len, np.int32),
        "input_positions": np.zeros(encoder_len, np.int32),
        "input_segment_ids": np.zeros(encoder_len, np.int32),
    }
    rates = np.full(len(denoisers), 1 / len(denoisers))
    num_inputs = 0
    num_targets = 0
    for piece, segment_id in _split_segments(tokens, segment_ids):
        # Drawn by rates: other calls of the generator would change runs' batches.
        denoiser = denoisers[rng.choice(rates.size, p=rates)]
        free_inputs = encoder_len - num_inputs
        free_targets = decoder_len - num_targets
        inputs, targets = corrupt_tokens(piece, denoiser, special, rng)
        if inputs.size > free_inputs or targets.size > free_targets:
            # A denoiser's lengths are without the tokens that inputs begin with.
            free = InputsAndTargets(free_inputs - len(special.bos_ids), free_targets)
            num_fitting = _count_fitting(piece.size, denoiser, free)
            if num_fitting == 0:
                continue
            piece = piece[:num_fitting]
            inputs, targets = corrupt_tokens(piece, denoiser, special, rng)

        span = slice(num_inputs, num_inputs + inputs.size)
        row["input_tokens"][span] = inputs
        row["input_positions"][span] = np.arange(inputs.size)
        row["input_segment_ids"][span] = segment_id
        num_inputs += inputs.size

        # The decoder reads each target one step later, behind the start id.
        span = slice(num_targets, num_targets + targets.size)
        shifted = np.concatenate([[special.decoder_start_id], targets[:-1]])
        row["tokens"][span] = shifted
        row["positions"][span] = np.arange(targets.size)
        row["segment_ids"][span] = segment_id
        row["targets"][span] = targets
        row["weights"][span] = 1
        num_targets += targets.size
    return row


def _split_segments(tokens: Ids, segment_ids: Ids) -> Iterator[tuple[Ids, int]]:
    """Yields each segment's tokens and number, padding left out."""
    borders = np.flatnonzero(np.diff(segment_ids)) + 1
    pieces = np.split(tokens, borders)
    numbers = np.split(segment_ids, borders)
    for piece, number in zip(pieces, numbers, strict=True):
        if piece.size and number[0] != 0:
            yield piece, number[0]


def _draw_composition(total: int, parts: int, rng: Generator) -> NDArray[np.integer]:
    """Draws ``parts`` positive numbers that add up to ``total``, all such equally
    likely."""
    # parts − 1 of the total − 1 places between two units are cut at.
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _count_fitting(n: int, denoiser: Denoiser, free: InputsAndTargets) -> int:
    """Counts how many of n tokens surely fit inputs and targets of these lengths; 0:
    too few to take any out of."""

    def is_too_long(m: int) -> bool:
        lengths = denoiser.max_lengths(m)
        return lengths.inputs > free.inputs or lengths.targets > free.targets

    # Lengths fall with m nowhere, so that the sizes 2, 3, ... that fit come first. Of k
    # such sizes the largest is k + 1.
    num_sizes = bisect_left(range(2, n + 1), True, key=is_too_long)
    return num_sizes + 1 if num_sizes else 0


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


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
        lengths = compute_max_lengths(seq_len, self.denoisers)
        encoder_len = self.encoder_len or _round_up(lengths.inputs)
        decoder_len = self.decoder_len or _round_up(lengths.targets)
        return decoder_len, encoder_len

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
        first_sentinel = self.first_sentinel
        if first_sentinel is None:
            first_sentinel = vocabulary.size - 1
        special = SentinelIds(
            first_sentinel=first_sentinel,
            eos=vocabulary.eos,
            decoder_start_id=start_id,
            bos_ids=vocabulary.bos_ids,
        )
        tokens = row["tokens"]
        segment_ids = row["segment_ids"]
        decoder_len, encoder_len = self.row_lengths(tokens.size)
        # Without the marks that documents open and close with: each piece gets its own.
        opens = np.diff(segment_ids, prepend=0) != 0
        closes = np.diff(segment_ids, append=0) != 0
        opening_mark = opens & np.isin(tokens, vocabulary.bos_ids)
        closing_mark = closes & (tokens == vocabulary.eos)
        is_text = ~(opening_mark | closing_mark)
        return corrupt_row(
            tokens[is_text],
            segment_ids[is_text],
            self.denoisers,
            special,
            rng,
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
        sentinels = 1
        while ids.get(_SENTINEL.format(sentinels)) == first - sentinels:
            sentinels += 1
        return self.model_copy(update={"first_sentinel": first, "sentinels": sentinels})

    def for_small_model(self) -> Self:
        lengths = {"encoder_len": None, "decoder_len": None}
        return super().for_small_model().model_copy(update=lengths)

    def check(self, seq_len: int, vocab_size: int) -> None:
        super().check(seq_len, vocab_size)
        max_spans = max(
            denoiser.count_noise_and_spans(seq_len).num_spans
            for denoiser in self.denoisers
        )
        if max_spans > self.sentinels:
            raise MaxlmError(
                f"data.seq_len={seq_len} tokens can have {max_spans} spans taken out, "
                f"and there are {self.sentinels} sentinels",
                where="task.sentinels",
                fix=f"set it to {max_spans} or more, or shorten the sequences",
            )
        lengths = compute_max_lengths(seq_len, self.denoisers)
        for setting, length, min_length in (
            ("encoder_len", self.encoder_len, lengths.inputs),
            ("decoder_len", self.decoder_len, lengths.targets),
        ):
            if length is not None and length < min_length:
                raise MaxlmError(
                    f"{length} is too short for what data.seq_len={seq_len} tokens "
                    "become",
                    where=f"task.{setting}",
                    fix=f"set it to {min_length} or more, to null, or shorten the "
                    "sequences",
                )

    @model_validator(mode="after")
    def _check_sentinels(self) -> Self:
        if self.first_sentinel is None:
            return self
        num_ids = self.first_sentinel + 1  # down to 0
        if num_ids < self.sentinels:
            raise MaxlmError(
                f"first_sentinel={self.first_sentinel} has no {self.sentinels} ids at "
                f"and below it",
                fix=f"use fewer sentinels: {num_ids}",
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
        return {
            **super().reserved_ids,
            "regular_id": self.regular_id,
            "sequential_id": self.sequential_id,
            "extreme_id": self.extreme_id,
        }

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        # Density, mean span and mode: table 1 of the paper.
        return (
            Denoiser(0.15, 3, self.regular_id),
            Denoiser(0.15, 8, self.regular_id),
            Denoiser(0.25, None, self.sequential_id),
            Denoiser(0.5, 3, self.extreme_id),
            Denoiser(0.5, 8, self.extreme_id),
            Denoiser(0.15, 64, self.extreme_id),
            Denoiser(0.5, 64, self.extreme_id),
        )
