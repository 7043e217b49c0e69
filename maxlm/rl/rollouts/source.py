"""Batches that are made of rollouts: the policy answers prompts, rewards score the
answers, and what came of it is kept in the run's folder and trained on.

Rollout r serves the batches r·U to r·U + U − 1, U being epochs · minibatches. It is
drawn with the parameters that the first of them is trained on with; with
``rollouts.staleness`` the first tokens of its samples may be of up to so many rollouts
before. Without a rollback batch and step have the same number.
"""

import hashlib
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import jax
import numpy as np

from maxlm.checkpoint.folder import list_checkpoint_steps
from maxlm.checkpoint.skips import Skips
from maxlm.config import MaxlmError
from maxlm.config.keys import select_leaves
from maxlm.data.batch_source import Batch
from maxlm.data.loader.permutation import derive_key, permute
from maxlm.optim.state import TrainState
from maxlm.rl.rewards.runner import RewardRunner, check_row
from maxlm.rl.rollouts.description import (
    describe_engine_work,
    describe_groups,
    describe_staleness,
)
from maxlm.rl.rollouts.generation import PolicyEngine
from maxlm.rl.rollouts.groups import Group, GroupCollector, GroupQueue
from maxlm.rl.rollouts.history import RolloutHistory
from maxlm.rl.rollouts.packing import pack_samples
from maxlm.rl.rollouts.planned_work import count_groups_per_rollout
from maxlm.rl.rollouts.preparation import RolloutPreparation
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.records import (
    RolloutFiles,
    SampleLog,
    episodes_from_arrays,
    episodes_to_arrays,
)
from maxlm.rl.rollouts.sampler import RolloutSampler
from maxlm.rl.rollouts.scoring import list_scored
from maxlm.rl.rollouts.task import RolloutTask
from maxlm.rl.rollouts.validator import PolicyValidator
from maxlm.rl.routes import ROUTES
from maxlm.run.config import INCIDENTAL, RunConfig
from maxlm.run.rollout_source import RolloutContext
from maxlm.runtime.collectives import run_on_process_0
from maxlm.tasks.task import SourceInputs

# Settings that decide what rollouts hold, but for those that a run may change as it goes
# on. A rollout that was drawn under others is drawn again, unless training stands in the
# middle of it.
_DECIDING = (
    "seed",
    "model",
    "adapter",
    "task",
    "optimizer",
    "schedule",
    "train.steps",
    "train.start_from",
)
_NEXT_PROMPT = "next_prompt"
_NUM_BEGUN = "num_begun"
_SETTINGS = "settings"
_METRICS = "metrics"


class PolicyRolloutSource:
    """The batches of a task that learns of what the policy generates.

    Args:
        task: what is learnt.
        inputs: of the run.

    Raises:
        MaxlmError: a batch that does not divide into groups of samples.
    """

    num_steps: int | None = None

    def __init__(self, task: RolloutTask, inputs: SourceInputs):
        self.task = task
        self.inputs = inputs
        loader = inputs.loader
        self.num_groups = count_groups_per_rollout(
            task, loader.seq_len, loader.batch_size
        )
        self.batches_per_rollout = task.epochs * task.minibatches

    def rows(self, step: int, row_numbers: Sequence[int], /) -> Batch:
        raise ValueError("rollouts are made of a run's state: open them first")

    @contextmanager
    def open(self, context: RolloutContext) -> Generator["PolicyRollouts"]:
        with ExitStack() as stack:
            runner = None
            if jax.process_index() == 0:
                runner = stack.enter_context(RewardRunner(self.task.rewards))
            yield PolicyRollouts(self, context, runner)


class PolicyRollouts:
    """The rollouts of a run, one after the other.

    Args:
        runner: what scores samples, on process 0; None on others.

    Raises:
        MaxlmError: prompts that cannot be read, are too long or lack what a reward
            reads; a mesh that cannot generate.
    """

    num_steps: int | None = None

    def __init__(
        self,
        source: PolicyRolloutSource,
        context: RolloutContext,
        runner: RewardRunner | None,
    ):
        setup = context.setup
        self._task = source.task
        self._num_groups = source.num_groups
        self._context = context
        self._layout = source.task.make_layout(setup.config.data.seq_len)
        self._routes = setup.config.batch_arrays.get(ROUTES)
        self._engine = PolicyEngine(
            source.task, setup, context.tokenizer, self._layout.max_entries + 1
        )
        if runner is not None:
            runner.check_setup()
        self._order = PromptOrder(
            source.task.environment,
            context.tokenizer,
            seed=setup.config.seed,
            max_prompt_length=self._engine.max_prompt_length,
            long_prompts=source.task.rollouts.long_prompts,
            shuffle=setup.config.data.shuffle,
            workers=setup.config.data.build_workers,
            check_row=None if runner is None else partial(check_row, runner.rewards),
        )
        if self._order.num_left_out:
            context.say(
                f"{self._order.num_left_out:,} prompts are left out: longer than "
                f"{self._engine.max_prompt_length:,} tokens"
            )
        # Rows without end are not read beforehand: those of the first rollout.
        if runner is not None and self._order.prompts_per_epoch is None:
            runner.check(self._order.take(0, self._num_groups))
        self._runner = runner
        self._collector: GroupCollector | None = None
        self._collected: int | None = None
        """The rollout that the collector collected last."""
        self._validator: PolicyValidator | None = None
        if source.task.validation is not None:
            self._validator = PolicyValidator(
                source.task, source.task.validation, context, self._engine, runner
            )
        self._updates = source.batches_per_rollout
        self._history = RolloutHistory(self._updates, context.skips)
        self._files = RolloutFiles(context.folder)
        self._copy_record()
        is_lead = jax.process_index() == 0
        self._log = SampleLog(context.folder, write=is_lead)
        self._settings = _digest_settings(setup.config, context.skips)
        self._preparation = RolloutPreparation(source.task, setup)
        self._number: int | None = None
        """The rollout that the next arrays are of."""
        self._batch: Batch = {}

    def roll_out(self, batch_number: int, state: TrainState) -> Mapping[str, float]:
        """See :class:`~maxlm.run.rollout_source.OpenRollouts`."""
        number, update = divmod(batch_number, self._updates)
        if number == self._number:
            return {}
        arrays = self._read(number, is_under_way=update > 0)
        timings: Mapping[str, float] = {}
        if arrays is None:
            if update:
                purpose = "training stands in the middle of it"
                raise self._make_missing_error(number, purpose)
            arrays, timings = self._make(number, state)
        self._number = number
        self._batch = {
            name.removeprefix("batch_"): array
            for name, array in arrays.items()
            if name.startswith("batch_")
        }
        if update:
            return {}
        # A rollout that was kept is logged as it was, but for the time it took.
        return json.loads(arrays[_METRICS].tobytes()) | timings

    def rows(self, batch_number: int, row_numbers: Sequence[int], /) -> Batch:
        """See :class:`~maxlm.run.rollout_source.OpenRollouts`."""
        number, update = divmod(batch_number, self._updates)
        assert number == self._number, "roll_out makes the batch first"
        epoch, minibatch = divmod(update, self._task.minibatches)
        batch_size = self._context.setup.config.data.batch_size
        num_rows = batch_size * self._task.minibatches
        places = np.arange(num_rows)
        if self._task.minibatches > 1:
            seed = self._context.setup.config.seed
            key = derive_key(seed, "minibatches", number, epoch)
            places = permute(places, num_rows, key)
        chosen = places[minibatch * batch_size :][np.asarray(row_numbers)]
        return {name: array[chosen] for name, array in self._batch.items()}

    @property
    def has_validation(self) -> bool:
        """See :class:`~maxlm.run.rollout_source.ValidatedRollouts`."""
        return self._validator is not None

    def validate(self, state: TrainState) -> dict[str, float]:
        """See :class:`~maxlm.run.rollout_source.ValidatedRollouts`."""
        assert self._validator is not None
        return self._validator.validate(state)

    def _read(self, number: int, *, is_under_way: bool) -> dict[str, np.ndarray] | None:
        """Returns a rollout's record; None where it is to be made."""
        arrays = self._files.read_on_all_hosts(number)
        if arrays is None or is_under_way:
            return arrays
        is_same = arrays[_SETTINGS].tobytes().decode() == self._settings
        return arrays if is_same else None

    def _make(
        self, number: int, state: TrainState
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Draws and scores a rollout, and keeps it; returns its arrays, and what is
        logged of the time that it took."""
        step = int(state.step)
        collector = self._open_collector(number, step, state)
        collected = collector.collect(self._num_groups)
        self._collected = number
        # The step needs the memory of the engine's caches.
        self._engine.release()

        began = time.perf_counter()
        batch = self._make_batch(collected.groups, number, state)
        collected.seconds["preparation"] = time.perf_counter() - began
        arrays = {f"batch_{name}": array for name, array in batch.items()}
        queue = collector.get_queue()
        arrays[_NEXT_PROMPT] = np.array(queue.next_prompt, np.int64)
        arrays[_NUM_BEGUN] = np.array(queue.num_begun, np.int64)
        arrays |= episodes_to_arrays(queue.episodes)
        arrays[_SETTINGS] = np.frombuffer(self._settings.encode(), np.uint8)
        metrics = describe_groups(collected, self._task.rewards)
        if collected.environment_errors:
            self._context.say(
                f"the environment failed with {len(collected.environment_errors)} "
                f"samples, which end there: {collected.environment_errors[0]}"
            )
        if self._task.rollouts.staleness:
            metrics |= describe_staleness(
                batch, step, self._updates, collector.num_under_way
            )
        arrays[_METRICS] = np.frombuffer(json.dumps(metrics).encode(), np.uint8)
        if jax.process_index() == 0:
            samples = collected.list_samples()
            scored = list_scored(
                samples,
                np.concatenate([group.scores for group in collected.groups]),
                self._task.rewards,
                self._context.tokenizer,
                self._average_advantages(batch)[: len(samples)],
            )
            self._log.append(step, number, scored)
            # What was drawn behind it followed from another.
            self._files.delete_after(number)
            self._files.write(number, arrays)
            self._delete_old_records()
        return arrays, describe_engine_work(collected)

    def _delete_old_records(self) -> None:
        """Deletes the records that nobody wants, and no checkpoint needs."""
        num_kept = self._task.rollouts.keep_records
        if num_kept is None:
            return
        steps = list_checkpoint_steps(self._context.folder / "checkpoints")
        first_needed = self._history.find_needed_record(min(steps, default=0))
        self._files.delete_old(num_kept, first_needed or 0)

    def _copy_record(self) -> None:
        """Takes over the record that this run begins with, where it goes on from another
        run's checkpoint."""
        other_folder = self._context.other_folder
        number = self._history.find_needed_record(self._context.start_step)
        if other_folder is None or number is None:
            return

        def copy_record() -> None:
            if self._files.get_path(number).exists():
                return
            arrays = RolloutFiles(other_folder).read(number)
            if arrays is not None:
                self._files.write(number, arrays)

        run_on_process_0(copy_record)

    def _open_collector(
        self, number: int, step: int, state: TrainState
    ) -> GroupCollector:
        """Returns what collects a rollout, with the parameters that ``step`` begins
        with, standing where the rollout before left it, in this process or another."""
        goes_on = (
            self._collector is not None
            and self._history.find_previous(number) == self._collected
            and not self._history.is_after_skips(number)
        )
        if not goes_on:
            # What is under way follows from a rollout that does not lead to this one.
            self._engine.drop_sampler()
            self._collector = None
        sampler = self._engine.open_sampler(state.params, step)
        if self._collector is None:
            self._collector = self._make_collector(sampler, number)
        return self._collector

    def _make_collector(self, sampler: RolloutSampler, number: int) -> GroupCollector:
        config = self._task.rollouts
        collector = GroupCollector(
            sampler,
            self._runner,
            self._order,
            config,
            self._task.num_samples,
            config.staleness * self._num_groups,
            self._task.find_groups_without_variance,
            self._context.on_work,
        )
        resamples = config.zero_variance == "resample"
        if not (resamples or config.staleness):
            collector.skip_to(number * self._num_groups)
            return collector
        before = self._history.find_previous(number)
        queue = GroupQueue(0, 0, [])
        if before is not None:
            queue = self._read_queue(before)
        if not self._history.is_after_skips(number):
            collector.restore(queue)
            return collector
        # A rollback skips prompts with their batches: all that a rollout between may
        # have taken, and what was begun ahead with parameters that are gone.
        prompts_per_rollout = self._num_groups
        if resamples:
            prompts_per_rollout *= 1 + config.max_resamples
        num_skipped = self._history.count_skipped_before(number) * prompts_per_rollout
        collector.skip_to(queue.num_begun + num_skipped)
        return collector

    def _read_queue(self, number: int) -> GroupQueue:
        """Returns where groups stand behind a rollout. Raises MaxlmError: its record is
        not there."""
        arrays = self._files.read_on_all_hosts(number)
        if arrays is None:
            raise self._make_missing_error(number, "it says which samples come next")
        episodes = episodes_from_arrays(arrays, self._order)
        next_prompt = int(arrays[_NEXT_PROMPT])
        return GroupQueue(next_prompt, int(arrays[_NUM_BEGUN]), episodes)

    def _make_missing_error(self, number: int, purpose: str) -> MaxlmError:
        message = f"the record of rollout {number} is not there, and {purpose}"
        step = self._context.start_step
        fix = f"put it back, or move checkpoint {step} away to resume from an older one"
        other_folder = self._context.other_folder
        files = self._files if other_folder is None else RolloutFiles(other_folder)
        return MaxlmError(message, where=str(files.get_path(number)), fix=fix)

    def _make_batch(
        self, groups: Sequence[Group], number: int, state: TrainState
    ) -> Batch:
        """Packs samples into rows, and adds what the task makes of them."""
        samples = [sample for group in groups for sample in group.samples]
        batch = pack_samples(samples, self._layout, routes=self._routes)
        if self._task.reads_models_of_rollouts:
            batch |= self._preparation.compute_arrays(batch, number, state)
        scores = np.stack([group.scores for group in groups])
        weights = [reward.weight for reward in self._task.rewards]
        is_complete = np.array([group.is_complete for group in groups])
        return self._task.finish_rollouts(scores, weights, is_complete, batch)

    def _average_advantages(self, batch: Batch) -> list[float]:
        """Returns the mean advantage of each sample's tokens, in the order in which
        they were packed."""
        advantages: list[float] = []
        for row in range(len(batch["segment_ids"])):
            is_drawn = batch["weights"][row] > 0
            for number in range(1, self._layout.sequences_per_row + 1):
                is_own = is_drawn & (batch["segment_ids"][row] == number)
                values = batch["advantages"][row][is_own]
                advantages.append(float(values.mean()) if values.size else 0.0)
        return advantages


def _digest_settings(config: RunConfig, skips: Skips) -> str:
    """Returns a digest of what decides what rollouts hold."""
    settings = config.model_dump(mode="json")
    deciding = select_leaves(settings, _DECIDING, ignored=INCIDENTAL)
    text = json.dumps([deciding, skips], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
