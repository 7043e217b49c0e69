"""The batch at step s: a pure function of (stores, mixture, seed, s).

Order and packing are decided by global index, before any host picks its rows, so every row of
every batch can be made by anyone, at any time, in any number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maxlm.data.loader.mixture import ENDLESS, MixtureOrder
from maxlm.data.loader.packing import DocumentSpans, Packing, TokenSource
from maxlm.data.loader.permutation import derive_keys, permute
from maxlm.data.store.arrays import Int64s

PADDING = -1

Batch = dict[str, np.ndarray]
"""int32 arrays [rows, seq_len] and float32 weights [rows, seq_len]:

tokens       token ids; 0 in padding.
targets      the next token of the same document, also where the document is cut here; 0 where
             there is none.
weights      1 where the target counts; 0 at a document's last token and in padding.
segment_ids  1, 2, ... for the row's pieces; 0 in padding.
positions    0, 1, ... within each piece. A piece that continues a cut document starts at 0 again,
             as attention cannot see what came before it.
"""


@dataclass(frozen=True)
class Batches:
    """Makes any rows of any step's batch. Small to pickle: stores reopen where they arrive.

    Stores are mixed by weight, each read epoch after epoch, each epoch in an order of its own; or
    one store is read once, in store order.
    """

    sources: tuple[Packing, ...]
    mixture: MixtureOrder | None
    """Draws each row from a source; None: one pass over the only one, past whose end is padding."""
    shuffle_keys: tuple[int, ...] | None
    """A key for each store; None reads every epoch in store order."""
    seq_len: int
    batch_size: int

    @property
    def num_steps(self) -> int | None:
        """Batches of the one pass, or whole ones until every source of the mixture was read as
        often as it may; None: no end."""
        if self.mixture is None:
            return -(-self.sources[0].num_sequences // self.batch_size)
        return None if self.mixture.end == ENDLESS else self.mixture.end // self.batch_size

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """Returns where each global index [n] lies: store numbers [n] (`PADDING` past the end of
        the one pass) and sequences [n] of those stores."""
        if self.mixture is None:
            size = self.sources[0].num_sequences
            return np.where(indices < size, 0, PADDING), indices
        stores, streams = self.mixture.locate(indices)
        sequences = np.empty_like(streams)
        for store in np.unique(stores):
            here = stores == store
            size = self.sources[store].num_sequences
            epochs, within = np.divmod(streams[here], size)
            if self.shuffle_keys is not None:
                within = permute(within, size, derive_keys(self.shuffle_keys[store], epochs))
            sequences[here] = within
        return stores, sequences

    def rows(self, step: int, row_numbers: Sequence[int] | ArrayLike | None = None) -> Batch:
        """Returns the given global rows [n] of the batch of `step`, in this order; None is all."""
        row_numbers = np.arange(self.batch_size) if row_numbers is None else row_numbers
        wanted = np.asarray(row_numbers, dtype=np.int64)
        stores, sequences = self.locate(step * self.batch_size + wanted)
        shape = (wanted.size, self.seq_len)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        for number in np.unique(stores[stores != PADDING]):
            source = self.sources[number]
            here = np.flatnonzero(stores == number)
            _fill(batch, here, source.find_document_spans(sequences[here]), source.store)
        return batch


def _fill(batch: Batch, rows: Int64s, pieces: DocumentSpans, store: TokenSource) -> None:
    """Writes one sequence's pieces into each of the given rows [n], reading all at once."""
    counts, starts, lengths, ends = pieces
    seq_len = batch["tokens"].shape[1]
    row = np.repeat(rows, counts)
    first_of_row = np.cumsum(counts) - counts
    ahead = np.cumsum(lengths) - lengths  # Tokens of earlier pieces, over all rows.
    column = ahead - np.repeat(ahead[first_of_row], counts)

    stream, at = _read(store, row, starts, lengths, ends)
    within = np.arange(lengths.sum()) - np.repeat(ahead, lengths)
    source = np.repeat(at, lengths) + within
    target = np.repeat(row * seq_len + column, lengths) + within
    nth = np.arange(row.size) - np.repeat(first_of_row, counts)

    flat = {name: array.reshape(-1) for name, array in batch.items()}
    flat["tokens"][target] = stream[source]
    flat["targets"][target] = stream[source + 1]
    flat["weights"][target] = 1
    flat["segment_ids"][target] = np.repeat(nth + 1, lengths)
    flat["positions"][target] = within
    last = (row * seq_len + column + lengths - 1)[ends]
    flat["targets"][last] = 0
    flat["weights"][last] = 0


def _read(
    store: TokenSource, row: Int64s, starts: Int64s, lengths: Int64s, ends: NDArray[np.bool_]
) -> tuple[NDArray[np.integer], Int64s]:
    """The pieces' tokens in one array, and where in it each piece starts.

    A piece whose document goes on is read one token further, for its last target. Neighbours in
    the store and in a row are read as one range: with concat, one read a row.
    """
    touches = (row[1:] == row[:-1]) & (starts[1:] == (starts + lengths)[:-1])
    opens = np.flatnonzero(np.concatenate([[True], ~touches]))
    closes = np.append(opens[1:], starts.size) - 1
    read_starts, read_stops = starts[opens], (starts + lengths + ~ends)[closes]
    # One more place than tokens: a document's last token looks past its end before it is masked.
    tokens = store.read_many(read_starts.tolist(), read_stops.tolist())
    stream = np.concatenate([*tokens, [0]], dtype=np.int32, casting="same_kind")
    read_lengths = read_stops - read_starts
    shift = np.cumsum(read_lengths) - read_lengths - read_starts
    reads = np.repeat(np.arange(opens.size), closes - opens + 1)
    return stream, starts + shift[reads]
