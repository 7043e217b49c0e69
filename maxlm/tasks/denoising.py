"""Span corruption (T5) and mixtures of denoisers (UL2): write what was taken out of a text."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArraySpec, BatchTransform
from maxlm.tasks.corrupt import (
    Denoiser,
    SentinelIds,
    compute_max_lengths,
    corrupt_row,
    make_ul2_denoisers,
)
from maxlm.tasks.task import SourceInputs, Vocabulary
from maxlm.tasks.text import ENCODER_ARRAYS, Row, RowTransform, TextTask

# Sequences are as long as tiles and shards like.
_MULTIPLE = 8
# The texts of published tokenizers' sentinels.
_SENTINEL = "<extra_id_{}>"


class DenoisingTask(TextTask):
    """Settings of span corruption and UL2; they need an encoder and a decoder. ``data.seq_len`` is
    that of the text before anything is taken out."""

    architecture: ClassVar[str] = "encoder_decoder"

    encoder_len: int | None = Field(default=None, gt=0)
    """Tokens of an input row; null: what a row of one document needs, rounded up to 8."""
    decoder_len: int | None = Field(default=None, gt=0)
    """Tokens of an output row; null: as for ``encoder_len``."""
    sentinels: int = Field(default=100, gt=0)
    """Ids that stand for spans taken out."""
    first_sentinel: int | None = Field(default=None, ge=0)
    """Id of the first sentinel, others count down from it; null: the last of the model's table, of
    which the tokenizer must leave so many free. T5's is 32,099."""

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

    def make_batch_transform(self, inputs: SourceInputs) -> BatchTransform:
        change = partial(self._corrupt_row, inputs.vocabulary, inputs.start_id)
        return RowTransform(change, inputs.seed)

    def _corrupt_row(
        self, vocabulary: Vocabulary, start_id: int, row: Row, rng: np.random.Generator
    ) -> Row:
        first = vocabulary.size - 1 if self.first_sentinel is None else self.first_sentinel
        ids = SentinelIds(first, vocabulary.eos, start_id, vocabulary.bos_ids)
        decoder_len, encoder_len = self.row_lengths(row["tokens"].size)
        text = _remove_marks(row["tokens"], row["segment_ids"], vocabulary)
        lengths = {"encoder_len": encoder_len, "decoder_len": decoder_len}
        return corrupt_row(*text, self.denoisers, ids, rng, **lengths)

    @property
    def reserved_ids(self) -> Mapping[str, int | None]:
        return {"first_sentinel": self.first_sentinel}

    @property
    def num_ids_to_reserve(self) -> int:
        return self.sentinels if self.first_sentinel is None else 0

    def with_special_tokens(self, ids: Mapping[str, int]) -> Self:
        if (first := ids.get(_SENTINEL.format(0))) is None:
            return self
        number = next(n for n in count(1) if ids.get(_SENTINEL.format(n)) != first - n)
        return self.model_copy(update={"first_sentinel": first, "sentinels": number})

    def for_small_model(self) -> Self:
        lengths = {"encoder_len": None, "decoder_len": None}
        return super().for_small_model().model_copy(update=lengths)

    def check(self, seq_len: int, vocab_size: int) -> None:
        super().check(seq_len, vocab_size)
        spans = max(denoiser.count_noise_and_spans(seq_len)[1] for denoiser in self.denoisers)
        if spans > self.sentinels:
            raise MaxlmError(
                f"data.seq_len={seq_len} tokens can have {spans} spans taken out, and there are "
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
                f"first_sentinel={self.first_sentinel} has no {self.sentinels} ids at and below it",
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
    """UL2's mixture (Tay et al. 2022, table 1): regular spans, a sequence's end, extreme spans."""

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
        return make_ul2_denoisers(self.regular_id, self.sequential_id, self.extreme_id)


def _remove_marks(
    tokens: np.ndarray, segment_ids: np.ndarray, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """A row without the marks that documents open and close with: each piece gets its own."""
    opens = np.diff(segment_ids, prepend=0) != 0
    closes = np.diff(segment_ids, append=0) != 0
    mark = (opens & np.isin(tokens, vocabulary.bos_ids)) | (closes & (tokens == vocabulary.eos))
    return tokens[~mark], segment_ids[~mark]
