"""The frame of a task: what a model is trained for."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.data.batch_source import BatchArray, BatchSource
from maxlm.data.loader import LoaderConfig, Mixing, TokenSource
from maxlm.data.tokenizer import Tokenizer
from maxlm.tasks.vocabulary import Vocabulary

DeviceBatch = dict[str, jax.Array]
LossResult = tuple[jax.Array, dict[str, jax.Array]]
"""The loss to differentiate, summed over what is counted, and sums to log: ``tokens`` (the weight
that everything is divided by) among them."""


@dataclass(frozen=True)
class Models:
    """The models that a loss reads, each bound to its parameters."""

    trained: Any
    frozen: Mapping[str, Any] = field(default_factory=dict)
    """By the names of :meth:`Task.frozen_models`; no gradient reaches them."""


@dataclass(frozen=True)
class FrozenModelSource:
    """Where the parameters of a model that a task only reads come from."""

    folder: str | None = None
    """A run's folder, such as `maxlm convert` makes; None: the parameters that training starts
    from."""


@dataclass(frozen=True)
class SourceInputs:
    """The things that a run has for its task to make batches from."""

    loader: LoaderConfig
    seed: int
    vocabulary: Vocabulary
    tokenizer: Tokenizer | None = None
    stores: Mapping[str, TokenSource] = field(default_factory=dict)
    """Text to train on, by source."""
    heldout: Mapping[str, TokenSource] = field(default_factory=dict)
    mixing: Mapping[str, float] | Mixing = field(default_factory=dict)
    start_id: int = 0
    """The token that a decoder beside an encoder reads first."""


class Task(Config):
    """A goal to train a model for. A subclass has a ``kind`` of its own, a Literal.

    To add one, write a subclass and register it (``maxlm.tasks.register_task``, or in an installed
    package an entry point of the group ``maxlm.tasks`` named as its kind).
    """

    architecture: ClassVar[str] = "decoder"
    """The architecture of the models that it trains."""
    reads_text: ClassVar[bool] = True
    """Whether its batches come from the token stores of ``data.sources``."""
    predicts_every_token: ClassVar[bool] = False
    """Whether its cross-entropy says how well text is compressed, in bits per byte."""

    kind: Any
    chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens a device holds logits of at once: chunk_tokens × vocab_size fp32 values."""

    def frozen_models(self) -> Mapping[str, FrozenModelSource]:
        """The models that the loss reads beside the trained one, by name."""
        return {}

    def row_lengths(self, seq_len: int) -> tuple[int, int]:
        """Tokens of a row that a decoder (or a model of one sequence) reads, and those of an
        encoder beside it, where a row of text has ``seq_len``."""
        return seq_len, seq_len

    @abstractmethod
    def batch_arrays(self, seq_len: int) -> dict[str, BatchArray]:
        """A batch's arrays by name."""

    @abstractmethod
    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        """The batches to train on.

        Raises:
            MaxlmError: they cannot be made of these inputs.
        """

    def evaluation_sources(self, inputs: SourceInputs) -> Mapping[str, BatchSource]:
        """Finite sources to evaluate on, by name."""
        return {}

    @abstractmethod
    def loss(self, models: Models, batch: DeviceBatch, key: jax.Array) -> LossResult:
        """The loss of a batch, as the sum over what is counted.

        Args:
            batch: the arrays of :meth:`batch_arrays`, [B, ...]; [M, B, ...] on pipeline stages.
            key: of this step and micro-batch.
        """

    @property
    def reserved_ids(self) -> Mapping[str, int | None]:
        """Settings that name ids of the model's table which stand for no text; None: a free one
        is taken."""
        return {}

    @property
    def num_free_ids(self) -> int:
        """Ids of the model's table that the tokenizer must leave free."""
        return 0

    def with_special_tokens(self, ids: Mapping[str, int]) -> Self:
        """The task with the reserved ids that a published tokenizer has.

        Args:
            ids: of the tokenizer's special tokens, by their text.
        """
        return self

    def shrunk(self) -> Self:
        """The task for a small model: settings that fit the model's own size are left out."""
        return self.model_copy(update=dict.fromkeys(self.reserved_ids))

    def check(self, seq_len: int, vocab_size: int) -> None:
        """Check that this can be done to rows of ``seq_len``, for a table of so many ids.

        Raises:
            MaxlmError: naming the setting.
        """
        for name, reserved in self.reserved_ids.items():
            if reserved is not None and reserved >= vocab_size:
                raise MaxlmError(
                    f"{reserved} is no row of the model's table, model.vocab_size={vocab_size}",
                    where=f"task.{name}",
                    fix="name one of the tokenizer's ids, or null",
                )

    def name_row_lengths(self, seq_len: int) -> dict[str, int]:
        """Return the lengths of :meth:`row_lengths` by the settings that decide them."""
        named = zip(
            ("task.decoder_len", "task.encoder_len"), self.row_lengths(seq_len), strict=True
        )
        return {"data.seq_len" if n == seq_len else setting: n for setting, n in named}

    def check_vocab_size(self, tokenizer_ids: int, table_rows: int) -> None:
        """Check that every id of the tokenizer has a row in the model's table, and that there are
        as many more as the task reserves.

        Raises:
            MaxlmError: naming both sizes.
        """
        free = self.num_free_ids
        if free and tokenizer_ids + free > table_rows:
            raise MaxlmError(
                f"the tokenizer has {tokenizer_ids} ids and task.kind={self.kind} needs {free} "
                f"more, model.vocab_size={table_rows}",
                where="model.vocab_size",
                fix=f"set it to {tokenizer_ids + free} or more, or name ids of the tokenizer's own "
                "in the task",
            )
        if tokenizer_ids > table_rows:
            raise MaxlmError(
                f"the tokenizer has {tokenizer_ids} ids, model.vocab_size={table_rows}",
                where="model.vocab_size",
                fix=f"set it to {tokenizer_ids} or more, or train a smaller tokenizer",
            )
