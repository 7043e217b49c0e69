"""The documents that a deduplication stage looks at, numbered through over the shards.

A *member* is a document that the stage's `where` selects and that has a text. Members
are counted in the order of shards and rows, so a member's number says where it lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maxlm.corpus.dedup.columns import get_shard_path, map_columns, write_columns
from maxlm.corpus.shards import SelectedRows, StageShardView
from maxlm.corpus.stage import Stage


@dataclass(frozen=True)
class SelectedDocuments:
    """The members of a corpus. Picklable; their columns stay on disk.

    A shard's file has the columns row (int64, within the shard, rising), rank (float64,
    the higher the better) and id (string).
    """

    folder: Path
    shards: tuple[str, ...]
    shard_offsets: tuple[int, ...]
    """The first member of each shard, and behind them the number of all."""
    document_offsets: tuple[int, ...] = ()
    """The first document of each shard, counted over the corpus, members or not, and
    behind them the number of all."""

    @property
    def num_selected(self) -> int:
        return self.shard_offsets[-1]

    def map_shard(self, shard: int) -> pa.RecordBatch:
        """Maps the columns of a shard's members into memory; `shard`: its index."""
        return map_columns(get_shard_path(self.folder, "members", self.shards[shard]))

    def group_by_shard(self, members: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Yields each shard that has some of the sorted `members`, and the slice of
        these."""
        bounds = np.searchsorted(members, self.shard_offsets)
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            yield shard, slice(int(bounds[shard]), int(bounds[shard + 1]))

    def get_document_numbers(self, members: np.ndarray) -> np.ndarray:
        """Returns members' numbers among all documents of the corpus: int64; -1 for
        -1."""
        rows = self.take("row", members).fill_null(-1).to_numpy()
        shards = np.searchsorted(self.shard_offsets, members, "right") - 1
        first_documents = np.array(self.document_offsets)[shards]
        return np.where(members < 0, -1, first_documents + rows)

    def take(self, column: str, members: np.ndarray) -> pa.Array:
        """Returns a column's values for members in any order; null for -1."""
        # Each member once, by shards, so that each shard's file is read once.
        unique = np.unique(members[members >= 0])
        parts = [self.map_shard(0).column(column).slice(0, 0)]  # For the type.
        for shard, span in self.group_by_shard(unique):
            values = self.map_shard(shard).column(column)
            places = unique[span] - self.shard_offsets[shard]
            parts.append(values.take(pa.array(places)))
        unique_values = pa.concat_arrays(parts)
        # Back to the order that was asked for.
        indices = np.searchsorted(unique, members)
        return unique_values.take(pa.array(indices, mask=members < 0))


def write_members(
    scratch: Path, shard: str, groups: Sequence[SelectedRows], keep_by: str | None
) -> np.ndarray:
    """Writes the file of a shard's members, of their ids and the label that `keep_by`
    names; returns the ranks."""
    # Empty ones first: a shard may have no members.
    rows = [np.empty(0, np.int64)]
    ranks = [np.empty(0)]
    ids = [pa.array([], pa.string())]
    for group in groups:
        rows.append(group.row_indices + group.first_row)
        ranks.append(compute_keep_scores(group.batch, keep_by))
        ids.append(group.batch.column("id"))
    rank = np.concatenate(ranks)
    columns = {"row": np.concatenate(rows), "rank": rank, "id": pa.concat_arrays(ids)}
    write_columns(get_shard_path(scratch, "members", shard), columns)
    return rank


def open_selected_documents(
    folder: Path, shards: Sequence[StageShardView]
) -> SelectedDocuments:
    """Numbers the members of shards whose files have been written."""
    names = tuple(shard.name for shard in shards)
    paths = [get_shard_path(folder, "members", name) for name in names]
    num_members = [map_columns(path).num_rows for path in paths]
    return SelectedDocuments(
        folder=folder,
        shards=names,
        shard_offsets=tuple(accumulate(num_members, initial=0)),
        document_offsets=compute_document_offsets(shards),
    )


def compute_document_offsets(shards: Sequence[StageShardView]) -> tuple[int, ...]:
    """Computes the first document of each shard, counted over the corpus, and behind
    them the number of all."""
    return tuple(accumulate((shard.count_documents() for shard in shards), initial=0))


def compute_keep_scores(batch: pa.RecordBatch, keep_by: str | None) -> np.ndarray:
    """Ranks documents, best highest: float64 [rows], -inf where the label is null or no
    number."""
    if keep_by is None:
        return np.zeros(batch.num_rows)
    label = keep_by.removeprefix("-")
    values = pc.fill_null(pc.cast(batch.column(label), pa.float64()), np.nan)
    scores = values.to_numpy(zero_copy_only=False)
    if keep_by.startswith("-"):
        scores = -scores
    return np.where(np.isnan(scores), -np.inf, scores)


def write_labels(
    shard: StageShardView,
    stage: type[Stage],
    rows: np.ndarray,
    labels: Mapping[str, pa.Array | np.ndarray],
) -> None:
    """Writes a shard's labels. `rows`: the members' rows within the shard, rising.
    `labels`: for each of the stage's labels its values for the members; others get
    nulls."""
    schema = pa.schema(dict(stage.label_types))
    batch = pa.RecordBatch.from_pydict(dict(labels), schema=schema)
    with shard.open_writer(schema) as writer:
        for group in shard.read_selected_rows(["id"]):
            bounds = [group.first_row, group.first_row + group.num_rows]
            start, stop = np.searchsorted(rows, bounds)
            # Not all selected documents are members: some have no text.
            group_members = replace(
                group, row_indices=rows[start:stop] - group.first_row
            )
            writer.write_selected_rows(group_members, batch.slice(start, stop - start))
