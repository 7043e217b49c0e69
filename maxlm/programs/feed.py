"""Batches of a run, on its mesh."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager

from maxlm.data.loader import Mixing, TokenSource, make_loader, one_pass
from maxlm.data.store import TokenStore
from maxlm.programs.setup import Setup
from maxlm.tasks import Transform, Vocabulary, host_transform
from maxlm.train.batch import batch_sharding, local_rows, put_batch
from maxlm.train.skips import Skips, stretches
from maxlm.train.step import Batch


@contextmanager
def training_batches(
    setup: Setup,
    stores: Mapping[str, TokenSource],
    mixing: Mapping[str, float] | Mixing,
    vocabulary: Vocabulary,
    start: int,
    skips: Skips = (),
) -> Iterator[Iterator[Batch]]:
    """Arrays [micro-batches, rows, S] from step ``start`` to the run's last.

    Args:
        skips: batches to leave out.
    """
    data, micro = setup.config.data, setup.config.train.micro_batches
    lead = (micro, data.batch_size // micro)
    sharding = batch_sharding(setup.compute, setup.mesh)
    rows, order = local_rows(sharding, (*lead, data.seq_len)), setup.token_order

    def batches() -> Generator[Batch]:
        for first, count in stretches(start, setup.config.train.steps, skips):
            with make_loader(
                stores,
                mixing,
                data,
                seed=setup.config.seed,
                start_step=first,
                num_steps=count,
                rows=rows,
                transform=_transform(setup, vocabulary),
            ) as loader:
                for batch in loader:
                    yield put_batch(batch, rows, sharding, lead, order)

    with closing(batches()) as each:
        yield each


@contextmanager
def evaluation_batches(
    setup: Setup, store: TokenStore, vocabulary: Vocabulary, max_batches: int | None = None
) -> Iterator[Iterator[Batch]]:
    """Arrays [micro-batches, rows, S]: a store read once, in order. What an objective takes out of
    it is the same each time."""
    data, micro = setup.config.data, setup.config.train.micro_batches
    lead = (micro, data.batch_size // micro)
    sharding = batch_sharding(setup.compute, setup.mesh)
    rows, order = local_rows(sharding, (*lead, data.seq_len)), setup.token_order
    with one_pass(
        store,
        data.seq_len,
        data.batch_size,
        packing="concat",
        max_batches=max_batches,
        rows=rows,
        transform=_transform(setup, vocabulary),
    ) as loader:
        yield (put_batch(batch, rows, sharding, lead, order) for batch in loader)


def _transform(setup: Setup, vocabulary: Vocabulary) -> Transform | None:
    start_id = getattr(setup.config.model, "start_id", 0)
    return host_transform(
        setup.config.objective, vocabulary, start_id=start_id, seed=setup.config.seed
    )
