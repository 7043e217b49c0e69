"""Batch sources that read the state: what they make of a step depends on the parameters
that the step begins with."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol, runtime_checkable

from maxlm.checkpoint.skips import Skips, contiguous_ranges
from maxlm.data.batch_source import Batch, BatchSource
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.optim.state import TrainState
from maxlm.run.setup import BatchPlacement, RunSetup, open_training_batches
from maxlm.tasks.task import DeviceBatch


@dataclass(frozen=True)
class RolloutContext:
    """What a run has for a source of rollouts to make batches with."""

    setup: RunSetup
    tokenizer: Tokenizer
    folder: Path
    """The run's, in which rollouts are kept."""
    other_folder: Path | None
    """That of the run whose checkpoint the state is of; None: of this run's, or of
    none."""
    start_step: int
    """Updates made before."""
    skips: Skips
    """Batches that the run leaves out."""
    say: Callable[[str], None]
    """Takes lines that tell what happens, on process 0."""
    on_work: Callable[[], None]
    """To be called now and then while a rollout is made: resets the watchdog."""


class OpenRollouts(Protocol):
    """Batches that are made of the state, one after the other, on all processes
    alike."""

    @property
    def num_steps(self) -> int | None:
        """See :class:`BatchSource`."""
        ...

    def roll_out(self, batch_number: int, state: TrainState) -> Mapping[str, float]:
        """Makes a batch, if it is not made yet, with the state that its step begins
        with, and keeps it in the run's folder; a batch that is kept there is read.
        Returns what is to be logged with the step. Numbers that the run skips are not
        asked for."""
        ...

    def rows(self, batch_number: int, row_numbers: Sequence[int], /) -> Batch:
        """Returns rows of the batch that :meth:`roll_out` made last."""
        ...


@runtime_checkable
class ValidatedRollouts(OpenRollouts, Protocol):
    """Batches of a state that is also tried on what it does not learn from, every
    ``train.eval_every`` steps and after the last."""

    @property
    def has_validation(self) -> bool:
        """Whether the run asks for that."""
        ...

    def validate(self, state: TrainState) -> dict[str, float]:
        """Returns a metrics record, whose names begin with ``eval_``. Batches are the
        same with and without it, but where samples under way keep the caches of older
        parameters (``rollouts.update_in_flight``): these are computed anew behind
        it."""
        ...


@runtime_checkable
class RolloutSource(BatchSource, Protocol):
    """A batch source whose batches the trainer asks for between steps, with the state;
    none is made ahead, but for what the source itself says."""

    @property
    def batches_per_rollout(self) -> int:
        """Batches that are made together; a rollback skips all of them, or none."""
        ...

    def open(self, context: RolloutContext) -> AbstractContextManager[OpenRollouts]:
        """Opens what makes the batches of a run, and closes it at the end."""
        ...


class StepBatches:
    """The batches of a run's steps, in their order.

    Attributes:
        arrays: each step's, [micro-batches, rows, ...]. Where there are rollouts, call
            :meth:`roll_out` before each.
        rollouts: what makes them of the state; None: they do not depend on it.
    """

    def __init__(
        self,
        arrays: Iterator[DeviceBatch],
        rollouts: OpenRollouts | None = None,
        batch_numbers: Iterator[int] = iter(()),
    ):
        self.arrays = arrays
        self.rollouts = rollouts
        self._batch_numbers = batch_numbers

    def roll_out(self, state: TrainState) -> Mapping[str, float]:
        """Makes the next step's batch of the state that the step begins with, where it
        depends on that; see :meth:`OpenRollouts.roll_out`."""
        if self.rollouts is None:
            return {}
        return self.rollouts.roll_out(next(self._batch_numbers), state)


@contextmanager
def open_step_batches(
    context: RolloutContext,
    source: BatchSource,
    is_stop_requested: Callable[[], bool] = lambda: False,
) -> Generator[StepBatches]:
    """Opens a source's batches of the steps after ``context.start_step`` up to the run's
    last, but for ``context.skips``. ``is_stop_requested``: see
    :class:`~maxlm.data.loader.prefetch.Prefetcher`."""
    setup = context.setup
    start = context.start_step
    skips = context.skips
    if not isinstance(source, RolloutSource):
        training_batches = open_training_batches(
            setup, source, start, skips, is_stop_requested=is_stop_requested
        )
        with training_batches as arrays:
            yield StepBatches(arrays)
        return

    def iterate_batch_numbers() -> Iterator[int]:
        ranges = contiguous_ranges(start, setup.config.train.steps, skips)
        return chain.from_iterable(
            range(first, first + count) for first, count in ranges
        )

    placement = BatchPlacement.of_run(setup)

    def put_batches(rollouts: OpenRollouts) -> Iterator[DeviceBatch]:
        for number in iterate_batch_numbers():
            yield placement.put(rollouts.rows(number, placement.local_rows))

    with source.open(context) as rollouts:
        yield StepBatches(put_batches(rollouts), rollouts, iterate_batch_numbers())
