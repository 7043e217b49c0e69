"""Span corruption (T5) and mixtures of denoisers (UL2): write what was taken out of a text."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.tasks.corrupt import Denoiser, Marks, corrupt_row, most_spans, room, ul2
from maxlm.tasks.loss import Batch, LossConfig, Result, token_loss
from maxlm.tasks.vocabulary import Vocabulary

INPUTS = ("input_tokens", "input_positions", "input_segment_ids")
# Sequences are as long as tiles and shards like.
_MULTIPLE = 8


class DenoisingConfig(LossConfig):
    """What both kinds have; needs an encoder and a decoder. ``data.seq_len`` is that of the text
    before anything is taken out."""

    encoder_len: int | None = Field(default=None, gt=0)
    """Tokens of an input row; null: what a row of one document needs, rounded up to 8."""
    decoder_len: int | None = Field(default=None, gt=0)
    """Tokens of an output row; null: likewise."""
    sentinels: int = Field(default=100, gt=0)
    """Ids that stand for spans taken out."""
    first_sentinel: int | None = Field(default=None, ge=0)
    """The first one's id, others count down from it; null: the last of the model's table, of which
    the tokenizer must leave so many free. T5's is 32,099."""

    @property
    @abstractmethod
    def mixture(self) -> tuple[Denoiser, ...]:
        """Ways to take tokens out."""

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Tokens of a row of the encoder's and of the decoder's."""
        encoder, decoder = room(seq_len, self.mixture)
        encoder, decoder = (-(-n // _MULTIPLE) * _MULTIPLE for n in (encoder, decoder))
        return self.encoder_len or encoder, self.decoder_len or decoder

    @property
    def marks(self) -> Mapping[str, int | None]:
        return {"first_sentinel": self.first_sentinel}

    def check(self, seq_len: int, vocab_size: int) -> None:
        super().check(seq_len, vocab_size)
        if (spans := most_spans(seq_len, self.mixture)) > self.sentinels:
            raise MaxlmError(
                f"data.seq_len={seq_len} tokens can have {spans} spans taken out, and there are "
                f"{self.sentinels} sentinels",
                where="objective.sentinels",
                fix=f"set it to {spans} or more, or shorten the sequences",
            )
        given = {"encoder_len": self.encoder_len, "decoder_len": self.decoder_len}
        needed = room(seq_len, self.mixture)
        for (name, length), least in zip(given.items(), needed, strict=True):
            if length is not None and length < least:
                raise MaxlmError(
                    f"{length} is too short for what data.seq_len={seq_len} tokens become",
                    where=f"objective.{name}",
                    fix=f"set it to {least} or more, to null, or shorten the sequences",
                )

    @model_validator(mode="after")
    def _all_sentinels(self):
        if self.first_sentinel is not None and self.first_sentinel + 1 < self.sentinels:
            raise MaxlmError(
                f"first_sentinel={self.first_sentinel} has no {self.sentinels} ids at and below it",
                fix=f"use fewer sentinels: {self.first_sentinel + 1}",
            )
        return self


class SpanCorruptionConfig(DenoisingConfig):
    """T5's (Raffel et al. 2020, §3.1.4): 568 tokens become 512 and 114."""

    kind: Literal["span_corruption"] = "span_corruption"
    density: float = Field(default=0.15, gt=0, lt=1)
    """The share of tokens taken out."""
    mean_span: float = Field(default=3.0, ge=1)
    """Mean tokens of a span."""

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        return (Denoiser(density=self.density, mean_span=self.mean_span),)


class Ul2Config(DenoisingConfig):
    """UL2's mixture (Tay et al. 2022, table 1): regular spans, a sequence's end, extreme spans."""

    kind: Literal["ul2"] = "ul2"
    regular_id: int | None = Field(default=None, ge=0)
    """Id put before an input of the first kind, [NLU] in UL2; null: none."""
    sequential_id: int | None = Field(default=None, ge=0)
    """Of the second, [S2S]."""
    extreme_id: int | None = Field(default=None, ge=0)
    """Of the third, [NLG]."""

    @property
    def marks(self) -> Mapping[str, int | None]:
        modes = ("regular_id", "sequential_id", "extreme_id")
        return {**super().marks, **{name: getattr(self, name) for name in modes}}

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        return ul2(self.regular_id, self.sequential_id, self.extreme_id)


@dataclass(frozen=True)
class Denoising:
    """Takes tokens out of a batch's rows, each by its own number: pure in (seed, step, row)."""

    config: Any
    vocabulary: Vocabulary
    start_id: int
    """What a decoder reads first."""
    seed: int

    def __call__(
        self, batch: dict[str, np.ndarray], step: int, rows: Sequence[int]
    ) -> dict[str, np.ndarray]:
        config, vocabulary = self.config, self.vocabulary
        first = vocabulary.size - 1 if config.first_sentinel is None else config.first_sentinel
        opening = vocabulary.opening
        marks = Marks(first, config.sentinels, vocabulary.eos, self.start_id, opening)
        encoder_len, decoder_len = config.lengths(batch["tokens"].shape[1])
        found = [
            corrupt_row(
                *_text_alone(batch["tokens"][i], batch["segment_ids"][i], vocabulary),
                config.mixture,
                marks,
                np.random.default_rng((self.seed, step, int(row))),
                encoder_len=encoder_len,
                decoder_len=decoder_len,
            )
            for i, row in enumerate(rows)
        ]
        out = {name: np.stack([row.decoder[name] for row in found]) for name in found[0].decoder}
        for name in INPUTS:
            out[name] = np.stack([row.encoder[name.removeprefix("input_")] for row in found])
        return out


def _text_alone(
    tokens: np.ndarray, segment_ids: np.ndarray, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """A row without the marks that documents open and close with: each piece gets its own."""
    opens = np.diff(segment_ids, prepend=0) != 0
    closes = np.diff(segment_ids, append=0) != 0
    mark = (opens & np.isin(tokens, vocabulary.opening)) | (closes & (tokens == vocabulary.eos))
    kept = ~mark
    return tokens[kept], segment_ids[kept]


def rewrite(config: LossConfig, model: EncoderDecoder, batch: Batch, key: jax.Array) -> Result:
    """The loss of a decoder that writes what an encoder's input lacks.

    Args:
        model: bound to its parameters.
        batch: as of a model of one sequence, for the decoder [B, S_dec]; and int32 input_tokens,
            input_positions and input_segment_ids [B, S_enc].
        key: unused.
    """
    tokens, positions, segment_ids = (batch[name] for name in INPUTS)
    hidden, aux = model(
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        inputs=(tokens, positions, segment_ids),
    )
    return token_loss(config, model, hidden, aux, batch)
