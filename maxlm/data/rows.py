"""Batches from rows of dictionaries: prompts with answers, chosen and rejected ones,
messages.

Rows are encoded, padded, or packed several into one, and shuffled anew each epoch.
Which examples a row has is a function of the seed alone, and where it stands of the
seed and the epoch, so that any row of any batch is found in O(1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.batch_source import Batch, BatchArraySpec
from maxlm.data.loader.packing import pack_best_fit
from maxlm.data.loader.permutation import derive_key, derive_keys, permute
from maxlm.data.row_files import RowFiles

Encode = Callable[[dict[str, Any]], Mapping[str, Any]]
"""A row of a file to arrays by name; pure, and pickles. Along "seq", always the first
axis, an array is as long as the example, at most a row's length; one without "seq" is
the example's entry of the row's array, or its entries where the array is appended."""

# Examples that are packed together: bounds the memory and the time of packing.
PACKING_BLOCK = 16384
# Ends of the names of arrays that number something of an example from 1 on, 0 being
# none; numbers go on from example to example.
_NUMBERED = ("segment_ids", "vector_numbers")


@dataclass(frozen=True)
class RowSource:
    """A batch source of rows; see :func:`make_row_source`."""

    file: RowFiles
    encode: Encode
    arrays: Mapping[str, BatchArraySpec]
    batch_size: int
    shuffle_key: int | None
    """Key of the shuffling; None keeps the file's order."""
    example_indices: NDArray[np.int64]
    """The examples of all rows, one row after the other."""
    row_offsets: NDArray[np.int64]
    """Row i has examples [offsets[i], offsets[i + 1])."""
    endless: bool = True
    """False reads the file once; rows past its end are padding."""
    notes: tuple[str, ...] = ()
    """Notes for the user, such as examples that are left out."""
    refused: tuple[MaxlmError, ...] = ()
    """Faults of the rows that are left out because they cannot be read or learnt."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return self.row_offsets.size - 1

    @property
    def num_steps(self) -> int | None:
        return None if self.endless else -(-self.rows_per_epoch // self.batch_size)

    def rows(self, step: int, row_numbers: Sequence[int], /) -> Batch:
        indices = step * self.batch_size + np.asarray(row_numbers, np.int64)
        epochs, rows = np.divmod(indices, self.rows_per_epoch)
        if self.shuffle_key is not None:
            epoch_keys = derive_keys(self.shuffle_key, epochs)
            rows = permute(rows, self.rows_per_epoch, epoch_keys)
        batch = {
            name: np.zeros((len(indices), *array.shape), array.dtype)
            for name, array in self.arrays.items()
        }
        for i, (epoch, row) in enumerate(zip(epochs, rows, strict=True)):
            if epoch > 0 and not self.endless:
                continue  # Past the one pass: the row stays padding.
            start, stop = self.row_offsets[row : row + 2]
            self._fill(batch, i, self.example_indices[start:stop].tolist())
        return batch

    def _fill(self, batch: Batch, i: int, examples: Sequence[int]) -> None:
        """Write examples into row i, which is zeros, one after the other."""
        start = 0
        # Of each array: the entries so far, or the largest number.
        counts = dict.fromkeys(self.arrays, 0)
        for number, example in enumerate(examples):
            values, length = self._read_example(example)
            for name, array in self.arrays.items():
                count_before = counts[name]
                value = values[name]
                if array.is_appended:
                    counts[name] += len(value)
                    batch[name][i, count_before : counts[name]] = value
                    continue
                if "seq" not in array.axes:
                    batch[name][i, number] = value
                    continue
                if name.endswith(_NUMBERED):
                    counts[name] += int(value.max(initial=0))
                    value = np.where(value > 0, value + count_before, 0)
                batch[name][i, start : start + len(value)] = value
            start += length

    def _read_example(self, example: int) -> tuple[dict[str, np.ndarray], int]:
        """The arrays of an example, with those that its encoding leaves out, and how
        many tokens it has."""
        encoded = encode_row(self.encode, self.file, example)
        length = max(
            len(encoded[name])
            for name, array in self.arrays.items()
            if "seq" in array.axes and name in encoded
        )
        room = _get_row_length(self.arrays)
        if length > room:
            message = (
                f"an example of {length} tokens, where a row of a batch has {room}"
            )
            fix = "raise data.seq_len, or let the task cut its examples"
            raise MaxlmError(message, where=self.file.locate(example), fix=fix)
        values = {
            "positions": np.arange(length),
            "segment_ids": np.ones(length, np.int32),
        }
        for name, value in encoded.items():
            values[name] = np.asarray(value)
        return values, length


def encode_row(encode: Encode, file: RowFiles, index: int) -> Mapping[str, Any]:
    """Encodes a row of a file; what is wrong with it names the file and the row."""
    row = file[index]
    try:
        return encode(row)
    except MaxlmError as error:
        raise MaxlmError(
            error.message, where=file.locate(index), fix=error.fix
        ) from error


def _get_row_length(arrays: Mapping[str, BatchArraySpec]) -> int:
    """Tokens that a row of a batch has room for."""
    return min(array.shape[0] for array in arrays.values() if "seq" in array.axes)


def make_row_source(
    file: RowFiles,
    encode: Encode,
    arrays: Mapping[str, BatchArraySpec],
    batch_size: int,
    *,
    seed: int,
    examples: NDArray[np.int64] | None = None,
    lengths: NDArray[np.int64] | None = None,
    examples_per_row: int | None = 1,
    shuffle: bool = True,
    endless: bool = True,
    notes: Sequence[str] = (),
    refused: Sequence[MaxlmError] = (),
) -> RowSource:
    """Makes a batch source of a file's rows, each example exactly once an epoch.

    Args:
        arrays: a row's, which ``encode`` fills, but for ``segment_ids`` and
            ``positions``: where it leaves them out, they number the examples of a row
            from 1 and the tokens of each from 0. Segments that it does number, from 1
            on, in ``*segment_ids``, are numbered on from example to example, and so are
            vectors in ``*vector_numbers``. An array without the axis "seq" has its
            examples along its first, or entries of theirs where it is appended. Zeros
            pad all else.
        examples: the rows of the file to read; None: all.
        lengths: tokens of each of ``examples``; needed if several share a row.
        examples_per_row: the most that share a row, each in the fullest row that has
            room for it (best-fit decreasing); None: as many as there is room for.
        shuffle: False keeps the file's order.
        endless: False reads the file once.
    """
    if examples is None:
        examples = np.arange(len(file), dtype=np.int64)
    if examples_per_row == 1:
        offsets = np.arange(len(examples) + 1, dtype=np.int64)
    else:
        assert lengths is not None
        if shuffle:
            # Only examples of one block share rows: blocks are of chance examples.
            packing_key = derive_key(seed, "packing")
            order = permute(np.arange(len(examples)), len(examples), packing_key)
            examples = examples[order]
            lengths = lengths[order]
        room = _get_row_length(arrays)
        examples, offsets = _pack(examples, lengths, room, examples_per_row)
    return RowSource(
        file=file,
        encode=encode,
        arrays=arrays,
        batch_size=batch_size,
        shuffle_key=derive_key(seed, "rows") if shuffle else None,
        example_indices=examples,
        row_offsets=offsets,
        endless=endless,
        notes=tuple(notes),
        refused=tuple(refused),
    )


def _pack(
    examples: NDArray[np.int64],
    lengths: NDArray[np.int64],
    room: int,
    examples_per_row: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Examples in order of their rows, and where each row's begin."""
    packed_blocks = []
    row_sizes = []
    for start in range(0, len(examples), PACKING_BLOCK):
        block = slice(start, start + PACKING_BLOCK)
        rows = pack_best_fit(lengths[block], room)
        if examples_per_row is not None:
            rows = _split_full_rows(rows, examples_per_row)
        packed_blocks.append(examples[block][np.argsort(rows, kind="stable")])
        row_sizes.append(np.bincount(rows))
    offsets = np.cumsum([0, *np.concatenate(row_sizes)])
    return np.concatenate(packed_blocks), offsets


def _split_full_rows(
    rows: NDArray[np.int64], examples_per_row: int
) -> NDArray[np.int64]:
    """The row of each example [n], numbered without gaps, where the examples that a row
    has too many of begin another."""
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    first_of_row = np.searchsorted(sorted_rows, sorted_rows)
    index_in_row = np.arange(len(rows)) - first_of_row
    # One number for (row, part of it): a row has fewer parts than there are examples.
    row_parts = sorted_rows * len(rows) + index_in_row // examples_per_row
    _, numbered_parts = np.unique(row_parts, return_inverse=True)
    split_rows = np.empty_like(rows)
    split_rows[order] = numbered_parts
    return split_rows
