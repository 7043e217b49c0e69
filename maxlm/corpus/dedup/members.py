"""The documents that a deduplication stage looks at, numbered through over the shards.

A *member* is a document that the stage's `where` selects and that has a text. Members are counted
in the order of shards and rows, so a member's number says where it lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maxlm.corpus.dedup.columns import concatenate, read_columns, write_columns
from maxlm.corpus.shards import RowGroup, StageShardView


@dataclass(frozen=True)
class SelectedDocuments:
    """The members of a corpus. Picklable; their columns stay on disk.

    A shard's file has the columns row (int64, within the shard, rising), rank (float64, the higher
    the better) and id (string).
    """

    folder: Path
    shards: tuple[str, ...]
    shard_offsets: tuple[int, ...]
    """The first member of each shard, and behind them the number of all."""

    @property
    def num_selected(self) -> int:
        return self.shard_offsets[-1]

    def shard_path(self, shard: int) -> Path:
        return get_member_path(self.folder, self.shards[shard])

    def group_by_shard(self, members: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Yields each shard that has some of the sorted `members`, and the slice of these."""
        ends = np.searchsorted(members, self.shard_offsets)
        for shard in np.flatnonzero(np.diff(ends)).tolist():
            yield shard, slice(int(ends[shard]), int(ends[shard + 1]))

    def take(self, column: str, members: np.ndarray) -> pa.Array:
        """Returns a column's values for members in any order."""
        unique, places = np.unique(members, return_inverse=True)
        parts = []
        for shard, part in self.group_by_shard(unique):
            values = read_columns(self.shard_path(shard)).array(column)
            parts.append(values.take(pa.array(unique[part] - self.shard_offsets[shard])))
        if not parts:
            kinds = {"rank": pa.float64(), "row": pa.int64()}
            return pa.array([], kinds.get(column, pa.string()))
        return pa.concat_arrays(parts).take(pa.array(places))


def get_member_path(folder: Path, shard: str) -> Path:
    """Returns the file of a shard's members, below a stage's scratch folder."""
    return folder / "members" / f"{shard}.arrow"


class SelectedDocumentsWriter:
    """The members of one shard, as they are read."""

    input_columns = ("id",)
    """The columns it needs, besides the label that `keep_by` names."""

    def __init__(self, keep_by: str | None):
        self._keep_by = keep_by
        self._rows: list[np.ndarray] = []
        self._ranks: list[np.ndarray] = []
        self._ids: list[pa.Array] = [pa.array([], pa.string())]

    def add(self, group: RowGroup) -> None:
        """Adds the members of one row group."""
        self._rows.append(group.row_indices + group.first_row)
        self._ranks.append(compute_keep_scores(group.batch, self._keep_by))
        self._ids.append(group.batch.column("id"))

    def write(self, path: Path) -> np.ndarray:
        """Write the shard's file; returns the ranks."""
        rank = concatenate(self._ranks, np.float64)
        columns = {"row": concatenate(self._rows, np.int64), "rank": rank}
        write_columns(path, columns | {"id": pa.concat_arrays(self._ids)})
        return rank


def open_selected_documents(folder: Path, shards: Sequence[StageShardView]) -> SelectedDocuments:
    """Number the members of shards whose files have been written."""
    names = tuple(shard.name for shard in shards)
    sizes = (len(read_columns(get_member_path(folder, name))) for name in names)
    offsets = tuple(accumulate(sizes, initial=0))
    return SelectedDocuments(folder, names, offsets)


def compute_keep_scores(batch: pa.RecordBatch, keep_by: str | None) -> np.ndarray:
    """Ranks documents, best highest: float64 [rows], -inf where the label is null or no number."""
    if keep_by is None:
        return np.zeros(batch.num_rows)
    values = pc.fill_null(pc.cast(batch.column(keep_by.removeprefix("-")), pa.float64()), np.nan)
    signed = values.to_numpy(zero_copy_only=False) * (-1 if keep_by.startswith("-") else 1)
    return np.where(np.isnan(signed), -np.inf, signed)


def write_labels(
    shard: StageShardView,
    schema: pa.Schema,
    rows: np.ndarray,
    labels: Mapping[str, pa.Array | np.ndarray],
) -> None:
    """Write a shard's labels.

    Args:
        rows: the members' rows within the shard, rising.
        labels: for each column of `schema` its values for the members; others get nulls.
    """
    arrays = [pa.array(labels[field.name], field.type) for field in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    with shard.open_writer(schema) as writer:
        for group in shard.read_selected_rows(["id"]):
            start, stop = np.searchsorted(rows, [group.first_row, group.first_row + group.num_rows])
            own = replace(group, row_indices=rows[start:stop] - group.first_row)
            writer.write_selected_rows(own, batch.slice(start, stop - start))
