"""Batches of encoded rows: padded, or several packed into one, shuffled anew each epoch.

Which examples a row has is a function of the seed alone, and where it stands of the seed and the
epoch, so that any row of any batch is found in O(1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArray
from maxlm.data.loader.batches import Batch
from maxlm.data.loader.packing import pack_best_fit
from maxlm.data.loader.permutation import derive_key, derive_keys, permute
from maxlm.data.rows.files import RowFile

Encode = Callable[[dict[str, Any]], Mapping[str, Any]]
"""A row of a file to arrays by name; pure, and pickles. Along "seq" an array is as long as the
example, at most a row's length."""

# Examples that are packed together.
PACKING_BLOCK = 16384


@dataclass(frozen=True)
class RowSource:
    """A batch source of rows; see :func:`make_row_source`."""

    file: RowFile
    encode: Encode
    arrays: Mapping[str, BatchArray]
    batch_size: int
    shuffle_key: int | None
    """None keeps the file's order."""
    examples: NDArray[np.int64]
    """The examples of all rows, one row after the other."""
    offsets: NDArray[np.int64]
    """Row i has examples [offsets[i], offsets[i + 1])."""
    endless: bool = True
    """False reads the file once; rows past its end are padding."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.offsets.size - 1

    @property
    def num_steps(self) -> int | None:
        return None if self.endless else -(-self.num_rows // self.batch_size)

    def rows(self, step: int, row_numbers: Sequence[int], /) -> Batch:
        indices = step * self.batch_size + np.asarray(row_numbers, np.int64)
        epochs, places = np.divmod(indices, self.num_rows)
        present = np.ones(len(indices), bool) if self.endless else epochs == 0
        if self.shuffle_key is not None:
            places = permute(places, self.num_rows, derive_keys(self.shuffle_key, epochs))
        batch = {
            name: np.zeros((len(indices), *array.shape), array.dtype)
            for name, array in self.arrays.items()
        }
        for i in np.flatnonzero(present).tolist():
            own = slice(*self.offsets[places[i] : places[i] + 2])
            self._fill(batch, i, self.examples[own].tolist())
        return batch

    def _fill(self, batch: Batch, i: int, examples: Sequence[int]) -> None:
        """Write examples into row i, which is zeros, one after the other."""
        start = 0
        for number, example in enumerate(examples, 1):
            encoded = self.encode(self.file[example])
            check_fits(encoded, self.arrays, f"{self.file.path}: row {example}")
            for name, array in self.arrays.items():
                prefix = name.removesuffix("segment_ids").removesuffix("positions")
                if name in encoded:
                    value = np.asarray(encoded[name])
                elif prefix != name:
                    size = len(encoded[f"{prefix}tokens"])
                    value = np.arange(size)
                    value = np.full_like(value, number) if name.endswith("segment_ids") else value
                else:
                    continue
                place = (
                    slice(start, start + size) if axis == "seq" else slice(None)
                    for axis, size in zip(array.axes, value.shape, strict=True)
                )
                batch[name][(i, *place)] = value
            start += measure_length(encoded, self.arrays)


def measure_length(encoded: Mapping[str, Any], arrays: Mapping[str, BatchArray]) -> int:
    """Return the tokens of an encoded example: those of its longest array along "seq"."""
    along = {name: a.axes.index("seq") for name, a in arrays.items() if "seq" in a.axes}
    return max(np.shape(encoded[name])[axis] for name, axis in along.items() if name in encoded)


def check_fits(encoded: Mapping[str, Any], arrays: Mapping[str, BatchArray], where: str) -> None:
    """Check that an encoded example is no longer than a row.

    Raises:
        MaxlmError: naming both lengths.
    """
    room = min(a.shape[a.axes.index("seq")] for a in arrays.values() if "seq" in a.axes)
    if (length := measure_length(encoded, arrays)) > room:
        raise MaxlmError(
            f"an example of {length} tokens, where a row of a batch has {room}",
            where=where,
            fix="raise data.seq_len, or let the task cut its examples",
        )


def make_row_source(
    file: RowFile,
    encode: Encode,
    arrays: Mapping[str, BatchArray],
    batch_size: int,
    *,
    seed: int,
    packed: bool = False,
    shuffle: bool = True,
    endless: bool = True,
) -> RowSource:
    """A batch source of a file's rows, each example exactly once an epoch.

    Args:
        arrays: a row's, which ``encode`` fills, but for those whose names end in ``segment_ids``
            and ``positions``: where it leaves them out, they number the examples of a row from 1
            and the ``tokens`` of each (under the same prefix) from 0. Zeros pad all else.
        packed: several examples share a row, each in the fullest row that has room for it
            (best-fit decreasing). Every example is encoded once beforehand, for its length.
        shuffle: False keeps the file's order.
        endless: False reads the file once.

    Raises:
        MaxlmError: an example that is longer than a row.
    """
    key = derive_key(seed, "rows") if shuffle else None
    examples = np.arange(len(file), dtype=np.int64)
    offsets = np.arange(len(file) + 1, dtype=np.int64)
    if packed:
        if key is not None:
            examples = permute(examples, len(file), derive_key(seed, "packing"))
        examples, offsets = _pack(file, encode, arrays, examples)
    return RowSource(file, encode, arrays, batch_size, key, examples, offsets, endless)


def _pack(
    file: RowFile, encode: Encode, arrays: Mapping[str, BatchArray], examples: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Examples in order of their rows, and where each row's begin."""
    room = min(a.shape[a.axes.index("seq")] for a in arrays.values() if "seq" in a.axes)
    lengths = []
    for example in examples.tolist():
        encoded = encode(file[example])
        check_fits(encoded, arrays, f"{file.path}: row {example}")
        lengths.append(measure_length(encoded, arrays))
    lengths = np.array(lengths)
    order, counts = [], []
    for start in range(0, len(examples), PACKING_BLOCK):
        block = slice(start, start + PACKING_BLOCK)
        rows = pack_best_fit(lengths[block], room)
        order.append(examples[block][np.argsort(rows, kind="stable")])
        counts.append(np.bincount(rows))
    return np.concatenate(order), np.cumsum([0, *np.concatenate(counts)])
