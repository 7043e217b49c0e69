"""Samples as rows to train on.

An entry of a row is about its target: the next token of the same sequence. A row holds
up to ``sequences_per_row`` sequences, one behind the other, as segments 1, 2, ... that
do not see each other; 0 is padding. Sequence i is in row ``i // sequences_per_row``: so
samples of a prompt that stand together stay together, and how many rows there are
follows from how many samples there are, whatever their lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.batch_source import Batch, BatchArraySpec
from maxlm.models.architectures.routes import OWN_CHOICE
from maxlm.rl.routes import ROUTES
from maxlm.rl.samples import Sample


@dataclass(frozen=True)
class RowLayout:
    """Sizes of rows to train on."""

    seq_len: int
    """Entries of a row."""
    sequences_per_row: int = 1

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
    layout: RowLayout,
    *,
    routes: BatchArraySpec | None = None,
) -> Batch:
    """Returns arrays [rows, seq_len] of samples:

    tokens, targets, segment_ids, positions     int32, as in every batch
    weights             fp32: 1 where the policy drew the target; else 0
    sampled_log_probs   fp32: of the targets, where the policy drew them; else 0
    versions            int32: step whose parameters drew the target; else -1

    Args:
        routes: what :func:`~maxlm.rl.routes.declare_routes` returns, where rows have
            the samples' routes besides.

    Raises:
        MaxlmError: a sample that is longer than its share of a row.
    """
    num_rows = layout.count_rows(len(samples))
    batch = make_padding_rows(num_rows, layout.seq_len)
    if routes is not None:
        batch[ROUTES] = np.full((num_rows, *routes.shape), OWN_CHOICE, routes.dtype)
    place = 0
    for number, sample in enumerate(samples):
        row_number, sequence_number = divmod(number, layout.sequences_per_row)
        if sequence_number == 0:
            place = 0
        num_entries = _count_entries(sample, layout)
        row = {name: array[row_number] for name, array in batch.items()}
        entries = slice(place, place + num_entries)
        targets = slice(1, num_entries + 1)
        row["tokens"][entries] = sample.tokens[:num_entries]
        row["targets"][entries] = sample.tokens[targets]
        row["segment_ids"][entries] = sequence_number + 1
        row["positions"][entries] = np.arange(num_entries)
        row["weights"][entries] = sample.is_sampled[targets]
        row["sampled_log_probs"][entries] = sample.log_probs[targets]
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
    numbers = ("weights", "sampled_log_probs")
    batch: Batch = {name: np.zeros(shape, np.int32) for name in integers}
    batch |= {name: np.zeros(shape, np.float32) for name in numbers}
    batch["versions"] = np.full(shape, -1, np.int32)
    return batch


def describe_sample(sample: Sample) -> str:
    """Names a sample in a message."""
    return f"sample {sample.number} of row {sample.prompt.row_number}"


def _count_entries(sample: Sample, layout: RowLayout) -> int:
    """Entries of a sample in its row."""
    num_entries = len(sample.tokens) - 1
    if num_entries <= layout.max_entries:
        return num_entries
    message = (
        f"{describe_sample(sample)} has {len(sample.tokens):,} tokens, and a row of "
        f"data.seq_len={layout.seq_len} has room for {layout.sequences_per_row} of "
        f"{layout.max_entries + 1:,}"
    )
    fix = "raise data.seq_len, or lower max_new_tokens or sequences_per_row"
    raise MaxlmError(message, where="data.seq_len", fix=fix)
