"""Batches of a run, on its mesh."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from maxlm.data.loader import TokenSource, make_loader, one_pass
from maxlm.data.store import TokenStore
from maxlm.programs.setup import Setup
from maxlm.train.batch import batch_sharding, local_rows, put_batch
from maxlm.train.step import Batch


@contextmanager
def training_batches(
    setup: Setup,
    stores: Mapping[str, TokenSource],
    weights: Mapping[str, float],
    start: int,
) -> Iterator[Iterator[Batch]]:
    """Arrays [micro-batches, rows, S] from step ``start`` to the run's last."""
    data, micro = setup.config.data, setup.config.train.micro_batches
    lead = (micro, data.batch_size // micro)
    sharding = batch_sharding(setup.compute, setup.mesh)
    rows, order = local_rows(sharding, (*lead, data.seq_len)), setup.token_order
    with make_loader(
        stores,
        weights,
        data,
        seed=setup.config.seed,
        start_step=start,
        num_steps=setup.config.train.steps - start,
        rows=rows,
    ) as loader:
        yield (put_batch(batch, rows, sharding, lead, order) for batch in loader)


@contextmanager
def evaluation_batches(
    setup: Setup, store: TokenStore, max_batches: int | None = None
) -> Iterator[Iterator[Batch]]:
    """Arrays [micro-batches, rows, S]: a store read once, in order."""
    data, micro = setup.config.data, setup.config.train.micro_batches
    lead = (micro, data.batch_size // micro)
    sharding = batch_sharding(setup.compute, setup.mesh)
    rows, order = local_rows(sharding, (*lead, data.seq_len)), setup.token_order
    with one_pass(
        store, data.seq_len, data.batch_size, packing="concat", max_batches=max_batches, rows=rows
    ) as loader:
        yield (put_batch(batch, rows, sharding, lead, order) for batch in loader)
