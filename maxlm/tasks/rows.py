"""Tasks on rows of files: prompts with answers, conversations, pairs of answers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.batch_source import BatchArraySpec, BatchSource
from maxlm.data.conversations import EncodedSequence
from maxlm.data.loader.permutation import derive_key, permute
from maxlm.data.row_files import RowFiles, open_rows
from maxlm.data.rows import RowSource, encode_row, make_row_source
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.models.frontends import (
    ARRAY_PREFIX,
    VECTOR_NUMBERS,
    FrontendConfig,
    ItemArrays,
)
from maxlm.runtime.json_types import JsonMapping
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import ignore_progress, show_progress
from maxlm.tasks.task import SourceInputs, Task, list_batch_arrays

_MANY_ROWS = 16384
"""So many rows take longer to encode than processes to start: seconds."""
_PART_ROWS = 1024
"""Rows that a process encodes at once."""
_REFUSED_ROWS_SHOWN = 3
"""Refused rows whose faults a run says at its start; a file in its folder lists all."""
TooLong = Literal["drop", "cut_end", "cut_start"]
FilesSetting = Literal["files", "validation_files"]
"""Settings of a task that name files."""
FileRow = JsonMapping
"""A row of a file, by column."""
Arrays = dict[str, Any]
"""An example's arrays and numbers, by name."""


class RowTask(Task):
    """A task on rows of JSON Lines, Parquet or saved datasets; see
    :mod:`maxlm.data.conversations` for their forms.

    An example is one sequence of tokens or several, which stand one after the other in
    a row of ``data.seq_len`` tokens as segments of their own, so that one pass through
    the model reads all.
    """

    command: ClassVar[Literal["train", "tune", "rl"]] = "tune"
    reads_text: ClassVar[bool] = False
    sequences_per_example: ClassVar[int] = 1

    files: tuple[LocalPath, ...] = ()
    """Files to train on: .jsonl (also .gz, .zst), .parquet, folders that `datasets`
    saved."""
    validation_files: tuple[LocalPath, ...] = ()
    """Files to evaluate on."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """Names of columns in the files, by the names that tasks read: {prompt: question,
    completion: answer}. ShareGPT's and Alpaca's columns are known without."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows of ``files`` to evaluate on instead, drawn by the run's
    seed."""
    max_length: int | None = Field(default=None, gt=1)
    """Most tokens of a prompt and its answer; null: as many as a row has room for."""
    too_long: TooLong = "drop"
    """Longer ones are left out, or lose what is too much at their end or start. One
    without a token to learn is left out."""
    examples_per_row: int | None = Field(default=1, ge=1)
    """Most examples that share a row, each with attention to itself alone; null: as
    many as fit."""

    @abstractmethod
    def encode_example(
        self, tokenizer: Tokenizer, row: FileRow
    ) -> list[EncodedSequence]:
        """Returns the ``sequences_per_example`` sequences of a file's row; raises
        MaxlmError saying what is wrong with it."""

    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns what fp32 arrays [examples, ...] of a row hold for each example, by
        name."""
        return {}

    def extend_example(
        self, encoder: "ExampleEncoder", row: FileRow, arrays: Arrays
    ) -> Arrays:
        """Returns an example's arrays with its entries of :meth:`example_shapes`, and
        with whatever the task's batches have besides."""
        return arrays

    @property
    def num_segments(self) -> int:
        """Sequences in a row at most, where ``examples_per_row`` says."""
        return (self.examples_per_row or 0) * self.sequences_per_example

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        arrays = super().batch_arrays(seq_len)
        for name, example_shape in self.example_shapes().items():
            shape = (self.examples_per_row or 1, *example_shape)
            axes = (None,) * len(shape)
            arrays[name] = BatchArraySpec(shape, np.float32, axes)
        return arrays

    def make_encoder(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        num_virtual_tokens: int = 0,
        frontend: FrontendConfig | None = None,
    ) -> "ExampleEncoder":
        """Returns what encodes rows for batches of ``seq_len`` tokens; ``frontend``:
        the model's."""
        room = seq_len // self.sequences_per_example
        # A sequence's last token is a target alone: one more than a row has room for.
        max_length = room + 1 - num_virtual_tokens
        if self.max_length is not None:
            max_length = min(self.max_length, max_length)
        items = None if frontend is None else ItemEncoder(self, frontend, seq_len)
        return ExampleEncoder(self, tokenizer, max_length, num_virtual_tokens, items)

    def open_files(self, setting: FilesSetting) -> RowFiles:
        """Opens the files to train or evaluate on."""
        paths = getattr(self, setting)
        if not paths:
            message = (
                f"task.kind={self.kind} trains on rows of files, and none is named"
            )
            fix = "name a .jsonl or .parquet file"
            raise MaxlmError(message, where=f"task.{setting}", fix=fix)
        return open_rows(*paths, columns=self.columns)

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        file = self.open_files("files")
        training, _ = self._split(len(file), inputs.seed)
        return self.make_source(
            file, training, inputs, shuffle=inputs.loader.shuffle, endless=True
        )

    def evaluation_sources(self, inputs: SourceInputs) -> Mapping[str, BatchSource]:
        if self.validation_files:
            file = self.open_files("validation_files")
            examples = np.arange(len(file))
        else:
            file = self.open_files("files")
            _, examples = self._split(len(file), inputs.seed)
            if not examples.size:
                return {}
        source = self.make_source(file, examples, inputs, shuffle=False, endless=False)
        return {"validation": source}

    def for_small_model(self) -> Self:
        small = super().for_small_model()
        return small.model_copy(update={"max_length": None, "too_long": "cut_start"})

    def _split(
        self, num_rows: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the rows to train and to evaluate on, in the file's order."""
        if self.validation_files or not self.validation_fraction:
            return np.arange(num_rows), np.arange(0)
        order = permute(np.arange(num_rows), num_rows, derive_key(seed, "validation"))
        num_heldout = max(1, round(num_rows * self.validation_fraction))
        num_heldout = min(num_rows - 1, num_heldout)  # a row is left to train on
        return np.sort(order[num_heldout:]), np.sort(order[:num_heldout])

    def make_source(
        self,
        file: RowFiles,
        examples: NDArray[np.int64],
        inputs: SourceInputs,
        *,
        shuffle: bool,
        endless: bool,
    ) -> RowSource:
        """Makes a batch source of some rows of files; see
        :func:`~maxlm.data.rows.make_row_source`."""
        assert inputs.tokenizer is not None
        loader = inputs.loader
        encoder = self.make_encoder(
            inputs.tokenizer,
            loader.seq_len,
            inputs.num_virtual_tokens,
            inputs.frontend,
        )
        scan = scan_examples(
            encoder,
            file,
            examples,
            inputs.build_workers,
            keep_errors=loader.on_bad_rows == "skip",
        )
        notes = self.describe_scan(scan, encoder.max_length)
        if scan.errors:
            notes.append(describe_refused_rows(scan))
        usable = np.flatnonzero(scan.lengths)
        if not usable.size:
            fix = "raise data.seq_len, or set task.too_long"
            raise MaxlmError(notes[-1], where=str(file.paths[0]), fix=fix)
        return make_row_source(
            file,
            encoder,
            list_batch_arrays(self, inputs.frontend, loader.seq_len),
            loader.batch_size,
            seed=inputs.seed,
            examples=examples[usable],
            lengths=scan.lengths[usable],
            examples_per_row=self.examples_per_row,
            shuffle=shuffle,
            endless=endless,
            notes=notes,
            refused=scan.errors,
        )

    def describe_scan(self, scan: "ExampleScan", max_length: int) -> list[str]:
        """Says which rows are cut and left out, and by which rule."""
        rule = f"task.too_long={self.too_long}"
        of_rows = f"of {len(scan.lengths):,} rows"
        limit = f"{max_length:,}"
        notes = []
        num_cut = int(scan.was_cut.sum())
        if num_cut:
            notes.append(f"{num_cut:,} {of_rows} are cut to {limit} tokens ({rule})")
        # Rows that cannot be read are not among those that the rule leaves out.
        num_left_out = int((scan.lengths == 0).sum()) - len(scan.errors)
        if num_left_out:
            reason = f"longer than {limit} tokens"
            if self.too_long != "drop":
                reason = f"no token to learn among the {limit} that are kept"
            notes.append(f"{num_left_out:,} {of_rows} are left out: {reason} ({rule})")
        return notes


def describe_refused_rows(scan: "ExampleScan") -> str:
    """Says how many rows are refused, and what is wrong with the first of them."""
    count = f"{len(scan.errors):,} of {len(scan.lengths):,} rows"
    first = [str(error) for error in scan.errors[:_REFUSED_ROWS_SHOWN]]
    more = "; ..." if len(first) < len(scan.errors) else ""
    rule = "data.on_bad_rows=skip"
    return f"{count} are refused and left out ({rule}): {'; '.join(first)}{more}"


class ExampleScan(NamedTuple):
    """Counts of encoded rows of files, arrays int64 [n]."""

    lengths: NDArray[np.int64]
    """Tokens that each takes of a row of a batch, or the same share of them as its
    items take of the row's room for items, if that is larger; 0: it is left out."""
    num_targets: NDArray[np.int64]
    """Tokens of each to learn."""
    was_cut: NDArray[np.int64]
    """1 where tokens were cut off, else 0."""
    errors: list[MaxlmError]
    """Faults of those that cannot be read."""


def scan_examples(
    encoder: "ExampleEncoder",
    file: RowFiles,
    examples: NDArray[np.int64],
    workers: int | None = 1,
    *,
    keep_errors: bool = False,
) -> ExampleScan:
    """Encodes rows of files once.

    Args:
        workers: processes at most, for many rows; None: one a core.
        keep_errors: whether a row that cannot be read is left out; otherwise its
            MaxlmError is raised.
    """
    is_long = len(examples) >= _MANY_ROWS
    num_parts = max(1, len(examples) // _PART_ROWS)
    parts = np.array_split(examples, num_parts)
    scans: dict[int, ExampleScan] = {}
    num_done = 0
    with ExitStack() as stack:
        progress = ignore_progress
        if is_long and jax.process_index() == 0:
            progress = stack.enter_context(show_progress("rows"))
        pool = stack.enter_context(WorkerPool(workers if is_long else 1))
        scan = partial(_scan_part, encoder, file)
        for number, part in pool.map_unordered(scan, [*enumerate(parts)]):
            if part.errors and not keep_errors:
                raise part.errors[0]
            scans[number] = part
            num_done += len(part.lengths)
            progress("encoding rows", num_done, len(examples))
    # In the order of the files, in whichever order the parts were done.
    in_order = [scans[number] for number in range(len(parts))]
    return ExampleScan(
        lengths=np.concatenate([part.lengths for part in in_order]),
        num_targets=np.concatenate([part.num_targets for part in in_order]),
        was_cut=np.concatenate([part.was_cut for part in in_order]),
        errors=[error for part in in_order for error in part.errors],
    )


def _scan_part(
    encoder: "ExampleEncoder", file: RowFiles, job: tuple[int, NDArray[np.int64]]
) -> tuple[int, ExampleScan]:
    """Encodes a numbered part of the examples."""
    number, examples = job
    lengths = np.zeros(len(examples), np.int64)
    num_targets = np.zeros(len(examples), np.int64)
    was_cut = np.zeros(len(examples), np.int64)
    errors: list[MaxlmError] = []
    for i, example in enumerate(examples.tolist()):
        try:
            arrays = encode_row(encoder, file, example)
        except MaxlmError as error:
            errors.append(error)
            continue
        if not arrays:  # the example is left out
            continue
        # KTO's examples have another array of tokens (kl_tokens).
        lengths[i] = max(
            len(array) for name, array in arrays.items() if name.endswith("tokens")
        )
        if encoder.items is not None:
            lengths[i] = max(lengths[i], encoder.items.count_tokens_alike(arrays))
        num_targets[i] = np.count_nonzero(arrays["weights"])
        was_cut[i] = arrays["was_cut"]
    return number, ExampleScan(lengths, num_targets, was_cut, errors)


@dataclass(frozen=True)
class ExampleEncoder:
    """Encodes rows for a task's batches; pure, and pickles."""

    task: RowTask
    tokenizer: Tokenizer
    max_length: int
    """Tokens of a sequence at most, without virtual ones."""
    num_virtual_tokens: int = 0
    items: "ItemEncoder | None" = None
    """What encodes items for the model's frontend, if it has one."""

    def __call__(self, row: FileRow) -> Arrays:
        """Returns an example's arrays by name (see :data:`maxlm.data.rows.Encode`);
        none of an example that is left out."""
        uncut = self.task.encode_example(self.tokenizer, row)
        items: ItemArrays = {}
        if self.items is not None:
            items = self.items.read(row)
            opening = self.tokenizer.prefix_ids
            uncut = [self.items.place(items, sequence, opening) for sequence in uncut]
        sequences = [self._cut(sequence) for sequence in uncut]
        # Dropped, or cut to a part with nothing to learn.
        if not all(sequence.num_targets for sequence in sequences):
            return {}
        arrays: Arrays = join_sequences(sequences, self.num_virtual_tokens)
        if self.items is not None and self.task.reads_frontend:
            item_arrays = self.items.make_arrays(items, arrays["tokens"], len(uncut))
            if item_arrays is None:  # placeholders are cut off
                return {}
            arrays |= item_arrays
        arrays["was_cut"] = any(
            len(sequence.tokens) > self.max_length for sequence in uncut
        )
        return self.task.extend_example(self, row, arrays)

    def _cut(self, sequence: EncodedSequence) -> EncodedSequence:
        """Cuts a sequence to its longest length, or drops it: one without tokens."""
        tokens, is_target = sequence
        # The first token is learnt where virtual ones stand before it.
        is_first_learnt = self.num_virtual_tokens > 0
        if len(tokens) > self.max_length:
            match self.task.too_long:
                case "drop":
                    return EncodedSequence([], [])
                case "cut_end":
                    part = slice(self.max_length)
                case "cut_start":
                    part = slice(-self.max_length, None)
                    # What stood before it is gone.
                    is_first_learnt = False
            tokens = tokens[part]
            is_target = is_target[part]
        first = is_first_learnt and is_target[0]
        return EncodedSequence(tokens, [first, *is_target[1:]])


@dataclass(frozen=True)
class ItemEncoder:
    """Encodes what rows have for a model's frontend; pure, and pickles."""

    task: RowTask
    frontend: FrontendConfig
    seq_len: int
    """Tokens of a batch's row."""

    @property
    def room(self) -> int:
        """Items that a batch's row has room for."""
        return self.frontend.count_items_per_row(self.seq_len)

    def read(self, row: FileRow) -> ItemArrays:
        """Reads the items of a file's row. Raises MaxlmError: the task does not read
        them, or a batch's row has no room for so many."""
        items = self.frontend.read_items(row)
        if not items:
            return items
        name, array = next(iter(items.items()))
        if not self.task.reads_frontend:
            message = f"the row has {name}, which task.kind={self.task.kind} does not "
            raise MaxlmError(f"{message}read", where=name, fix="use task.kind=sft")
        num_items = len(array) * self.task.sequences_per_example
        if num_items > self.room:
            message = f"{num_items} items, where a row of a batch has {self.room}"
            fix = "raise data.seq_len or model.frontend.max_items, or leave it out"
            raise MaxlmError(message, where=name, fix=fix)
        return items

    def place(
        self, items: ItemArrays, sequence: EncodedSequence, opening: Sequence[int]
    ) -> EncodedSequence:
        """Returns a sequence with placeholders for items, which are not learnt."""
        indices = self.frontend.place_items(
            sequence.tokens, self.frontend.count_vectors(items), opening
        )
        placeholder_id = self.frontend.placeholder_id
        return EncodedSequence(
            [placeholder_id if i < 0 else sequence.tokens[i] for i in indices],
            [i >= 0 and sequence.is_target[i] for i in indices],
        )

    def make_arrays(
        self, items: ItemArrays, tokens: np.ndarray, num_sequences: int
    ) -> Arrays | None:
        """Returns a batch's arrays for an example's tokens, each of whose sequences has
        all items; None: they do not have all placeholders."""
        numbers = self.frontend.number_vectors(tokens)
        num_vectors = self.frontend.count_vectors(items) * num_sequences
        if numbers.max(initial=0) != num_vectors:
            return None
        arrays: Arrays = {VECTOR_NUMBERS: numbers}
        for name, spec in self.frontend.item_arrays().items():
            array = items.get(name, np.zeros((0, *spec.shape), spec.dtype))
            arrays[f"{ARRAY_PREFIX}{name}"] = np.concatenate([array] * num_sequences)
        return arrays

    def count_tokens_alike(self, arrays: Mapping[str, Any]) -> int:
        """Counts the tokens that are the same share of a row's as an example's items
        are of its room for items, rounded up: examples with few enough tokens together
        then have few enough items."""
        name = next(iter(self.frontend.item_arrays()))
        num_items = len(arrays.get(f"{ARRAY_PREFIX}{name}", ()))
        return -(-num_items * self.seq_len // self.room) if num_items else 0


def join_sequences(
    sequences: Sequence[EncodedSequence], num_virtual_tokens: int = 0
) -> dict[str, np.ndarray]:
    """Lays sequences out one after the other, each a segment that begins with virtual
    tokens."""
    # An adapter sets what the model sees in the place of these.
    virtual_ids = [0] * num_virtual_tokens
    virtual_targets = [False] * num_virtual_tokens
    parts = []
    for segment, sequence in enumerate(sequences, 1):
        ids = np.array(virtual_ids + sequence.tokens, np.int32)
        is_learnt = np.array(virtual_targets + sequence.is_target)
        # Every token but the last is read, every one but the first is a target.
        length = len(ids) - 1
        part = {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "weights": is_learnt[1:].astype(np.float32),
            "segment_ids": np.full(length, segment, np.int32),
            "positions": np.arange(length, dtype=np.int32),
        }
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def sum_by_segment(
    values: jax.Array, segment_ids: jax.Array, num_segments: int
) -> jax.Array:
    """Sums values [..., S] over the tokens of each segment 1 to n: [..., n]; padding,
    0, is left out."""
    is_in_segment = segment_ids[..., None] == jnp.arange(1, num_segments + 1)
    return jnp.where(is_in_segment, values[..., None], 0).sum(-2)
