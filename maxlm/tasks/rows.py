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
from maxlm.data.tokenizer import Tokenizer
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import ignore_progress, show_progress
from maxlm.tasks.task import SourceInputs, Task

# So many rows take longer than processes to start: seconds.
_MANY_ROWS, _PART_ROWS = 16384, 1024
# Refused rows whose faults a run says at its start; a file in its folder lists all.
_REFUSED_ROWS_SHOWN = 3
TooLong = Literal["drop", "cut_end", "cut_start"]
FileRow = Mapping[str, Any]
"""A row of a file, by column."""
Arrays = dict[str, Any]
"""An example's arrays, by name."""


class RowTask(Task):
    """A task on rows of JSON Lines, Parquet or saved datasets; see
    :mod:`maxlm.data.conversations` for their forms.

    An example is one sequence of tokens or several, which stand one after the other in
    a row of ``data.seq_len`` tokens as segments of their own, so that one pass through
    the model reads all.
    """

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
        return super().batch_arrays(seq_len) | {
            name: BatchArraySpec(
                (self.examples_per_row or 1, *shape),
                np.float32,
                (None,) * (1 + len(shape)),
            )
            for name, shape in self.example_shapes().items()
        }

    def make_encoder(
        self, tokenizer: Tokenizer, seq_len: int, num_virtual_tokens: int = 0
    ) -> "ExampleEncoder":
        """Returns what encodes rows for batches of ``seq_len`` tokens."""
        room = seq_len // self.sequences_per_example
        length = min(self.max_length or room + 1, room + 1 - num_virtual_tokens)
        return ExampleEncoder(self, tokenizer, length, num_virtual_tokens)

    def open_files(self, which: Literal["files", "validation_files"]) -> RowFiles:
        """Opens the files to train or evaluate on."""
        paths = getattr(self, which)
        if not paths:
            what = f"task.kind={self.kind} trains on rows of files, and none is named"
            raise MaxlmError(
                what, where=f"task.{which}", fix="name a .jsonl or .parquet file"
            )
        return open_rows(*paths, columns=self.columns)

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        file = self.open_files("files")
        training, _ = self._split(len(file), inputs.seed)
        return self.make_source(
            file, training, inputs, shuffle=inputs.loader.shuffle, endless=True
        )

    def evaluation_sources(self, inputs: SourceInputs) -> Mapping[str, BatchSource]:
        once = partial(self.make_source, inputs=inputs, shuffle=False, endless=False)
        if self.validation_files:
            file = self.open_files("validation_files")
            return {"validation": once(file, np.arange(len(file)))}
        file = self.open_files("files")
        _, heldout = self._split(len(file), inputs.seed)
        return {"validation": once(file, heldout)} if heldout.size else {}

    def for_small_model(self) -> Self:
        small = super().for_small_model()
        return small.model_copy(update={"max_length": None, "too_long": "cut_start"})

    def _split(
        self, num_rows: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows to train and to evaluate on, in the file's order."""
        if self.validation_files or not self.validation_fraction:
            return np.arange(num_rows), np.arange(0)
        order = permute(np.arange(num_rows), num_rows, derive_key(seed, "validation"))
        size = min(num_rows - 1, max(1, round(num_rows * self.validation_fraction)))
        return np.sort(order[size:]), np.sort(order[:size])

    def make_source(
        self,
        file: RowFiles,
        examples: NDArray[np.int64],
        inputs: SourceInputs,
        **options: bool,
    ) -> RowSource:
        """Makes a batch source of some rows of files; ``options``: ``shuffle`` and
        ``endless`` of :func:`~maxlm.data.rows.make_row_source`."""
        assert inputs.tokenizer is not None
        loader = inputs.loader
        arrays = self.batch_arrays(inputs.loader.seq_len)
        encoder = self.make_encoder(
            inputs.tokenizer, loader.seq_len, inputs.num_virtual_tokens
        )
        skips = loader.on_bad_rows == "skip"
        scan = scan_examples(
            encoder, file, examples, inputs.build_workers, keep_errors=skips
        )
        notes = self.describe_scan(scan, encoder.max_length)
        if scan.errors:
            notes.append(describe_refused_rows(scan))
        kept = np.flatnonzero(scan.lengths)
        if not kept.size:
            fix = "raise data.seq_len, or set task.too_long"
            raise MaxlmError(notes[-1], where=str(file.paths[0]), fix=fix)
        return make_row_source(
            *(file, encoder, arrays, loader.batch_size),
            seed=inputs.seed,
            examples=examples[kept],
            lengths=scan.lengths[kept],
            examples_per_row=self.examples_per_row,
            notes=notes,
            refused=scan.errors,
            **options,
        )

    def describe_scan(self, scan: "ExampleScan", max_length: int) -> list[str]:
        """Says which rows are cut and left out, and by which rule."""
        rule, total = f"task.too_long={self.too_long}", f"of {len(scan.lengths):,} rows"
        notes = []
        if cut := int(scan.was_cut.sum()):
            notes.append(f"{cut:,} {total} are cut to {max_length:,} tokens ({rule})")
        if lost := int((scan.lengths == 0).sum()) - len(scan.errors):
            why = f"longer than {max_length:,} tokens"
            if self.too_long != "drop":
                why = f"no token to learn among the {max_length:,} that are kept"
            notes.append(f"{lost:,} {total} are left out: {why} ({rule})")
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
    """Tokens that each has in a row of a batch; 0: it is left out."""
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
    """Encodes rows of files once; many in up to so many processes, with a progress bar.
    A row that cannot be read raises its MaxlmError, or, with ``keep_errors``, is left
    out."""
    is_long = len(examples) >= _MANY_ROWS
    parts = np.array_split(examples, max(1, len(examples) // _PART_ROWS))
    counts = [np.zeros((3, 0), np.int64)] * len(parts)
    errors = [list[MaxlmError]()] * len(parts)
    done = 0
    is_shown = is_long and jax.process_index() == 0
    with ExitStack() as stack:
        progress = (
            stack.enter_context(show_progress("rows")) if is_shown else ignore_progress
        )
        pool = stack.enter_context(WorkerPool(workers if is_long else 1))
        scan = partial(_scan, encoder, file)
        for number, part_counts, faults in pool.map_unordered(
            scan, [*enumerate(parts)]
        ):
            if faults and not keep_errors:
                raise faults[0]
            counts[number] = part_counts
            errors[number] = faults
            done += len(parts[number])
            progress("encoding rows", done, len(examples))
    # In the order of the files, in whichever order the parts were done.
    in_order = [error for faults in errors for error in faults]
    return ExampleScan(*np.concatenate(counts, axis=1), errors=in_order)


def _scan(
    encoder: "ExampleEncoder", file: RowFiles, job: tuple[int, NDArray[np.int64]]
) -> tuple[int, NDArray[np.int64], list[MaxlmError]]:
    number, examples = job
    counts = np.zeros((3, len(examples)), np.int64)
    errors = list[MaxlmError]()
    for i, example in enumerate(examples.tolist()):
        try:
            if encoded := encode_row(encoder, file, example):
                size = max(
                    len(own) for name, own in encoded.items() if name.endswith("tokens")
                )
                counts[:, i] = (
                    size,
                    np.count_nonzero(encoded["weights"]),
                    encoded["was_cut"],
                )
        except MaxlmError as error:
            errors.append(error)
    return number, counts, errors


@dataclass(frozen=True)
class ExampleEncoder:
    """Encodes rows for a task's batches; pure, and pickles."""

    task: RowTask
    tokenizer: Tokenizer
    max_length: int
    """Tokens of a sequence at most, without virtual ones."""
    num_virtual_tokens: int = 0

    def __call__(self, row: FileRow) -> Mapping[str, Any]:
        """Returns an example's arrays by name (see :data:`maxlm.data.rows.Encode`);
        none of an example that is left out."""
        whole = self.task.encode_example(self.tokenizer, row)
        sequences = [self._cut(sequence) for sequence in whole]
        if not all(sequence.num_targets for sequence in sequences):
            return {}
        arrays: Arrays = join_sequences(sequences, self.num_virtual_tokens)
        arrays["was_cut"] = any(len(each.tokens) > self.max_length for each in whole)
        return self.task.extend_example(self, row, arrays)

    def _cut(self, sequence: EncodedSequence) -> EncodedSequence:
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
                    is_first_learnt = False
            tokens, is_target = tokens[part], is_target[part]
        return EncodedSequence(
            tokens, [is_first_learnt and is_target[0], *is_target[1:]]
        )


def join_sequences(
    sequences: Sequence[EncodedSequence], num_virtual_tokens: int = 0
) -> dict[str, NDArray[Any]]:
    """Lays sequences out one after the other, each a segment that begins with virtual
    tokens."""
    parts = []
    for segment, sequence in enumerate(sequences, 1):
        ids = np.array([0] * num_virtual_tokens + sequence.tokens, np.int32)
        learnt = np.array([False] * num_virtual_tokens + sequence.is_target)
        size = len(ids) - 1
        parts.append(
            {
                "tokens": ids[:-1],
                "targets": ids[1:],
                "weights": learnt[1:].astype(np.float32),
                "segment_ids": np.full(size, segment, np.int32),
                "positions": np.arange(size, dtype=np.int32),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def sum_by_segment(
    values: jax.Array, segment_ids: jax.Array, num_segments: int
) -> jax.Array:
    """Sums values [..., S] over the tokens of each segment 1 to n: [..., n]; padding,
    0, is left out."""
    own = segment_ids[..., None] == jnp.arange(1, num_segments + 1)
    return jnp.where(own, values[..., None], 0).sum(-2)
