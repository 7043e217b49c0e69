"""Samples as rows to train on.

An entry of a row is about its target: the next token of the same sequence. A row holds
up to ``sequences_per_row`` sequences, one behind the other, as segments 1, 2, ... that
do not see each other; 0 is padding. Sequence i is in row ``i // sequences_per_row``: so
samples of a prompt that stand together stay together, and how many rows there are
follows from how many samples there are, whatever their lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.batch_source import Batch, BatchArraySpec
from maxlm.models.architectures.routes import OWN_CHOICE
from maxlm.rl.routes import ROUTES
from maxlm.rl.samples import Sample

LongSamples = Literal["refuse", "cut"]


@dataclass(frozen=True)
class RowLayout:
    """Sizes of rows to train on."""

    seq_len: int
    """Entries of a row."""
    sequences_per_row: int = 1
    long_samples: LongSamples = "refuse"
    """A sample with more entries than ``max_entries``: an error, or it loses its last
    tokens."""

    @property
    def max_entries(self) -> int:
        """Entries of a sequence at most, one fewer than its tokens: an equal share of
        its row, so that the lengths of others do not matter."""
        return self.seq_len // self.sequences_per_row

    def count_rows(self, num_samples: int) -> int:
        """Returns how many rows so many samples take."""
        return -(-num_samples // self.sequences_per_row)


def pack_samples(
    samples: Sequence[Sample],
    advantages: Sequence[float],
    layout: RowLayout,
    *,
    num_rows: int | None = None,
    counts: Sequence[bool] | None = None,
    routes: BatchArraySpec | None = None,
) -> Batch:
    """Returns arrays [rows, seq_len] of samples with an advantage each, which all of
    its drawn tokens get:

    tokens, targets, segment_ids, positions     int32, as in every batch
    weights             fp32: 1 where the policy drew the target, and it counts
    sampled_log_probs   fp32: of the targets, where the policy drew them; else 0
    advantages          fp32: likewise
    versions            int32: step whose parameters drew the target; else -1

    Args:
        num_rows: rows there are, those past the samples being padding; default: as many
            as the samples take.
        counts: whether each sample's tokens count in the loss; default: all do.
        routes: what :func:`~maxlm.rl.routes.declare_routes` returns, where rows have
            the samples' routes besides.

    Raises:
        MaxlmError: a sample that is longer than its share of a row, an advantage that
            is not finite, or rows too few.
    """
    if len(advantages) != len(samples):
        raise ValueError(f"{len(advantages)} advantages of {len(samples)} samples")
    num_needed = layout.count_rows(len(samples))
    num_rows = num_needed if num_rows is None else num_rows
    if num_rows < num_needed:
        message = f"{len(samples)} samples take {num_needed} rows, and there are "
        fix = "raise data.batch_size, or sample fewer"
        raise MaxlmError(f"{message}{num_rows}", where="data.batch_size", fix=fix)
    batch = make_padding_rows(num_rows, layout.seq_len)
    if routes is not None:
        batch[ROUTES] = np.full((num_rows, *routes.shape), OWN_CHOICE, routes.dtype)
    place = 0
    for number, (sample, advantage) in enumerate(zip(samples, advantages, strict=True)):
        row_number, sequence_number = divmod(number, layout.sequences_per_row)
        if sequence_number == 0:
            place = 0
        if not np.isfinite(advantage):
            message = f"the advantage of {describe_sample(sample)} is {advantage}"
            fix = "correct the reward of it"
            raise MaxlmError(message, where="rewards", fix=fix)
        num_entries = _count_entries(sample, layout)
        row = {name: array[row_number] for name, array in batch.items()}
        entries = slice(place, place + num_entries)
        targets = slice(1, num_entries + 1)
        is_drawn = np.array(sample.is_sampled[targets], np.float32)
        is_counted = counts is None or counts[number]
        row["tokens"][entries] = sample.tokens[:num_entries]
        row["targets"][entries] = sample.tokens[targets]
        row["segment_ids"][entries] = sequence_number + 1
        row["positions"][entries] = np.arange(num_entries)
        row["weights"][entries] = is_drawn * is_counted
        row["sampled_log_probs"][entries] = sample.log_probs[targets]
        row["advantages"][entries] = is_drawn * advantage
        row["versions"][entries] = sample.versions[targets]
        if routes is not None and sample.routes:
            num_read = min(num_entries, len(sample.routes))
            row[ROUTES][place : place + num_read] = sample.routes[:num_read]
        place += num_entries
    return batch


def make_padding_rows(num_rows: int, seq_len: int) -> Batch:
    """Returns rows of :func:`pack_samples` without a sample."""
    shape = (num_rows, seq_len)
    integers = ("tokens", "targets", "segment_ids", "positions")
    numbers = ("weights", "sampled_log_probs", "advantages")
    batch: Batch = {name: np.zeros(shape, np.int32) for name in integers}
    batch |= {name: np.zeros(shape, np.float32) for name in numbers}
    batch["versions"] = np.full(shape, -1, np.int32)
    return batch


def count_cut_samples(samples: Sequence[Sample], layout: RowLayout) -> int:
    """Counts the samples that lose tokens in rows of a layout."""
    limit = layout.max_entries + 1
    return sum(len(sample.tokens) > limit for sample in samples)


def spread_over_sequences(
    values: NDArray[np.floating], segment_ids: NDArray[np.int32], sequences_per_row: int
) -> NDArray[np.float32]:
    """Spreads a value of each sample [n] over the entries of its sequence: fp32 [rows,
    seq_len], 0 in padding. For scores that are known once the rows are packed."""
    num_rows = len(segment_ids)
    table = np.zeros((num_rows, sequences_per_row + 1), np.float32)
    numbers = np.arange(len(values))
    table[numbers // sequences_per_row, 1 + numbers % sequences_per_row] = values
    return np.take_along_axis(table, segment_ids, axis=1)


def describe_sample(sample: Sample) -> str:
    """Names a sample in a message."""
    return f"sample {sample.number} of row {sample.prompt.row_number}"


def _count_entries(sample: Sample, layout: RowLayout) -> int:
    """Entries of a sample in its row."""
    num_entries = len(sample.tokens) - 1
    if num_entries <= layout.max_entries:
        return num_entries
    if layout.long_samples == "cut":
        return layout.max_entries
    message = (
        f"{describe_sample(sample)} has {len(sample.tokens):,} tokens, and a row of "
        f"data.seq_len={layout.seq_len} has room for {layout.sequences_per_row} of "
        f"{layout.max_entries + 1:,}"
    )
    fix = "raise data.seq_len, or lower max_new_tokens or sequences_per_row"
    raise MaxlmError(message, where="data.seq_len", fix=fix)
