"""Batches for training and evaluation from token stores."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.data.loader.batches import Batch, Batches
from maxlm.data.loader.mixture import Mixing
from maxlm.data.loader.packing import ConcatPacking, TokenSource, open_best_fit
from maxlm.data.loader.permutation import derive_key

if TYPE_CHECKING:
    from maxlm.data.batch_source import BatchSource
    from maxlm.data.loader.prefetch import Prefetcher


class LoaderConfig(Config):
    """Settings by which token stores become batches."""

    seq_len: int = Field(default=512, ge=1)
    """Tokens in a row."""
    batch_size: int = Field(default=8, ge=1)
    """Rows a step, over all hosts."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat cuts the stream of documents every seq_len tokens: no padding, no index, but most
    documents are cut. best_fit keeps every document that fits in one row whole: under 1% padding
    on common text, and an index beside the store, built at first use (seconds a million
    documents)."""
    packing_block: int = Field(default=16384, ge=1)
    """Consecutive documents that best_fit packs together. More pads less; fewer keep a row's
    documents closer in the store."""
    shuffle: bool = True
    """True reads each epoch in a new random order; False reads each in store order and interleaves
    stores evenly."""
    workers: int = Field(default=1, ge=0)
    """Processes that make batches ahead. 0 makes them in threads of the training process: quick to
    start, but they share its interpreter."""
    prefetch: int = Field(default=4, ge=1)
    """Batches made ahead, by each worker."""


def make_batches(
    stores: Mapping[str, TokenSource],
    mixing: Mapping[str, float] | Mixing,
    config: LoaderConfig,
    *,
    seed: int,
) -> Batches:
    """Makes the batches of a mixture: `make_batches(...).rows(step, rows)` is any of them.

    They are endless unless every source that is read has `max_epochs`. A store's order depends on
    the seed and its name, not on the other stores.

    Args:
        mixing: each store's share of the sequences, by name (need not sum to 1); or how shares
            depend on sizes, epochs and steps.
        config: seq_len, batch_size, packing and shuffle are used.

    Raises:
        MaxlmError: no stores, names that differ, a bad weight or phase, a store shorter than one
            sequence, or a best_fit index that cannot be written.
    """
    if not isinstance(mixing, Mixing):
        mixing = Mixing(mixing)
    if stores.keys() != mixing.weights.keys():
        what = f"weights are for {sorted(mixing.weights)}, stores are {sorted(stores)}"
        raise MaxlmError(what, where="weights", fix="give each store one weight")
    tokens = {name: store.num_tokens for name, store in stores.items()}
    # Weights are checked before any index is built; the true sizes do not change the answer.
    mixing.make_order(tokens, tokens, config.batch_size, None)
    for name, count in tokens.items():
        if count < config.seq_len:
            what = f"the corpus has {count} tokens, fewer than seq_len={config.seq_len}"
            fix = "give more text, or lower seq_len"
            raise MaxlmError(what, where=f"store {name!r}", fix=fix)
    if config.packing == "best_fit":
        pack = partial(open_best_fit, seq_len=config.seq_len, block=config.packing_block)
    else:
        pack = partial(ConcatPacking, seq_len=config.seq_len)
    sources = tuple(map(pack, stores.values()))
    sequences = {n: s.num_sequences for n, s in zip(stores, sources, strict=True)}
    mixture_key = derive_key(seed, "mixture") if config.shuffle else None
    mixture = mixing.make_order(tokens, sequences, config.batch_size, mixture_key)
    keys = tuple(derive_key(seed, "shuffle", name) for name in stores) if config.shuffle else None
    return Batches(sources, mixture, keys, config.seq_len, config.batch_size)


def make_one_pass_batches(store: TokenSource, seq_len: int, batch_size: int) -> Batches:
    """Makes the batches of one pass over a store in order: every token in exactly one batch.

    All batches have one shape: the last is filled up with rows of weight 0. The weights of all
    hosts' batches sum to num_tokens minus the number of documents, as each token but a document's
    first is a target once. The store may be shorter than one sequence.
    """
    if store.num_tokens == 0:
        raise MaxlmError("the store has no tokens", where="evaluation", fix="give some text")
    return Batches((ConcatPacking(store, seq_len),), None, None, seq_len, batch_size)


def load_batches(
    source: "BatchSource",
    rows: Sequence[int],
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    workers: int = 0,
    prefetch: int = 4,
) -> "Prefetcher":
    """Iterates over rows of a source's batches from `start_step` on, made ahead.

    To resume, pass the iterator's `step` (the next step) as `start_step`, on any number of hosts.

    Args:
        rows: the global rows to take, in this order, which are this process's.
        num_steps: how many batches; None is all there are.
        workers, prefetch: see `LoaderConfig`.
    """
    from maxlm.data.loader.prefetch import Prefetcher

    stop = source.num_steps if num_steps is None else start_step + num_steps
    if stop is not None:
        check_num_steps(source, stop)
    make = partial(_make_rows, source, rows)
    return Prefetcher(make, start_step, stop, workers=workers, prefetch=prefetch)


def _make_rows(source: "BatchSource", rows: Sequence[int], step: int) -> Batch:
    return source.rows(step, rows)


def check_num_steps(batches: "BatchSource", steps: int) -> None:
    """Refuses a mixture that ends before so many steps."""
    if batches.num_steps is not None and batches.num_steps < steps:
        raise MaxlmError(
            f"the mixture ends after {batches.num_steps:,} of {steps:,} steps: every source that "
            "has a weight then was read max_epochs times",
            where="data.sources",
            fix="raise max_epochs of a source or give it more text, or train for fewer steps",
        )
