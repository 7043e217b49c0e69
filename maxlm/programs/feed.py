"""Batches of a run, on its mesh."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

from maxlm.data.batch_source import BatchSource
from maxlm.data.loader import load_batches
from maxlm.programs.setup import Setup
from maxlm.train.batch import batch_sharding, get_local_rows, put_batch
from maxlm.train.skips import Skips, contiguous_ranges
from maxlm.train.step import Batch


@contextmanager
def load_training_batches(
    setup: Setup, source: BatchSource, start: int, skips: Skips = ()
) -> Iterator[Iterator[Batch]]:
    """Arrays [micro-batches, rows, ...] from step ``start`` to the run's last.

    Args:
        skips: batches to leave out.
    """
    data = setup.config.data

    def batches() -> Generator[Batch]:
        for first, count in contiguous_ranges(start, setup.config.train.steps, skips):
            steps = {"start_step": first, "num_steps": count}
            pace = {"workers": data.workers, "prefetch": data.prefetch}
            yield from _put_batches(setup, source, **steps, **pace)

    with closing(batches()) as each:
        yield each


@contextmanager
def load_evaluation_batches(
    setup: Setup, source: BatchSource, max_batches: int | None = None
) -> Iterator[Iterator[Batch]]:
    """Arrays [micro-batches, rows, ...] of a finite source, in order."""
    steps = min(n for n in (source.num_steps, max_batches) if n is not None)
    with closing(_put_batches(setup, source, num_steps=steps)) as each:
        yield each


def _put_batches(setup: Setup, source: BatchSource, **how: int) -> Generator[Batch]:
    config, mesh = setup.config, setup.mesh
    lead = (config.train.micro_batches, config.data.batch_size // config.train.micro_batches)
    arrays = config.task.batch_arrays(config.data.seq_len)
    rows = get_local_rows(batch_sharding(setup.compute, mesh, ()), lead)
    with load_batches(source, rows, **how) as loader:
        for batch in loader:
            yield put_batch(batch, arrays, rows, setup.compute, mesh, lead, setup.token_order)
