"""The batch at step s: a pure function of (stores, mixture, seed, s).

Order and packing are decided by global index, before any host picks its rows, so every
row of every batch can be made by anyone, at any time, in any number of processes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.data.batch_source import Batch, BatchSource
from maxlm.data.loader.mixture import ENDLESS, Mixing, MixtureOrder
from maxlm.data.loader.packing import (
    ConcatPacking,
    Packing,
    Pieces,
    TokenSource,
    open_best_fit,
)
from maxlm.data.loader.permutation import derive_key, derive_keys, permute
from maxlm.data.store.arrays import Int64s

if TYPE_CHECKING:
    from maxlm.data.loader.prefetch import Prefetcher

PADDING = -1


class LoaderConfig(Config):
    """Settings by which token stores become batches."""

    seq_len: int = Field(default=512, ge=1)
    """Tokens in a row."""
    batch_size: int = Field(default=8, ge=1)
    """Rows a step, over all hosts."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat cuts the stream of documents every seq_len tokens: no padding, no index,
    but most documents are cut. best_fit keeps every document that fits in one row
    whole: under 1% padding on common text, and an index beside the store, built at
    first use (seconds a million documents)."""
    packing_block: int = Field(default=16384, ge=1)
    """Consecutive documents that best_fit packs together. More pads less; fewer keep a
    row's documents closer in the store."""
    shuffle: bool = True
    """True reads each epoch in a new random order; False reads each in store order and
    interleaves stores evenly."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """What becomes of a row of `task.files` that cannot be read or learnt: error ends
    the run with its file and number; skip leaves it out, says how many there are, and
    lists them in the run's folder (refused_rows.jsonl)."""
    workers: int = Field(default=1, ge=0)
    """Processes that make batches ahead. 0 makes them in threads of the training
    process: quick to start, but they share its interpreter."""
    prefetch: int = Field(default=4, ge=1)
    """Batches made ahead, by each worker."""
    verify: bool = False
    """true reads every token store and packing index when a run starts, on each
    process, and refuses one of which a file is not what was written (as `maxlm corpus
    verify` does): some seconds a GB. false checks manifests and sizes then, and each
    chunk of tokens when it is read, which finds damage but not a whole file that stands
    where another belongs."""


@dataclass(frozen=True)
class Batches:
    """Makes any rows of any step's batch. Small to pickle: stores reopen where they
    arrive.

    Stores are mixed by weight, each read epoch after epoch, each epoch in an order of
    its own; or one store is read once, in store order.
    """

    sources: tuple[Packing, ...]
    mixture: MixtureOrder | None
    """Draws each row from a source; None: one pass over the only one, past whose end is
    padding."""
    shuffle_keys: tuple[int, ...] | None
    """A key for each store; None reads every epoch in store order."""
    seq_len: int
    batch_size: int

    @property
    def num_steps(self) -> int | None:
        """Batches of the one pass, or whole ones until every source of the mixture was
        read as often as it may; None: no end."""
        if self.mixture is None:
            return -(-self.sources[0].num_sequences // self.batch_size)
        if self.mixture.end == ENDLESS:
            return None
        return self.mixture.end // self.batch_size

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """Returns where each global index [n] lies: store numbers [n] (`PADDING` past
        the end of the one pass) and sequences [n] of those stores."""
        if self.mixture is None:
            is_past_end = indices >= self.sources[0].num_sequences
            return np.where(is_past_end, PADDING, 0), indices
        stores, stream_indices = self.mixture.locate(indices)
        sequences = np.empty_like(stream_indices)
        for store in np.unique(stores):
            is_of_store = stores == store
            num_sequences = self.sources[store].num_sequences
            epochs, in_epoch = np.divmod(stream_indices[is_of_store], num_sequences)
            if self.shuffle_keys is not None:
                epoch_keys = derive_keys(self.shuffle_keys[store], epochs)
                in_epoch = permute(in_epoch, num_sequences, epoch_keys)
            sequences[is_of_store] = in_epoch
        return stores, sequences

    def rows(
        self, step: int, row_numbers: Sequence[int] | ArrayLike | None = None
    ) -> Batch:
        """Returns the given global rows [n] of the batch of `step`, in this order; None
        is all."""
        if row_numbers is None:
            row_numbers = np.arange(self.batch_size)
        numbers = np.asarray(row_numbers, dtype=np.int64)
        stores, sequences = self.locate(step * self.batch_size + numbers)
        shape = (numbers.size, self.seq_len)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        for store in np.unique(stores[stores != PADDING]):
            source = self.sources[store]
            rows = np.flatnonzero(stores == store)
            counts, pieces = source.find_pieces(sequences[rows])
            _fill(batch, rows, counts, pieces, source.store)
        return batch


def _fill(
    batch: Batch, rows: Int64s, counts: Int64s, pieces: Pieces, store: TokenSource
) -> None:
    """Writes so many (`counts` [n]) of the pieces into each of the given rows [n].

    All rows are filled together, by index arithmetic over arrays of pieces and of
    tokens: a loop over pieces would take longer than reading them does.
    """
    # One element a piece.
    starts = pieces["start"].astype(np.int64)
    lengths = pieces["length"].astype(np.int64)
    ends_document = pieces["ends_document"].copy()  # Contiguous, as the others.
    row_of_piece = np.repeat(rows, counts)
    first_piece = np.repeat(np.cumsum(counts) - counts, counts)  # Of the same row.
    segment_id = np.arange(row_of_piece.size) - first_piece + 1
    tokens_before = np.cumsum(lengths) - lengths  # Over all rows.
    column = tokens_before - tokens_before[first_piece]
    # Where the piece starts in an array of all rows end to end.
    seq_len = batch["tokens"].shape[1]
    flat_start = row_of_piece * seq_len + column

    tokens, read_start = _read(store, row_of_piece, starts, lengths, ends_document)

    # One element a token: its position in its piece, where it was read, and where it
    # goes among all rows end to end.
    position = np.arange(lengths.sum()) - np.repeat(tokens_before, lengths)
    source = np.repeat(read_start, lengths) + position
    place = np.repeat(flat_start, lengths) + position

    flat = {name: array.reshape(-1) for name, array in batch.items()}  # Views.
    flat["tokens"][place] = tokens[source]
    flat["targets"][place] = tokens[source + 1]
    flat["weights"][place] = 1
    flat["segment_ids"][place] = np.repeat(segment_id, lengths)
    flat["positions"][place] = position
    # Nothing follows on the last token of a document.
    last_of_document = (flat_start + lengths - 1)[ends_document]
    flat["targets"][last_of_document] = 0
    flat["weights"][last_of_document] = 0


def _read(
    store: TokenSource,
    row_of_piece: Int64s,
    starts: Int64s,
    lengths: Int64s,
    ends_document: NDArray[np.bool_],
) -> tuple[NDArray[np.integer], Int64s]:
    """The pieces' tokens in one array, and where in it each piece starts.

    A piece whose document goes on is read one token further, for its last target.
    Neighbours in the store and in a row are read as one range: with concat, one read a
    row.
    """
    stops = starts + lengths
    is_same_row = row_of_piece[1:] == row_of_piece[:-1]
    continues_range = is_same_row & (starts[1:] == stops[:-1])
    # The first and the last piece of each range.
    first_piece = np.flatnonzero(np.concatenate([[True], ~continues_range]))
    last_piece = np.append(first_piece[1:], starts.size) - 1
    range_starts = starts[first_piece]
    range_stops = (stops + ~ends_document)[last_piece]
    ranges = store.read_many(range_starts.tolist(), range_stops.tolist())
    # One more place than tokens: a document's last token looks past its end before it
    # is masked.
    tokens = np.concatenate([*ranges, [0]], dtype=np.int32, casting="same_kind")
    # From a place in the store to the place in `tokens`, for each range.
    range_lengths = range_stops - range_starts
    places_in_tokens = np.cumsum(range_lengths) - range_lengths
    shift = places_in_tokens - range_starts
    pieces_in_range = last_piece - first_piece + 1
    return tokens, starts + np.repeat(shift, pieces_in_range)


def make_batches(
    stores: Mapping[str, TokenSource],
    mixing: Mapping[str, float] | Mixing,
    config: LoaderConfig,
    *,
    seed: int,
) -> Batches:
    """Makes the batches of a mixture: `make_batches(...).rows(step, rows)` is any of
    them.

    They are endless unless every source that is read has `max_epochs`. A store's order
    depends on the seed and its name, not on the other stores. Raises MaxlmError: no
    stores, names that differ, a bad weight or phase, a store shorter than one sequence,
    or a best_fit index that cannot be written.

    Args:
        mixing: each store's share of the sequences, by name (need not sum to 1); or how
            shares depend on sizes, epochs and steps.
        config: seq_len, batch_size, packing, shuffle and (for packing indices) verify
            are used.
    """
    if not isinstance(mixing, Mixing):
        mixing = Mixing(mixing)
    if stores.keys() != mixing.weights.keys():
        message = (
            f"weights are for {sorted(mixing.weights)}, stores are {sorted(stores)}"
        )
        raise MaxlmError(message, where="weights", fix="give each store one weight")
    tokens = {name: store.num_tokens for name, store in stores.items()}
    # Weights are checked before any index is built; the true sizes do not change the
    # answer.
    mixing.make_order(tokens, tokens, config.batch_size, None)
    for name, count in tokens.items():
        if count < config.seq_len:
            message = (
                f"the corpus has {count} tokens, fewer than seq_len={config.seq_len}"
            )
            fix = "give more text, or lower seq_len"
            raise MaxlmError(message, where=f"store {name!r}", fix=fix)
    packings = {name: _pack_store(store, config) for name, store in stores.items()}
    sequences = {name: packing.num_sequences for name, packing in packings.items()}
    mixture_key = None
    shuffle_keys = None
    if config.shuffle:
        mixture_key = derive_key(seed, "mixture")
        shuffle_keys = tuple(derive_key(seed, "shuffle", name) for name in stores)
    return Batches(
        sources=tuple(packings.values()),
        mixture=mixing.make_order(tokens, sequences, config.batch_size, mixture_key),
        shuffle_keys=shuffle_keys,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
    )


def _pack_store(store: TokenSource, config: LoaderConfig) -> Packing:
    if config.packing == "concat":
        return ConcatPacking(store, config.seq_len)
    return open_best_fit(
        store, config.seq_len, config.packing_block, verify=config.verify
    )


def make_one_pass_batches(store: TokenSource, seq_len: int, batch_size: int) -> Batches:
    """Makes the batches of one pass over a store in order: every token in exactly one
    batch.

    All batches have one shape: the last is filled up with rows of weight 0. The weights
    of all hosts' batches sum to num_tokens minus the number of documents, as each token
    but a document's first is a target once. The store may be shorter than one sequence.
    """
    return Batches(
        sources=(ConcatPacking(store, seq_len),),
        mixture=None,
        shuffle_keys=None,
        seq_len=seq_len,
        batch_size=batch_size,
    )


def load_batches(
    source: BatchSource,
    rows: Sequence[int],
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    workers: int = 0,
    prefetch: int = 4,
    is_stop_requested: Callable[[], bool] = lambda: False,
) -> "Prefetcher":
    """Iterates over rows of a source's batches from `start_step` on, made ahead.

    To resume, pass the iterator's `step` (the next step) as `start_step`, on any number
    of hosts.

    Args:
        rows: the global rows to take, in this order, which are this process's.
        num_steps: how many batches; None is all there are.
        workers, prefetch: see `LoaderConfig`.
        is_stop_requested: see `Prefetcher`.
    """
    from maxlm.data.loader.prefetch import Prefetcher

    stop = source.num_steps if num_steps is None else start_step + num_steps
    if stop is not None:
        check_num_steps(source, stop)
    make = partial(_make_rows, source, rows)
    return Prefetcher(
        make,
        start_step,
        stop,
        workers=workers,
        prefetch=prefetch,
        is_stop_requested=is_stop_requested,
    )


def _make_rows(source: BatchSource, rows: Sequence[int], step: int) -> Batch:
    return source.rows(step, rows)


def check_num_steps(batches: BatchSource, steps: int) -> None:
    """Refuses a mixture that ends before so many steps."""
    if batches.num_steps is not None and batches.num_steps < steps:
        raise MaxlmError(
            f"the mixture ends after {batches.num_steps:,} of {steps:,} steps: every "
            "source that has a weight then was read max_epochs times",
            where="data.sources",
            fix="raise max_epochs of a source or give it more text, or train for fewer "
            "steps",
        )
