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
        return (
            None if self.mixture.end == ENDLESS else self.mixture.end // self.batch_size
        )

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """Returns where each global index [n] lies: store numbers [n] (`PADDING` past
        the end of the one pass) and sequences [n] of those stores."""
        if self.mixture is None:
            return np.where(
                indices < self.sources[0].num_sequences, 0, PADDING
            ), indices
        stores, streams = self.mixture.locate(indices)
        sequences = np.empty_like(streams)
        for store in np.unique(stores):
            here = stores == store
            size = self.sources[store].num_sequences
            epochs, within = np.divmod(streams[here], size)
            if self.shuffle_keys is not None:
                within = permute(
                    within, size, derive_keys(self.shuffle_keys[store], epochs)
                )
            sequences[here] = within
        return stores, sequences

    def rows(
        self, step: int, row_numbers: Sequence[int] | ArrayLike | None = None
    ) -> Batch:
        """Returns the given global rows [n] of the batch of `step`, in this order; None
        is all."""
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
            counts, pieces = source.find_pieces(sequences[here])
            _fill(batch, here, counts, pieces, source.store)
        return batch


def _fill(
    batch: Batch, rows: Int64s, counts: Int64s, pieces: Pieces, store: TokenSource
) -> None:
    """Writes so many of the pieces into each of the given rows [n], reading all at
    once."""
    starts, lengths = (pieces[name].astype(np.int64) for name in ("start", "length"))
    ends = pieces["ends_document"].copy()  # Contiguous, as the others.
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
    store: TokenSource,
    row: Int64s,
    starts: Int64s,
    lengths: Int64s,
    ends: NDArray[np.bool_],
) -> tuple[NDArray[np.integer], Int64s]:
    """The pieces' tokens in one array, and where in it each piece starts.

    A piece whose document goes on is read one token further, for its last target.
    Neighbours in the store and in a row are read as one range: with concat, one read a
    row.
    """
    touches = (row[1:] == row[:-1]) & (starts[1:] == (starts + lengths)[:-1])
    opens = np.flatnonzero(np.concatenate([[True], ~touches]))
    closes = np.append(opens[1:], starts.size) - 1
    read_starts, read_stops = starts[opens], (starts + lengths + ~ends)[closes]
    # One more place than tokens: a document's last token looks past its end before it
    # is masked.
    tokens = store.read_many(read_starts.tolist(), read_stops.tolist())
    stream = np.concatenate([*tokens, [0]], dtype=np.int32, casting="same_kind")
    read_lengths = read_stops - read_starts
    shift = np.cumsum(read_lengths) - read_lengths - read_starts
    return stream, starts + np.repeat(shift, closes - opens + 1)


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
        what = f"weights are for {sorted(mixing.weights)}, stores are {sorted(stores)}"
        raise MaxlmError(what, where="weights", fix="give each store one weight")
    tokens = {name: store.num_tokens for name, store in stores.items()}
    # Weights are checked before any index is built; the true sizes do not change the
    # answer.
    mixing.make_order(tokens, tokens, config.batch_size, None)
    for name, count in tokens.items():
        if count < config.seq_len:
            what = f"the corpus has {count} tokens, fewer than seq_len={config.seq_len}"
            raise MaxlmError(
                what, where=f"store {name!r}", fix="give more text, or lower seq_len"
            )
    if config.packing == "best_fit":
        sizes = {"seq_len": config.seq_len, "block": config.packing_block}
        pack = partial(open_best_fit, **sizes, verify=config.verify)
    else:
        pack = partial(ConcatPacking, seq_len=config.seq_len)
    sources = tuple(map(pack, stores.values()))
    sequences = {n: s.num_sequences for n, s in zip(stores, sources, strict=True)}
    mixture_key = derive_key(seed, "mixture") if config.shuffle else None
    mixture = mixing.make_order(tokens, sequences, config.batch_size, mixture_key)
    keys = (
        tuple(derive_key(seed, "shuffle", name) for name in stores)
        if config.shuffle
        else None
    )
    return Batches(sources, mixture, keys, config.seq_len, config.batch_size)


def make_one_pass_batches(store: TokenSource, seq_len: int, batch_size: int) -> Batches:
    """Makes the batches of one pass over a store in order: every token in exactly one
    batch.

    All batches have one shape: the last is filled up with rows of weight 0. The weights
    of all hosts' batches sum to num_tokens minus the number of documents, as each token
    but a document's first is a target once. The store may be shorter than one sequence.
    """
    return Batches((ConcatPacking(store, seq_len),), None, None, seq_len, batch_size)


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
            f"source that "
            "has a weight then was read max_epochs times",
            where="data.sources",
            fix="raise max_epochs of a source or give it more text, or train for fewer "
            "steps",
        )
