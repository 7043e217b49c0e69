"""The base of tasks: what a model is trained for."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar, Unpack

import jax
import numpy as np
from jax import lax
from pydantic import ConfigDict, Field

from maxlm.config import Config, MaxlmError
from maxlm.config.errors import Requirement
from maxlm.data.batch_source import BatchArraySpec, BatchSource
from maxlm.data.loader.batches import LoaderConfig
from maxlm.data.loader.mixture import Mixing
from maxlm.data.loader.packing import TokenSource
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.models.architectures import ModelConfig
from maxlm.models.architectures.mtp import AheadPredictions
from maxlm.models.aux import Aux
from maxlm.models.frontends import (
    ARRAY_PREFIX,
    VECTOR_NUMBERS,
    FrontendConfig,
    InputVectors,
)
from maxlm.parallel.cross_entropy import LogitsInputs
from maxlm.sharding import AxisRules
from maxlm.sharding.supported import ReshapingAxis, require_declared_axes
from maxlm.tasks.extra_work import ExtraPass, GenerationWork, ScoringModel

ModelT = TypeVar("ModelT")
ResultT = TypeVar("ResultT")
DeviceBatch = dict[str, jax.Array]
TaskState = dict[str, jax.Array]
"""Small arrays of a task's own that a step changes, by name."""


class Average(NamedTuple):
    """A sum to log with a denominator of its own, both fp32 scalars."""

    total: jax.Array
    count: jax.Array


LossResult = tuple[jax.Array, Mapping[str, jax.Array | Average]]
"""The loss to differentiate, summed over what is counted, and sums to log: ``tokens``
(the weight that the loss and every sum that is no :class:`Average` are divided by)
among them."""


class WatchedMetric(NamedTuple):
    """What tells whether training works."""

    name: str
    """A metric of the step."""
    goal: Literal["falls", "rises"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids of a model's table, and what they stand for."""

    size: int
    """Ids that text and reserved ids may have: the rows of the model's table."""
    bos_ids: tuple[int, ...]
    """The tokens that a document begins with in a store."""
    eos: int
    is_special: np.ndarray
    """bool [size]: ids that no text has."""
    starts_word: np.ndarray
    """bool [size]: ids with which a word begins."""


class BoundModel(Protocol):
    """A language model bound to its parameters, as losses on tokens read it."""

    @property
    def auxiliary(self) -> Mapping[str, "BoundModel"]:
        """The models of :meth:`Task.auxiliary_models`, of the trained model."""
        ...

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        vectors: InputVectors | None = None,
        routes: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Returns final hidden states [..., S, D], and what layers add to the loss."""
        ...

    def encode_items(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns a frontend's vectors [..., N, D] of its arrays."""
        ...

    def prepare_logits(self, hidden: jax.Array) -> LogitsInputs: ...

    def predict_ahead(
        self,
        hidden: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        targets: jax.Array,
        weights: jax.Array,
    ) -> AheadPredictions | None:
        """Returns what modules of ``model.mtp`` predict beside the next token; None:
        there are none."""
        ...

    def apply_head(self, name: str, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., S, D] by one of ``model.heads``, fp32."""
        ...


@dataclass(frozen=True)
class TaskModels:
    """The models that a loss reads, each bound to its parameters: ``BoundModel`` for
    tasks on tokens, whatever architecture a task of one's own names otherwise."""

    trained: Any
    frozen: Mapping[str, Any] = field(default_factory=dict)
    """Models by the names of :meth:`Task.frozen_models`; no gradient reaches them."""
    state: Mapping[str, jax.Array] = field(default_factory=dict)
    """The task's own arrays, as :meth:`Task.init_state` made them and
    :meth:`Task.update_state` last returned them."""


@dataclass(frozen=True)
class AuxiliaryModel:
    """A model of its own that is trained beside the run's, by the same loss and
    optimizer. Its layers are those of the run that it starts from."""

    heads: Mapping[str, int]
    """Widths of its ``model.heads``, by name. The run that it starts from may call one
    otherwise, the only one of its width, or have none; more are refused."""
    source: str | None = None
    """Folder of the run that it starts from; None: it starts as a copy of the run's own
    model."""


@dataclass(frozen=True)
class SourceInputs:
    """Inputs of a run for its task to make batches from."""

    loader: LoaderConfig
    seed: int
    vocabulary: Vocabulary
    tokenizer: Tokenizer | None = None
    stores: Mapping[str, TokenSource] = field(default_factory=dict)
    """Text to train on, by source."""
    heldout: Mapping[str, TokenSource] = field(default_factory=dict)
    mixing: Mapping[str, float] | Mixing = field(default_factory=dict)
    frontend: FrontendConfig | None = None
    """The model's, whose arrays batches have where the task reads them."""
    start_id: int = 0
    """The token that a decoder beside an encoder reads first."""
    num_virtual_tokens: int = 0
    """Tokens that every example begins with for an adapter's sake; see
    ``count_virtual_tokens``."""
    build_workers: int | None = 1
    """Processes that encode rows of files once; None: one a core."""


class Task(Config):
    """Base of tasks: what a model is trained for. A subclass has a ``kind`` of its own,
    a Literal, and is registered; see ``maxlm.tasks``."""

    architecture: ClassVar[str] = "decoder"
    """The architecture of the models that it trains."""
    reads_text: ClassVar[bool] = True
    """Whether its batches come from the token stores of ``data.sources``."""
    prepares_batch_alone: ClassVar[bool] = False
    """Whether :meth:`prepare_batch` alone reads frozen models, and the loss none."""
    predicts_every_token: ClassVar[bool] = False
    """Whether its cross-entropy says how well text is compressed, in bits per byte."""
    reads_frontend: ClassVar[bool] = False
    """Whether its batches have the arrays of the model's frontend, if it has one
    (:mod:`maxlm.models.frontends`), which its loss reads. A subclass with a ``loss`` or
    ``prepare_batch`` of its own declares it anew, too."""
    command: ClassVar[Literal["train", "tune", "rl"]] = "train"
    """The verb of ``maxlm`` that runs it."""
    shown_metrics: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"loss": "loss {:.4f}", "accuracy": "accuracy {:.1%}"}
    )
    """Metrics that the progress of a run shows first, where a step has them, and how
    each is written."""
    plotted_metrics: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"loss": "loss (nats per token, or the task's own)", "accuracy": "accuracy"}
    )
    """Metrics that are drawn at a run's end, where its records have them, and what each
    is called."""
    plot_name: ClassVar[str] = "loss"
    """Name of the image in the run's ``plots``, without its suffix."""
    watched_metric: ClassVar[WatchedMetric | None] = WatchedMetric("loss", "falls")
    """The metric by which `maxlm smoke` tells that a small model learns; None: no
    metric of a few steps tells."""
    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset()
    """The mesh axes, of those that reshape a batch, that its loss supports. A subclass
    with a ``loss`` or ``prepare_batch`` of its own declares them anew: it supports none
    otherwise."""

    def __init_subclass__(cls, **config: Unpack[ConfigDict]):
        super().__init_subclass__(**config)
        reads_batches = "loss" in cls.__dict__ or "prepare_batch" in cls.__dict__
        if reads_batches and "mesh_axes" not in cls.__dict__:
            cls.mesh_axes = frozenset()
        if reads_batches and "reads_frontend" not in cls.__dict__:
            cls.reads_frontend = False

    # A Literal of its own in each subclass, which no wider type than Any allows.
    kind: Any
    chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens a device holds logits of at once: chunk_tokens × vocab_size fp32
    values."""

    def frozen_models(self) -> Mapping[str, str | None]:
        """Returns the models that the loss reads beside the trained one: by name a
        run's folder, such as `maxlm convert` makes; None: the parameters that training
        starts from."""
        return {}

    def auxiliary_models(self) -> Mapping[str, AuxiliaryModel]:
        """Returns the models that are trained beside the run's own, by name: the loss
        reads them as ``models.trained.auxiliary``. They are in checkpoints, and not in
        what is loaded of a run to be used."""
        return {}

    def extra_passes(self) -> tuple[ExtraPass, ...]:
        """Returns the forward passes that the run makes outside its steps, for its
        plan. A frozen model that they name is not counted in every step, as the others
        are."""
        return ()

    def generation(self, seq_len: int, batch_size: int) -> GenerationWork | None:
        """Returns what the trained model generates for steps of ``batch_size`` rows of
        ``seq_len`` tokens, for the run's plan; None: nothing."""
        return None

    def scoring_models(self) -> Mapping[str, ScoringModel]:
        """Returns the models that score what is generated, by name, for the run's
        plan."""
        return {}

    @property
    def required_heads(self) -> Mapping[str, int]:
        """Widths of the ``model.heads`` that the loss reads, by name."""
        return {}

    def check_model(self, model: ModelConfig) -> None:
        """Checks by its config that the loss can read the trained model; raises
        MaxlmError naming the setting."""

    def check_frozen_models(
        self, model: ModelConfig, frozen: Mapping[str, ModelConfig]
    ) -> None:
        """Checks by their configs that the loss can read these models beside the
        trained one; raises MaxlmError naming what differs."""

    def row_lengths(self, seq_len: int) -> tuple[int, int]:
        """Returns the tokens of a row that a decoder (or a model of one sequence)
        reads, and those of an encoder beside it, where a row of text has
        ``seq_len``."""
        return seq_len, seq_len

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        """Returns a batch's arrays by name: by default those of a model of one sequence
        that predicts tokens, each with a weight."""
        length, _ = self.row_lengths(seq_len)
        integers = BatchArraySpec.of_tokens(length)
        return {
            "tokens": integers,
            "targets": integers,
            "segment_ids": integers,
            "positions": integers,
            "weights": BatchArraySpec.of_tokens(length, np.float32),
        }

    def list_model_arrays(
        self, model: ModelConfig, seq_len: int
    ) -> dict[str, BatchArraySpec]:
        """Returns the arrays that a batch has beside those of :meth:`batch_arrays`,
        whose shapes follow from the trained model."""
        return {}

    @abstractmethod
    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        """Returns the batches to train on; raises MaxlmError if these inputs cannot
        make them."""

    def evaluation_sources(self, inputs: SourceInputs) -> Mapping[str, BatchSource]:
        """Returns finite sources to evaluate on, by name."""
        return {}

    def init_state(self) -> TaskState:
        """Returns the arrays of the task's own that training begins with, which steps
        change and checkpoints hold: a coefficient that adapts, a moving average."""
        return {}

    def update_state(
        self, state: Mapping[str, jax.Array], metrics: Mapping[str, jax.Array]
    ) -> TaskState:
        """Returns the task's own arrays after a step.

        Args:
            metrics: of the step, as they are logged.
        """
        return dict(state)

    def prepare_batch(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> DeviceBatch:
        """Returns a batch [M, B, ...] of M micro-batches with more arrays for the loss:
        what frozen models make of it, or what is measured over all of it. Gradients do
        not reach them.

        Args:
            key: of this step; the losses' keys are drawn from it too.
        """
        return batch

    @abstractmethod
    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        """Computes the loss of a batch, as the sum over what is counted.

        Args:
            batch: the arrays of :meth:`prepare_batch`, [B, ...]; [M, B, ...] on
                pipeline stages.
            key: of this step and micro-batch.
        """

    @property
    def reserved_ids(self) -> Mapping[str, int | None]:
        """Settings that name ids of the table which stand for no text; None: takes a
        free one."""
        return {}

    @property
    def num_ids_to_reserve(self) -> int:
        """Ids of the model's table that the tokenizer must leave free."""
        return 0

    def with_special_tokens(self, ids: Mapping[str, int]) -> Self:
        """Returns the task with the reserved ids that a published tokenizer has.

        Args:
            ids: of its special tokens, by their text.
        """
        return self

    @property
    def files_setting(self) -> str | None:
        """The setting, below ``task``, that must name the files of its rows; None: it
        needs none."""
        return "files" if "files" in type(self).model_fields else None

    def for_small_model(self) -> Self:
        """Returns the task for a small model, without settings that fit the model's own
        size."""
        return self.model_copy(update=dict.fromkeys(self.reserved_ids))

    def check(self, seq_len: int, vocab_size: int) -> None:
        """Checks that the task can be done to rows of ``seq_len``, for a table of so
        many ids; raises MaxlmError naming the setting."""
        for name, reserved in self.reserved_ids.items():
            if reserved is not None and reserved >= vocab_size:
                message = f"{reserved} is no row of the model's table, "
                message += f"model.vocab_size={vocab_size}"
                fix = "name one of the tokenizer's ids, or null"
                raise MaxlmError(message, where=f"task.{name}", fix=fix)

    def require_mesh(
        self, compute: AxisRules, sizes: Mapping[str, Any]
    ) -> Iterator[Requirement]:
        """Yields what a mesh must meet for this task.

        Args:
            compute: rules of arrays in use.
            sizes: devices by mesh axis, or arrays of them.
        """
        name = type(self).__name__
        subject = f"task.kind={self.kind}"
        fix = f"declare mesh_axes with '{{}}' in {name} (docs/tasks.md)"
        yield from require_declared_axes(self.mesh_axes, compute, sizes, subject, fix)

    def name_row_lengths(self, seq_len: int) -> dict[str, int]:
        """Returns the lengths of :meth:`row_lengths` by the settings that decide
        them."""
        decoder, encoder = self.row_lengths(seq_len)
        lengths: dict[str, int] = {}
        for setting, length in (
            ("task.decoder_len", decoder),
            ("task.encoder_len", encoder),
        ):
            lengths["data.seq_len" if length == seq_len else setting] = length
        return lengths

    def check_vocab_size(
        self, tokenizer_vocab_size: int, model_vocab_size: int
    ) -> None:
        """Checks that every id of the tokenizer has a row in the model's table, and
        that there are as many more as the task reserves; raises MaxlmError naming both
        sizes."""
        num_reserved = self.num_ids_to_reserve
        min_vocab_size = tokenizer_vocab_size + num_reserved
        if min_vocab_size <= model_vocab_size:
            return
        reserved = ""
        other_fix = "train a smaller tokenizer"
        if num_reserved:
            reserved = f" and task.kind={self.kind} needs {num_reserved} more"
            other_fix = "name ids of the tokenizer's own in the task"
        raise MaxlmError(
            f"the tokenizer has {tokenizer_vocab_size} ids{reserved}, "
            f"model.vocab_size={model_vocab_size}",
            where="model.vocab_size",
            fix=f"set it to {min_vocab_size} or more, or {other_fix}",
        )


def list_batch_arrays(
    task: Task, frontend: FrontendConfig | None, seq_len: int
) -> dict[str, BatchArraySpec]:
    """Returns a batch's arrays by name, those of the model's frontend among them where
    the task reads them."""
    arrays = dict(task.batch_arrays(seq_len))
    if frontend is not None and task.reads_frontend:
        arrays |= frontend.batch_arrays(seq_len)
    return arrays


def encode_batch_items(model: BoundModel, batch: DeviceBatch) -> InputVectors | None:
    """Runs a model's frontend on the arrays that a batch has for it, differentiable in
    reverse mode; None: it has none."""
    if VECTOR_NUMBERS not in batch:
        return None
    items = {
        name.removeprefix(ARRAY_PREFIX): array
        for name, array in batch.items()
        if name.startswith(ARRAY_PREFIX) and name != VECTOR_NUMBERS
    }
    return InputVectors(model.encode_items(items), batch[VECTOR_NUMBERS])


def map_micro_batches(
    function: Callable[[ModelT, DeviceBatch], ResultT],
    model: ModelT,
    batch: DeviceBatch,
) -> ResultT:
    """Computes ``function(model, batch)`` of micro-batches [M, B, ...]: one after the
    other, stacked, or of all together where the model runs them through a pipeline."""
    if getattr(model, "pipeline_schedule", None) is not None:
        return function(model, batch)
    return lax.map(lambda micro: function(model, micro), batch)
